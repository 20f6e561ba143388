"""Memory in use, of the device and of the host, in GiB (2^30 bytes)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pixtune.hardware.facts import GIB
from pixtune.hardware.meminfo import read_process_bytes

log = logging.getLogger(__name__)


def get_memory_stats() -> dict[str, float]:
    """Returns `allocated_gb`, `reserved_gb` and `max_allocated_gb` of the current device; zeros without a GPU."""
    memory = read_device_memory()
    return {
        "allocated_gb": memory.allocated_gib, "reserved_gb": memory.reserved_gib, "max_allocated_gb": memory.peak_gib
    }  # fmt: skip


def log_memory_usage(checkpoint_name: str) -> None:
    """Writes a line to the log (logger "pixtune.hardware.monitor") on what is in use at a named moment."""
    stats = get_memory_stats()
    log.info(
        "%s: %.2f GiB allocated, %.2f GiB reserved, peak %.2f GiB",
        checkpoint_name, stats["allocated_gb"], stats["reserved_gb"], stats["max_allocated_gb"],
    )  # fmt: skip


def reset_peak_memory_stats() -> None:
    """Starts a new peak from what is allocated now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


@dataclass(frozen=True)
class DeviceMemory:
    """One reading of torch's allocator, GiB. No figure includes the CUDA context."""

    allocated_gib: float
    reserved_gib: float
    peak_gib: float
    """Largest amount that was allocated since the peak was last reset."""
    peak_reserved_gib: float


@dataclass(frozen=True)
class StageMemory:
    """Memory in use when a stage of a run ended."""

    stage: str
    seconds: float
    """Time since the stage before it ended, or since the log began."""
    allocated_gib: float
    reserved_gib: float
    peak_gib: float
    """Largest amount that was allocated during the stage."""
    peak_reserved_gib: float
    host_rss_gib: float
    """Host memory of this process at the stage's end."""

    def row(self) -> dict[str, Any]:
        """Returns the values for the report and for JSON, rounded to a MiB and a millisecond."""
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(self).items()}


def read_device_memory() -> DeviceMemory:
    """Reads the current device's memory; zeros without a GPU."""
    if not torch.cuda.is_available():
        return DeviceMemory(0.0, 0.0, 0.0, 0.0)
    return DeviceMemory(
        torch.cuda.memory_allocated() / GIB,
        torch.cuda.memory_reserved() / GIB,
        torch.cuda.max_memory_allocated() / GIB,
        torch.cuda.max_memory_reserved() / GIB,
    )


class StageLog:
    """Memory at the end of every stage of a run: text encoded, pictures encoded, base loaded, first step, ...

    `record` resets the device's peak, so that each stage has its own; call it where a stage ends, not among steps whose
    common peak is wanted.

    Args:
        read_device, reset_peak, read_host_bytes, clock: sources of the figures.
    """

    def __init__(
        self,
        read_device: Callable[[], DeviceMemory] = read_device_memory,
        reset_peak: Callable[[], None] = reset_peak_memory_stats,
        read_host_bytes: Callable[[], int] = read_process_bytes,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._read_device, self._reset_peak = read_device, reset_peak
        self._read_host_bytes, self._clock = read_host_bytes, clock
        self._stages: list[StageMemory] = []
        self._began = clock()

    def record(self, stage: str) -> StageMemory:
        """Records and logs the memory of a stage that has just ended."""
        now, device = self._clock(), self._read_device()
        entry = StageMemory(
            stage,
            now - self._began,
            device.allocated_gib,
            device.reserved_gib,
            device.peak_gib,
            device.peak_reserved_gib,
            self._read_host_bytes() / GIB,
        )
        self._stages.append(entry)
        self._reset_peak()
        self._began = now
        log.info(
            "%s: %.2f GiB allocated, %.2f GiB reserved, peak %.2f GiB, host %.2f GiB, %.1f s",
            stage, entry.allocated_gib, entry.reserved_gib, entry.peak_gib, entry.host_rss_gib, entry.seconds,
        )  # fmt: skip
        return entry

    @property
    def stages(self) -> tuple[StageMemory, ...]:
        return tuple(self._stages)

    def rows(self) -> list[dict[str, Any]]:
        """Returns one row a stage, in order."""
        return [stage.row() for stage in self._stages]
