"""Manages a run's memory around its steps: the allocator's environment, caps, a line for each stage, the watchdog."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from pixtune.config.schema import TrainConfig
from pixtune.errors import TrainingError
from pixtune.hardware.capping import BeforeCuda, cap_device_memory, outside_allocator_bytes, read_before_cuda
from pixtune.hardware.facts import GIB
from pixtune.hardware.monitor import StageLog, StageMemory
from pixtune.hardware.nvidia_smi import own_gpu
from pixtune.hardware.read import read_facts
from pixtune.hardware.unified import MemoryWatchdog, cap_unified_memory, setup_unified_memory_env
from pixtune.plan.demands import demands_of

log = logging.getLogger(__name__)

SETUP, STEPS = "other set-up", "training steps"
"""Names of the last two stages of every run, after those that encode and load."""


class RunMemory:
    """Memory of one run: its settings, its caps and its stages.

    Must be created before CUDA starts, which reads the allocator's settings once; `start` follows when the device is
    known.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.stages = StageLog()
        self.outside_bytes = 0
        """Device memory that the run holds outside of torch's allocator, and that its plan counts."""
        self._config = config
        self._steps_began = False
        self._watchdog: MemoryWatchdog | None = None
        self._before: BeforeCuda | None = None
        if torch.cuda.is_initialized():
            return
        if sys.platform == "linux" and config.expandable_segments is not False:  # torch has them on Linux only
            setup_unified_memory_env()
        if config.gpu_memory_limit_gib is not None and torch.version.cuda is not None:
            self._before = read_before_cuda(own_gpu(os.environ))

    def start(self, device: torch.device) -> None:
        """Caps the process's device memory, and watches a pool that the GPU shares with the CPU.

        Raises:
            PlanError: the cap leaves no memory.
        """
        if device.type != "cuda":
            return
        if self._config.gpu_memory_limit_gib is not None:
            cap_device_memory(self._config.gpu_memory_limit_gib, self._before, device)
        demands = demands_of(self._config)
        facts = read_facts(device, demands.memory_fraction)
        if facts.integrated and demands.is_unified(facts):
            cap_unified_memory(facts)
            self._watchdog = MemoryWatchdog(facts.total_bytes)

    def scarcity(self) -> TrainingError | None:
        """Returns the error to raise once this step is saved, where a shared pool is nearly used up; None elsewhere."""
        if self._watchdog is None:
            return None
        verdict = self._watchdog.check()
        return TrainingError(verdict.message) if verdict.should_stop else None

    def begin_steps(self) -> None:
        """Marks the end of the set-up: the first step follows."""
        self.stages.record(SETUP)
        self._steps_began = True

    @contextmanager
    def aside(self, stage: str) -> Iterator[None]:
        """Counts the memory of work before or between steps for a stage of its own, not for the steps."""
        if self._steps_began:
            self.stages.record(STEPS)
        try:
            yield
        finally:
            self.stages.record(stage)

    def end_steps(self) -> None:
        """Marks the end of the last step."""
        self.stages.record(STEPS)

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row for each stage, however often it was entered."""
        return [stage.row() for stage in merge_stages(self.stages.stages)]

    def compare(self, expected_bytes: int, replayed_bytes: int = 0) -> dict[str, float]:
        """Compares the steps' peak memory with the plan's estimate; empty where no GPU trained.

        Args:
            replayed_bytes: what a captured pass takes again at each replay, which torch's allocator does not count. It
                matters where optimizer states came after the capture.

        `process_peak_gib`, which runs with a memory limit have, is the peak of the whole run and process, CUDA context
        included.
        """
        stages = merge_stages(self.stages.stages)
        steps = next((stage for stage in stages if stage.stage == STEPS), None)
        if steps is None or not steps.peak_gib or not expected_bytes:
            return {}
        measured_gib = max(steps.peak_gib, steps.allocated_gib + replayed_bytes / GIB) + self.outside_bytes / GIB
        figures = {
            "expected_peak_gib": expected_bytes / GIB,
            "measured_peak_gib": measured_gib,
            "reserved_peak_gib": steps.peak_reserved_gib,
            "error_percent": 100 * (expected_bytes / GIB / measured_gib - 1),
        }
        if self._before is not None:
            outside_gib = outside_allocator_bytes(self._before) / GIB
            figures["process_peak_gib"] = max(stage.peak_reserved_gib for stage in stages) + outside_gib
        return {name: round(value, 2) for name, value in figures.items()}


def merge_stages(stages: Iterable[StageMemory]) -> list[StageMemory]:
    """Merges stages of one name, in order of appearance: seconds are summed, peaks are the highest, the rest the last.

    The host's memory is read at a stage's end only; of several ends the highest value counts.
    """
    merged: dict[str, StageMemory] = {}
    for stage in stages:
        before = merged.get(stage.stage, stage)
        merged[stage.stage] = replace(
            stage,
            seconds=stage.seconds + (before.seconds if before is not stage else 0.0),
            peak_gib=max(stage.peak_gib, before.peak_gib),
            peak_reserved_gib=max(stage.peak_reserved_gib, before.peak_reserved_gib),
            host_rss_gib=max(stage.host_rss_gib, before.host_rss_gib),
        )
    return list(merged.values())
