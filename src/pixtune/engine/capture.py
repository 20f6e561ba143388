"""The forward and backward pass of a step, captured once for each shape and replayed in one launch (CUDA graphs).

A step of a 60-block transformer launches ten thousand kernels from Python, and a GPU that computes in 8 bits is done
with each before the next one comes. A replay launches them all at once. It runs the very kernels that were captured,
in their order, on the memory that they were captured with: batches are copied to where the captured one stood, and
gradients add up where they stood. Numbers are those of the plain pass.

What is captured must not wait for the device or depend on a value of the batch; whatever such a pass does on the host
is done once, when it is captured.
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from pixtune.engine.transfer import join_capture

log = logging.getLogger(__name__)

PLAIN_CALLS = 2
"""Of each shape, before it is captured: the first ones compile, and try out which products are fastest. While new
shapes come up nothing is captured: on a full card a plain pass would need the memory that captures hold."""

Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]
"""Runs some work once without its effects, and returns what runs it in earnest."""


class Inputs(Protocol):
    """What a pass computes from."""

    @property
    def shapes(self) -> Hashable:
        """Equal where a capture can be used again."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """With other tensors in place of each."""

    def tensors(self) -> tuple[Tensor, ...]: ...


InputsT = TypeVar("InputsT", bound=Inputs)


@dataclass(frozen=True)
class CapturedPass(Generic[InputsT]):
    """One shape's."""

    inputs: InputsT
    """Their memory is what the replay reads."""
    replay: Replay


class ReplayedPass(Generic[InputsT]):
    """A pass that is captured for each shape once it has run plainly, and replayed from then on.

    Recordings hold the memory of one pass, whatever their number. A plain pass beside them needs as much again; where
    that is not there, they give theirs back first.

    Gradients must be zeroed in place, never dropped, between the steps: see `zero_gradients`.

    Args:
        compute: forward and backward pass; returns the loss.
        parameters: whose gradients it adds to.
        record: None: never.
        most: shapes to record, those that come up first: to give one up for another would cost more time than it saves
            where many shapes take turns.
        free_bytes: what torch's allocator may still reserve.
        keep_less: called where a capture runs out of memory; lets `compute` need less of it and says how, or returns
            None where nothing is left to do. How well a capture's memory is used is not known before, and computing
            a few blocks twice costs less than to launch every kernel from Python.
    """

    def __init__(
        self,
        compute: Callable[[InputsT], Tensor],
        parameters: Iterable[nn.Parameter],
        record: Capture | None,
        most: int = 1,
        free_bytes: Callable[[], int] = lambda: 0,
        keep_less: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._compute, self._parameters, self._capture, self._most = compute, tuple(parameters), record, most
        self._free_bytes, self._keep_less = free_bytes, keep_less
        self._calls: Counter[Hashable] = Counter()
        self._calls_since_a_new_shape = 0
        self._captures: dict[Hashable, CapturedPass[InputsT]] = {}
        self._plain_bytes = 0
        """What the allocator held for plain passes, most of all times."""

    def __call__(self, inputs: InputsT) -> Tensor:
        if self._capture is None:
            return self._compute(inputs)
        shapes = inputs.shapes
        self._calls_since_a_new_shape = self._calls_since_a_new_shape + 1 if shapes in self._calls else 0
        self._calls[shapes] += 1
        if shapes not in self._captures and not (self._is_ripe(shapes) and self._try_to_capture(shapes, inputs)):
            self._make_room_for_a_plain_pass()
            return self._compute(inputs)
        capture = self._captures[shapes]
        for target, source in zip(capture.inputs.tensors(), inputs.tensors(), strict=True):
            target.copy_(source)
        return capture.replay()

    def _is_ripe(self, shapes: Hashable) -> bool:
        if self._calls[shapes] <= PLAIN_CALLS or len(self._captures) >= self._most:
            return False
        return self._calls_since_a_new_shape >= PLAIN_CALLS * len(self._calls)

    def _try_to_capture(self, shapes: Hashable, inputs: InputsT) -> bool:
        """Where it cannot be done all runs plainly from then on, which costs time and nothing else; where memory is all
        that lacks, it is tried again after a plain pass that keeps less."""
        assert self._capture is not None
        if not self._captures:
            held_bytes = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            self._plain_bytes = max(self._plain_bytes, held_bytes)
        standing = inputs.map(Tensor.clone)
        with_gradient = self._gradients_there()
        replay, obstacle, lacks_memory = None, "", False
        try:
            replay = self._capture(lambda: self._compute(standing))
        except RuntimeError as error:  # out of memory is one, too
            obstacle = next(iter(str(error).strip().splitlines()), type(error).__name__)
            lacks_memory = isinstance(error, torch.OutOfMemoryError)
        if replay is None:  # here, since the error holds the memory of what it broke off
            saving = self._keep_less() if lacks_memory else None
            if saving is None:
                self._stop_capturing(f"they could not be captured ({obstacle})")
            else:
                log.info("a captured step needs more memory than there is: %s", saving)
                self.release()
            return False
        if self._gradients_there() != with_gradient:
            raise RuntimeError(
                "capture a step gave gradients to parameters that had none before, and a replay would not add to "
                "them. This is a fault of pixtune; cuda_graphs=false avoids it."
            )
        self._captures[shapes] = CapturedPass(standing, replay)
        return True

    def _make_room_for_a_plain_pass(self) -> None:
        full = len(self._captures) >= self._most
        if self.make_room(self._plain_bytes) and full:  # each such pass would cost all captures
            self._stop_capturing(
                f"pictures and captions come in {len(self._calls)} shapes, and memory has room for {self._most} "
                "captures but not for a plain pass beside them"
            )

    def _stop_capturing(self, why: str) -> None:
        log.warning("steps are launched kernel by kernel: %s", why)
        self._capture = None
        self.release()

    def make_room(self, num_bytes: int) -> bool:
        """Gives back the memory of all captures if so much is not free beside them; returns whether it did."""
        if not self._captures or self._free_bytes() >= num_bytes:
            return False
        torch.cuda.empty_cache()  # what plain passes left behind
        if self._free_bytes() >= num_bytes:
            return False
        self.release()
        return True

    def _gradients_there(self) -> list[bool]:
        return [parameter.grad is not None for parameter in self._parameters]

    def zero_gradients(self) -> None:
        """Drops gradients where nothing is captured, and else zeroes them where they stand."""
        if self._capture is None:
            for parameter in self._parameters:
                parameter.grad = None
            return
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)

    def release(self) -> None:
        """Gives back the memory of all captures, or of one that failed; each shape is captured anew when it comes."""
        self._captures.clear()
        gc.collect()
        torch.cuda.empty_cache()


