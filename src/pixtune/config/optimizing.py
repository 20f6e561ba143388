"""Sections of the optimizers' own keys, and what contradicts the choice of one. Keys that all of them read are above.

A section is read by the optimizers that `READERS` names; a key of it that is set for another one is a problem, since it
would do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from pixtune.config.section import Section

OPTIMIZER_NAMES = Literal[
    "adamw", "adamw_schedule_free", "prodigy", "prodigy_schedule_free", "adafactor", "muon"
]  # fmt: skip
FINDS_RATE = ("prodigy", "prodigy_schedule_free")
"""Optimizers that estimate the step size; the learning rate is a factor of their estimate, and 1 where it is absent."""
SCHEDULE_FREE = ("adamw_schedule_free", "prodigy_schedule_free")
"""Optimizers that average the weights in place of a falling learning rate."""
STEADY = ("constant", "constant_with_warmup")
"""Schedules that do not fall."""
ONE_METHOD: Mapping[str, tuple[str, str]] = {
    "adamw_schedule_free": ("lora", "the weights and their average would be kept, in fp32, beside all weights"),
    "prodigy": ("lora", "its one step size depends on all gradients at once, and all weights are stepped one by one"),
    "prodigy_schedule_free": (
        "lora", "its one step size depends on all gradients at once, and all weights are stepped one by one",
    ),
    "muon": ("full", "it makes steps of whole matrices orthogonal, and a LoRA has two factors of one instead"),
}  # fmt: skip
"""Optimizers that are for one method of training alone, with that and why."""


class ProdigyConfig(Section):
    """Keys of Prodigy, with and without schedule-free averaging."""

    d0: Annotated[float, Field(gt=0, le=1)] = 1e-6
    """Estimate of the step size d that Prodigy begins with. Larger, such as 1e-5, for runs that stay slow."""
    d_coef: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Factor of each estimate of d: the usual way to make Prodigy bolder (2) or more careful (0.5)."""
    growth_rate: Annotated[float, Field(gt=1, le=1000)] | None = None
    """Largest factor by which d grows in a step, such as 1.02. Absent: no limit. Read by "prodigy" alone."""
    slice: Annotated[int, Field(ge=1, le=1000)] = 1
    """Distance of the numbers of each tensor that the estimate is made of: 1 takes all, 11 every 11th, which saves 7 of
    16 bytes a trained weight. Read by "prodigy" alone, "prodigy_schedule_free" has 11."""
    safeguard_warmup: bool | None = None
    """Whether the estimate leaves out the learning rate, so that a warm-up does not inflate it: d grows more slowly.
    Absent: where there is a warm-up. Read by "prodigy" alone."""
    bias_correction: bool = True
    """Whether Adam's moments are corrected for having begun at zero, as its authors recommend for diffusion models.
    Without it the first steps after d has grown are several times d. Read by "prodigy" alone."""


class ScheduleFreeConfig(Section):
    """Keys of "adamw_schedule_free"."""

    r: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Power of the step's number by which later steps weigh more in the average."""
    weight_lr_power: Annotated[float, Field(ge=0, le=10)] = 2.0
    """Power of the highest learning rate so far by which a step weighs: those of a warm-up weigh less."""


class AdafactorConfig(Section):
    """Keys of Adafactor, which keeps a row and a column in place of each matrix of second moments."""

    momentum: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a first moment, as 0.9, which takes 4 bytes a trained weight. Absent: there is none."""
    decay_rate: Annotated[float, Field(ge=-1, lt=0)] = -0.8
    """Exponent by which the second moment forgets: at step t it keeps 1 - t to this power."""
    clip_threshold: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    """Root mean square to which the step of a tensor, before the learning rate, is scaled down."""


class MuonConfig(Section):
    """Keys of Muon, which steps the matrices of the blocks; the other weights are stepped by AdamW."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the gradients' average that is made orthogonal."""
    nesterov: bool = True
    """Whether the newest gradient counts once more (Nesterov's momentum)."""
    ns_steps: Annotated[int, Field(ge=1, le=20)] = 5
    """Number of Newton-Schulz iterations that make a step orthogonal."""


SECTIONS: Mapping[str, type[Section]] = {
    "prodigy": ProdigyConfig, "schedule_free": ScheduleFreeConfig, "adafactor": AdafactorConfig, "muon": MuonConfig,
}  # fmt: skip
READERS: Mapping[str, tuple[str, ...]] = {
    "prodigy.d0": FINDS_RATE,
    "prodigy.d_coef": FINDS_RATE,
    "prodigy": ("prodigy",),
    "schedule_free": ("adamw_schedule_free",),
    "adafactor": ("adafactor",),
    "muon": ("muon",),
}
"""Optimizers that read each section, or a key of it that others read, too."""
MOMENTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
"""Keys of Adam's moments, with their defaults: all optimizers but Adafactor have such moments."""


