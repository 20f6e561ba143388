"""Memory of a run by stage: what lies between steps is not counted as theirs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pixtune.config import load_config
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB, HardwareFacts
from pixtune.hardware.monitor import DeviceMemory, StageLog
from pixtune.hardware.unified import MemoryWatchdog
from pixtune.tracking import memory as of_run
from pixtune.tracking.memory import STEPS, RunMemory


class Device:
    """Memory that a test sets, with a peak as torch keeps it, and a clock."""

    def __init__(self) -> None:
        self.allocated = self.peak = self.now = 0.0

    def use(self, peak_gib: float, then_gib: float, seconds: float = 1.0) -> None:
        self.allocated, self.peak, self.now = then_gib, max(self.peak, peak_gib), self.now + seconds

    def reset(self) -> None:
        self.peak = self.allocated

    def read(self) -> DeviceMemory:
        return DeviceMemory(self.allocated, self.allocated + 1, self.peak, self.peak + 1)


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def memory(device: Device, tmp_path: Path) -> RunMemory:
    words = ["pretrained_model_name_or_path=x", f"output_dir={tmp_path}", "max_train_steps=1", "data_config.img_dir=x"]
    memory = RunMemory(load_config(None, words, folders_must_exist=False))
    memory.stages = StageLog(device.read, device.reset, lambda: 3 * GIB, lambda: device.now)
    return memory


def run_through(memory: RunMemory, device: Device) -> None:
    """A validation before the first step, steps, another validation that takes more than they, steps."""
    device.use(20.0, 18.0, 10.0)
    memory.stages.record("transformer")
    with memory.aside("held-out loss"):
        device.use(25.0, 18.0, 2.0)
    memory.begin_steps()
    device.use(22.0, 19.0, 5.0)
    with memory.aside("held-out loss"):
        device.use(30.0, 19.0, 3.0)
    device.use(21.0, 19.0, 6.0)
    memory.end_steps()


def test_steps_have_their_own_peak(memory: RunMemory, device: Device) -> None:
    run_through(memory, device)
    rows = {row["stage"]: row for row in memory.rows()}
    assert list(rows) == ["transformer", "held-out loss", "other set-up", STEPS]
    assert {name: row["peak_gib"] for name, row in rows.items()} == {
        "transformer": 20.0, "held-out loss": 30.0, "other set-up": 18.0, STEPS: 22.0,
    }  # fmt: skip
    assert {name: row["seconds"] for name, row in rows.items()} == {
        "transformer": 10.0, "held-out loss": 5.0, "other set-up": 0.0, STEPS: 11.0,
    }  # fmt: skip


def test_the_plan_is_held_against_the_steps_alone(memory: RunMemory, device: Device) -> None:
    run_through(memory, device)
    assert memory.compare(round(21.12 * GIB)) == {
        "expected_peak_gib": 21.12, "measured_peak_gib": 22.0, "reserved_peak_gib": 23.0, "error_percent": -4.0,
    }  # fmt: skip


def test_without_a_gpu_there_is_nothing_to_compare(memory: RunMemory) -> None:
    memory.begin_steps()
    memory.end_steps()
    assert memory.compare(GIB) == {}
    assert [row["host_rss_gib"] for row in memory.rows()] == [3.0, 3.0]


def test_without_an_estimate_there_is_nothing_to_compare(memory: RunMemory, device: Device) -> None:
    run_through(memory, device)
    assert memory.compare(0) == {}


@pytest.mark.parametrize(
    ("card", "words", "capped"),
    [
        ("DGX Spark", [], True),
        ("DGX Spark", ["unified_memory=false"], False),
        ("H200", ["unified_memory=true"], False),  # a demand makes no pool of two memories
        ("H200", [], False),
    ],
)
def test_a_pool_that_the_gpu_shares_is_capped_at_the_configs_share_and_watched(
    card: str, words: list[str], capped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    caps: list[HardwareFacts] = []
    facts = replace(facts_as("H200"), total_bytes=100 * GIB) if card == "H200" else facts_as(card)

    def read(device: torch.device, fraction: float = 0.9) -> HardwareFacts:
        shares.append(fraction)
        return facts

    monkeypatch.setattr(of_run, "read_facts", read)
    monkeypatch.setattr(of_run, "cap_unified_memory", caps.append)
    monkeypatch.setattr(MemoryWatchdog, "check", lambda watchdog: Verdict("little is left"))
    given = ["pretrained_model_name_or_path=x", f"output_dir={tmp_path}", "max_train_steps=1", "data_config.img_dir=x"]
    memory = RunMemory(load_config(None, [*given, "memory_fraction=0.5", *words], folders_must_exist=False))
    assert memory.scarcity() is None
    memory.start(torch.device("cpu"))
    assert not shares, "a CPU has no memory of its own"
    memory.start(torch.device("cuda"))
    assert shares == [0.5]
    assert caps == [facts] * capped
    assert (str(memory.scarcity()) == "little is left") is capped


class Verdict:
    should_stop = True

    def __init__(self, message: str) -> None:
        self.message = message
