"""All weights: resumed bit for bit, exported as a model that the stock pipeline loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pixtune.checkpoint import checkpoint_path, joined, load_checkpoint
from tests.runs import ROOT, TINY_MODEL, overrides, pixtune, write_config

WAYS = {
    "rounded": {"mixed_precision": "bf16", "weight_update": "stochastic_rounding"},
    "masters": {"mixed_precision": "bf16", "weight_update": "fp32_master"},
    "fp32": {"mixed_precision": "'no'"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, way: str) -> None:
    config, ends = write_config(tmp_path), {"whole": [4], "parts": [2, 4]}
    for name, stops in ends.items():
        for stop in stops:
            words = overrides(
                tmp_path / name, tmp_path / "cache", method="full", learning_rate=1e-5, max_train_steps=stop,
                checkpointing_steps=2, resume_from_checkpoint="latest", **WAYS[way],
            )  # fmt: skip
            outcome = pixtune("train", "--config", config, *words)
            assert outcome.returncode == 0, outcome.stdout
    assert "going on after step 2" in outcome.stdout
    whole, parts = (load_checkpoint(checkpoint_path(tmp_path / name, 4)) for name in ends)
    early = load_checkpoint(checkpoint_path(tmp_path / "whole", 2))
    for stem in ("transformer", "optimizer"):
        one, other = joined(whole.tensors, stem), joined(parts.tensors, stem)
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one), f"{stem} differs"
        assert any(not one[name].equal(tensor) for name, tensor in joined(early.tensors, stem).items())
    assert whole.record["optimizer_plain"] == parts.record["optimizer_plain"]

    trained = joined(whole.tensors, "transformer")
    assert {tensor.dtype for tensor in trained.values()} == {torch.bfloat16 if way == "rounded" else torch.float32}
    base = load_base(TINY_MODEL)
    changed = sum(not trained[name].float().equal(base[name].float()) for name in base)
    assert changed > 0.8 * len(base), "all but what the last block makes of the text gets a gradient"
    exported = load_base(tmp_path / "whole" / "model")
    assert all(exported[name].equal(trained[name].to(exported[name].dtype)) for name in trained)


def load_base(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: t
        for file in sorted((folder / "transformer").glob("*.safetensors"))
        for name, t in load_file(file).items()
    }


def test_the_exported_model_is_whole_and_an_export_of_the_checkpoint_equals_it(tmp_path: Path) -> None:
    from diffusers import QwenImagePipeline

    words = overrides(tmp_path / "run", tmp_path / "cache", method="full", mixed_precision="bf16", max_train_steps=1)
    outcome = pixtune("train", "--config", write_config(tmp_path), *words)
    assert outcome.returncode == 0, outcome.stdout
    model = tmp_path / "run" / "model"
    pipeline = QwenImagePipeline.from_pretrained(model)
    assert pipeline.transformer is not None and pipeline.text_encoder is not None and pipeline.vae is not None
    about = json.loads((model / "pixtune.json").read_text())
    assert about["step"] == 1 and about["base_model"] == str(TINY_MODEL)
    assert not list((tmp_path / "run").glob(".model*")), "half-written"

    exported = pixtune("export", tmp_path / "run" / "checkpoint-000001", "--output", tmp_path / "again")
    assert exported.returncode == 0, exported.stdout
    one, other = load_base(model), load_base(tmp_path / "again" / "model")
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("model", ["tiny-flux", "tiny-qwen-image-edit"])
def test_every_family_trains_all_weights(tmp_path: Path, model: str) -> None:
    words = overrides(
        tmp_path / "run", tmp_path / "cache", pretrained_model_name_or_path=ROOT / "assets" / model, method="full",
        max_train_steps=1, random_weights=True, data_config__allow_missing_controls=True,
    )  # fmt: skip
    outcome = pixtune("train", "--config", write_config(tmp_path), *words)
    assert outcome.returncode == 0, outcome.stdout
    assert (tmp_path / "run" / "model" / "model_index.json").is_file()


def test_lora_keys_with_all_weights_are_refused(tmp_path: Path) -> None:
    words = overrides(tmp_path / "run", tmp_path / "cache", method="full", lora_alpha=4)
    outcome = pixtune("train", "--config", write_config(tmp_path), *words)
    assert outcome.returncode == 1 and "lora_alpha given and method is full" in outcome.stdout
