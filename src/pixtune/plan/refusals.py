"""Words for a run that fits no rung: how much is missing, and the smallest change of the config by which it fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from operator import attrgetter
from typing import NamedTuple

from pixtune.config.schema import TrainConfig
from pixtune.config.sources import show
from pixtune.hardware.facts import GIB, missing_on_host
from pixtune.plan import all_weights, rungs
from pixtune.plan.demands import demands_of
from pixtune.plan.optimizers import EXACT
from pixtune.plan.situation import AnyRung, Situation


class Change(NamedTuple):
    """Another value for a key of the config."""

    key: str
    value: object = None
    """Value that is tried; None and False leave the key out."""
    instead_of: tuple[object, ...] | None = None
    """Values in whose place it is tried; None: any other one."""


GPU_COUNTS = (2, 4, 8)
"""Numbers of GPUs of one host that are tried where fewer do not hold a run."""
LORA_CHANGES = (
    Change("disable_gradient_checkpointing"),
    Change("quantize"),
    Change("disable_quantization", False),
    Change("adam8bit", True),
    Change("cuda_features.enable_fp8_training"),
    Change("unified_memory", instead_of=(True,)),
    Change("distributed.shards"),
)
"""Changes by which a LoRA run may fit. Of equally many, those with earlier ones are named."""
ALL_WEIGHTS_CHANGES = (
    Change("distributed.shards"),
    Change("disable_gradient_checkpointing"),
    Change("adam8bit", True),
    Change("unified_memory", instead_of=(True,)),
    Change("gradient_accumulation_steps", 1),
    Change("weight_update", "stochastic_rounding"),
    Change("distributed.shards"),
)
"""Changes by which a run that trains all weights may fit, the least change to what is learnt first."""


def refuse_lora(situation: Situation, config: TrainConfig) -> str:
    """Returns why a LoRA run cannot be held in memory, and what would help."""
    needed = min(map(situation.needed, rungs.ladder(situation)))
    fits_device = needed <= situation.usable_bytes
    if fits_device:
        lack = f"this run needs {_host_lack(situation, _least_on_host(situation))}"
    else:
        lack = _device_lack("this run", situation, needed, rungs.first_that_fits)
    changes, more_gpus = _that_apply(LORA_CHANGES, situation, config), _more_gpus(situation, rungs.first_that_fits)
    if found := _smallest(changes, situation, config, rungs.first_that_fits):
        some, peak = found
        outcome = "fits" if fits_device else f"needs {_gib(peak)} and fits"
        return f"{lack} {_words(some)} it {outcome}: {_to_type(some)}{more_gpus and f' Or: {more_gpus}'}"
    if situation.num_processes > 1 and rungs.first_that_fits(replace(situation, num_processes=1)):
        return f"{lack} With one process instead of {situation.num_processes} it fits: they share the host's memory."
    if more_gpus:
        return f"{lack} {more_gpus}"
    smaller = "lower data_config.img_size or train_batch_size."
    leanest = situation.under(demands_of(_changed(config, changes)))
    least_bytes = min(map(leanest.needed, rungs.ladder(leanest)))
    if least_bytes > leanest.usable_bytes:
        return f"{lack} The least that any plan needs is {_gib(least_bytes)}. {smaller.capitalize()}"
    if not fits_device:
        missing = missing_on_host(leanest.facts, _least_on_host(leanest))
        lack += f" {_words(changes)} it fits the GPU, and {_gib(missing)} of host memory are missing."
    return f"{lack} Close other programs, or {smaller}"


def _least_on_host(situation: Situation) -> int:
    """Returns the least host memory of a LoRA run that fits the GPU, in bytes."""
    fitting = (rung for rung in rungs.ladder(situation) if situation.fits_device(rung))
    return min(situation.on_host(rungs.with_rows(rung, situation.footprint)) for rung in fitting)


def refuse_all_weights(situation: Situation, config: TrainConfig) -> str:
    """Returns why a run that trains all weights cannot be held in memory, and what would help."""
    ladder = all_weights.ladder_of_all_weights(situation)
    fitting = [rung for rung in ladder if situation.fits_device(rung)]
    if fitting:
        on_host = min(map(situation.on_host, fitting))
        lack = f"training all weights needs {_host_lack(situation, on_host)}"
    else:
        needed = min(map(situation.needed, ladder))
        lack = _device_lack("training all weights", situation, needed, all_weights.first_that_fits)
    changes = _that_apply(ALL_WEIGHTS_CHANGES, situation, config)
    if found := _smallest(changes, situation, config, all_weights.first_that_fits):
        some, peak = found
        return f"{lack} {_words(some)} it needs {_gib(peak)} and fits: {_to_type(some)}"
    if situation.num_processes > 1 and all_weights.first_that_fits(alone_in(situation)):
        return f"{lack} With one process instead of {situation.num_processes} it fits: they share the host's memory."
    leanest = situation.under(demands_of(_changed(config, changes)))
    least = min(all_weights.ladder_of_all_weights(leanest), key=leanest.needed)
    size = least.host_bytes(leanest)
    host = f" and {_gib(size)} of host memory" if size else ""
    return (
        f"{lack} The least that any plan needs is {_gib(leanest.needed(least))}{host}. {_with_more_gpus(situation)}"
        "Train a LoRA: method=lora."
    )


def alone_in(situation: Situation) -> Situation:
    """Returns the situation of the run in one process."""
    return replace(situation, num_processes=1, demands=replace(situation.demands, shards=None))


def _with_more_gpus(situation: Situation) -> str:
    """Returns how many GPUs of the kind hold a run together that trains all weights."""
    free = situation.demands if situation.demands.shards is None else replace(situation.demands, shards=None)
    numbers = (2**power for power in range(1, 11) if 2**power > situation.num_processes)
    for number in numbers:
        if all_weights.first_that_fits(replace(situation, demands=free, num_processes=number)):
            return (
                f"{number} such GPUs hold them together: torchrun --nproc-per-node {number} train.py ... (on one host "
                "with that host's memory, or --nnodes on several). Or: "
            )
    return ""


# ---- what is missing


def _device_lack(
    subject: str, situation: Situation, needed: int, first_that_fits: Callable[[Situation], AnyRung | None]
) -> str:
    usable = situation.usable_bytes
    missing = needed - usable
    lack = (
        f"{subject} needs about {_gib(needed, missing)}, and {_gib(usable, missing)} of {situation.facts.name} are "
        f"usable: {_gib(missing, missing)} are missing."
    )
    limit = situation.demands.memory_limit_bytes
    if limit is None:
        return lack
    enough_gib = math.ceil(10 * (limit + missing) / GIB) / 10
    larger = situation.under(replace(situation.demands, memory_limit_bytes=round(enough_gib * GIB)))
    if first_that_fits(larger) is None:  # the card has no more, or a larger limit asks for other things
        return lack
    return f"{lack} With gpu_memory_limit_gib={enough_gib:g} it fits this GPU."


def _host_lack(situation: Situation, on_host: int) -> str:
    facts, missing = situation.facts, missing_on_host(situation.facts, on_host)
    processes = f" for {situation.num_processes} processes" if situation.num_processes > 1 else ""
    return (
        f"{_gib(on_host)} of host memory{processes} beside {facts.name}, and {_gib(on_host - missing)} of the "
        f"{_gib(facts.host_available_bytes)} available may be taken: {_gib(missing)} are missing."
    )


# ---- what would help


def _that_apply(changes: Sequence[Change], situation: Situation, config: TrainConfig) -> list[Change]:
    """Returns the changes that make a difference."""
    found = []
    for change in changes:
        value = attrgetter(change.key)(config)
        is_other = value in change.instead_of if change.instead_of else value != change.value
        if is_other and not (change.key == "adam8bit" and situation.optimizer != EXACT):
            found.append(change)
    return found


def _smallest(
    changes: Sequence[Change],
    situation: Situation,
    config: TrainConfig,
    first_that_fits: Callable[[Situation], AnyRung | None],
) -> tuple[tuple[Change, ...], int] | None:
    """Returns the fewest changes by which a rung fits, and that rung's peak in bytes; None: nothing helps."""
    for count in range(1, len(changes) + 1):
        for some in combinations(changes, count):
            relaxed = situation.under(demands_of(_changed(config, some)))
            if rung := first_that_fits(relaxed):
                return some, relaxed.peak(rung)
    return None


