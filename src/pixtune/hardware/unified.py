"""Machines whose CPU and GPU share one pool of memory (DGX Spark), and what follows from it.

The device reports it itself (`integrated`). Capability does not show it: an H100 or an RTX 5090 has its own memory, and
a GH200 has two coherent pools.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pixtune.errors import PlanError
from pixtune.hardware.facts import GIB, HardwareFacts, pool_floor_bytes
from pixtune.hardware.meminfo import HostMemory, read_meminfo

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Names of the allocator's settings: the newer, and the one that older torch and most users know. torch reads both, the
newer one first."""
EXPANDABLE = "expandable_segments:True"


def is_unified_memory_system() -> bool:
    """Returns whether the current GPU and the CPU share one pool of memory. Starts CUDA."""
    return torch.cuda.is_available() and bool(torch.cuda.get_device_properties().is_integrated)


def get_memory_config(unified_memory: bool | None = None) -> dict[str, Any]:
    """Returns the preset of a machine with or without one pool of memory.

    Args:
        unified_memory: None to ask the machine.
    """
    unified = is_unified_memory_system() if unified_memory is None else unified_memory
    return {
        "pin_memory": not unified,
        "disable_cpu_offload": unified,
        "prefetch_factor": 2 if unified else 4,
        "num_workers": 4 if unified else 8,
        "memory_pool": "unified" if unified else "standard",
        "expandable_segments": unified,
    }


def setup_unified_memory_env() -> None:
    """Makes torch's allocator grow its segments instead of reserving new ones. A user's own settings are kept.

    Raises:
        RuntimeError: CUDA has started: the allocator has read its settings.
    """
    if torch.cuda.is_initialized():
        raise RuntimeError("setup_unified_memory_env() must run before CUDA starts, and CUDA has started")
    variable = next((name for name in ALLOCATOR_VARIABLES if os.environ.get(name)), ALLOCATOR_VARIABLES[1])
    settings = [word for word in os.environ.get(variable, "").split(",") if word]
    if not any(word.strip().startswith("expandable_segments:") for word in settings):
        os.environ[variable] = ",".join([*settings, EXPANDABLE])


def cap_unified_memory(facts: HardwareFacts) -> int:
    """Makes torch raise out-of-memory before the machine hangs: caps the allocator at what the facts call free.

    Call it once, when the facts are read and before anything is loaded; elsewhere than on an integrated machine use
    `capping.cap_device_memory`, or nothing.

    Returns:
        The cap in bytes.

    Raises:
        PlanError: nothing is left of the pool to cap.
    """
    if facts.free_bytes <= 0:
        raise PlanError(
            f"{facts.host_available_bytes / GIB:.1f} GiB of {facts.total_bytes / GIB:.1f} GiB of {facts.name}'s pool "
            f"are available and {pool_floor_bytes(facts.total_bytes) / GIB:.1f} GiB of it stay free for the system. "
            "End other programs that hold memory; `pixtune doctor` shows how much is page cache."
        )
    torch.cuda.set_per_process_memory_fraction(min(1.0, facts.free_bytes / facts.total_bytes))
    return facts.free_bytes


@dataclass(frozen=True)
class MemoryVerdict:
    """Answer to whether a run can continue."""

    available_bytes: int
    floor_bytes: int

    @property
    def should_stop(self) -> bool:
        return self.available_bytes < self.floor_bytes

    @property
    def message(self) -> str:
        """Reason and remedy, for the error that follows the checkpoint."""
        return (
            f"{self.available_bytes / GIB:.1f} GiB of memory are available and this run stops below "
            f"{self.floor_bytes / GIB:.1f} GiB, since a machine whose GPU shares its memory hangs when none is left. "
            "The run is saved. End other programs and resume with resume_from_checkpoint=latest. A resumed run keeps "
            "its plan; one that needs less memory starts anew, in another output_dir, with a lower memory_fraction or "
            "train_batch_size."
        )


class MemoryWatchdog:
    """Watches the memory that is available while a run trains on a machine with one pool.

    The loop asks after every step and acts on the answer: save, then raise `TrainingError(verdict.message)`. Nothing is
    raised from here and there is no thread: a step is the only place where a run can be saved, and a thread would race
    with it. Asking costs a clock reading; the kernel is asked at most once per `interval_seconds`.

    Args:
        pool_bytes: the whole pool. The run stops at half of `facts.pool_floor_bytes`, which the plan leaves free.
        read: returns the machine's memory.
    """

    def __init__(
        self,
        pool_bytes: int,
        read: Callable[[], HostMemory] = read_meminfo,
        clock: Callable[[], float] = time.monotonic,
        interval_seconds: float = 1.0,
    ) -> None:
        self._floor_bytes = pool_floor_bytes(pool_bytes) // 2
        self._read, self._clock, self._interval_seconds = read, clock, interval_seconds
        self._next_reading = -math.inf
        self._verdict = MemoryVerdict(pool_bytes, self._floor_bytes)

    def check(self) -> MemoryVerdict:
        """Returns the latest verdict, at most `interval_seconds` old."""
        now = self._clock()
        if now >= self._next_reading:
            self._next_reading = now + self._interval_seconds
            self._verdict = MemoryVerdict(self._read().available_bytes, self._floor_bytes)
        return self._verdict
