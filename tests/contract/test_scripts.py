"""contract.md section 1: each script trains its own models, and names the right script for others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, overrides, run, write_config

EDIT_PAIRS = ROOT / "assets" / "demo-edit" / "train"
STYLE_PICTURES = ROOT / "assets" / "demo-style" / "train"


def launch(script: str, model: str, folder: Path) -> tuple[int, str]:
    words = overrides(
        folder / "run", folder / "cache", pretrained_model_name_or_path=ROOT / "assets" / model, max_train_steps=1,
        random_weights=True,
    )  # fmt: skip
    outcome = run([sys.executable, script, "--config", str(write_config(folder)), *words])
    return outcome.returncode, outcome.stdout


@pytest.mark.parametrize(
    ("script", "model"),
    [("train_4090.py", "tiny-qwen-image"), ("train_flux_lora.py", "tiny-flux")],
    ids=["C2", "C5"],
)
def test_a_script_trains_its_models(tmp_path: Path, script: str, model: str) -> None:
    code, output = launch(script, model, tmp_path)
    assert code == 0, output
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("script", "model", "right"),
    [
        ("train.py", "tiny-flux", "train_flux_lora.py"),
        ("train_flux_lora.py", "tiny-qwen-image-edit", "train_qwen_edit_lora.py"),
        ("train_qwen_edit_lora.py", "tiny-qwen-image", "train.py"),
    ],
)
def test_another_models_script_is_named(tmp_path: Path, script: str, model: str, right: str) -> None:
    code, output = launch(script, model, tmp_path)
    assert code == 1 and "Traceback" not in output
    assert f"Use {right}" in output and model in output
    assert not (tmp_path / "run").exists()


def test_a_text_model_as_base_is_named(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}')
    code, output = launch("train.py", str(tmp_path / "llm"), tmp_path)
    assert code == 1 and "holds one Qwen2ForCausalLM" in output and "not an image pipeline" in output


@pytest.mark.parametrize(
    ("script", "config", "model", "data"),
    [
        ("train_flux_lora.py", "train_flux_config", "tiny-flux", STYLE_PICTURES),
        ("train_qwen_edit_lora.py", "train_lora_qwen_edit", "tiny-qwen-image-edit", EDIT_PAIRS / "images"),
        ("train_full_qwen_image.py", "train_full_qwen_image", "tiny-qwen-image", STYLE_PICTURES),
    ],
    ids=["C5", "C4", "C6"],
)
def test_the_launcher_runs_a_shipped_config(tmp_path: Path, script: str, config: str, model: str, data: Path) -> None:
    """As contract.md has it, with what names the real model and data put in its place."""
    controls = {"data_config__control_dir": EDIT_PAIRS / "control", "data_config__control_size": 64}
    words = overrides(
        tmp_path / "run", tmp_path / "cache", pretrained_model_name_or_path=ROOT / "assets" / model,
        data_config__img_dir=data, max_train_steps=1, resume_from_checkpoint="null", lr_warmup_steps=0,
        **(controls if "edit" in config else {}),
    )  # fmt: skip
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1"]
    outcome = run([*launcher, script, "--config", f"./train_configs/{config}.yaml", *words])
    assert outcome.returncode == 0, outcome.stdout
    written = "model/model_index.json" if "full" in config else "pytorch_lora_weights.safetensors"
    assert (tmp_path / "run" / written).is_file()
