"""Swapped captions are found by the base model before the first step, and pictures can be left out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pixtune import train as training
from pixtune.config import load_config
from pixtune.tracking.metrics import read_metrics
from tests.runs import DEMO_TRAIN, TINY_MODEL, overrides, write_config

SWAPPED = ("avocado", "birthday-cake", "rooster")


def train(folder: Path, cache: Path, pictures: Path, **changes: Any) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    settings = {
        "pretrained_model_name_or_path": TINY_MODEL, "data_config__img_dir": pictures, "data_config__img_size": 128,
        "max_train_steps": 1, **changes,
    }  # fmt: skip
    training.train(load_config(write_config(folder), overrides(folder / "run", cache, **settings)))
    return read_metrics(folder / "run" / "metrics.jsonl")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's pictures, three of them with each other's captions."""
    folder = tmp_path_factory.mktemp("swapped") / "pictures"
    shutil.copytree(DEMO_TRAIN, folder)
    captions = [(folder / f"{name}.txt").read_text() for name in SWAPPED]
    for name, caption in zip(SWAPPED, captions[1:] + captions[:1], strict=True):
        (folder / f"{name}.txt").write_text(caption)
    return folder


def test_swapped_captions_are_the_worst_suspects_and_are_named(
    tmp_path: Path, warm_cache: Path, pictures: Path, capfd: Any
) -> None:
    (line,) = [line for line in train(tmp_path, warm_cache, pictures, validation__judge_captions="true")
               if line["kind"] == "captions"]  # fmt: skip
    worst, swapped = list(line["gains"])[:5], {f"{name}.png" for name in SWAPPED}
    assert len(line["gains"]) == 48 and swapped <= set(worst)
    assert {entry["name"] for entry in line["suspects"]} >= {worst[0]}
    printed = capfd.readouterr().out
    assert "captions fit their pictures hardly better than other pictures' captions do" in printed
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Captions that look wrong" in page and (tmp_path / "run" / "suspects" / "00.png").is_file()
    names = ",".join(f"{name}.png" for name in SWAPPED)
    assert all(line["kind"] != "captions" for line in train(
        tmp_path / "without", warm_cache, pictures, data_config__exclude=f"[{names}]"))  # fmt: skip
    assert "data: 45 pictures in 1 sizes" in capfd.readouterr().out
