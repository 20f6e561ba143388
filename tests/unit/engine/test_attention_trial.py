"""Trials of kernels that are right, wrong or missing, or that die or hang. Real ones need a GPU (tests/gpu)."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from pixtune.engine import attention_trial as trial
from pixtune.engine.attention_trial import MARK, Shape, try_attention
from pixtune.plan.kernel_choice import Finding
from tests.processes import forked_run

SHAPE = Shape(96, 2, 32)
ALL = ("cudnn", "flash", "efficient")
GOOD = Finding(error=0.003, milliseconds=1.5, padded_error=0.004)
real_run = subprocess.run


@pytest.fixture(autouse=True)
def _a_gpu_and_nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")


def line(kernel: str, at_work: str | None, finding: Finding | None = None) -> str:
    report = {"kernel": kernel, "at_work": at_work, "finding": finding and asdict(finding)}
    return f"{MARK}{json.dumps(report)}\n"


def well(kernel: str, finding: Finding = GOOD) -> str:
    """Prints of a process whose kernel makes no trouble."""
    return line(kernel, kernel) + "a line of a library\n" + line(kernel, None, finding)


class Processes:
    """Stands in for `subprocess.run`: gives the next of some outcomes each time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *outcomes: tuple[int, str, str]) -> None:
        self.outcomes = list(outcomes)
        self.tried: list[list[str]] = []
        monkeypatch.setattr(subprocess, "run", self)

    def __call__(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[:8] == [sys.executable, "-m", "pixtune.engine.attention_trial", "96", "2", "32", "bf16", "0"]
        self.tried.append(command[8:])
        code, printed, errors = self.outcomes.pop(0)
        return subprocess.CompletedProcess(command, code, printed, errors)


# ---- the process itself


def with_fakes(monkeypatch: pytest.MonkeyPatch, **fakes: str) -> list[list[str]]:
    """Lets the real process run, on kernels that are made up; returns which ones each process is asked for."""
    tried: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        tried.append(command[8:])
        return forked_run([sys.executable, "-m", "tests.unit.engine.trial_with_fakes", *command[3:]], **options)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("FAKES", json.dumps(fakes))
    return tried


def test_a_kernel_that_dies_is_dropped_and_the_others_are_tried_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = with_fakes(monkeypatch, cudnn="dies", flash="right", efficient="nan")
    found = try_attention(SHAPE, ALL)
    assert tried == [["cudnn", "flash", "efficient"], ["flash", "efficient"]]
    assert found["cudnn"].fault == "its process ended with exit code -9" and not found["cudnn"].lacked_memory
    assert found["flash"].fault is None and found["flash"].milliseconds == 2.95 and found["flash"].padded_error < 0.02
    assert "nan times" in (found["efficient"].fault or "")


def test_each_way_to_fail_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = with_fakes(monkeypatch, cudnn="raises", flash="spoils the GPU", efficient="lacks memory")
    found = try_attention(SHAPE, ALL)
    assert tried == [["cudnn", "flash", "efficient"], ["efficient"]]
    assert found["cudnn"].fault == "RuntimeError: cuDNN Frontend error: no engine"
    assert "illegal memory access" in (found["flash"].fault or "")
    assert found["efficient"].lacked_memory and "memory was lacking" in (found["efficient"].fault or "")
    assert [finding.lacked_memory for finding in found.values()] == [False, False, True]


def test_what_dies_in_padded_attention_is_right_without(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = with_fakes(monkeypatch, cudnn="dies when padded", flash="wrong")
    found = try_attention(SHAPE, ("cudnn", "flash"))
    assert tried == [["cudnn", "flash"], ["flash"]]
    assert found["cudnn"].fault is None and found["cudnn"].padded_error == float("inf")
    assert "wrong by 0.5 times their size" in (found["flash"].fault or "")


def test_a_kernel_that_hangs_is_dropped_with_the_time_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process, ended by a real time limit; what it has printed before counts."""
    tried: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        tried.append(command[8:])
        printed = well("cudnn") + line("flash", "flash") if len(tried) == 1 else well("efficient")
        code = f"import time; print({printed!r}, flush=True); time.sleep({60 if len(tried) == 1 else 0})"
        return real_run([sys.executable, "-c", code], **options)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(trial, "TRIAL_SECONDS", 3)
    found = try_attention(SHAPE, ALL)
    assert tried == [["cudnn", "flash", "efficient"], ["efficient"]]
    assert found == {"cudnn": GOOD, "flash": Finding("did not end within 3 s"), "efficient": GOOD}


def test_a_process_that_never_begins_says_nothing_of_any_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(monkeypatch, (1, "", "Traceback\ntorch.OutOfMemoryError: no room\nhints\n"))
    found = try_attention(SHAPE, ALL)
    assert len(processes.tried) == 1 and all(finding.lacked_memory for finding in found.values())
    assert found["flash"].obstacle == "its process ended with exit code 1: torch.OutOfMemoryError: no room"


def test_a_process_that_dies_when_all_is_done_has_told_all(monkeypatch: pytest.MonkeyPatch) -> None:
    Processes(monkeypatch, (-11, "".join(map(well, ALL)), ""))
    assert try_attention(SHAPE, ALL) == dict.fromkeys(ALL, GOOD)


def test_a_line_that_was_cut_off_is_not_read() -> None:
    outcome = trial.read_outcome(well("cudnn") + line("flash", "flash")[:30], "killed")
    assert outcome.findings == {"cudnn": GOOD} and outcome.culprit is None


def test_how_it_is_computed_stands_in_the_command_and_in_the_files_name(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, other = Shape(4352, 24, 128), Shape(4352, 24, 128, "fp32", deterministic=True)
    assert (plain.name, other.name) == ("4352x24x128-bf16", "4352x24x128-fp32-deterministic")
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, well("flash"), "")

    monkeypatch.setattr(subprocess, "run", run)
    try_attention(other, ["flash"])
    assert commands[0][3:] == ["4352", "24", "128", "fp32", "1", "flash"]


# ---- what is remembered


def kept_files(tmp_path: Path) -> list[Path]:
    return list(tmp_path.rglob("*.json"))


def test_what_was_measured_is_known_the_next_time_and_a_crash_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dead = (-11, well("cudnn") + line("flash", "flash"), "")
    missing = Finding("PyTorch has no such kernel for this GPU, shape and format")
    processes = Processes(monkeypatch, dead, (0, well("efficient", missing), ""), (0, well("flash"), ""))
    assert try_attention(SHAPE, ALL)["flash"] == Finding("its process ended with exit code -11")
    assert try_attention(SHAPE, ALL) == {"cudnn": GOOD, "flash": GOOD, "efficient": missing}
    assert processes.tried == [["cudnn", "flash", "efficient"], ["efficient"], ["flash"]]
    assert try_attention(SHAPE, ALL)["flash"] == GOOD and not processes.outcomes
    (file,) = kept_files(tmp_path)
    assert file.name.startswith("NVIDIA_H100_80GB_HBM3-torch") and "-cudnn" in file.name
    assert file.stem.endswith("96x2x32-bf16") and json.loads(file.read_text())["format"] == trial.FORMAT


def test_a_kernel_that_is_new_is_tried_beside_those_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(monkeypatch, (0, well("flash"), ""), (0, well("flash_3"), ""))
    assert try_attention(SHAPE, ["flash"]).keys() == {"flash"}
    assert try_attention(SHAPE, ["flash", "flash_3"]) == {"flash": GOOD, "flash_3": GOOD}
    assert try_attention(SHAPE, ["flash"]).keys() == {"flash"}, "what is known and not asked for is not returned"
    assert processes.tried == [["flash"], ["flash_3"]]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"error": 0.003, "padded_error": 0.003, "cudnn_ms": 1.5, "flash_ms": 2.9}),
        json.dumps({"format": 99, "kernels": {"flash": {"speed": 1}}}),
        json.dumps({"format": trial.FORMAT, "kernels": {"flash": {"speed": 1}}}),
        json.dumps([1]),
        "not JSON",
    ],
    ids=["before formats had numbers", "newer", "other figures", "a list", "damaged"],
)
def test_files_of_other_versions_are_made_anew(content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Processes(monkeypatch, (0, well("flash"), ""), (0, well("flash"), ""))
    try_attention(SHAPE, ["flash"])
    (file,) = kept_files(tmp_path)
    file.write_text(content)
    assert try_attention(SHAPE, ["flash"]) == {"flash": GOOD}
    assert json.loads(file.read_text())["kernels"]["flash"] == asdict(GOOD)


def test_where_nothing_can_be_kept_it_is_tried_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "user_cache_folder", lambda: None)
    processes = Processes(monkeypatch, *[(0, well("flash"), "")] * 2)
    for _ in range(2):
        assert try_attention(SHAPE, ["flash"]) == {"flash": GOOD}
    assert len(processes.tried) == 2
