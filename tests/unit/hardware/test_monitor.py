"""Memory by stage: each has its own peak and its own seconds."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pixtune.hardware.facts import GIB
from pixtune.hardware.monitor import DeviceMemory, StageLog, log_memory_usage
from pixtune.hardware.sensors import GpuSensors, read_sensors


class Machine:
    """Memory that a test sets, with a peak as torch keeps it."""

    def __init__(self) -> None:
        self.allocated = self.peak = 0.0
        self.host_bytes, self.now = 2 * GIB, 50.0

    def use(self, gib: float) -> None:
        self.allocated, self.peak = gib, max(self.peak, gib)

    def read(self) -> DeviceMemory:
        return DeviceMemory(self.allocated, self.allocated + 1, self.peak, self.peak + 1)

    def reset(self) -> None:
        self.peak = self.allocated


def test_each_stage_has_its_own_peak() -> None:
    machine = Machine()
    log = StageLog(machine.read, machine.reset, lambda: machine.host_bytes, lambda: machine.now)
    machine.use(16.0)
    machine.use(0.5)
    machine.now += 12.5
    log.record("text encoded")
    machine.use(3.0)
    machine.host_bytes, machine.now = 5 * GIB, machine.now + 4
    log.record("base loaded")

    text, base = log.stages
    assert (text.peak_gib, text.allocated_gib, text.seconds, text.host_rss_gib) == (16.0, 0.5, 12.5, 2.0)
    assert (base.peak_gib, base.peak_reserved_gib, base.seconds, base.host_rss_gib) == (3.0, 4.0, 4.0, 5.0)
    rows = log.rows()
    assert [row["stage"] for row in rows] == ["text encoded", "base loaded"] and json.loads(json.dumps(rows)) == rows


def test_a_stage_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pixtune.hardware.monitor"):
        entry = StageLog().record("started")
    assert entry.host_rss_gib > 0.05 and entry.peak_gib == 0.0  # a CPU
    assert "started: 0.00 GiB allocated" in caplog.text


def test_memory_is_logged_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pixtune.hardware.monitor"):
        log_memory_usage("after text encoding")
    assert "after text encoding" in caplog.text and "GiB allocated" in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1980, 64", GpuSensors(1980, 64)),
        ("2418.5, [N/A]", GpuSensors(2418.5, None)),
        ("No devices were found", None),
        ("", None),
    ],
)
def test_sensors(text: str, expected: GpuSensors | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\necho '{text}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_sensors("2dee1e25") == expected


def test_without_nvidia_smi_no_sensor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_sensors("2dee1e25") is None
