"""Runs with an average and a training adapter: their steps are a plain run's, and both are resumed to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixtune.storage.checkpoint_state import checkpoint_path
from pixtune.tracking.metrics import read_metrics
from tests.runs import overrides, pixtune, write_config
from tests.shallow import shallow_model

NUM_STEPS = 4
LORA, RAW = "pytorch_lora_weights.safetensors", "raw_lora_weights.safetensors"
AVERAGED = {"ema__decay": 0.6}
LOOKED_AT = {
    "validation__held_out": 0.05, "validation__every": 1, "validation__num_draws": 1, "samples__prompts": "['a cat']",
    "samples__every": 2, "samples__num_steps": 2, "samples__guidance_scale": 1.0,
    "samples__strengths": "[0.5, 1.0]",
}  # fmt: skip
UNSEEN = {**LOOKED_AT, "validation__every": 100, "samples__prompts": "[]", "samples__strengths": "[1.0]"}


def train(folder: Path, cache: Path, **changes: object) -> Path:
    """The output folder of a finished run."""
    words = overrides(folder / "run", cache, **{"max_train_steps": NUM_STEPS, "checkpointing_steps": 1, **changes})
    outcome = pixtune("train", "--config", write_config(folder), *words)
    assert outcome.returncode == 0, outcome.stdout
    return folder / "run"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Path:
    """A LoRA that a run has trained."""
    run = train(tmp_path_factory.mktemp("adapter"), warm_cache, max_train_steps=3, learning_rate=1e-2, seed=5)
    return run / LORA


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path, adapter: Path) -> Path:
    """A run in one go, with everything on."""
    folder = tmp_path_factory.mktemp("whole")
    return train(folder, warm_cache, training_adapter__path=adapter, **AVERAGED, **LOOKED_AT)


FLAGS = ("--guidance", 1.0, "--width", 64, "--height", 64, "--weights-format", "fp32")


def saved(run: Path, file: str, step: int = NUM_STEPS) -> dict[str, Tensor]:
    return load_file(checkpoint_path(run, step) / file)


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_the_files_hold_the_formulas_average_and_the_last_weights(whole: Path) -> None:
    """Worked out from the weights of every step's checkpoint; the first one's come from one with a decay of 0.1."""
    average = {name: weight.double() for name, weight in saved(whole, LORA, 1).items()}
    for step in range(1, NUM_STEPS):
        decay = min(0.6, (1 + step) / (10 + step))
        raw = saved(whole, RAW, step + 1)
        average = {name: decay * average[name] + (1 - decay) * raw[name].double() for name in average}
        for name, found in saved(whole, LORA, step + 1).items():
            torch.testing.assert_close(found.double(), average[name], rtol=1e-5, atol=1e-8)
    assert not differing(load_file(whole / LORA), saved(whole, LORA))
    assert not differing(load_file(whole / RAW), saved(whole, RAW))
    assert differing(load_file(whole / LORA), load_file(whole / RAW))


def test_looked_at_or_not_and_resumed_its_steps_are_the_same(
    tmp_path: Path, warm_cache: Path, whole: Path, adapter: Path
) -> None:
    """The second run neither samples nor validates, ends early, and goes on with the adapter's file elsewhere."""
    settings = {"training_adapter__path": adapter, **AVERAGED, **UNSEEN, "ema__on_host": "true"}
    run = train(tmp_path, warm_cache, max_train_steps=2, **settings)
    moved = shutil.copy(adapter, tmp_path / "moved.safetensors")
    train(tmp_path, warm_cache, resume_from_checkpoint="latest", **{**settings, "training_adapter__path": moved})
    for file in (LORA, RAW, "optimizer.safetensors"):
        assert not differing(saved(run, file), saved(whole, file)), file


def test_the_average_changes_no_step_and_may_be_left_out_on_resuming(
    tmp_path: Path, warm_cache: Path, whole: Path, adapter: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("checkpoint-000003", "checkpoint-000004"))
    settings = {"training_adapter__path": adapter, **UNSEEN, "resume_from_checkpoint": "latest"}
    words = overrides(run, warm_cache, max_train_steps=NUM_STEPS, checkpointing_steps=1, **settings)
    refusal = pixtune("train", "--config", write_config(tmp_path), *words)
    assert refusal.returncode == 1 and "ema.decay: was 0.6, is absent" in refusal.stdout
    train(tmp_path, warm_cache, **settings, resume_with_changes_in="[ema.decay]")
    assert not differing(saved(run, LORA), saved(whole, RAW))
    assert not (run / RAW).exists() and not (checkpoint_path(run, NUM_STEPS) / RAW).exists()


def test_another_adapter_is_another_run(tmp_path: Path, warm_cache: Path, whole: Path, adapter: Path) -> None:
    other, tensors = tmp_path / "other.safetensors", load_file(adapter)
    config = {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.target_modules": ["to_q"]}
    save_file({n: 2 * t for n, t in tensors.items()}, other, {"lora_adapter_metadata": json.dumps(config)})
    settings = {**AVERAGED, **LOOKED_AT, "max_train_steps": NUM_STEPS + 1, "resume_from_checkpoint": "latest"}
    for changed, words in (
        ({"training_adapter__path": other}, "training_adapter: was "),
        ({}, "training_adapter: was "),
        ({"training_adapter__path": adapter, "training_adapter__strength": 0.5}, "training_adapter.strength: was 1.0"),
        ({"training_adapter__path": tmp_path / "none.safetensors"}, "none.safetensors"),
    ):
        refusal = pixtune(
            "train", "--config", write_config(tmp_path), *overrides(whole, warm_cache, **settings, **changed)
        )
        assert refusal.returncode == 1 and words in refusal.stdout, refusal.stdout


def test_samples_are_of_the_average_without_the_adapter(tmp_path: Path, whole: Path) -> None:
    """Pictures that `pixtune sample` draws with the run's LoRA alone are the run's own last ones, at each strength."""
    lines = [line for line in read_metrics(whole / "metrics.jsonl") if line["kind"] == "sample"]
    drawn = {(line["step"], line.get("strength", 1.0)): (whole / line["path"]).read_bytes() for line in lines}
    assert drawn.keys() == {(step, strength) for step in (0, 2, NUM_STEPS) for strength in (0.5, 1.0)}
    model = shallow_model("tiny-qwen-image")
    words = ["a cat", "--model", model, "--lora", whole, "--output", tmp_path, "--steps", 2]
    outcome = pixtune("sample", *words, *FLAGS, "--strength", 0.5, "--strength", 1)
    assert outcome.returncode == 0, outcome.stdout
    found = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert found == {
        "000-seed0-strength0.5.png": drawn[NUM_STEPS, 0.5], "000-seed0-strength1.png": drawn[NUM_STEPS, 1.0]
    }  # fmt: skip
    assert len(set(drawn.values())) == 5, "before the first step the LoRA adds nothing, whatever its strength"
