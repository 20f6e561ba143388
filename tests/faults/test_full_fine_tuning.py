"""All weights: resumed bit for bit, however memory is saved, and exported as a model that the stock pipeline loads."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pixtune import assembly
from pixtune.config.load import load_config
from pixtune.storage.checkpoint import Checkpoint, joined, load_checkpoint
from pixtune.storage.checkpoint_state import checkpoint_path
from pixtune.tracking.metrics import read_metrics
from tests.runs import ROOT, TINY_MODEL, overrides, pixtune, write_config
from tests.shallow import shallow_model

training = import_module("pixtune.train")  # the package has a function of that name
WAYS = {
    "rounded": {"mixed_precision": "bf16", "weight_update": "stochastic_rounding"},
    "masters": {"mixed_precision": "bf16", "weight_update": "fp32_master"},
    "fp32": {"mixed_precision": "'no'"},
}
OPTIMIZERS = {"rounded": "adamw", "masters": "adafactor", "fp32": "muon"}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, warm_cache: Path, way: str) -> None:
    config, ends = write_config(tmp_path), {"whole": [4], "parts": [2, 4]}
    for name, stops in ends.items():
        for stop in stops:
            words = overrides(
                tmp_path / name, warm_cache, method="full", learning_rate=1e-5, max_train_steps=stop,
                checkpointing_steps=2, resume_from_checkpoint="latest", optimizer=OPTIMIZERS[way],
                **WAYS[way],
            )  # fmt: skip
            outcome = pixtune("train", "--config", config, *words)
            assert outcome.returncode == 0, outcome.stdout
    assert "resuming after step 2" in outcome.stdout
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
    base = load_base(shallow_model("tiny-qwen-image"))
    changed = sum(not trained[name].float().equal(base[name].float()) for name in base)
    assert changed > 0.8 * len(base), "all but what the last block makes of the text gets a gradient"
    exported = load_base(tmp_path / "whole" / "model")
    assert all(exported[name].equal(trained[name].to(exported[name].dtype)) for name in trained)


SAVINGS: dict[str, tuple[str, dict[str, object]]] = {  # of memory: which weights, and what the plan says
    "recomputed": ("rounded", {"recomputed_blocks": 1}),
    "fused": ("rounded", {"fused_step": True}),
    "states on the host": ("rounded", {"states_on_host": True, "optimizer": "adamw_8bit"}),
    "copies on the host": ("masters", {"states_on_host": True}),
    "all": ("masters", {"states_on_host": True, "fused_step": True, "recomputed_blocks": 1}),
    "all in 8 bits": (
        "rounded",
        {"states_on_host": True, "fused_step": True, "recomputed_blocks": 99, "optimizer": "adamw_8bit"},
    ),
}


def train_here(
    folder: Path, cache_dir: Path, name: str, way: str, steps: int, planned: Mapping[str, object], **changes: object
) -> Checkpoint:
    """A run in this process whose plan is changed; its last checkpoint."""
    decide: Any = assembly.decide_plan
    words = overrides(
        folder / name, cache_dir, method="full", learning_rate=1e-5, max_train_steps=steps,
        resume_from_checkpoint="latest", **{"max_grad_norm": 0.01} | WAYS[way] | changes,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "decide_plan", lambda *args: replace(decide(*args), **planned))
        training.train(load_config(None, words))
    return load_checkpoint(checkpoint_path(folder / name, steps))


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    for stem in ("transformer", "optimizer"):
        tensors, others = joined(one.tensors, stem), joined(other.tensors, stem)
        assert tensors.keys() == others.keys()
        assert all(tensors[name].equal(others[name]) for name in tensors), f"{stem} differs"
    assert one.record["optimizer_plain"] == other.record["optimizer_plain"]


def losses(folder: Path) -> list[tuple[float, float]]:
    """And gradient norms, of all steps."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [(line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "step"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Callable[..., tuple[Path, Checkpoint]]:
    """Runs of three steps that save no memory, by their weights and optimizer, each taken once."""
    folder = tmp_path_factory.mktemp("plain")

    @functools.cache
    def run(way: str, optimizer: str | None) -> tuple[Path, Checkpoint]:
        planned, name = {} if optimizer is None else {"optimizer": optimizer}, f"{way} {optimizer}"
        return folder / name, train_here(folder, warm_cache, name, way, 3, planned)

    return run


@pytest.mark.parametrize("saving", SAVINGS)
def test_saving_memory_changes_neither_losses_nor_weights_nor_states(
    tmp_path: Path, warm_cache: Path, saving: str, plain: Callable[..., tuple[Path, Checkpoint]]
) -> None:
    way, planned = SAVINGS[saving]
    plain_run, expected = plain(way, planned.get("optimizer"))
    train_here(tmp_path, warm_cache, "parts", way, 1, planned)
    assert_same(train_here(tmp_path, warm_cache, "parts", way, 3, planned), expected)
    assert losses(tmp_path / "parts") == losses(plain_run)
    assert all(norm > 0.01 for _, norm in losses(plain_run)), "clipped"


