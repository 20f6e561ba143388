"""A frozen LoRA beside the trained one: on, it is what merging it into the base gives; off, it is not there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pixtune.config import load_config
from pixtune.config.schema import TrainConfig
from pixtune.errors import PixtuneError
from pixtune.families import family_of
from pixtune.planning import footprint_of
from pixtune.storage.model_folder import ModelFolder
from pixtune.trained import adapters
from pixtune.trained.saved_lora import read_saved_lora
from pixtune.trained.training_adapter import TrainingAdapter, check_training_adapter
from tests.runs import overrides, write_config
from tests.unit.engine import tiny

LAYERS = {
    "tiny-qwen-image": ("attn.to_q", "attn.to_out.0", "img_mlp.net.2", "img_mod.1"),
    "tiny-flux": ("attn.to_q", "attn.to_out.0", "ff.net.2", "norm1.linear"),
}
"""Layers of the first block that the adapter is on: two that are trained, one of an MLP, one that makes modulations."""
QWEN = tiny.family_named("tiny-qwen-image")
RANKS, ALPHA, STRENGTH = (3, 2, 5, 1), 6.0, 0.5


def paths(name: str) -> list[str]:
    return [f"transformer_blocks.0.{layer}" for layer in LAYERS[name]]


def write_adapter(path: Path, name: str, model: nn.Module, **changes: Tensor | None) -> Path:
    """A file as PEFT writes it. `changes` replace tensors, or leave them out, by their names with _ for each dot."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for layer, rank in zip(paths(name), RANKS, strict=True):
        rows, columns = model.get_parameter(f"{layer}.weight").shape
        tensors[f"transformer.{layer}.lora_A.weight"] = 0.1 * torch.randn(rank, columns, generator=generator)
        tensors[f"transformer.{layer}.lora_B.weight"] = 0.1 * torch.randn(rows, rank, generator=generator)
    for key in list(tensors):
        if (change := key.replace(".", "_")) in changes:
            value = changes[change]
            del tensors[key]
            tensors |= {} if value is None else {key: value}
    config = {"r": 1, "lora_alpha": ALPHA, "target_modules": paths(name)}
    config["rank_pattern"] = dict(zip(paths(name), RANKS, strict=True))
    metadata = {f"transformer.{key}": value for key, value in config.items()}
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    return path


def loss_and_gradients(name: str, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    velocity = tiny.velocity(name, model)
    velocity.square().mean().backward()
    found = {path: weight.grad for path, weight in adapters.trainable_parameters(model).items()}
    return {"velocity": velocity.detach(), **{path: grad for path, grad in found.items() if grad is not None}}


@pytest.mark.parametrize("name", LAYERS)
def test_on_it_is_merged_into_the_base_and_off_it_is_not_there(name: str, tmp_path: Path) -> None:
    model = tiny.load_model(name)
    file = load_file(path := write_adapter(tmp_path / "adapter.safetensors", name, model))
    merged, plain = tiny.load_model(name), tiny.load_model(name)
    with torch.no_grad():
        for layer, rank in zip(paths(name), RANKS, strict=True):
            down, up = (file[f"transformer.{layer}.lora_{matrix}.weight"] for matrix in "AB")
            merged.get_parameter(f"{layer}.weight").add_(STRENGTH * ALPHA / rank * up @ down)
    for each in (model, merged, plain):
        tiny.attach(name, each)
    trained = adapters.trainable_parameters(model).keys()
    adapter = TrainingAdapter(model, read_saved_lora(path, tiny.family_named(name)).scaled(STRENGTH), torch.float32)
    assert adapters.trainable_parameters(model).keys() == trained, "the adapter is frozen"

    expected, without = loss_and_gradients(name, merged), loss_and_gradients(name, plain)
    assert (expected["velocity"] - without["velocity"]).norm() > 0.01 * without["velocity"].norm()
    before = loss_and_gradients(name, model)
    with adapter.off(), adapter.off():
        off = loss_and_gradients(name, model)
    after = loss_and_gradients(name, model)
    for key in expected:
        for found, wanted in ((before, expected), (off, without)):
            assert (found[key] - wanted[key]).norm() <= 1e-5 * wanted[key].norm(), key
        assert torch.equal(before[key], after[key])


@pytest.mark.parametrize("linear_format", ["int8"])
def test_on_a_quantized_base(linear_format: str, tmp_path: Path) -> None:
    """Products of layers add up, so what the adapter changes in the first layer that it is on can be worked out."""
    name = "tiny-qwen-image"
    path = write_adapter(tmp_path / "adapter.safetensors", name, tiny.load_model(name))
    model = tiny.load_model(name, linear_format)
    tiny.attach(name, model)
    with torch.no_grad():
        without = tiny.velocity(name, model)
        adapter = TrainingAdapter(model, lora := read_saved_lora(path, tiny.family_named(name)), torch.float32)
        inputs = torch.randn(7, 256, generator=torch.Generator().manual_seed(4))
        layer = model.get_submodule(paths(name)[0])
        on = layer(inputs)
        with adapter.off():
            assert torch.equal(tiny.velocity(name, model), without)
            off = layer(inputs)
    down, up = (lora.weights[f"{paths(name)[0]}.lora_{matrix}.weight"] for matrix in "AB")
    torch.testing.assert_close(on - off, ALPHA / RANKS[0] * inputs @ down.t() @ up.t(), rtol=1e-3, atol=1e-4)


# ---- what cannot be one


def config_with(folder: Path, path: Path | str, **changes: object) -> TrainConfig:
    words = overrides(folder / "run", folder / "cache", **{"training_adapter__path": path, **changes})
    return load_config(write_config(folder), words)


FIRST_UP = "transformer_transformer_blocks_0_attn_to_q_lora_B_weight"
HARM: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "a weight that is no number": ({FIRST_UP: torch.full((256, 3), float("nan"))}, "no finite numbers"),
    "half a layer": ({FIRST_UP: None}, "has matrices of shapes"),
    "two ranks": ({FIRST_UP: torch.zeros(256, 4)}, "has matrices of shapes"),
    "another width": ({FIRST_UP: torch.zeros(128, 3)}, "does not fit this model"),
}


