"""Unified memory is told by the device's own property; what follows from it (contract.md sections 2, 3, 4, C9)."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pixtune.errors import PlanError
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB, HardwareFacts, usable_pool_bytes
from pixtune.hardware.meminfo import HostMemory
from pixtune.hardware.unified import MemoryWatchdog, cap_unified_memory
from tests.runs import ROOT, environment
from utils.unified_memory import get_memory_config, is_unified_memory_system, setup_unified_memory_env

MACHINES = {  # name: (capability, integrated)
    "GB10": ((12, 1), 1),
    "RTX 5090": ((12, 0), 0),
    "GH200": ((9, 0), 0),
    "H100": ((9, 0), 0),
    "RTX 4090": ((8, 9), 0),
    "Orin": ((8, 7), 1),
}


@pytest.fixture
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    (major, minor), integrated = MACHINES[request.param]
    properties = SimpleNamespace(name=request.param, major=major, minor=minor, is_integrated=integrated)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    return str(request.param)


@pytest.mark.parametrize("machine", MACHINES, indirect=True)
def test_only_an_integrated_gpu_shares_its_memory(machine: str) -> None:
    expected = machine in ("GB10", "Orin")
    assert is_unified_memory_system() is expected
    assert get_memory_config()["memory_pool"] == ("unified" if expected else "standard")


def test_a_machine_without_gpu_is_not_unified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert is_unified_memory_system() is False


def test_the_presets_are_the_documents() -> None:
    names = (
        "pin_memory",
        "disable_cpu_offload",
        "prefetch_factor",
        "num_workers",
        "memory_pool",
        "expandable_segments",
    )
    unified, standard = get_memory_config(True), get_memory_config(False)
    assert unified == dict(zip(names, (False, True, 2, 4, "unified", True), strict=True))
    assert standard == dict(zip(names, (True, False, 4, 8, "standard", False), strict=True))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"},
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512,expandable_segments:True"},
        ),
        ({"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_ALLOC_CONF": "a:1,expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"},) * 2,
    ],
)
def test_the_users_own_allocator_settings_are_kept(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, str], after: dict[str, str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that monkeypatch takes back what the call sets
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    setup_unified_memory_env()
    setup_unified_memory_env()
    assert {
        name: os.environ[name] for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if name in os.environ
    } == after


def test_after_cuda_has_started_it_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="before CUDA starts"):
        setup_unified_memory_env()


def test_importing_starts_no_cuda_and_changes_no_setting() -> None:
    code = (
        "import os, utils.unified_memory, torch; "
        "print(torch.cuda.is_initialized(), 'PYTORCH_CUDA_ALLOC_CONF' in os.environ)"
    )
    settings = {name: value for name, value in environment().items() if not name.startswith("PYTORCH_")}
    outcome = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=settings, capture_output=True, text=True)
    assert outcome.stdout.split() == ["False", "False"], outcome.stderr


# ---- the cap and the watchdog


def spark(available_gib: float) -> HardwareFacts:
    pool = 120 * GIB
    return replace(
        facts_as("DGX Spark"),
        total_bytes=pool,
        host_available_bytes=round(available_gib * GIB),
        free_bytes=usable_pool_bytes(pool, round(available_gib * GIB), 0.9),
    )


@pytest.mark.parametrize(("available_gib", "fraction"), [(120, 0.9), (67.5, 0.5)])
def test_the_process_is_capped_at_what_is_free(
    monkeypatch: pytest.MonkeyPatch, available_gib: float, fraction: float
) -> None:
    caps: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", caps.append)
    assert cap_unified_memory(spark(available_gib)) == pytest.approx(fraction * 120 * GIB)
    assert caps == [pytest.approx(fraction)]


def test_a_pool_that_others_fill_is_refused() -> None:
    with pytest.raises(PlanError, match=r"6\.0 GiB of 120\.0 GiB .* are available and 7\.5 GiB of it stay free"):
        cap_unified_memory(spark(6))


class Readings:
    """A machine's available memory over time, and a clock that the test turns."""

    def __init__(self, *available_gib: float) -> None:
        self.available_gib, self.num_read, self.now = list(available_gib), 0, 100.0

    def read(self) -> HostMemory:
        gib = self.available_gib[min(self.num_read, len(self.available_gib) - 1)]
        self.num_read += 1
        return HostMemory(120 * GIB, round(gib * GIB), 0, 0)


def test_the_watchdog_stops_a_run_at_half_the_floor_that_plans_keep() -> None:
    readings = Readings(9, 4, 3.7)
    watchdog = MemoryWatchdog(120 * GIB, readings.read, lambda: readings.now)
    answers = []
    for _ in range(3):
        answers.append(watchdog.check().should_stop)
        readings.now += 2
    assert answers == [False, False, True]  # a plan keeps 7.5 GiB free
    assert "3.7 GiB of memory are available and this run stops below 3.8 GiB" in watchdog.check().message


def test_the_watchdog_asks_the_kernel_once_a_second() -> None:
    readings = Readings(9, 1)
    watchdog = MemoryWatchdog(120 * GIB, readings.read, lambda: readings.now)
    assert not watchdog.check().should_stop
    readings.now += 0.9
    assert not watchdog.check().should_stop and readings.num_read == 1
    readings.now += 0.2
    assert watchdog.check().should_stop and readings.num_read == 2


def test_the_watchdog_reads_this_machine() -> None:
    verdict = MemoryWatchdog(8 * GIB).check()
    assert verdict.available_bytes > 0 and verdict.floor_bytes == 2 * GIB
