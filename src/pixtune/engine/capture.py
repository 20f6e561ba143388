"""Captures the forward and backward pass of a step once for each shape and replays it in one launch (CUDA graphs).

A step of a 60-block transformer launches ten thousand kernels from Python, and a GPU that computes in 8 bits finishes
each before the next one is launched. A replay launches them all at once. It runs the same kernels that were captured,
in their order, on the memory that they were captured with: batches are copied to the captured batch's memory, and
gradients accumulate in the captured gradients' memory. Numbers are those of the plain pass.

A captured pass must not wait for the device or depend on a value of the batch; whatever it does on the host is done
only once, when it is captured.
"""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from pixtune.engine.gradient_buffer import GradientBuffer
from pixtune.engine.relief import Relief, drop_frames, first_line, free_unused, lacks_memory
from pixtune.engine.transfer import join_capture

log = logging.getLogger(__name__)

PLAIN_CALLS = 2
"""Number of plain passes of each shape before it is captured: the first ones compile, and try which products are
fastest. While new shapes come up nothing is captured: on a full card a plain pass would need the captures' memory."""

Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]
"""Function that runs some work once without its effects, and returns the function that replays it with them."""


class Inputs(Protocol):
    """Inputs of a pass."""

    @property
    def shapes(self) -> Hashable:
        """Key that is equal for inputs which can use the same capture."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Returns the same inputs with each tensor changed."""

    def tensors(self) -> tuple[Tensor, ...]: ...


InputsT = TypeVar("InputsT", bound=Inputs)


@dataclass(frozen=True)
class CapturedPass(Generic[InputsT]):
    """Capture of one shape."""

    inputs: InputsT
    """Inputs whose memory the replay reads."""
    replay: Replay


class StandingInputs(Generic[InputsT]):
    """Memory that captured passes read their inputs from, the same for all shapes: one pass runs at a time."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def copy(self, inputs: InputsT) -> InputsT:
        """Returns a copy of some inputs that lies where earlier copies do; only where it is larger, elsewhere."""
        place = itertools.count()

        def copied(tensor: Tensor) -> Tensor:
            number, num_bytes = next(place), tensor.nbytes
            if number == len(self._buffers):
                self._buffers.append(torch.empty(0, dtype=torch.uint8, device=tensor.device))
            if self._buffers[number].nbytes < num_bytes:
                self._buffers[number] = torch.empty(num_bytes, dtype=torch.uint8, device=tensor.device)
            memory = self._buffers[number][:num_bytes].view(tensor.dtype).view(tensor.shape)
            return memory.copy_(tensor)

        return inputs.map(copied)


@dataclass(frozen=True)
class CaptureHistory:
    """History of a pass's captures, for the run's record."""

    made: int = 0
    """Number of captures that succeeded, those counted that were given back."""
    savings: tuple[str, ...] = ()
    """Savings that were made where a capture ran out of memory, in words."""
    pass_bytes: int = 0
    """Memory of the largest pass beside what was allocated before it, up to the newest capture. A replay takes it
    again, and torch's allocator does not count that."""
    stopped: str | None = None
    """Reason why passes are launched kernel by kernel; None: they are not, or nothing was to be captured."""


