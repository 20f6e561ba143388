"""contract.md section 1: the commands, typed as they stand there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.runs import DEMO_TRAIN, TINY_MODEL, overrides, pixtune, run, write_config

ACCELERATE_LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1"]
CONFIG = ["--config", "./train_configs/train_lora.yaml"]


@pytest.mark.parametrize(
    "command", [[*ACCELERATE_LAUNCH, "train.py", *CONFIG], [sys.executable, "train.py", *CONFIG]], ids=["C1", "C7"]
)
def test_train_lora_by_launcher_and_by_python(tmp_path: Path, command: list[str]) -> None:
    words = overrides(tmp_path / "run", tmp_path / "cache", resume_from_checkpoint="null", lr_warmup_steps=0)
    outcome = run([*command, *words])
    assert outcome.returncode == 0, outcome.stdout
    with safe_open(tmp_path / "run" / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert all(name.startswith("transformer.transformer_blocks.") for name in file.keys())  # noqa: SIM118
        metadata = file.metadata()
    assert json.loads(metadata["lora_adapter_metadata"])["transformer.r"] == 4
    assert metadata["pixtune.base_model"] == str(TINY_MODEL)
    assert (tmp_path / "run" / "report.html").is_file()


def test_c8_validate_dataset_has_an_exit_code(tmp_path: Path) -> None:
    script = [sys.executable, "utils/validate_dataset.py", "--path"]
    assert run([*script, str(DEMO_TRAIN)]).returncode == 0
    (tmp_path / "lonely.png").write_bytes(next(DEMO_TRAIN.glob("*.png")).read_bytes())
    outcome = run([*script, str(tmp_path)])
    assert outcome.returncode == 1
    assert "lonely" in outcome.stdout


def test_errors_are_one_block_without_a_traceback(tmp_path: Path) -> None:
    words = overrides(tmp_path / "run", tmp_path / "cache", rankk=4, learning_rate="fast", data_config__img_dir="/nope")
    outcome = pixtune("train", "--config", write_config(tmp_path), *words)
    assert outcome.returncode == 1
    assert "Traceback" not in outcome.stdout
    for fault in ("rankk", "did you mean", "learning_rate", "fast", "/nope"):
        assert fault in outcome.stdout, f"{fault} is missing in:\n{outcome.stdout}"
    assert not (tmp_path / "run").exists()


def test_sample_and_export_work_on_what_training_wrote(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert pixtune("train", "--config", config, *overrides(tmp_path / "run", tmp_path / "cache")).returncode == 0
    drawn = pixtune(
        "sample", "--model", TINY_MODEL, "--prompt", "red heart, twemoji style", "--output", tmp_path / "pictures",
        "--lora", tmp_path / "run" / "pytorch_lora_weights.safetensors", "--steps", 2, "--width", 64, "--height", 96,
        "--weights-format", "fp32",
    )  # fmt: skip
    assert drawn.returncode == 0, drawn.stdout
    from PIL import Image

    assert Image.open(tmp_path / "pictures" / "000-seed0.png").size == (64, 96)
    exported = pixtune("export", tmp_path / "run" / "checkpoint-000004", "--output", tmp_path / "exported")
    assert exported.returncode == 0, exported.stdout
    for name in ("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"):
        assert read(tmp_path / "exported" / name) == read(tmp_path / "run" / name)


def read(path: Path) -> tuple[dict[str, str], dict[str, list[float]]]:
    """Metadata and values of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name).flatten().tolist() for name in file.keys()}  # noqa: SIM118
