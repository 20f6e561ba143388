"""Optimizers by name, with what planning has to know of each. Imports no torch: `trained/optimizers.py` builds them.

A new one is a row here and a builder of the same name there; see docs/add_an_optimizer.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TrainedTensors:
    """Trained tensors that an optimizer treats alike."""

    shape: tuple[int, ...]
    count: int = 1
    in_block: bool = True
    """Tensors of a transformer's blocks."""
    in_parts: bool = False
    """Processes hold some rows of them each."""

    @property
    def numbers(self) -> int:
        """Numbers of one of them."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class State:
    """Size of one state of one tensor."""

    numbers: int
    """Number of its numbers, at most."""
    element_bytes: int = 4
    least_numbers: int | None = None
    """Number of them, at least; None: it always has the most."""

    def fits(self, numbers: int, element_bytes: int) -> bool:
        """Returns whether a tensor of these sizes is such a state."""
        return numbers in (self.numbers, self.least_numbers) and element_bytes == self.element_bytes


StatesOf = Callable[[TrainedTensors, "StateOptions"], Mapping[str, State]]


@dataclass(frozen=True)
class StateOptions:
    """Keys of a config that decide which states an optimizer has."""

    prodigy_slice: int = 1
    """Every n-th number of a tensor is what Prodigy's estimate is made of."""
    adafactor_momentum: bool = False
    """Adafactor has a first moment."""


USUAL_STATES = StateOptions()
"""Options of a config that leaves these keys out."""


@dataclass(frozen=True)
class OptimizerNeeds:
    """Needs of one optimizer."""

    title: str
    """Name in words."""
    states_of: StatesOf
    """Returns the tensors that are kept of a tensor once it has been stepped, by their names."""
    moments: tuple[str, ...]
    """States that are zero until a gradient is not. Of each stepped tensor, the first that it has tells."""
    least_moment: float = 0.0
    """Size up to which these count as zero."""
    of_first: Mapping[str, State] = field(default_factory=dict)
    """States of the run as a whole, kept with the first tensor of each group of tensors that is stepped together."""
    step_bytes: int = 16
    """Bytes per number of the largest tensor while it is stepped by itself: it and its gradient in fp32, what is drawn
    and summed for rounding, and what the step computes."""
    waits: bool = False
    """Each of its steps waits for the device."""
    by_number: bool = False
    """Each number of a weight is stepped by its own gradient and states alone, so that processes can step parts."""
    has_kernel: bool = False
    """Steps of a weight are one kernel where Triton runs (`trained/adamw_step.py`), which needs no memory."""
    package: str | None = None
    """Package that it is imported from, besides what pixtune requires."""


BLOCK = 256
"""Numbers that share a scale, and levels that 8 bits have."""
LEAST_8BIT_NUMBERS = 4096
"""Numbers of a tensor from which bitsandbytes keeps its states in 8 bits."""
PRODIGY_PLUS_SLICE = 11
"""Every n-th number of a tensor is what prodigy-plus-schedule-free makes its estimate of."""
LEAST_FACTORED_SIDE = 32
"""Side from which prodigy-plus-schedule-free factors the second moment of a matrix."""


def _adamw(tensors: TrainedTensors, options: StateOptions) -> dict[str, State]:
    return {"exp_avg": State(tensors.numbers), "exp_avg_sq": State(tensors.numbers), "step": State(1)}


def has_8bit_states(tensors: TrainedTensors) -> bool:
    """Returns whether 8-bit AdamW keeps its states of tensors in 8 bits: of large ones.

    Of those that processes hold rows of, only where a row is whole blocks, so that each block has one scale whichever
    process has the row. Biases are none; all weights of Qwen-Image's and FLUX's blocks are.
    """
    fits = not tensors.in_parts or math.prod(tensors.shape[1:]) % BLOCK == 0
    return tensors.numbers >= LEAST_8BIT_NUMBERS and fits and (not tensors.in_parts or len(tensors.shape) > 1)


