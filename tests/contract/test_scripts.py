"""contract.md section 1: a script names the right one for another's models. What each trains: test_commands.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import ROOT, overrides, python, write_config


def launch(script: str, model: str, folder: Path) -> tuple[int, str]:
    words = overrides(
        folder / "run", folder / "cache", pretrained_model_name_or_path=ROOT / "assets" / model, max_train_steps=1,
        random_weights=True,
    )  # fmt: skip
    outcome = python(script, "--config", write_config(folder), *words)
    return outcome.returncode, outcome.stdout


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
