"""Page-locked host memory, and copies that run beside the computation.

Only copies from or to page-locked memory are asynchronous; the host waits for one from ordinary memory, and block
swapping is up to half slower (musubi-tuner's figures). torch's own pinned allocator rounds a buffer up to a power of
two, which wastes 180 MB for a block of 330 MB, so ordinary memory is locked in place instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pixtune.errors import PlanError
from pixtune.hardware.facts import GIB
from pixtune.hardware.meminfo import read_host_memory

Mark = torch.cuda.Event | None
"""Point in the work of a stream; None where there are no streams, so that everything before it is done."""


class CopyLane:
    """A stream for copies. On a CPU there is none, and copies happen at once.

    Marks alone give the order; no method makes the host wait.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        LANES.add(self)

    def reached(self) -> Mark:
        """Returns the mark of all work launched so far."""
        if self._stream is None:
            return None
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self.device))
        return mark

    @torch.no_grad()
    def copy(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        """Copies once `after` is done, behind all earlier copies of the lane; returns the mark of its end."""
        return self.copy_all([target], [source], after)

    @torch.no_grad()
    def copy_all(self, targets: Sequence[Tensor], sources: Sequence[Tensor], after: Mark) -> Mark:
        """Copies each source to its target, as `copy` does."""

        def copy() -> None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=self._stream is not None)

        return self.launch(copy, after)

    def launch(self, work: Callable[[], None], after: Mark) -> Mark:
        """Launches work once `after` is done, behind all earlier work of the lane; returns the mark of its end."""
        if self._stream is None:
            work()
            return None
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            work()
        mark = torch.cuda.Event()
        mark.record(self._stream)
        return mark

    def wait(self, mark: Mark) -> None:
        """Makes work that is launched from now on run after the mark."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def join_capture(self) -> None:
        """Makes work that is launched from now on run after the lane's copies, if these are being captured."""
        if self._stream is None:
            return
        with torch.cuda.stream(self._stream):
            if not torch.cuda.is_current_stream_capturing():
                return
            mark = torch.cuda.Event()
            mark.record()
        self.wait(mark)

    def keep_until_copied(self, memory: Tensor) -> None:
        """Keeps memory that is dropped while copies to it are under way from being reused before they end."""
        if self._stream is not None:
            memory.record_stream(self._stream)


LANES: weakref.WeakSet[CopyLane] = weakref.WeakSet()
"""All lanes of this process."""


def join_capture() -> None:
    """Waits for the copies of all lanes: no capture, not even one that failed, can end before that."""
    for lane in LANES:
        lane.join_capture()


def host_buffer(num_bytes: int, device: torch.device) -> Tensor:
    """Allocates bytes on the host, page-locked where `device` is a GPU with memory of its own.

    They stay locked as long as the returned tensor itself lives.

    Raises:
        PlanError: the host has too little memory.
    """
    require_host_memory(num_bytes, "a buffer for copies to the device")
    buffer = torch.empty(num_bytes, dtype=torch.uint8)
    if device.type == "cuda" and not torch.cuda.get_device_properties(device).is_integrated:
        _lock_pages(buffer, device)
    return buffer


def require_host_memory(num_bytes: int, purpose: str) -> None:
    """Raises PlanError where the host lacks the memory; otherwise the kernel would end the process silently.

    Args:
        purpose: what the memory is for, as the subject of a sentence.
    """
    available = read_host_memory().available_bytes
    if num_bytes > available:
        raise PlanError(
            f"{purpose} needs {num_bytes / GIB:.2f} GiB of host memory, and {available / GIB:.2f} GiB are available. "
            "Close other programs, let fewer blocks be streamed or offloaded, or choose a smaller weight format."
        )


def _lock_pages(buffer: Tensor, device: torch.device) -> None:
    cudart = torch.cuda.cudart()
    error = int(cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if error:
        available = read_host_memory().available_bytes
        raise PlanError(
            f"the driver could not lock {buffer.nbytes / GIB:.2f} GiB of host memory (CUDA error {error}); "
            f"{available / GIB:.2f} GiB are available. Containers and WSL may limit locked memory: raise that limit, "
            "or let fewer blocks be streamed or offloaded."
        )
    unlock = weakref.finalize(buffer, _unlock_pages, buffer.data_ptr(), device)
    unlock.atexit = False  # a process that ends unlocks by itself


def _unlock_pages(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may still be under way
    error = int(torch.cuda.cudart().cudaHostUnregister(address))
    if error:
        raise RuntimeError(f"the driver could not unlock host memory at {address:#x}: CUDA error {error}")


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Counts the elements from a tensor's first to its last in memory; a slice has fewer of its own."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