class ReplayedPass(Generic[InputsT]):
    """A pass that is captured for each shape once it has run plainly, and replayed from then on.

    Captures hold the memory of one pass, however many they are. A plain pass beside them needs as much again; where
    that is not free, they give theirs back first.

    Gradients must be zeroed in place, never dropped, between the steps: see `zero_gradients`. What a call returns may
    lie in the memory of a capture, which the next call overwrites.

    Args:
        compute: forward and backward pass; returns losses.
        parameters: those to whose gradients it adds.
        capture: None: every pass runs plainly.
        max_captures: number of shapes to capture, the first ones that come up: replacing one by another would cost more
            time than it saves where many shapes alternate.
        free_bytes: returns how much torch's allocator may still reserve.
        keep_less: called where a capture runs out of memory. How well a capture uses its memory is not known
            beforehand, and recomputing a few blocks, or passing in parts, costs less than launching every kernel from
            Python.
    """

    def __init__(
        self,
        compute: Callable[[InputsT], Tensor],
        parameters: Iterable[nn.Parameter],
        capture: Capture | None,
        max_captures: int = 1,
        free_bytes: Callable[[], int] = lambda: 0,
        keep_less: Relief = lambda: None,
    ) -> None:
        self._compute, self._parameters, self._capture = compute, tuple(parameters), capture
        self.gradients = GradientBuffer(self._parameters)
        self._max_captures, self._free_bytes, self._keep_less = max_captures, free_bytes, keep_less
        self._calls: Counter[Hashable] = Counter()
        self._calls_since_a_new_shape = 0
        self._ran_plainly: set[Hashable] = set()
        """Shapes that have run since something was last given up. Another way of computing them is compiled first, and
        compiling within a capture breaks it."""
        self._captures: dict[Hashable, CapturedPass[InputsT]] = {}
        self._standing: StandingInputs[InputsT] = StandingInputs()
        self._plain_bytes = 0
        """Peak of what the allocator held for plain passes."""
        self._gave_up = False
        self._history = CaptureHistory()

    @property
    def history(self) -> CaptureHistory:
        """History of captures so far."""
        return self._history

    def __call__(self, inputs: InputsT) -> Tensor:
        if self._capture is None:
            return self._compute(inputs)
        shapes = inputs.shapes
        self._calls_since_a_new_shape = self._calls_since_a_new_shape + 1 if shapes in self._calls else 0
        self._calls[shapes] += 1
        if shapes not in self._captures and not (self._is_ripe(shapes) and self._try_to_capture(shapes, inputs)):
            self._make_room_for_a_plain_pass()
            result = self._compute(inputs)
            self._ran_plainly.add(shapes)
            return result
        capture = self._captures[shapes]
        for target, source in zip(capture.inputs.tensors(), inputs.tensors(), strict=True):
            target.copy_(source)
        return capture.replay()

    def _is_ripe(self, shapes: Hashable) -> bool:
        if self._calls[shapes] <= PLAIN_CALLS or len(self._captures) >= self._max_captures:
            return False
        if shapes not in self._ran_plainly:
            return False
        return self._calls_since_a_new_shape >= PLAIN_CALLS * len(self._calls)

    def _try_to_capture(self, shapes: Hashable, inputs: InputsT) -> bool:
        """Captures a pass, and returns whether that succeeded.

        Where it does not, everything runs plainly from then on, which costs nothing but time; where only memory is
        missing, the capture is tried again after a plain pass that keeps less.
        """
        assert self._capture is not None
        if not self._captures:
            held_bytes = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            self._plain_bytes = max(self._plain_bytes, held_bytes)
            free_unused()  # the compiler leaves cycles that hold tensors of the pass that it compiled
            self.gradients.gather()
        standing = self._standing.copy(inputs)
        with_gradient = self._gradients_there()
        replay, obstacle, is_short = None, "", False
        before_bytes = torch.cuda.memory_allocated()
        try:
            replay = self._capture(lambda: self._compute(standing))
        except RuntimeError as error:  # out of memory is one, too
            obstacle, is_short = first_line(error), lacks_memory(error)
        if replay is None:  # outside the except clause, since the error holds the memory of the work that failed
            saving = self._keep_less() if is_short else None
            if saving is None:
                self._stop_capturing(f"they could not be captured ({obstacle})")
            else:
                log.info("a captured step needs more memory than there is: %s", saving)
                self._history = replace(self._history, savings=(*self._history.savings, saving))
                self._ran_plainly.clear()
                self.release()
            return False
        if self._gradients_there() != with_gradient:
            raise RuntimeError(
                "capturing a step gave gradients to parameters that had none before, and a replay would not add to "
                "them. This is a bug in pixtune; cuda_graphs=false avoids it."
            )
        self._captures[shapes] = CapturedPass(standing, replay)
        pass_bytes = max(torch.cuda.max_memory_allocated() - before_bytes, self._history.pass_bytes)
        self._history = replace(self._history, made=self._history.made + 1, pass_bytes=pass_bytes)
        return True

    def _make_room_for_a_plain_pass(self) -> None:
        full = len(self._captures) >= self._max_captures
        if self.make_room(self._plain_bytes) and full:  # each such pass would cost all captures
            self._stop_capturing(
                f"pictures and captions come in {len(self._calls)} shapes, and memory has room for "
                f"{self._max_captures} captures but not for a plain pass beside them"
            )

    def _stop_capturing(self, why: str) -> None:
        log.warning("steps are launched kernel by kernel: %s", why)
        self._history = replace(self._history, stopped=why)
        self._capture = None
        self.release()

    def make_room(self, num_bytes: int) -> bool:
        """Gives back the memory of all captures unless `num_bytes` are free beside them; returns whether it did."""
        if not self._captures or self._free_bytes() >= num_bytes:
            return False
        torch.cuda.empty_cache()  # frees what plain passes have left
        if self._free_bytes() >= num_bytes:
            return False
        self.release()
        return True

    def give_up_captures(self) -> str | None:
        """Gives back the memory of all captures; see `Relief`. The second time nothing is captured any more."""
        self._ran_plainly.clear()  # the next relief may change how passes are computed
        if not self._captures:
            return None
        if self._gave_up:
            self._stop_capturing("twice memory was short beside captured steps")
            return "captured steps are given up"
        self._gave_up = True
        self.release()
        return "captured steps are given up and will be captured anew"

    def _gradients_there(self) -> list[bool]:
        return [parameter.grad is not None for parameter in self._parameters]

    def zero_gradients(self) -> None:
        """Drops gradients where nothing is captured or exchanged; otherwise zeroes them in place."""
        self.gradients.zero(in_place=self._capture is not None)

    def release(self) -> None:
        """Gives back the memory of all captures, or of one that failed; shapes are captured anew when they come up."""
        if torch.cuda.is_initialized():
            # A replay may still run, on another stream than the one that its memory was taken on. torch waits for that
            # one alone before it takes the memory away.
            torch.cuda.synchronize()
        self._captures.clear()
        free_unused()


