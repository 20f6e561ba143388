"""`pixtune doctor`: what it prints, for people and for programs, and how it ends."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pixtune.cli import app
from pixtune.commands import doctor
from pixtune.commands.doctor import Examination
from pixtune.hardware.advice import advise
from pixtune.hardware.machine import Machine
from tests.unit.hardware.test_advice import BROKEN, SOUND, SPARK


def printed(examination: Examination) -> str:
    output = io.StringIO()
    doctor.render(examination, Console(file=output, width=200))
    return output.getvalue()


def test_a_sound_machine() -> None:
    text = printed(Examination(SOUND, ()))
    for part in (
        "NVIDIA GeForce RTX 4090, compute capability 8.9, 128 SMs",
        "23.6 GiB, of which a run may take 23.3 GiB",
        "1008 GB/s (nominal)",
        "PCIe, about 25 GB/s",
        "bf16, int8, fp8",
        "2.13.0, CUDA 13.0, cuDNN 9.19.0",
        "peft 0.21.2",
        "580.95.05",
        "No problem was found",
    ):
        assert part in text
    assert "torchao" not in text  # not installed


def test_a_pool_is_called_one() -> None:
    text = printed(Examination(SPARK, ()))
    assert "one pool with the CPU" in text and "CPU and GPU share one pool" in text and "about" not in text


@pytest.mark.parametrize("name", BROKEN)
def test_every_broken_machine_can_be_shown(name: str) -> None:
    advice = tuple(advise(BROKEN[name][0]))
    text = printed(Examination(BROKEN[name][0], advice))
    assert advice[0].severity in text and advice[0].topic in text and "No problem" not in text


@pytest.mark.parametrize(("machine", "code"), [(SOUND, 0), (BROKEN["WSL"][0], 0), (BROKEN["torchao"][0], 1)])
def test_the_exit_code_says_whether_training_is_possible(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, code: int
) -> None:
    monkeypatch.setattr(doctor, "read_machine", lambda environment, folder: machine)
    outcome = CliRunner().invoke(app, ["doctor"])
    assert outcome.exit_code == code, outcome.output
    for_programs = CliRunner().invoke(app, ["doctor", "--json"])
    values = json.loads(for_programs.output)
    assert for_programs.exit_code == code and values["can_train"] is (code == 0)
    assert machine.facts is not None and values["machine"]["facts"]["name"] == machine.facts.name
    assert [advice["topic"] for advice in values["advice"]] == [advice.topic for advice in advise(machine)]


def test_this_machine_is_examined() -> None:
    outcome = CliRunner().invoke(app, ["doctor", "--json"])
    values = json.loads(outcome.output)
    assert values["machine"]["torch"]["version"] and outcome.exit_code == (0 if values["can_train"] else 1)
