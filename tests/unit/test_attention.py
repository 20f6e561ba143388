"""What becomes of a trial that passes, fails, crashes or hangs. The trial itself needs a GPU: see tests/gpu."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixtune.errors import ConfigError
from pixtune.fit import attention
from pixtune.fit.attention import with_dense_gradient


def outcome(error: float, cudnn_ms: float, flash_ms: float, padded_error: float = 0.003) -> str:
    figures = {"error": error, "padded_error": padded_error, "cudnn_ms": cudnn_ms, "flash_ms": flash_ms}
    return "a line of a library\n" + json.dumps(figures) + "\n"


OUTCOMES = {
    "right and faster": (0, outcome(0.003, 1.5, 2.9), "", True, "right within 0.3%, 1.50 ms a block, 2.90"),
    "right and slower": (0, outcome(0.003, 3.1, 2.9), "", False, "3.10 ms a block, 2.90"),
    "wrong": (0, outcome(1.4, 1.5, 2.9), "", False, "1.4 times their size away"),
    "no number": (0, outcome(float("nan"), 1.5, 2.9), "", False, "nan times"),
    "crash": (1, "", "torch.AcceleratorError: illegal memory access\nSearch for it\n", False, "illegal memory access"),
    "signal": (-11, "", "", False, "exit code -11"),
}


@pytest.fixture(autouse=True)
def _a_gpu_and_nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize("kind", OUTCOMES)
def test_a_trial_says_whether_and_what(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    code, out, err, passed, words = OUTCOMES[kind]
    commands = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(attention.subprocess, "run", run)
    trial = attention.try_cudnn_attention(4352, 24, 128)
    assert trial.passed == passed and words in trial.finding
    assert commands[0][1:] == ["-m", "pixtune.fit.attention", "4352", "24", "128"]


@pytest.mark.parametrize(
    ("figures", "pads"),
    [
        ((0.003, 1.5, 2.9, 0.003), True),
        ((0.003, 1.5, 2.9, 0.5), False),
        ((0.003, 1.5, 2.9, math.nan), False),
        ((0.003, 1.5, 2.9, math.inf), False),
        ((0.5, 1.5, 2.9, 0.003), False),
    ],
    ids=["right", "wrong", "no number", "no kernel", "wrong without padding"],
)
def test_attention_to_padded_captions_is_tried_as_well(
    monkeypatch: pytest.MonkeyPatch, figures: tuple[float, float, float, float], pads: bool
) -> None:
    run = subprocess.CompletedProcess([], 0, outcome(*figures), "")
    monkeypatch.setattr(attention.subprocess, "run", lambda command, **options: run)
    for _ in ("measured", "known"):
        trial = attention.try_cudnn_attention(4352, 24, 128)
        assert (trial.pads, trial.passed) == (pads, figures[0] < 0.02)


def test_figures_of_a_version_that_tried_less_are_measured_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = subprocess.CompletedProcess([], 0, outcome(0.003, 1.5, 2.9), "")
    monkeypatch.setattr(attention.subprocess, "run", lambda command, **options: run)
    assert attention.try_cudnn_attention(4352, 24, 128).pads
    (kept,) = tmp_path.rglob("*.json")
    kept.write_text(json.dumps({"error": 0.003, "cudnn_ms": 1.5, "flash_ms": 2.9}))
    assert attention.try_cudnn_attention(4352, 24, 128).pads
    assert json.loads(kept.read_text()).keys() == attention.FIGURES


def test_what_was_measured_is_known_the_next_time_and_a_crash_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [(-11, ""), (0, outcome(0.003, 1.5, 2.9)), (0, outcome(0.003, 9.9, 2.9))]

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, *outcomes.pop(0), "")

    monkeypatch.setattr(attention.subprocess, "run", run)
    assert not attention.try_cudnn_attention(4352, 24, 128).passed
    assert attention.try_cudnn_attention(4352, 24, 128).passed
    assert attention.try_cudnn_attention(4352, 24, 128).passed and len(outcomes) == 1
    assert not attention.try_cudnn_attention(4608, 24, 128).passed and not outcomes


def test_a_trial_that_hangs_is_a_failed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, attention.TRIAL_SECONDS)

    monkeypatch.setattr(attention.subprocess, "run", run)
    trial = attention.try_cudnn_attention(8, 1, 16)
    assert not trial.passed and "120 s" in trial.finding


@pytest.mark.parametrize("compiled", [False, True])
def test_a_slice_of_a_wider_gradient_arrives_dense(compiled: bool) -> None:
    """As in blocks that put the MLP's features beside what was attended."""
    strides = []

    def block(states: Tensor) -> Tensor:
        doubled = states * 2
        doubled.register_hook(lambda gradient: strides.append(gradient.stride()))
        return torch.cat([with_dense_gradient(doubled), states], dim=2).square()

    states = torch.randn(1, 4, 8, requires_grad=True)
    (torch.compile(block) if compiled else block)(states).sum().backward()
    assert states.grad is not None
    torch.testing.assert_close(states.grad, 10 * states.detach())
    assert strides == [(32, 8, 1)] or compiled


def test_why_flash_attention_3_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    activated: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append, raising=False)
    monkeypatch.setattr(attention, "FLASH_ATTENTION_3", "a_module_that_nobody_has")
    with pytest.raises(ConfigError, match="a_module_that_nobody_has is not installed"):
        attention.use_flash_attention_3()
    monkeypatch.setattr(attention, "FLASH_ATTENTION_3", "json")  # one that is there
    assert attention.flash_attention_3_obstacle() is None
    attention.use_flash_attention_3()
    assert activated == ["FA3"]
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    obstacle = attention.flash_attention_3_obstacle()
    assert obstacle is not None and torch.__version__ in obstacle
