"""Ways for a step that ran out of memory to need less, in the order of what they cost.

A plan can be wrong, and another program can take memory while a run trains. A step that fails has changed no weight, so
it is taken again, with the same draws, once something needs less: captured steps are given up, more blocks are
recomputed, micro-batches are split. What a run has given up this way is part of its plan from then on. Last of all it
waits for memory that other programs hold.
"""

from __future__ import annotations

import gc
import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from pixtune.engine.activations import recompute_blocks
from pixtune.engine.forwards import is_recomputed
from pixtune.errors import PixtuneError
from pixtune.hardware.facts import GIB
from pixtune.plan.training import TrainingPlan

log = logging.getLogger(__name__)
T = TypeVar("T")

Relief = Callable[[], str | None]
"""Function that makes a step need less memory and returns how, in words for users; None: it can do nothing more."""

Needs = Mapping[str, int]
"""Numbers that a process has come to need for its steps to fit: recomputed blocks, and parts of a micro-batch."""
BLOCKS, PARTS = "recomputed blocks", "parts"

OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""Words of errors that the driver and its libraries raise where torch's allocator was not asked."""


LONGEST_WAIT_SECONDS = 30.0
"""Longest time at once in which other programs are given the chance to free what they hold of a run's memory."""
WAITING_SECONDS = 300.0
"""Longest time of that kind in a whole run."""
WAIT_STEP_SECONDS = 0.1


def in_turn(*reliefs: Relief) -> Relief:
    """Returns the relief that uses up each of some before the next one."""
    return lambda: next(filter(None, (relief() for relief in reliefs)), None)


def lacks_memory(error: BaseException) -> bool:
    """Returns whether an error says that the device has too little free memory; one that quotes another's does not."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and not isinstance(error, PixtuneError)
        and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def drop_frames(error: BaseException) -> None:
    """Drops what the frames of an error and of those before it hold: the tensors of the work that failed."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__


