"""Ways of holding a run that trains all weights, from the fastest to the leanest, and what each needs. No torch.

What is saved, in this order: activations (blocks computed twice), 32-bit optimizer states, gradients (each weight is
stepped within the backward pass), states on the device (they wait in host memory). Clipping by the global norm has to
know all gradients before the first weight moves, so stepping within the backward pass then runs it twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from pixtune.config.schema import TrainConfig
from pixtune.errors import PlanError
from pixtune.hardware.facts import GIB, HardwareFacts, missing_on_host
from pixtune.plan.footprint import BlockKind, Footprint, block_weight_bytes
from pixtune.plan.rungs import (
    AHEAD_BYTES,
    FIXED_BYTES,
    Rung,
    activation_units,
    compute_format_of,
    is_unified,
    kept_units,
    weight_bytes,
)

STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256}
"""Of one weight: two numbers, in 8 bits with an fp32 scale for each 256."""
STEP_BYTES = 16
"""Of one weight of the largest tensor while it is stepped: it and its gradient in fp32, draws and sums of rounding."""

MARGIN_BYTES = GIB // 2
"""One run of full size has been measured (docs/experiments.md): a plan that is a little too bold ends the run."""


@dataclass(frozen=True)
class Way:
    """One way of training all weights."""

    optimizer: str
    recomputed_blocks: int = 0
    fused_step: bool = False
    """Each weight is stepped within the backward pass, and its gradient freed."""
    states_on_host: bool = False
    """Optimizer states, and fp32 copies, wait in host memory."""

    def rung(self, config: TrainConfig) -> Rung:
        return Rung(compute_format_of(config), recomputed_blocks=self.recomputed_blocks)


@dataclass(frozen=True)
class Choice:
    """The way that was chosen, and what it needs."""

    way: Way
    peak_bytes: int
    host_bytes: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Situation:
    """Everything that a way has to fit."""

    facts: HardwareFacts
    footprint: Footprint
    usable_bytes: int
    """By torch's allocator."""
    compiled: bool
    num_processes: int = 1
    """On one host, each with a GPU of its own: they share its memory."""

    def peak(self, way: Way, config: TrainConfig) -> int:
        return peak_bytes(way, self.footprint, config, self.compiled, self.num_processes)

    def missing_on_host(self, way: Way, config: TrainConfig) -> int:
        return missing_on_host(self.facts, self.num_processes * host_bytes(way, self.footprint, config))

    def holds(self, way: Way, config: TrainConfig) -> bool:
        return self.peak(way, config) <= self.usable_bytes and not self.missing_on_host(way, config)


# ---- the ladder


def ladder_of_all_weights(situation: Situation, config: TrainConfig) -> list[Way]:
    """Fastest first."""
    blocks = situation.footprint.num_blocks
    counts = {None: range(blocks + 1), True: (0,), False: (blocks,)}[config.disable_gradient_checkpointing]
    ways = [
        Way(optimizer, count, fused, on_host)
        for on_host in ((False,) if is_unified(situation.facts, config) else (False, True))
        for fused in ((False, True) if can_fuse(config, situation.num_processes) else (False,))
        for optimizer in _optimizers(config, on_host)
        for count in counts
    ]
    return sorted(
        ways,
        key=lambda way: (
            way.states_on_host,
            runs_backward_twice(way, config),
            way.recomputed_blocks,
            way.optimizer == "adamw_8bit",
            way.fused_step,
        ),
    )


def can_fuse(config: TrainConfig, num_processes: int) -> bool:
    """Whether gradients are whole after one backward pass of one process."""
    return config.gradient_accumulation_steps == 1 and num_processes == 1


def runs_backward_twice(way: Way, config: TrainConfig) -> bool:
    return way.fused_step and config.max_grad_norm > 0


def _optimizers(config: TrainConfig, on_host: bool) -> tuple[str, ...]:
    if config.adam8bit is not None:
        return ("adamw_8bit",) if config.adam8bit else ("adamw",)
    # Four times as much through the link would cost more than anything else.
    return ("adamw_8bit",) if on_host else ("adamw", "adamw_8bit")


# ---- bytes


