"""Runs with a LoKr and a DoRA: resumed to the bit, with all that can be beside them, and exported from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from pixtune.storage.checkpoint_state import checkpoint_path
from tests.runs import overrides, pixtune, write_config
from tests.soak.draws import write_adapter

NUM_STEPS = 4
LORA, COMFYUI = "pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"
KINDS: dict[str, dict[str, object]] = {
    "lokr": {"adapter__kind": "lokr", "adapter__lokr_low_rank": "both", "adapter__lokr_factor": 4, "rank": 2,
             "adapter__rank_pattern": "{to_q: 3}"},
    "dora": {"adapter__kind": "dora", "adapter__rslora": "true", "adapter__rank_pattern": "{to_q: 2}"},
}  # fmt: skip


def train(folder: Path, cache: Path, name: str, num_steps: int, **changes: object) -> str:
    """Trains on 8-bit weights, with an average and a training adapter; returns what it printed."""
    settings = {
        **KINDS[name], "max_train_steps": num_steps, "checkpointing_steps": 2, "quantize": "true", "ema__decay": 0.5,
        "training_adapter__path": write_adapter(folder / "adapter.safetensors"), "resume_from_checkpoint": "latest",
        **changes,
    }  # fmt: skip
    outcome = pixtune("train", "--config", write_config(folder), *overrides(folder / "run", cache, **settings))
    assert outcome.returncode == 0, outcome.stdout
    return outcome.stdout


@pytest.mark.parametrize("name", KINDS)
def test_resumed_it_is_the_same_to_the_bit(name: str, tmp_path: Path, warm_cache: Path) -> None:
    """The run in one go is also looked at, which changes none of its steps."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    looks = {"samples__prompts": "['a cat']", "samples__num_steps": 1, "samples__guidance_scale": 1.0,
             "samples__strengths": "[0.0, 0.5]"}  # fmt: skip
    printed = train(one, warm_cache, name, NUM_STEPS, samples__every=2, **looks)
    assert f"{ {'lokr': 'LoKr', 'dora': 'DoRA'}[name] }: 20 layers" in printed and "of ranks" in printed
    train(other, warm_cache, name, 2)
    train(other, warm_cache, name, NUM_STEPS)
    files = sorted(path.name for path in checkpoint_path(one / "run", NUM_STEPS).glob("*.safetensors"))
    assert (
        LORA in files
        and "optimizer.safetensors" in files
        and ("comfyui_dora_scales.safetensors" in files) == (name == "dora")
    )
    for file in files:
        states = [load_file(checkpoint_path(folder / "run", NUM_STEPS) / file) for folder in (one, other)]
        assert states[0].keys() == states[1].keys()
        assert all(states[0][tensor].equal(states[1][tensor]) for tensor in states[0]), file
    start = load_file(checkpoint_path(one / "run", 2) / LORA)
    moved = [not start[tensor].equal(weight) for tensor, weight in load_file(one / "run" / LORA).items()]
    assert sum(moved) > 0.9 * len(moved)
    exported = pixtune("export", checkpoint_path(one / "run", NUM_STEPS), "--output", tmp_path / "files")
    assert exported.returncode == 0, exported.stdout
    for file in (LORA, COMFYUI):
        ours, theirs = load_file(one / "run" / file), load_file(tmp_path / "files" / file)
        assert ours.keys() == theirs.keys() and all(ours[tensor].equal(theirs[tensor]) for tensor in ours)
    with safe_open(one / "run" / LORA, framework="pt") as file_of_lora:
        settings = json.loads(file_of_lora.metadata()["lora_adapter_metadata"])
    assert settings["transformer.peft_type"] == {"lokr": "LOKR", "dora": "LORA"}[name]
    refusal = pixtune(
        "train", "--config", write_config(one),
        *overrides(one / "run", warm_cache, max_train_steps=NUM_STEPS + 1, resume_from_checkpoint="latest", rank=4),
    )  # fmt: skip
    assert refusal.returncode == 1 and "adapter.kind: was" in refusal.stdout, refusal.stdout
