"""Runs with a LoKr and a DoRA: killed, resumed to the bit, with all that can be beside them, and exported."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

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


def prepare(weights_format: str, killed_in: int | None = None) -> None:
    """Has a CPU's plan hold the weights in 4 bits, which it never chooses, or a run end in the midst of a step."""
    choice: Any = import_module("pixtune.plan.choice")
    training: Any = import_module("pixtune.train")  # the package has a function of that name
    choose, take = choice._choose_on_cpu, training.train_step

    def choose_format(situation: object) -> object:
        chosen = choose(situation)
        return replace(chosen, rung=replace(chosen.rung, weights_format=weights_format))

    def take_step(run: object, micro_batches: object, step: int) -> object:
        outcome = take(run, micro_batches, step)
        if step == killed_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return outcome

    choice._choose_on_cpu, training.train_step = choose_format, take_step


def train(folder: Path, cache: Path, way: tuple[str, str], killed_in: int | None = None, **changes: Any) -> str:
    """Trains on quantized weights, with an average and a training adapter; returns what it printed."""
    name, weights_format = way
    settings = {
        **KINDS[name], "max_train_steps": NUM_STEPS, "checkpointing_steps": 2, "quantize": "true", "ema__decay": 0.5,
        "training_adapter__path": write_adapter(folder / "adapter.safetensors"), "resume_from_checkpoint": "latest",
        **changes,
    }  # fmt: skip
    words = overrides(folder / "run", cache, **settings)
    before = partial(prepare, weights_format, killed_in)
    outcome = pixtune("train", "--config", write_config(folder), *words, before=before)
    assert outcome.returncode == (0 if killed_in is None else -signal.SIGKILL), outcome.stdout
    return outcome.stdout


@pytest.mark.parametrize("way", [("lokr", "nf4"), ("dora", "nf4"), ("lokr", "int8")], ids=" in ".join)
def test_killed_and_resumed_it_is_the_same_to_the_bit(way: tuple[str, str], tmp_path: Path, warm_cache: Path) -> None:
    """The run in one go is also looked at, which changes none of its steps."""
    name, weights_format = way
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    looks: dict[str, Any] = {"samples__prompts": "['a cat']", "samples__num_steps": 1, "samples__guidance_scale": 1.0,
             "samples__strengths": "[0.0, 0.5]"}  # fmt: skip
    printed = train(one, warm_cache, way, samples__every=2, **looks)
    assert f"{ {'lokr': 'LoKr', 'dora': 'DoRA'}[name] }: 8 layers" in printed and "of ranks" in printed
    train(other, warm_cache, way, killed_in=2)
    assert "resuming after step 2" in train(other, warm_cache, way)
    for folder in (one, other):
        record = json.loads((checkpoint_path(folder / "run", NUM_STEPS) / "state.json").read_text())["record"]
        assert record["plan"]["weights_format"] == weights_format
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
    if weights_format != "nf4":
        return
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