def peak_bytes(way: Way, footprint: Footprint, config: TrainConfig, compiled: bool, num_processes: int = 1) -> int:
    """Most that a training step allocates on the device."""
    rung, compute_format = way.rung(config), compute_format_of(config)
    element = 4 if compute_format == "fp32" else 2
    unit = footprint.unit_bytes * element / 2
    twice = runs_backward_twice(way, config)
    activations = unit * activation_units(rung, footprint, compiled, retained=twice)
    if twice and compiled:  # a compiled backward pass may use what it was given up as working memory only once
        activations += unit * max(kept_units(kind, rung, footprint, compiled) for kind in footprint.kinds)
    step = STEP_BYTES * footprint.largest_weight
    one_block = element * max(_block_weights(kind) for kind in footprint.kinds)  # a compiled block's come all at once
    if way.fused_step:
        moment = activations + step + one_block
    elif _are_summed(config, num_processes):  # they are there all the time
        moment = max(activations, step) + one_block + _gradient_bytes(footprint, config, element)
    else:  # they come as activations go: most is there at the beginning or at the end of the backward pass
        first_block = unit * _units_of_first_block(rung, footprint, compiled)
        at_end = _gradient_bytes(footprint, config, element) + max(step, first_block)
        moment = max(activations + one_block, at_end)
    return round(
        weight_bytes(rung, footprint, compute_format)
        + states_on_device(way.optimizer, way.states_on_host, has_masters(config), footprint)
        + moment
        + FIXED_BYTES
        + MARGIN_BYTES
    )


def has_masters(config: TrainConfig) -> bool:
    """Whether bf16 weights have fp32 copies."""
    return config.weight_update == "fp32_master" and compute_format_of(config) == "bf16"


def resting_bytes(optimizer: str, masters: bool) -> float:
    """Of one weight between its steps, besides itself: optimizer states and an fp32 copy."""
    return STATE_BYTES[optimizer] + 4 * masters


def states_on_device(optimizer: str, on_host: bool, masters: bool, footprint: Footprint) -> float:
    """Of all weights; of those in host memory what is on its way (`host_states.HostStates`)."""
    each = resting_bytes(optimizer, masters)
    every = each * footprint.trained_weights
    return min(every, max(AHEAD_BYTES, 2 * each * footprint.largest_weight)) if on_host else every


def _are_summed(config: TrainConfig, num_processes: int) -> bool:
    """Whether gradients are added up over backward passes or processes, or beside themselves in fp32."""
    return has_masters(config) or config.gradient_accumulation_steps > 1 or num_processes > 1


def _gradient_bytes(footprint: Footprint, config: TrainConfig, element: int) -> int:
    """Of all weights."""
    return footprint.trained_weights * (4 if has_masters(config) else element)


def _units_of_first_block(rung: Rung, footprint: Footprint, compiled: bool) -> float:
    """What its backward pass, the last of all, has on the device."""
    return activation_units(rung, replace(footprint, kinds=(replace(footprint.kinds[0], count=1),)), compiled)


def _block_weights(kind: BlockKind) -> int:
    return block_weight_bytes(kind, "bf16", True) // 2


def host_bytes(way: Way, footprint: Footprint, config: TrainConfig) -> int:
    """Page-locked host memory of one process; it is taken in pieces of a GiB."""
    if not way.states_on_host:
        return 0
    return round(footprint.trained_weights * resting_bytes(way.optimizer, has_masters(config))) + GIB


# ---- the choice


def choose_way(situation: Situation, config: TrainConfig) -> Choice:
    """The fastest way that fits.

    Raises:
        PlanError: none does; names what is missing and the nearest config with which one does.
    """
    ways = ladder_of_all_weights(situation, config)
    chosen = next((way for way in ways if situation.holds(way, config)), None)
    if chosen is None:
        raise PlanError(_nothing_fits(situation, config, ways))
    return Choice(
        chosen,
        situation.peak(chosen, config),
        host_bytes(chosen, situation.footprint, config),
        tuple(_reasons(situation, config, chosen, ways[0])),
    )


