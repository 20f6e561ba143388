"""What a run does about memory around its steps: the allocator's environment, caps, a line a stage, the watchdog."""

from __future__ import annotations

import logging
import sys

import torch

from pixtune.config.schema import TrainConfig
from pixtune.errors import TrainingError
from pixtune.fit.rungs import is_unified
from pixtune.hardware.capping import cap_device_memory, outside_allocator_bytes, used_before_cuda
from pixtune.hardware.facts import GIB, MEMORY_FRACTION, read_facts
from pixtune.hardware.monitor import StageLog
from pixtune.hardware.unified import MemoryWatchdog, cap_unified_memory, setup_unified_memory_env

log = logging.getLogger(__name__)


class RunMemory:
    """Made before CUDA starts, which reads the allocator's settings once; `start` follows when the device is known."""

    def __init__(self, config: TrainConfig) -> None:
        self.stages = StageLog()
        self._config = config
        self._watchdog: MemoryWatchdog | None = None
        self._used_before: int | None = None
        if torch.cuda.is_initialized():
            return
        if wants_expandable_segments(config):
            setup_unified_memory_env()
        if config.gpu_memory_limit_gib is not None and torch.version.cuda is not None:
            self._used_before = used_before_cuda()

    def start(self, device: torch.device) -> None:
        """Caps what the process takes, and watches a pool that it shares with the CPU.

        Raises:
            PlanError: the cap leaves nothing.
        """
        if device.type != "cuda":
            return
        if self._config.gpu_memory_limit_gib is not None:
            cap_device_memory(self._config.gpu_memory_limit_gib, self._used_before, device)
        facts = read_facts(device, self._config.memory_fraction or MEMORY_FRACTION)
        if facts.integrated and is_unified(facts, self._config):
            cap_unified_memory(facts)
            self._watchdog = MemoryWatchdog(facts.total_bytes)

    def scarcity(self) -> TrainingError | None:
        """The error to end with, once this step is saved, where a shared pool is nearly used up."""
        if self._watchdog is None:
            return None
        verdict = self._watchdog.check()
        return TrainingError(verdict.message) if verdict.should_stop else None

    def compare(self, expected_bytes: int) -> dict[str, float]:
        """Most that was allocated since the last stage, against the plan's estimate; empty without a GPU."""
        if not torch.cuda.is_available() or not expected_bytes:
            return {}
        measured, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        figures = {
            "expected_peak_gib": expected_bytes / GIB,
            "measured_peak_gib": measured / GIB,
            "reserved_peak_gib": reserved / GIB,
            "error_percent": 100 * (expected_bytes / measured - 1),
        }
        if self._used_before is not None:  # of the whole process, CUDA context included
            figures["process_peak_gib"] = (reserved + outside_allocator_bytes(self._used_before)) / GIB
        return {name: round(value, 2) for name, value in figures.items()}


def wants_expandable_segments(config: TrainConfig) -> bool:
    """Segments that grow lose less to fragmentation; torch has them on Linux."""
    return sys.platform == "linux" and config.expandable_segments is not False
