"""Reads tensors onto a device by several threads: each reads a slice into a staging buffer and uploads it.

Mapped files are slow to copy from: every page is a page fault, and the driver stages it once more. Where CPU and GPU
share one pool, the mapped pages take room in it beside the tensors.
"""

from __future__ import annotations

import os
import queue
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pixtune.errors import WeightsError
from pixtune.storage.loading.entries import TensorEntry

SLICE_BYTES = 16 * 2**20
"""Bytes that a thread reads at once: enough for a disk and a bus to run at their full speed, few enough to stage."""
AHEAD_BYTES = 256 * 2**20
"""Bytes that are read while the consumer works on a tensor. A tensor that is larger is read alone."""


@dataclass(frozen=True)
class Lane:
    """Buffer and stream of one slice that is being read."""

    staging_B: Tensor
    """Bytes in host memory, pinned where the device is a GPU."""
    stream: torch.cuda.Stream | None


@dataclass(frozen=True)
class Pending:
    """A tensor that is being read."""

    entry: TensorEntry
    data_B: Tensor
    """Bytes of the tensor, on the device."""
    slices: list[Future[None]]

    def wait(self) -> tuple[str, Tensor]:
        for done in self.slices:
            done.result()
        with torch.inference_mode(False):  # see _start
            return self.entry.name, self.data_B.view(self.entry.dtype).view(self.entry.shape)


def iterate_with_threads(
    entries: Sequence[TensorEntry],
    device: torch.device,
    num_threads: int,
    *,
    drop_cache: bool = False,
    slice_bytes: int = SLICE_BYTES,
    ahead_bytes: int = AHEAD_BYTES,
) -> Iterator[tuple[str, Tensor]]:
    """Yields name and tensor, in the order of `entries`, each on `device` and complete.

    At most `ahead_bytes` (or one tensor) are on the device and not yet handed out, and `num_threads` slices in host
    memory. Nothing keeps a tensor that was handed out.

    Args:
        drop_cache: drops the files' pages once they are read, for machines where page cache takes GPU memory.

    Raises:
        WeightsError: a file became shorter, or could not be read.
    """
    lanes = _open_lanes(device, num_threads, slice_bytes)
    waiting, reading, bytes_ahead = deque(entries), deque[Pending](), 0
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="read-weights")
    try:
        while waiting or reading:
            while waiting and (not reading or bytes_ahead + waiting[0].num_bytes <= ahead_bytes):
                entry = waiting.popleft()
                bytes_ahead += entry.num_bytes
                reading.append(_start(pool, lanes, entry, device, slice_bytes, drop_cache))
            bytes_ahead -= reading[0].entry.num_bytes
            yield reading.popleft().wait()
    finally:
        pool.shutdown(cancel_futures=True)  # waits for slices under way, which write into the tensors


def _open_lanes(device: torch.device, num_lanes: int, slice_bytes: int) -> queue.SimpleQueue[Lane]:
    lanes: queue.SimpleQueue[Lane] = queue.SimpleQueue()
    is_gpu = device.type == "cuda"
    for _ in range(num_lanes):
        staging_B = torch.empty(slice_bytes, dtype=torch.uint8, pin_memory=is_gpu)
        lanes.put(Lane(staging_B, torch.cuda.Stream(device) if is_gpu else None))
    return lanes


def _start(
    pool: ThreadPoolExecutor,
    lanes: queue.SimpleQueue[Lane],
    entry: TensorEntry,
    device: torch.device,
    slice_bytes: int,
    drop_cache: bool,
) -> Pending:
    """Allocates a tensor and has its slices read."""
    with torch.inference_mode(False):  # the consumer's mode would forbid the threads, and training, to write it
        data_B = torch.empty(entry.num_bytes, dtype=torch.uint8, device=device)
    allocated = None
    if device.type == "cuda":
        # The memory may be what the consumer has just freed, with kernels still under way that read it.
        allocated = torch.cuda.Event()
        allocated.record(torch.cuda.current_stream(device))
    slices = [
        pool.submit(
            _fill,
            lanes,
            entry.file,
            entry.offset_bytes + begin,
            data_B[begin : begin + slice_bytes],
            allocated,
            drop_cache,
        )
        for begin in range(0, entry.num_bytes, slice_bytes)
    ]
    return Pending(entry, data_B, slices)


def _fill(
    lanes: queue.SimpleQueue[Lane],
    file: Path,
    offset_bytes: int,
    target_B: Tensor,
    allocated: torch.cuda.Event | None,
    drop_cache: bool,
) -> None:
    """Reads bytes of a file into a part of a tensor, which is complete on every stream once this returns."""
    lane = lanes.get()
    try:
        staged_B = lane.staging_B[: target_B.numel()]
        read_exactly(file, offset_bytes, staged_B.numpy().data, drop_cache)
        if lane.stream is None or allocated is None:
            target_B.copy_(staged_B)
            return
        lane.stream.wait_event(allocated)
        with torch.cuda.stream(lane.stream):
            target_B.copy_(staged_B, non_blocking=True)
        lane.stream.synchronize()  # meanwhile other threads read
    finally:
        lanes.put(lane)


def read_exactly(file: Path, offset_bytes: int, view: memoryview, drop_cache: bool = False) -> None:
    """Fills `view` from a file.

    Raises:
        WeightsError: the file ends before, or cannot be read.
    """
    num_read = 0
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset_bytes)
            while num_read < len(view) and (count := stream.readinto(view[num_read:])):
                num_read += count
            if drop_cache and hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(stream.fileno(), offset_bytes, len(view), os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise WeightsError(
            f"{file} could not be read at byte {offset_bytes + num_read:,} ({error.strerror or error}). Is its disk or "
            "network mount in order?"
        ) from error
    if num_read < len(view):
        raise WeightsError(
            f"{file} ends at byte {offset_bytes + num_read:,}, in the middle of its weights. Was it changed while it "
            "was read? Fetch the model again."
        )
