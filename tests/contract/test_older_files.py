"""What earlier versions wrote still loads: checkpoints resume, LoRA files sample (tests/fixtures/written_by_0.1.0)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pixtune.plan.encoders import PLAINLY, EncoderPlan, without_former_fields
from pixtune.plan.training import TrainingPlan, with_todays_names
from pixtune.storage.checkpoint import read_decision
from tests.runs import ROOT, overrides, pixtune, write_config

WRITTEN = Path(__file__).resolve().parents[1] / "fixtures" / "written_by_0.1.0"
LORA_FILE = "pytorch_lora_weights.safetensors"
RUNS = {  # folder -> the shipped model and what the run changed
    "qwen-image": ("tiny-qwen-image", {"rank": 1}),
    "flux-8-bit": ("tiny-flux", {"rank": 2, "adam8bit": True, "quantize": True}),
}
DRIFT = {"qwen-image": 2e-3, "flux-8-bit": 0.35}
"""Relative to the largest weight, after two steps of Adam, which divides by tiny numbers. Version 0.1.0 encoded four
pictures at once, which rounds latents otherwise by a millionth; 8 bits make 0.22 of that, plain weights 8e-6. Another
CPU may add to it. Resuming without the optimizer's state moves the most distant tensor by 0.8. All measured."""


@pytest.mark.parametrize("name", RUNS)
def test_an_older_checkpoint_resumes_to_the_same_lora(name: str, tmp_path: Path) -> None:
    model, changes = RUNS[name]
    output_dir = tmp_path / "run"
    shutil.copytree(WRITTEN / name / "checkpoint-000002", output_dir / "checkpoint-000002")
    words = overrides(
        output_dir, tmp_path / "cache", pretrained_model_name_or_path=ROOT / "assets" / model,
        checkpointing_steps=2, resume_from_checkpoint="latest", **changes,
    )  # fmt: skip
    result = pixtune("train", "--config", write_config(tmp_path), *words)
    assert result.returncode == 0, result.stdout
    then, now = load_file(WRITTEN / name / LORA_FILE), load_file(output_dir / LORA_FILE)
    assert then.keys() == now.keys()
    for key, tensor in then.items():
        assert torch.allclose(tensor, now[key], rtol=0, atol=DRIFT[name] * float(tensor.abs().max())), key


def test_an_older_lora_samples(tmp_path: Path) -> None:
    result = pixtune(
        "sample", "--model", ROOT / "assets" / "tiny-qwen-image", "--lora", WRITTEN / "qwen-image" / LORA_FILE,
        "--prompt", "a red apple", "--output", tmp_path, "--steps", 2, "--width", 64, "--height", 64,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    (path,) = tmp_path.glob("*.png")
    assert Image.open(path).size == (64, 64)


@pytest.mark.parametrize("name", [*(f"{name}/checkpoint-000002" for name in RUNS), "qwen-image-all-weights"])
def test_the_plans_in_an_older_checkpoint_are_whole(name: str) -> None:
    record = json.loads((WRITTEN / name / "state.json").read_text())["record"]
    plan = read_decision(TrainingPlan, with_todays_names(record["plan"]), "plan")
    assert plan.weights_format == record["plan"]["weights_format"] and plan.captures == record["plan"]["recordings"]
    assert plan.step_form is None, "rounding draws from torch's generator, as it did"
    encoders = record["encoders"]
    assert encoders["caption_batch"] == 4, "what plans no longer have"
    assert read_decision(EncoderPlan, without_former_fields(encoders), "encoders") == PLAINLY
