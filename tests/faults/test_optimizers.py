"""A run goes on with each way of keeping states from a checkpoint bit for bit, and looks between steps change none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pixtune.tracking.metrics import FILE_NAME, read_metrics
from tests.runs import overrides, pixtune, write_config

LOOKS: dict[str, object] = {
    "validation__held_out": 0.1, "validation__num_draws": 1, "validation__every": 1, "samples__every": 2,
    "samples__prompts": "['red heart']", "samples__num_steps": 1, "samples__guidance_scale": 1.0,
}  # fmt: skip
NO_LOOKS: dict[str, object] = {"validation__held_out": 0.1, "validation__num_draws": 1, "validation__every": 99}
RUNS: dict[str, tuple[str | None, dict[str, object]]] = {
    "prodigy": (None, {"learning_rate": 1, "lr_scheduler": "rex", "lr_floor": 0.1}),
    "adamw_schedule_free": ("schedulefree", {"learning_rate": 1e-2, "lr_warmup_share": 0.5}),
    "prodigy_schedule_free": ("prodigyplus", {"learning_rate": 1, "prodigy__d0": 1e-4}),
}
"""Optimizers, with the module of a package that each needs, and settings of a run: one with a value for the run as a
whole, one whose average is the result, and one with both. `test_full_fine_tuning.py` has the others."""


@pytest.mark.parametrize("name", RUNS)
def test_resumed_and_looked_at_or_not_a_run_is_the_same(name: str, tmp_path: Path, warm_cache: Path) -> None:
    module, settings = RUNS[name]
    if module:
        pytest.importorskip(module)
    config = write_config(tmp_path)

    def run(folder: Path, **changes: object) -> list[dict[str, Any]]:
        words = overrides(
            folder, warm_cache, optimizer=name, train_batch_size=1, gradient_accumulation_steps=2,
            checkpointing_steps=2, max_train_steps=3, **{**settings, **changes},
        )  # fmt: skip
        result = pixtune("train", "--config", config, *words)
        assert result.returncode == 0, result.stdout
        return [line for line in read_metrics(folder / FILE_NAME) if line["kind"] == "step"]

    whole, later = tmp_path / "whole", tmp_path / "later"
    lines = run(whole, **LOOKS)
    shutil.copytree(whole / "checkpoint-000002", later / "checkpoint-000002")
    shutil.copy(whole / FILE_NAME, later)
    again = run(later, resume_from_checkpoint="latest", **NO_LOOKS)
    assert [line["loss"] for line in again] == [line["loss"] for line in lines] and len(lines) == 3
    files = sorted(path.name for path in (whole / "checkpoint-000003").glob("*.safetensors"))
    assert len(files) >= 2
    for file in files:
        one, other = (load_file(folder / "checkpoint-000003" / file) for folder in (whole, later))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), file
    if name.startswith("prodigy"):
        assert [line["d"] for line in again] == [line["d"] for line in lines]
        assert lines[-1]["d"] >= lines[0]["d"] >= 1e-6
        assert "Step size" in (whole / "report.html").read_text()
    if name.endswith("schedule_free"):
        result, raw = (
            load_file(whole / f"{stem}.safetensors") for stem in ("pytorch_lora_weights", "raw_lora_weights")
        )
        assert result.keys() == raw.keys()
        assert not any(torch.equal(result[key], raw[key]) for key in result if "lora_B" in key and raw[key].any())
    plain = json.loads((whole / "checkpoint-000003" / "state.json").read_text())["record"]["plan"]
    assert plain["optimizer"] == name