def unread(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields keys that are set and that the chosen optimizer does not read, with a sentence on each.

    Args:
        values: values by dotted keys, defaults filled in; those that are known to be wrong are left out.
    """
    chosen = values.get("optimizer")
    if chosen is None:
        return
    fields = ((section, *item) for section, kind in SECTIONS.items() for item in kind.model_fields.items())
    defaults = {f"{section}.{name}": field.default for section, name, field in fields}
    for key, default in {**defaults, **(MOMENTS if chosen == "adafactor" else {})}.items():
        readers = READERS.get(key) or READERS.get(key.partition(".")[0]) or ("adamw", "prodigy", "muon")
        if chosen not in readers and key in values and values[key] != default:
            names = " or ".join(f'"{name}"' for name in readers)
            sentence = f'{key} is given and optimizer is "{chosen}", which does not read it; {names} would'
            yield ("optimizer", key), sentence


def for_this_method(chosen: str, method: str) -> str | None:
    """Finds an optimizer that is for the other method of training."""
    only, why = ONE_METHOD.get(chosen, (method, ""))
    if only == method:
        return None
    others = '"adafactor" or "muon"' if method == "full" else '"prodigy" or "adafactor"'
    return (
        f'optimizer is "{chosen}" and method is {method}: it is for method: {only}, since {why}. Choose "adamw", '
        f"{others}"
    )


def eight_bits_of_adamw(chosen: str, adam8bit: bool | None) -> str | None:
    """Finds 8-bit states of an optimizer that has none."""
    if not adam8bit or chosen == "adamw":
        return None
    return f'adam8bit is true and optimizer is "{chosen}": only "adamw" has states of 8 bits'


def no_schedule_beside_averaging(chosen: str, scheduler: str) -> str | None:
    """Finds a falling learning rate beside an average that replaces it."""
    if chosen not in SCHEDULE_FREE or scheduler in STEADY:
        return None
    return (
        f'optimizer is "{chosen}", whose average stands for a falling learning rate, and lr_scheduler is '
        f'"{scheduler}": choose "constant" or "constant_with_warmup"'
    )


def one_average(chosen: str, decay: float | None) -> str | None:
    """Finds two averages of the same weights."""
    if chosen not in SCHEDULE_FREE or decay is None:
        return None
    return f'ema.decay is {decay} and optimizer is "{chosen}", which averages the weights itself: leave ema.decay out'


def a_first_moment(chosen: str, beta1: float) -> str | None:
    """Finds an averaging that leaves nothing of the average in what is trained."""
    if chosen not in SCHEDULE_FREE or beta1 > 0:
        return None
    return (
        f'adam_beta1 is 0 and optimizer is "{chosen}", which takes gradients between the steps and their average by it'
    )


def a_floor_to_fall_to(scheduler: str, floor: float) -> str | None:
    """Finds a floor of a schedule that has none."""
    if not floor or scheduler not in (*STEADY, "piecewise_constant"):
        return None
    return f'lr_floor is {floor} and lr_scheduler is "{scheduler}", which does not fall to a floor: choose "cosine"'


def one_warm_up(scheduler: str, steps: int, share: float) -> str | None:
    """Finds two lengths of the warm-up, or one of a schedule that has none."""
    if share and scheduler == "piecewise_constant":
        return f"lr_warmup_share is {share} and lr_scheduler is {scheduler!r}, which has no warm-up but in its rules"
    if not steps or not share:
        return None
    return f"lr_warmup_steps is {steps} and lr_warmup_share is {share}: choose one of them"


RULES_OF_OPTIMIZERS = (
    (("optimizer", "method"), for_this_method),
    (("optimizer", "adam8bit"), eight_bits_of_adamw),
    (("optimizer", "lr_scheduler"), no_schedule_beside_averaging),
    (("optimizer", "ema.decay"), one_average),
    (("optimizer", "adam_beta1"), a_first_moment),
    (("lr_scheduler", "lr_floor"), a_floor_to_fall_to),
    (("lr_scheduler", "lr_warmup_steps", "lr_warmup_share"), one_warm_up),
)
"""Rules as those of `contradictions`."""
