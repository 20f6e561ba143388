"""Runs whose base is one file: their steps are those of the folder, and either goes on from the other's checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pixtune.storage.checkpoint_state import checkpoint_path
from tests import single_files
from tests.runs import overrides, pixtune, write_config
from tests.shallow import shallow_model

FILES = ("pytorch_lora_weights.safetensors", "optimizer.safetensors")


def train(folder: Path, cache: Path, **changes: object) -> tuple[Path, str]:
    """The output folder of a run, and what it printed."""
    folder.mkdir(exist_ok=True)
    words = overrides(folder / "run", cache, **{"max_train_steps": 4, "checkpointing_steps": 2, **changes})
    outcome = pixtune("train", "--config", write_config(folder), *words)
    return folder / "run", outcome.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Path:
    return train(tmp_path_factory.mktemp("whole"), warm_cache)[0]


def in_one_file(file: Path) -> dict[str, object]:
    return {"pretrained_model_name_or_path": file, "model_parts__others": shallow_model("tiny-qwen-image")}


def test_a_run_from_a_file_goes_on_from_the_folder_to_the_same_bits(
    tmp_path: Path, warm_cache: Path, whole: Path
) -> None:
    tensors = single_files.published(str(shallow_model("tiny-qwen-image")))
    file = single_files.write(single_files.with_prefix(tensors), tmp_path / "16.safetensors")
    train(tmp_path, warm_cache, **in_one_file(file), max_train_steps=2)
    rounded = single_files.write(single_files.fp8_scaled(tensors), tmp_path / "8.safetensors")
    _, refusal = train(tmp_path, warm_cache, **in_one_file(rounded), resume_from_checkpoint="latest")
    assert "base_model" in refusal and "the weights are others" in refusal
    run, printed = train(tmp_path, warm_cache, resume_from_checkpoint="latest")
    for name in FILES:
        ours, theirs = (load_file(checkpoint_path(each, 4) / name) for each in (run, whole))
        assert ours.keys() == theirs.keys(), printed
        assert not [key for key in ours if not torch.equal(ours[key], theirs[key])], name