def _reasons(situation: Situation, config: TrainConfig, way: Way, first: Way) -> Iterator[str]:
    footprint = situation.footprint
    yield (
        f"about {_gib(situation.peak(way, config))} at the peak of a step, {_gib(situation.usable_bytes)} usable: all "
        f"{footprint.trained_weights / 1e9:.1f} billion weights are trained"
    )
    if way != first:
        yield f"the fastest way would need {_gib(situation.peak(first, config))}, so memory is saved:"
    if way.recomputed_blocks:
        yield f"recomputation on for {way.recomputed_blocks} of {footprint.num_blocks} blocks"
    else:
        yield "recomputation off: no block is computed twice"
    if way.optimizer == "adamw_8bit" and config.adam8bit is None:
        saved = footprint.trained_weights * (STATE_BYTES["adamw"] - STATE_BYTES["adamw_8bit"])
        yield f"8-bit optimizer states: 32-bit ones are {_gib(saved)} more"
    if way.fused_step:
        yield "each weight is stepped within the backward pass, so that gradients of all never exist at once"
    if runs_backward_twice(way, config):
        yield (
            "clipping needs the norm of all gradients before the first weight moves, so the backward pass runs twice; "
            "max_grad_norm=0 (no clipping) takes little more than half of the time"
        )
    if way.states_on_host:
        what = "optimizer states and fp32 copies" if has_masters(config) else "optimizer states"
        size = host_bytes(way, footprint, config)
        yield f"{what} wait in host memory, {_gib(size)}, and go to the device and back in each step"


RELAXATIONS: tuple[tuple[str, dict[str, object]], ...] = (
    ("disable_gradient_checkpointing left out", {"disable_gradient_checkpointing": None}),
    ("adam8bit=true", {"adam8bit": True}),
    ("unified_memory left out", {"unified_memory": None}),
    ("gradient_accumulation_steps=1", {"gradient_accumulation_steps": 1}),
    ("weight_update=stochastic_rounding", {"weight_update": "stochastic_rounding"}),
)
"""What may be changed to make a run fit, the least change to what is learnt first."""


def _nothing_fits(situation: Situation, config: TrainConfig, ways: list[Way]) -> str:
    facts, usable = situation.facts, situation.usable_bytes
    on_device = [way for way in ways if situation.peak(way, config) <= usable]
    if on_device:
        least = min(on_device, key=lambda way: host_bytes(way, situation.footprint, config))
        needed = situation.num_processes * host_bytes(least, situation.footprint, config)
        missing = situation.missing_on_host(least, config)
        lack = (
            f"training all weights on {facts.name} needs {_gib(needed)} of host memory for what does not fit the "
            f"device, and {_gib(needed - missing)} of the {_gib(facts.host_available_bytes)} available may be taken: "
            f"{_gib(missing)} are missing."
        )
    else:
        needed = min(situation.peak(way, config) for way in ways)
        lack = (
            f"training all weights needs about {_gib(needed)}, and {_gib(usable)} of {facts.name} are usable: "
            f"{_gib(needed - usable)} are missing."
        )
    for count in range(1, len(RELAXATIONS) + 1):
        for changes in combinations(RELAXATIONS, count):
            relaxed = config.model_copy(update={key: value for _, change in changes for key, value in change.items()})
            if any(getattr(config, key) == value for _, change in changes for key, value in change.items()):
                continue
            for way in ladder_of_all_weights(situation, relaxed):
                if situation.holds(way, relaxed):
                    words = ", ".join(words for words, _ in changes)
                    return f"{lack} With {words} it needs {_gib(situation.peak(way, relaxed))} and fits."
    alone = replace(situation, num_processes=1)
    for way in ladder_of_all_weights(alone, config) if alone != situation else ():
        if alone.holds(way, config):
            return (
                f"{lack} With one process instead of {situation.num_processes} it fits: more of them share no weights."
            )
    leanest = config.model_copy(update={key: value for _, change in RELAXATIONS for key, value in change.items()})
    least_way = min(ladder_of_all_weights(situation, leanest), key=lambda way: situation.peak(way, leanest))
    size = host_bytes(least_way, situation.footprint, leanest)
    host = f" and {_gib(size)} of host memory" if size else ""
    return (
        f"{lack} The least that any plan needs is {_gib(situation.peak(least_way, leanest))}{host}. Several GPUs do "
        "not help: each holds all weights. Train a LoRA: method=lora."
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
