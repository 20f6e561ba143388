"""A whole run with its modulation layers off the device: steps, validation, pictures, and going on after a stop."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pixtune.train
from pixtune.config import load_config
from pixtune.fit.modulation import StepsAhead, table_of
from pixtune.metrics import read_metrics
from tests.runs import DEMO_TRAIN, ROOT, overrides

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(params=["tiny-qwen-image", "tiny-flux"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Trains with a table of so many rows (0: without) and returns the LoRA and the metrics by step and kind."""
    decide_plan, pictures = pixtune.train.decide_plan, tmp_path / "pictures"
    pictures.mkdir()
    for path in sorted(DEMO_TRAIN.iterdir())[:16]:
        shutil.copy(path, pictures)

    def train(
        name: str, num_rows: int, **changes: object
    ) -> tuple[dict[str, torch.Tensor], dict[tuple[str, int], float]]:
        monkeypatch.setattr(
            pixtune.train, "decide_plan", lambda *args: replace(decide_plan(*args), modulation_rows=num_rows)
        )
        settings = {
            "pretrained_model_name_or_path": ROOT / "assets" / request.param, "max_train_steps": 6,
            "data_config.img_dir": pictures, "data_config.max_text_tokens": 16,
            "gradient_accumulation_steps": 2, "validation.held_out": 0.2, "validation.every": 3,
            "samples.prompts": "['red heart, twemoji style']", "samples.num_steps": 5, "samples.every": 9,
            "data_config.caption_dropout_rate": 0.3, "resume_from_checkpoint": "latest", "logging_steps": 1, **changes,
        }  # fmt: skip
        words = overrides(tmp_path / name, tmp_path / "cache", **{k.replace(".", "__"): v for k, v in settings.items()})
        pixtune.train.train(load_config(None, words))
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        losses = {(line["kind"], line["step"]): line["loss"] for line in lines if "loss" in line}
        return load_file(tmp_path / name / LORA), losses

    return train


def test_a_run_is_the_same_with_modulation_ahead(run: Any) -> None:
    """A step takes 4 samples and one row is for clean pictures, so 9 rows last for 2 steps; a picture takes 5 or 10."""
    plain, plain_losses = run("plain", 0)
    ahead, ahead_losses = run("ahead", 9)
    assert ahead_losses.keys() == plain_losses.keys() and ("validation", 3) in ahead_losses
    for place, loss in plain_losses.items():
        assert ahead_losses[place] == pytest.approx(loss, rel=1e-4), place
    for name, tensor in plain.items():
        torch.testing.assert_close(ahead[name], tensor, rtol=0.02, atol=2e-4)


def test_going_on_in_the_middle_of_a_stretch_is_exact(run: Any) -> None:
    whole, losses = run("whole", 20)  # stretches of 4 steps
    run("parts", 20, max_train_steps=3)
    parts, parts_losses = run("parts", 20)
    assert parts_losses == losses
    assert all(parts[name].equal(tensor) for name, tensor in whole.items())


def test_stretches_begin_at_fixed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[list[float]] = []

    class Table:
        num_rows, purpose = 7, None

        def compute(self, embed: Any, purpose: object) -> None:
            self.purpose = purpose
            announced.append(embed().tolist())

    class Family:
        def embed_time(self, transformer: object, sigmas: torch.Tensor, text: object, guidance: float) -> torch.Tensor:
            return sigmas

    table = Table()
    monkeypatch.setattr("pixtune.fit.modulation.table_of", lambda transformer: table)
    ahead = StepsAhead(
        torch.nn.Identity(), Family(), lambda step: (torch.tensor([step, step + 0.5]), {}), 2, 8, 1.0,
        torch.device("cpu"),
    )  # type: ignore[arg-type] # fmt: skip
    for step in (4, 5, 6, 7):
        ahead.reach(step)
    assert announced == [[3.0, 3.5, 4.0, 4.5, 5.0, 5.5], [6.0, 6.5, 7.0, 7.5]]


def test_a_model_with_its_modulation_in_place_has_no_table() -> None:
    assert table_of(torch.nn.Identity()) is None