class Moving(Protocol):
    """A mover of tensors within a pass, so that a capture is valid only where they are as at its beginning."""

    def rewind(self) -> None:
        """Moves everything to where a pass begins; work that is launched from now on runs after that."""

    def settle(self) -> None:
        """Treats all work launched so far, copies included, as one piece that is complete."""

    def forget(self) -> None:
        """Treats everything as where it was at the last `settle`: work launched since then never ran."""


class Still:
    """A `Moving` in which nothing moves."""

    def rewind(self) -> None: ...

    def settle(self) -> None: ...

    def forget(self) -> None: ...


@contextmanager
def ending_well() -> Iterator[None]:
    """Lets a capture whose work fails end properly: otherwise torch's allocator keeps its memory for ever.

    What the work held is dropped while the capture still runs, since its copies can be waited for only there.
    """
    try:
        yield
    except RuntimeError as error:  # out of memory is one, too
        drop_frames(error)
        gc.collect()
        join_capture()
        raise


class GraphCapturer:
    """Captures CUDA graphs that share their memory: one is done before the next one starts.

    Args:
        moving: mover of what the captured work moves, if any. Each capture ends by moving everything back to where a
            pass begins.
    """

    def __init__(self, moving: Moving | None = None) -> None:
        keep_graph(torch.cuda.current_device())
        self._pool = torch.cuda.graph_pool_handle()
        self._moving = moving or Still()
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, work: Callable[[], Tensor]) -> Replay:
        if not self._graphs:
            # torch refuses a pool that graphs used before and none uses now, as long as anything in it is alive.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._moving.rewind()
        torch.cuda.synchronize()  # a capture cannot wait for work that was launched outside of it
        is_whole = False
        try:
            # Other threads pin the memory of coming batches meanwhile, which must not break the capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._moving.settle()
                with ending_well():
                    result = work()
                self._moving.rewind()
            is_whole = True
        finally:
            if not is_whole:
                self._moving.forget()
                if not self._graphs:
                    # Products of the capture's stream keep their workspaces in its memory; no graph reads them now.
                    torch._C._cuda_clearCublasWorkspaces()
        self._graphs.add(graph)
        self._moving.settle()

        def replay() -> Tensor:
            self._moving.rewind()
            graph.replay()
            self._moving.settle()
            return result

        return replay


@functools.cache
def keep_graph(device_index: int) -> torch.cuda.CUDAGraph:
    """Captures next to nothing on a device, and keeps it for as long as the process lives.

    The first graph of a device takes two numbers for random generators. Where not even these have room, torch 2.11
    takes the graph apart without having put it together, and the process aborts; while another graph lives, it does not
    ask for them.
    """
    graph, number = torch.cuda.CUDAGraph(), torch.zeros((), device=f"cuda:{device_index}")
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        number + 1
    return graph


def drop_workspaces() -> None:
    """Gives back the workspaces of products, as soon as the captures in whose memory they lie are gone.

    All captures run on one stream, whose workspace is made in the first one and used by those after it. Captures that
    outlive these must not read memory that went with them, so theirs is made anew. Captures that live on keep the
    memory of their workspace, since it is in their pool.
    """
    if torch.cuda.is_initialized():
        torch._C._cuda_clearCublasWorkspaces()
