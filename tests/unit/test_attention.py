"""What becomes of a trial that passes, fails, crashes or hangs. The trial itself needs a GPU: see tests/gpu."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pixtune.fit import attention
from pixtune.weights import ModelFolder

OUTCOMES = {
    "agrees": (0, "its gradients agree within 0.30%\n", "There are modules that\n", True, "0.30%"),
    "wrong": (1, "", "note\nError: its gradients are 1e+04 times their size away\n", False, "1e+04 times"),
    "crash": (1, "", "torch.AcceleratorError: illegal memory access\nSearch for it\n", False, "illegal memory access"),
    "signal": (-11, "", "", False, "exit code -11"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OUTCOMES)
def test_a_trial_says_whether_and_what(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    code, out, err, passed, words = OUTCOMES[kind]
    commands = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(attention.subprocess, "run", run)
    trial = attention.try_cudnn_attention(ModelFolder(Path("model")), 128, 96, 512)
    assert trial.passed == passed and words in trial.finding
    assert commands[0][1:] == ["-m", "pixtune.fit.attention", "model", "128", "96", "512"]


def test_a_trial_that_hangs_is_a_failed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, attention.TRIAL_SECONDS)

    monkeypatch.setattr(attention.subprocess, "run", run)
    trial = attention.try_cudnn_attention(ModelFolder(Path("model")), 8, 8, 4)
    assert not trial.passed and "180 s" in trial.finding
