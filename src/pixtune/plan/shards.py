"""Whether processes can hold the weights together. No torch."""

from __future__ import annotations

from pixtune.errors import ConfigError


def check_shards(shards: int | None, num_processes: int) -> None:
    """Checks that the processes form whole groups of `distributed.shards`, of which each holds one copy.

    Raises:
        ConfigError: they do not.
    """
    if shards is None or num_processes % shards == 0:
        return
    possible = [each for each in range(1, num_processes + 1) if num_processes % each == 0]
    raise ConfigError(
        f"distributed.shards is {shards}",
        [
            f"this run has {num_processes} process{'es' if num_processes > 1 else ''}, which cannot be divided into "
            f"groups of {shards}. Possible here: {', '.join(map(str, possible))}; or start it with torchrun "
            f"--nproc-per-node {shards}"
        ],
    )


def can_share(planned_shards: int, shards: int | None, num_processes: int) -> bool:
    """Returns whether so many processes can hold the weights as a stored plan says.

    Args:
        planned_shards: those of the plan.
        shards: what the config demands; None: nothing.
    """
    return num_processes % planned_shards == 0 and shards in (None, planned_shards)


def possible_shards(per_host: int, num_hosts: int = 1) -> tuple[int, ...]:
    """Returns the numbers of processes that can hold one copy together: parts of a host, then whole hosts."""
    within = [each for each in range(2, per_host + 1) if per_host % each == 0]
    across = [each * per_host for each in range(2, num_hosts + 1) if num_hosts % each == 0]
    return (*within, *across)