def _adamw_8bit(tensors: TrainedTensors, options: StateOptions) -> dict[str, State]:
    if not has_8bit_states(tensors):
        return dict.fromkeys(("state1", "state2"), State(tensors.numbers))
    return {
        **dict.fromkeys(("state1", "state2"), State(tensors.numbers, 1)),
        **dict.fromkeys(("absmax1", "absmax2"), State(-(-tensors.numbers // BLOCK))),
    }


def _schedule_free(tensors: TrainedTensors, options: StateOptions) -> dict[str, State]:
    return {"z": State(tensors.numbers), "exp_avg_sq": State(tensors.numbers)}


def _prodigy(tensors: TrainedTensors, options: StateOptions) -> dict[str, State]:
    sliced = State(-(-tensors.numbers // options.prodigy_slice))
    moments = {"exp_avg": State(tensors.numbers), "exp_avg_sq": State(tensors.numbers)}
    return {**moments, "s": sliced, "p0": sliced}


def _prodigy_schedule_free(tensors: TrainedTensors, options: StateOptions) -> dict[str, State]:
    numbers = -(-tensors.numbers // PRODIGY_PLUS_SLICE)
    # Where the weights begin as zeros, one zero stands for them all.
    sliced = {"s": State(numbers, 2), "p0": State(numbers, 2, least_numbers=1)}
    if len(tensors.shape) != 2 or max(tensors.shape) < LEAST_FACTORED_SIDE:
        return {"z": State(tensors.numbers), "exp_avg_sq": State(tensors.numbers), **sliced}
    short, long = sorted(tensors.shape)
    return {"z": State(tensors.numbers), "exp_avg_sq_row": State(short), "exp_avg_sq_col": State(long), **sliced}


def _adafactor(tensors: TrainedTensors, options: StateOptions) -> dict[str, State]:
    first = {"exp_avg": State(tensors.numbers)} if options.adafactor_momentum else {}
    if len(tensors.shape) < 2:
        return {**first, "exp_avg_sq": State(tensors.numbers), "RMS": State(1)}
    rows, columns = tensors.numbers // tensors.shape[-1], tensors.numbers // tensors.shape[-2]
    return {**first, "exp_avg_sq_row": State(rows), "exp_avg_sq_col": State(columns), "RMS": State(1)}


def is_orthogonalized(tensors: TrainedTensors) -> bool:
    """Returns whether Muon steps tensors itself: matrices of the blocks. AdamW steps all others."""
    return len(tensors.shape) == 2 and tensors.in_block


def _muon(tensors: TrainedTensors, options: StateOptions) -> dict[str, State]:
    if is_orthogonalized(tensors):
        return {"momentum_buffer": State(tensors.numbers)}
    return _adamw(tensors, options)


OPTIMIZERS: Mapping[str, OptimizerNeeds] = {
    "adamw": OptimizerNeeds("AdamW", _adamw, ("exp_avg", "exp_avg_sq"), by_number=True, has_kernel=True),
    "adamw_8bit": OptimizerNeeds(
        "AdamW, 8 bits",
        _adamw_8bit,
        ("state1", "state2"),
        # Tables of the levels, which all tensors share.
        of_first=dict.fromkeys(("qmap1", "qmap2"), State(BLOCK)),
        by_number=True,
        has_kernel=True,
        package="bitsandbytes",
    ),
    "adamw_schedule_free": OptimizerNeeds(
        "AdamW, schedule-free", _schedule_free, ("exp_avg_sq",), package="schedulefree"
    ),
    "prodigy": OptimizerNeeds("Prodigy", _prodigy, ("exp_avg",), of_first={"estimate": State(4, 8)}),
    "prodigy_schedule_free": OptimizerNeeds(
        "Prodigy, schedule-free",
        _prodigy_schedule_free,
        ("s",),
        waits=True,
        package="prodigy-plus-schedule-free",
    ),
    "adafactor": OptimizerNeeds("Adafactor", _adafactor, ("exp_avg_sq", "exp_avg_sq_row"), 1e-29, step_bytes=28),
    "muon": OptimizerNeeds("Muon", _muon, ("momentum_buffer", "exp_avg_sq"), step_bytes=32),
}

KERNEL, SEPARATE = "kernel", "separate"
STEP_FORMS = (KERNEL, SEPARATE)
"""Forms of a step over all weights: AdamW in one kernel for each weight, or every operation by its own kernels. What is
drawn for rounding is the same. Runs from before December 2026 know neither: they draw it from torch's generators."""

EXACT, SMALL = "adamw", "adamw_8bit"
"""The two that the planner chooses between where the config names none: by exactness, and by memory."""


def state_bytes(name: str, tensors: Iterable[TrainedTensors], options: StateOptions) -> int:
    """Counts the bytes of an optimizer's states of some tensors, after their first step."""
    needs = OPTIMIZERS[name]
    return sum(
        kind.count * sum(state.numbers * state.element_bytes for state in needs.states_of(kind, options).values())
        for kind in tensors
    ) + sum(state.numbers * state.element_bytes for state in needs.of_first.values())
