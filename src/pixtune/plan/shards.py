"""Whether processes can hold the weights together. No torch."""

from __future__ import annotations

from pixtune.errors import CheckpointError, ConfigError


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


def refuse_other_format(before: str | None, now: str) -> None:
    """Checks that a run which is planned anew for other processes keeps the format of its frozen weights.

    No key asks for 4 bits, so that a plan with more room may have more.

    Args:
        before: format of the run that is resumed; None: nothing is to be kept.

    Raises:
        CheckpointError: it does not.
    """
    if before is not None and before != now:
        raise CheckpointError(
            f"the run has its frozen weights in {before}, and with these processes they would be in {now}: its next "
            "steps would be another run's. Resume with the number of processes and the distributed.shards it had."
        )