def free_unused() -> None:
    """Gives memory that nothing uses back to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def free_bytes(usable_bytes: int) -> int:
    """Returns how much torch's allocator may still take from the device, where it may use so much in all.

    Other programs may have taken memory since the plan was made.
    """
    on_device, _ = torch.cuda.mem_get_info()
    return min(usable_bytes - torch.cuda.memory_reserved(), on_device)


def bytes_of_others(expected_peak_bytes: int) -> int:
    """Returns how much of what a plan expects to take at its peak is not free; 0 where there is no GPU."""
    return (
        expected_peak_bytes - torch.cuda.memory_reserved() - free_bytes(expected_peak_bytes)
        if expected_peak_bytes and torch.cuda.is_initialized()
        else 0
    )


def first_that_fits(ways: Sequence[Callable[[], T]], what: str) -> T:
    """Returns what the first of some ways returns that does not run out of memory; the last may.

    Args:
        what: what they compute, as the subject of a sentence.
    """
    for way in ways[:-1]:
        try:
            return way()
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            obstacle = first_line(error)
            drop_frames(error)
        free_unused()  # outside the except clause, since the error holds the memory of the work that failed
        log.warning("%s ran out of memory (%s) and is done again with less", what, obstacle.rstrip("."))
    return ways[-1]()


class RecomputeMore:
    """Recomputes further blocks in the backward pass: 1 at the first call, then 2, 4, 8 and so on.

    Args:
        blocks: in the order in which they run. The first ones come first, as in a plan: what later blocks kept has
            been freed when one of them runs again.
        allowed: whether any more may be recomputed.
    """

    def __init__(self, blocks: Sequence[nn.Module], allowed: bool = True) -> None:
        self._blocks, self._allowed, self._count = blocks, allowed, 1

    @property
    def num_recomputed(self) -> int:
        """Number of blocks that are recomputed now."""
        return sum(map(is_recomputed, self._blocks))

    def __call__(self) -> str | None:
        more = [block for block in self._blocks if self._allowed and not is_recomputed(block)][: self._count]
        self._count *= 2
        recompute_blocks(more, offload=False)
        return f"{len(more)} more of {len(self._blocks)} blocks recomputed" if more else None


class Divisible(Protocol):
    """Inputs of a pass that can be computed in parts."""

    def __len__(self) -> int:
        """Returns the number of examples."""

    def parts(self, num_parts: int) -> Sequence[Self]:
        """Cuts them into parts of nearly equal size."""


DivisibleT = TypeVar("DivisibleT", bound=Divisible)


class PassInParts(Generic[DivisibleT]):
    """A pass over parts of its inputs, one after the other: gradients add up to those of the whole.

    Args:
        compute: forward and backward pass of some inputs; returns their losses, one example after the other in the last
            dimension.
        num_parts: number of parts at the start.
        most: largest number of parts; 1 where a pass steps weights itself.
    """

    def __init__(self, compute: Callable[[DivisibleT], Tensor], num_parts: int, most: int) -> None:
        self._compute, self.num_parts, self._most = compute, num_parts, most

    def __call__(self, inputs: DivisibleT) -> Tensor:
        if self.num_parts == 1 or len(inputs) == 1:
            return self._compute(inputs)
        return torch.cat([self._compute(part) for part in inputs.parts(self.num_parts)], -1)

    def divide(self) -> str | None:
        """Doubles the number of parts; see `Relief`."""
        if self.num_parts >= self._most:
            return None
        self.num_parts = min(2 * self.num_parts, self._most)
        return f"micro-batches are computed in {self.num_parts} parts"


class MemoryOfOthers:
    """Memory that the plan counts on and other programs hold, which they may give back in a little while.

    Args:
        missing_bytes: returns how much of the memory that the plan counts on others hold now; 0 or less: none.
        is_ended: returns whether waiting has become pointless, since the run is asked to stop.
    """

    def __init__(self, missing_bytes: Callable[[], int], is_ended: Callable[[], bool]) -> None:
        self._missing_bytes, self._is_ended, self._seconds_left = missing_bytes, is_ended, WAITING_SECONDS

    def await_some(self) -> str | None:
        """Waits until all of it is free, or at the end some more than at the beginning; see `Relief`."""
        missing = still_missing = self._missing_bytes()
        began, waited = time.monotonic(), 0.0
        while still_missing > 0 and waited < min(LONGEST_WAIT_SECONDS, self._seconds_left) and not self._is_ended():
            time.sleep(WAIT_STEP_SECONDS)
            still_missing, waited = self._missing_bytes(), time.monotonic() - began
        self._seconds_left -= waited
        if still_missing >= missing:
            return None
        return f"other programs gave {(missing - still_missing) / GIB:.1f} GiB back within {waited:.1f} s"


class Reliefs:
    """The reliefs of a run, each of which is used up before the next one.

    Args:
        plan: the plan that the run began with.
        give_up_captures: see `capture.ReplayedPass.give_up_captures`.
        others: waited for last.
        most_needed: tells the other processes of the run what this one needs, and returns the most that any has told.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        give_up_captures: Relief,
        recompute_more: RecomputeMore,
        passes: PassInParts[DivisibleT],
        others: MemoryOfOthers,
        most_needed: Callable[[Needs], Needs] = lambda own: own,
    ) -> None:
        self._first_plan, self._recompute_more, self._passes = plan, recompute_more, passes
        self._most_needed = most_needed
        self._relief = in_turn(give_up_captures, recompute_more, passes.divide, others.await_some)

    def __call__(self) -> str | None:
        """Makes a step need less memory; see `Relief`."""
        free_unused()
        words = self._relief()
        self._most_needed(self._needs)
        return words

    @property
    def _needs(self) -> Needs:
        return {BLOCKS: self._recompute_more.num_recomputed, PARTS: self._passes.num_parts}

    @property
    def plan(self) -> TrainingPlan:
        """The plan by which every process of the run has room, as far as they have found out."""
        plan, needs = self._first_plan, self._most_needed(self._needs)
        more = max(needs[BLOCKS] - plan.recomputed_blocks, 0)
        return replace(
            plan,
            recomputed_blocks=plan.recomputed_blocks + more,
            reprojected_blocks=max(plan.reprojected_blocks - more, 0),
            micro_batch_parts=needs[PARTS],
        )