@pytest.mark.parametrize("what", HARM)
def test_a_harmed_file_is_refused_by_name(what: str, tmp_path: Path) -> None:
    changes, words = HARM[what]
    name = "tiny-qwen-image"
    model = tiny.load_model(name)
    path = write_adapter(tmp_path / "adapter.safetensors", name, model, **changes)
    with pytest.raises(PixtuneError, match=re.escape(str(path))) as refusal:
        check_training_adapter(
            config_with(tmp_path, path), QWEN, {k: tuple(w.shape) for k, w in model.state_dict().items()}
        )
    assert words in str(refusal.value)


def test_another_models_adapter_is_refused(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter.safetensors", "tiny-flux", tiny.load_model("tiny-flux"))
    shapes = {key: tuple(w.shape) for key, w in tiny.load_model("tiny-qwen-image").state_dict().items()}
    with pytest.raises(PixtuneError, match=r"no part of a LoRA of qwen_image\..*LoRA of flux"):
        check_training_adapter(config_with(tmp_path, path), QWEN, shapes)


def test_a_folder_or_any_file_in_place_of_an_adapter_is_refused_by_the_key(tmp_path: Path) -> None:
    (text := tmp_path / "notes.txt").write_text("these are no weights at all")
    with pytest.raises(PixtuneError, match=r"training_adapter\.path: .*notes.txt is no safetensors file"):
        check_training_adapter(config_with(tmp_path, text), QWEN, {})
    with pytest.raises(PixtuneError, match=r"training_adapter\.path .* is a folder.*pytorch_lora_weights"):
        check_training_adapter(config_with(tmp_path, tmp_path), QWEN, {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training_adapter__strength": 0}, "training_adapter.strength"),
        ({"training_adapter__strength": ".nan"}, "training_adapter.strength"),
        ({"training_adapter__strength": -1}, "training_adapter.strength"),
        ({"method": "full"}, "an adapter is beside a LoRA"),
        ({"training_adapter__path": "''"}, "training_adapter.path"),
        ({"ema__decay": 1}, "ema.decay"),
        ({"ema__decay": 0}, "ema.decay"),
        ({"ema__decay": 0.9, "method": "full"}, "this version averages a LoRA alone"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_key(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(PixtuneError, match=re.escape(words)):
        config_with(tmp_path, tmp_path / "adapter.safetensors", **changes)


@pytest.mark.parametrize("name", LAYERS)
def test_the_plan_counts_its_weights_and_keeps_modulation_layers(name: str, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter.safetensors", name, tiny.load_model(name))
    folder = ModelFolder(tiny.ASSETS / name)
    plain, beside = (
        footprint_of(config_with(tmp_path, file), family_of(folder), folder, 64) for file in ("null", path)
    )
    assert beside.frozen_weights == sum(weight.numel() for weight in load_file(path).values())
    assert (plain.trains_modulation, beside.trains_modulation) == (False, True)
    assert (plain.mlps_are_frozen, beside.mlps_are_frozen) == (True, False)
    assert beside.trains_mlp and beside.trained_weights == plain.trained_weights
