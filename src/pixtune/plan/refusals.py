"""What a plan says that does not fit: how much is missing, and which demand of the config to drop."""

from __future__ import annotations

from pixtune.config.schema import TrainConfig
from pixtune.hardware.facts import GIB, HardwareFacts, missing_on_host
from pixtune.plan.footprint import Footprint
from pixtune.plan.rungs import Rung, fit_host, fragmented_bytes, ladder, peak_bytes, room_for_captures


def host_lacks(
    facts: HardwareFacts,
    footprint: Footprint,
    config: TrainConfig,
    optimizer: str,
    compiled: bool,
    usable: int,
    on_host: int,
) -> str:
    """What fits the GPU needs so much host memory, which is not there.

    Args:
        usable: bytes of device memory that torch's allocator may use.
        on_host: bytes.
    """
    missing = missing_on_host(facts, on_host)
    lack = (
        f"this run needs {on_host / GIB:.1f} GiB of host memory beside {facts.name}, and "
        f"{(on_host - missing) / GIB:.1f} of the {facts.host_available_bytes / GIB:.1f} GiB available may be taken: "
        f"{missing / GIB:.1f} GiB are missing."
    )
    free = _without_demands(config)
    rungs = ladder(facts, footprint, free)
    if any(
        peak_bytes(rung, footprint, free, optimizer, compiled) <= usable and fit_host(rung, footprint, facts)
        for rung in rungs
    ):
        return f"{lack} {_demands(config)} fits."
    return f"{lack} Close other programs, or lower data_config.img_size or train_batch_size."


def nothing_fits(
    facts: HardwareFacts,
    footprint: Footprint,
    config: TrainConfig,
    optimizer: str,
    compiled: bool,
    usable: int,
    least: Rung,
) -> str:
    """Not even the rung that needs least.

    Args:
        usable: bytes of device memory that torch's allocator may use.
    """

    def needed(rung: Rung, config: TrainConfig) -> int:
        beside = fragmented_bytes(rung, footprint, config, compiled) + room_for_captures(rung, config)
        return peak_bytes(rung, footprint, config, optimizer, compiled) + beside

    wanted = needed(least, config)
    lines = [
        f"this run needs about {wanted / GIB:.1f} GiB and {usable / GIB:.1f} GiB of {facts.name} are usable: "
        f"{(wanted - usable) / GIB:.1f} GiB are missing."
    ]
    free = _without_demands(config)
    rungs = list(ladder(facts, footprint, free))
    fitting = [rung for rung in rungs if needed(rung, free) <= usable]
    if fitting:
        peak = peak_bytes(fitting[0], footprint, free, optimizer, compiled)  # the planner's choice, not the leanest
        lines.append(f"{_demands(config)} needs {peak / GIB:.1f} GiB and fits.")
    else:
        least_bytes = min(needed(rung, free) for rung in rungs)
        lines.append(
            f"The least that any plan needs is {least_bytes / GIB:.1f} GiB. Lower data_config.img_size or "
            "train_batch_size."
        )
    return " ".join(lines)


def _without_demands(config: TrainConfig) -> TrainConfig:
    """The same config, unchecked."""
    left_open = {"disable_gradient_checkpointing": None, "quantize": None, "unified_memory": None}
    return config.model_copy(update={**left_open, "disable_quantization": False})


def _demands(config: TrainConfig) -> str:
    names = ("disable_gradient_checkpointing", "quantize", "disable_quantization", "unified_memory")
    given = [name for name in names if getattr(config, name) not in (None, False)]
    given += [name for name in names[:2] if getattr(config, name) is False]
    return f"Without {' and '.join(given)} it" if given else "It"