def _more_gpus(situation: Situation, first_that_fits: Callable[[Situation], AnyRung | None]) -> str:
    """Returns how many GPUs of one host, more than there are, hold a run together; empty where none of these do."""
    if situation.demands.shards is not None:
        return ""
    more = (count for count in GPU_COUNTS if count > situation.num_processes)
    count = next((count for count in more if first_that_fits(replace(situation, num_processes=count))), None)
    if count is None:
        return ""
    return (
        f"{count} such GPUs of one host hold the weights together and fit the run: start it with torchrun "
        f"--nproc-per-node {count} train.py ..."
    )


def _changed(config: TrainConfig, changes: Sequence[Change]) -> TrainConfig:
    """Returns the config with the changes made, unchecked."""
    for key, value, _ in changes:
        section, dot, name = key.rpartition(".")
        if dot:
            section_of_config = getattr(config, section).model_copy(update={name: value})
            config = config.model_copy(update={section: section_of_config})
        else:
            config = config.model_copy(update={key: value})
    return config


def _words(changes: Sequence[Change]) -> str:
    """Returns "Without a and b", "With c=true", or both in one."""
    left_out = [key for key, value, _ in changes if value in (None, False)]
    given = [f"{key}={'true' if value is True else value}" for key, value, _ in changes if value not in (None, False)]
    if not left_out:
        return f"With {' and '.join(given)}"
    return f"Without {' and '.join(left_out)}" + (f" and with {' and '.join(given)}" if given else "")


def _to_type(changes: Sequence[Change]) -> str:
    """Returns the words that make the changes, as one adds them to a command."""
    words = [f"{key}={value if isinstance(value, str) else show(value)}" for key, value, _ in changes]
    return f"add {' '.join(words)} to the command."


def _gib(num_bytes: float, missing: float = GIB) -> str:
    """Returns a size in words, with as many digits as it takes to tell it from one that is so many bytes larger."""
    digits = 1 if missing >= GIB / 10 else 2
    return f"{num_bytes / GIB:.{digits}f} GiB" if missing >= GIB / 100 else f"{num_bytes / 2**20:,.0f} MiB"