class Moving(Protocol):
    """What moves tensors from step to step, so that a capture holds for one arrangement of them only."""

    def arrangement(self) -> Hashable:
        """Where everything is now."""

    def restore(self, arrangement: Hashable) -> None:
        """Moves everything there; what the computation is told next comes after it."""

    def settle(self) -> None:
        """All that the computation has been told so far counts as one piece of work, copies included."""

    def forget(self) -> None:
        """What was told since the last `settle` was never done, so nothing is where it seems to be."""


class Still:
    """Nothing moves; see `Moving`."""

    def arrangement(self) -> Hashable:
        return None

    def restore(self, arrangement: Hashable) -> None: ...

    def settle(self) -> None: ...

    def forget(self) -> None: ...


@contextmanager
def ending_well() -> Iterator[None]:
    """Lets a capture whose work breaks off end properly: else torch's allocator keeps its memory for ever.

    What the work held is dropped while the capture is still on, since its copies can only be waited for there.
    """
    try:
        yield
    except RuntimeError as error:  # out of memory is one, too
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__context__
        gc.collect()
        join_capture()
        raise


class GraphCapturer:
    """Records CUDA graphs that share their memory: one is done before the next one starts.

    Args:
        moving: what the captured work moves, if it does. Each capture ends by moving it back to where it was at its
            beginning.
    """

    def __init__(self, moving: Moving | None = None) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._moving = moving or Still()

    def __call__(self, work: Callable[[], Tensor]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()  # a capture cannot wait for what was begun outside of it
        arrangement = self._moving.arrangement()
        is_whole = False
        try:
            # Other threads pin the memory of coming batches meanwhile, which must not spoil the capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._moving.settle()
                with ending_well():
                    result = work()
                self._moving.restore(arrangement)
            is_whole = True
        finally:
            if not is_whole:
                self._moving.forget()
        self._moving.settle()

        def replay() -> Tensor:
            self._moving.restore(arrangement)
            graph.replay()
            self._moving.settle()
            return result

        return replay
