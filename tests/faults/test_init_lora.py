"""A run that starts from a LoRA: its first loss is the LoRA's, it is resumed to the bit, another file another run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixtune.storage.checkpoint_state import checkpoint_path
from pixtune.tracking.metrics import read_metrics
from pixtune.trained.export import COMFYUI_FILE, DIFFUSERS_FILE
from tests.runs import overrides, pixtune, write_config

FILES = (DIFFUSERS_FILE, "optimizer.safetensors")
MEASURED = {"validation__held_out": 0.05, "validation__every": 100, "validation__num_draws": 1}


def train(folder: Path, cache: Path, **changes: object) -> subprocess.CompletedProcess[str]:
    words = overrides(folder / "run", cache, **{"checkpointing_steps": 1, **MEASURED, **changes})
    return pixtune("train", "--config", write_config(folder), *words)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Path:
    """A run of two steps, whose files the others start from."""
    folder = tmp_path_factory.mktemp("first")
    assert train(folder, warm_cache, max_train_steps=2, learning_rate=1e-2).returncode == 0
    return folder / "run"


def test_it_goes_on_where_the_file_ends_and_is_resumed_to_the_bit(
    tmp_path: Path, warm_cache: Path, first: Path
) -> None:
    """The held-out loss before its first step is the other run's last one. The file may be gone when it is resumed."""
    file = Path(shutil.copy(first / COMFYUI_FILE, tmp_path / "mine.safetensors"))
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    whole = train(tmp_path / "whole", warm_cache, init_lora=file, max_train_steps=3)
    assert whole.returncode == 0 and "starts from mine.safetensors (comfyui names) on 8 layers" in whole.stdout

    def losses(run: Path) -> list[float]:
        return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "validation"]

    assert losses(tmp_path / "whole" / "run")[0] == losses(first)[-1] != losses(first)[0]

    assert train(tmp_path / "resumed", warm_cache, init_lora=file, max_train_steps=1).returncode == 0
    on = {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    other = {name: 2 * tensor for name, tensor in load_file(file).items()}
    save_file(other, other_file := tmp_path / "other.safetensors")
    for changes in ({"init_lora": other_file}, {}):
        refusal = train(tmp_path / "resumed", warm_cache, **on, **changes)
        assert refusal.returncode == 1 and "init_lora: was " in refusal.stdout, refusal.stdout
    save_file(other, file)  # as a run does that goes on elsewhere
    assert train(tmp_path / "resumed", warm_cache, init_lora=file, **{**on, "max_train_steps": 2}).returncode == 0
    file.unlink()
    outcome = train(tmp_path / "resumed", warm_cache, init_lora=file, **on)
    assert outcome.returncode == 0, outcome.stdout
    for name in FILES:
        one, both = (load_file(checkpoint_path(tmp_path / folder / "run", 3) / name) for folder in ("whole", "resumed"))
        assert one.keys() == both.keys() and all(torch.equal(tensor, both[key]) for key, tensor in one.items()), name


def test_a_missing_or_spoiled_file_ends_a_new_run_before_anything_is_encoded(
    tmp_path: Path, first: Path, warm_cache: Path
) -> None:
    tensors = load_file(first / DIFFUSERS_FILE)
    tensors[next(iter(tensors))].fill_(float("nan"))
    save_file(tensors, tmp_path / "spoiled.safetensors")
    for name, words in (("spoiled", "no finite numbers"), ("missing", "init_lora: ")):
        refusal = train(tmp_path, warm_cache, init_lora=tmp_path / f"{name}.safetensors", max_train_steps=1)
        assert refusal.returncode == 1 and words in refusal.stdout and f"{name}.safetensors" in refusal.stdout
        assert not list((tmp_path / "run").glob("checkpoint-*"))
