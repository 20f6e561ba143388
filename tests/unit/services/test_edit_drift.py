"""How samples lie to the pictures that they edit: known motions and colours, in the log and in the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from pixtune import train as training
from pixtune.config import load_config
from pixtune.report.page import plan_charts
from pixtune.report.record import read_record
from pixtune.services.edit_drift import measure_drift
from pixtune.tracking.metrics import read_metrics
from tests.runs import ROOT, overrides, write_config

CONTROL = ROOT / "assets" / "known-edit" / "control"


def test_a_shift_and_a_colour_are_measured(tmp_path: Path) -> None:
    control = sorted(CONTROL.glob("*.png"))[0]
    picture = Image.open(control).convert("RGB")
    moved = ImageChops.offset(picture, 3, 4)
    dark = Image.fromarray((np.asarray(moved, dtype=np.int16) - 10).clip(0).astype(np.uint8))
    for name, made in (("same", picture), ("moved", moved), ("dark", dark)):
        made.save(tmp_path / f"{name}.png")
    same = measure_drift(control, tmp_path / "same.png")
    assert same["off_pixels"] == pytest.approx(0, abs=0.05) and same["scale"] == pytest.approx(1, abs=1e-3)
    assert same["is_sure"] and same["color_levels"] == 0
    off = measure_drift(control, tmp_path / "moved.png")
    assert off["is_sure"] and off["off_pixels"] == pytest.approx(5, abs=0.2) and off["color_levels"] < 0.5
    assert measure_drift(control, tmp_path / "dark.png")["color_levels"] == pytest.approx(10, abs=1)


def test_a_run_of_an_edit_model_logs_its_samples_and_draws_curves(tmp_path: Path, warm_cache: Path) -> None:
    words = overrides(
        tmp_path / "run", warm_cache, pretrained_model_name_or_path=ROOT / "assets" / "tiny-qwen-image-edit",
        data_config__img_dir=CONTROL.parent / "images", data_config__control_dir=CONTROL,
        data_config__control_size=64, max_train_steps=1, samples__prompts="[a hat]", samples__num_steps=1,
        samples__controls=f"[[{sorted(CONTROL.glob('*.png'))[0]}]]", samples__guidance_scale=1.0,
    )  # fmt: skip
    assert training.train(load_config(write_config(tmp_path), words)).finished
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "edit_drift"]
    assert [line["step"] for line in lines] == [0, 1]
    charts = {chart.title: chart for chart in plan_charts(read_record(tmp_path / "run"))}
    assert [point[0] for point in charts["Colour of edits"].series[0].points] == [0, 1]
