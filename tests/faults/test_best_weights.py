"""The weights that were best on held-out pictures are kept, a run may end early, and a killed one does the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pixtune import train as training
from pixtune.config import load_config
from pixtune.judging.validation import ValidationLoss
from pixtune.run import TrainResult
from pixtune.services import held_out_loss, measuring
from pixtune.services.around_steps import Services
from pixtune.storage.checkpoint_state import find_checkpoints
from pixtune.tracking.metrics import read_metrics
from pixtune.trained.export import DIFFUSERS_FILE, read_lora_file
from tests.runs import overrides, write_config

CURVE = {0: 1.0, 1: 0.8, 2: 0.5, 3: 0.6, 4: 0.7, 5: 0.9, 6: 0.95}
"""An over-fitted run's held-out losses."""


def train(folder: Path, cache: Path, **changes: Any) -> TrainResult:
    folder.mkdir(exist_ok=True)
    settings = {
        "max_train_steps": 6, "data_config__num_workers": 0, "validation__held_out": 0.05, "validation__num_draws": 1,
        "validation__every": 1, "checkpointing_steps": 2, "checkpoints_total_limit": 1, **changes,
    }  # fmt: skip
    return training.train(load_config(write_config(folder), overrides(folder / "run", cache, **settings)))


@pytest.fixture
def curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out loss follows `CURVE`, whatever the weights are."""
    look = held_out_loss.HeldOutLoss.look

    def at(self: Any, step: int) -> None:
        loss = ValidationLoss(CURVE[step], (CURVE[step],) * 4)
        monkeypatch.setattr(measuring, "measure", lambda *arguments: loss)
        look(self, step)

    monkeypatch.setattr(held_out_loss.HeldOutLoss, "look", at)


def step_in(folder: Path) -> int:
    return int(read_lora_file(folder / DIFFUSERS_FILE)[1]["pixtune.step"])


def names(folder: Path) -> list[str]:
    return [path.name for path in find_checkpoints(folder / "run")]


def validations(folder: Path) -> Mapping[int, float]:
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "validation"}


@pytest.mark.usefixtures("curve")
def test_the_best_weights_are_kept_beside_the_last(tmp_path: Path, warm_cache: Path, capfd: Any) -> None:
    assert train(tmp_path, warm_cache).finished
    run = tmp_path / "run"
    assert step_in(run) == 6 and step_in(run / "best") == 2
    assert names(tmp_path) == ["checkpoint-000002", "checkpoint-000006"], "the best is never deleted"
    best, saved = load_file(run / "best" / DIFFUSERS_FILE), load_file(run / "checkpoint-000002" / DIFFUSERS_FILE)
    assert all(tensor.equal(saved[name]) for name, tensor in best.items())
    printed = capfd.readouterr().out
    assert (
        f"best on held-out pictures: step 2, with 0.5000 (last step 0.9500); those weights are in {run}/best" in printed
    )
    fitted = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "training_pictures"]
    assert [line["step"] for line in fitted] == [*CURVE]


@pytest.mark.usefixtures("curve")
def test_a_run_ends_early_and_one_that_was_killed_there_does_too(
    tmp_path: Path, warm_cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    samples = {"samples__prompts": ["a cat"], "samples__num_steps": 1, "samples__every": 100}
    ended = train(tmp_path / "whole", warm_cache, validation__patience=2, **samples)
    assert ended.finished and ended.step == 4 and ended.last_loss is not None and ended.last_loss.mean == 0.7
    assert names(tmp_path / "whole") == ["checkpoint-000002", "checkpoint-000004"]
    assert "no new lowest for 2 validations (validation.patience): the run ends here" in capfd.readouterr().out

    drawn = [line for line in read_metrics(tmp_path / "whole" / "run" / "metrics.jsonl") if line["kind"] == "sample"]
    assert [line["step"] for line in drawn] == [0, 4], "a last round, as at the end of all steps"
    assert (tmp_path / "whole" / "run" / "before_after.png").is_file()

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Services, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", warm_cache, validation__patience=2)
    again = train(tmp_path / "killed", warm_cache, validation__patience=2, resume_from_checkpoint="latest")
    assert again.finished and again.step == 4
    printed = capfd.readouterr().out
    assert "finished already, at step 4 of 6" in printed and "To train longer: validation.patience=null." in printed
    whole, killed_files = (load_file(tmp_path / name / "run" / DIFFUSERS_FILE) for name in ("whole", "killed"))
    assert all(tensor.equal(whole[name]) for name, tensor in killed_files.items())
    assert validations(tmp_path / "killed") == validations(tmp_path / "whole")

    longer = train(tmp_path / "killed", warm_cache, resume_from_checkpoint="latest")
    assert longer.finished and longer.step == 6, "without patience it goes on"


@pytest.mark.usefixtures("curve")
def test_set_back_from_the_best_step_its_files_are_those_of_the_best_left(tmp_path: Path, warm_cache: Path) -> None:
    of_four = {"checkpoints_total_limit": "null", "max_train_steps": 4}
    train(tmp_path, warm_cache, **of_four, checkpointing_steps=1)
    assert step_in(tmp_path / "run" / "best") == 2
    train(tmp_path, warm_cache, **of_four, checkpointing_steps=4, resume_from_checkpoint="checkpoint-000001",
          validation__every=3)  # fmt: skip
    assert step_in(tmp_path / "run" / "best") == 3, "0.6 at step 3 is the lowest that this course has measured"
