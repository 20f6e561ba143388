"""Whether processes can hold the weights together. No torch."""

from __future__ import annotations

from pixtune.errors import ConfigError
from pixtune.plan.training import TrainingPlan


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


def can_share(plan: TrainingPlan, shards: int | None, num_processes: int) -> bool:
    """Returns whether so many processes can hold the weights as a stored plan says.

    Args:
        shards: what the config demands; None: nothing.
    """
    return num_processes % plan.shards == 0 and shards in (None, plan.shards)