STREAMED = {"states_on_host": True, "fused_step": True, "recomputed_blocks": 99, "streamed_blocks": 5}
"""All five blocks of the small model wait in host memory, and three of them find room on the device."""


def test_weights_may_wait_in_host_memory(tmp_path: Path, warm_cache: Path) -> None:
    """Losses, held-out losses, weights, states and the exported model are those of weights that stay, resumed too."""
    changes = {"pretrained_model_name_or_path": TINY_MODEL, "validation__held_out": 0.3, "validation__every": 1}
    stay = train_here(tmp_path, warm_cache, "stay", "masters", 2, {"fused_step": True}, **changes)
    train_here(tmp_path, warm_cache, "wait", "masters", 1, STREAMED, **changes)
    wait = train_here(tmp_path, warm_cache, "wait", "masters", 2, STREAMED, **changes)
    assert_same(wait, stay)
    assert losses(tmp_path / "wait") == losses(tmp_path / "stay")
    held_out = [
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if line["kind"] == "validation"]
        for name in ("stay", "wait")
    ]
    assert held_out[0] == held_out[1] and len(held_out[0]) >= 2
    one, other = (load_base(tmp_path / name / "model") for name in ("stay", "wait"))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("clip", [0, 0.01])
def test_compiled_blocks_train_all_weights(
    tmp_path: Path, warm_cache: Path, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced with their backward pass and run by torch's own kernels: only the order of sums in fp32 differs."""
    plain = train_here(tmp_path, warm_cache, "plain", "fp32", 2, {}, max_grad_norm=clip)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    planned = {"compile": True, "fused_step": True, "recomputed_blocks": 1}
    compiled = train_here(tmp_path, warm_cache, "compiled", "fp32", 2, planned, max_grad_norm=clip)
    figures = zip(losses(tmp_path / "plain"), losses(tmp_path / "compiled"), strict=True)
    for (loss, norm), (own_loss, own_norm) in figures:
        assert own_loss == pytest.approx(loss, rel=1e-5) and own_norm == pytest.approx(norm, rel=1e-4)
    one, other = joined(plain.tensors, "transformer"), joined(compiled.tensors, "transformer")
    # AdamW's first steps are as long as the learning rate, whichever way a gradient near zero points.
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 4e-5


def load_base(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: t
        for file in sorted((folder / "transformer").glob("*.safetensors"))
        for name, t in load_file(file).items()
    }


def test_the_exported_model_is_whole_and_an_export_of_the_checkpoint_equals_it(
    tmp_path: Path, warm_cache: Path
) -> None:
    from diffusers import QwenImagePipeline

    words = overrides(tmp_path / "run", warm_cache, method="full", mixed_precision="bf16", max_train_steps=1)
    outcome = pixtune("train", "--config", write_config(tmp_path), *words)
    assert outcome.returncode == 0, outcome.stdout
    model = tmp_path / "run" / "model"
    pipeline = QwenImagePipeline.from_pretrained(model)
    assert pipeline.transformer is not None and pipeline.text_encoder is not None and pipeline.vae is not None
    about = json.loads((model / "pixtune.json").read_text())
    assert about["step"] == 1 and about["base_model"] == TINY_MODEL.name
    assert not list((tmp_path / "run").glob(".model*")), "half-written"

    exported = pixtune("export", tmp_path / "run" / "checkpoint-000001", "--output", tmp_path / "again")
    assert exported.returncode == 0, exported.stdout
    one, other = load_base(model), load_base(tmp_path / "again" / "model")
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("model", ["tiny-flux", "tiny-qwen-image-edit"])
def test_every_family_trains_all_weights(tmp_path: Path, warm_cache: Path, model: str) -> None:
    words = overrides(
        tmp_path / "run", warm_cache, pretrained_model_name_or_path=ROOT / "assets" / model, method="full",
        max_train_steps=1, random_weights=True, data_config__allow_missing_controls=True,
    )  # fmt: skip
    outcome = pixtune("train", "--config", write_config(tmp_path), *words)
    assert outcome.returncode == 0, outcome.stdout
    assert (tmp_path / "run" / "model" / "model_index.json").is_file()


def test_lora_keys_with_all_weights_are_refused(tmp_path: Path, warm_cache: Path) -> None:
    words = overrides(tmp_path / "run", warm_cache, method="full", lora_alpha=4)
    outcome = pixtune("train", "--config", write_config(tmp_path), *words)
    assert outcome.returncode == 1 and "lora_alpha given and method is full" in outcome.stdout
