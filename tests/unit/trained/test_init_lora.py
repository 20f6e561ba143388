"""A new run starts with what a LoRA file adds, whatever its names, rank and scale; what it cannot keep is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from pixtune.config import load_config
from pixtune.config.schema import TrainConfig
from pixtune.errors import PixtuneError
from pixtune.trained import adapters
from pixtune.trained.fused_layers import LowRank
from pixtune.trained.init_lora import fit, fitting_init_lora, start_from
from pixtune.trained.lora_formats import AdapterLayer, comfyui_tensors, diffusers_tensors, kohya_tensors
from pixtune.trained.lora_names import DOWN, UP
from pixtune.trained.saved_lora import read_saved_lora
from tests.runs import overrides, write_config
from tests.unit.engine import tiny

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0")
WIDTH = 256
NAMES = {"diffusers": diffusers_tensors, "comfyui": comfyui_tensors, "kohya": kohya_tensors}
QWEN, FLUX = tiny.family_named("tiny-qwen-image"), tiny.family_named("tiny-flux")


def a_lora(
    rank: int = 3, alpha: float = 6.0, layers: tuple[str, ...] = LAYERS, inputs: int = WIDTH
) -> dict[str, AdapterLayer]:
    generator = torch.Generator().manual_seed(8)

    def drawn(*shape: int) -> Tensor:
        return 0.05 * torch.randn(*shape, generator=generator)

    return {layer: AdapterLayer({DOWN: drawn(rank, inputs), UP: drawn(WIDTH, rank)}, alpha) for layer in layers}


def write(path: Path, kind: str, lora: dict[str, AdapterLayer]) -> Path:
    if kind == "diffusers":
        rank, alpha = next((len(layer.tensors[DOWN]), layer.alpha) for layer in lora.values())
        scale = {"transformer.r": rank, "transformer.lora_alpha": alpha}
        save_file(dict(diffusers_tensors(lora).tensors), path, {"lora_adapter_metadata": json.dumps(scale)})
    else:
        save_file(dict(NAMES[kind](lora, QWEN).tensors), path)  # type: ignore[operator]
    return path


def started(path: Path, rank: int, alpha: float) -> tuple[dict[str, Tensor], str]:
    """What each layer's weight gets in a model that starts from a file, and what is said of it."""
    model = tiny.load_model("tiny-qwen-image")
    adapters.attach_lora(model, QWEN.lora_targets, rank, alpha, 1)
    line = start_from(layers := adapters.adapter_layers(model), read_saved_lora(path, QWEN))
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}, line


def added(layer: AdapterLayer) -> Tensor:
    low = layer.low_rank
    return low.scale * low.up @ low.down


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(("rank", "alpha"), [(3, 6.0), (5, 5.0)])
def test_a_run_starts_with_what_the_file_adds(kind: str, rank: int, alpha: float, tmp_path: Path) -> None:
    """By PEFT's own account of what it adds to each weight: the file's rank and scale, and larger ones."""
    lora = a_lora()
    found, line = started(write(tmp_path / "mine.safetensors", kind, lora), rank, alpha)
    for name, delta in found.items():
        torch.testing.assert_close(
            delta, added(lora[name]) if name in lora else torch.zeros(WIDTH, WIDTH), atol=1e-6, rtol=1e-5
        )
    assert line.startswith(f"starts from mine.safetensors ({kind} names) on 2 layers")
    assert re.search(r"18 layers that it has not start from zero, such as transformer_blocks\.0\.attn\.to_k", line)
    assert ("rank 3 made 5 with zeros" in line) == (rank == 5) and "SVD" not in line


def test_at_the_file_s_rank_and_scale_every_bit_is_the_file_s(tmp_path: Path) -> None:
    lora, model = a_lora(), tiny.load_model("tiny-qwen-image")
    adapters.attach_lora(model, QWEN.lora_targets, 3, 6.0, 1)
    fresh = {name: weight.clone() for name, weight in adapters.lora_weights(model).items()}
    start_from(adapters.adapter_layers(model), read_saved_lora(write(tmp_path / "a", "kohya", lora), QWEN))
    for name, weight in adapters.lora_weights(model).items():
        layer, part = name.split(".lora_")
        assert weight.equal(lora[layer].tensors[f"lora_{part}"] if layer in lora else fresh[name]), name


def test_a_smaller_rank_is_the_best_one_and_its_loss_is_said(tmp_path: Path) -> None:
    lora = a_lora(rank=6)
    found, line = started(write(tmp_path / "mine.safetensors", "comfyui", lora), 2, 2.0)
    lost = size = 0.0
    for name, layer in lora.items():
        left, values, right = torch.linalg.svd(added(layer).double())
        torch.testing.assert_close(found[name].double(), (left[:, :2] * values[:2]) @ right[:2], atol=1e-6, rtol=1e-4)
        lost, size = lost + float(values[2:].square().sum()), size + float(values.square().sum())
    assert f"rank 6 made 2 by SVD, which loses {(lost / size) ** 0.5:.2%} of what it adds" in line


@given(st.integers(1, 5), st.integers(1, 5), st.floats(0.01, 100), st.floats(0.01, 100), st.booleans())
def test_any_rank_and_scale_keep_what_they_have_room_for(
    saved_rank: int, rank: int, saved_scale: float, scale: float, is_zero: bool
) -> None:
    generator = torch.Generator().manual_seed(saved_rank)
    up = torch.randn(4, saved_rank, generator=generator) * (not is_zero)
    saved = LowRank(torch.randn(saved_rank, 3, generator=generator), up, saved_scale)
    fitted = fit(saved, torch.ones(rank, 3), scale)
    whole = saved_scale * saved.up.double() @ saved.down.double()
    found = scale * fitted.lora.up.double() @ fitted.lora.down.double()
    assert fitted.lora.down.shape == (rank, 3) and fitted.lora.up.shape == (4, rank)
    assert fitted.size == pytest.approx(float(whole.norm()), rel=1e-5, abs=1e-9)
    assert float((whole - found).norm()) == pytest.approx(fitted.lost, rel=1e-4, abs=1e-5 * saved_scale * 10)


# ---- what is refused


def config_with(folder: Path, path: Path, **changes: object) -> TrainConfig:
    return load_config(write_config(folder), overrides(folder / "run", folder / "cache", init_lora=path, **changes))


MLP = "transformer_blocks.0.img_mlp.net.2"
SHAPES = {name: tuple(weight.shape) for name, weight in tiny.loaded_once("tiny-qwen-image", None).state_dict().items()}


def test_layers_that_are_not_trained_are_refused_with_targets_that_have_them(tmp_path: Path) -> None:
    lora = a_lora() | {MLP: AdapterLayer({DOWN: torch.ones(3, 1024), UP: torch.ones(WIDTH, 3)}, 6.0)}
    path = write(tmp_path / "mine.safetensors", "diffusers", lora)
    with pytest.raises(PixtuneError, match=rf"1 layers that this run does not train, such as {MLP}") as refusal:
        fitting_init_lora(config_with(tmp_path, path), QWEN, SHAPES)
    assert "lora_targets='[attention_mlp]'" in str(refusal.value)
    assert fitting_init_lora(config_with(tmp_path, path, lora_targets="[attention_mlp]"), QWEN, SHAPES)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (a_lora(inputs=128), "does not fit this model: it has rank 3 for 128 inputs"),
        (a_lora(layers=("transformer_blocks.45.attn.to_q",)), "no linear layer transformer_blocks.45"),
        (a_lora(layers=("single_transformer_blocks.0.attn.to_q",)), "LoRA of flux"),
    ],
)
def test_another_model_s_lora_is_refused(lora: dict[str, AdapterLayer], words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.safetensors", "diffusers", lora)
    with pytest.raises(PixtuneError, match=re.escape(words)):
        fitting_init_lora(config_with(tmp_path, path), QWEN, SHAPES)


def test_a_folder_no_lora_and_all_weights_are_refused_by_the_key(tmp_path: Path) -> None:
    with pytest.raises(PixtuneError, match=r"init_lora .* is a folder"):
        fitting_init_lora(config_with(tmp_path, tmp_path), QWEN, SHAPES)
    (text := tmp_path / "notes.txt").write_text("no weights")
    with pytest.raises(PixtuneError, match=r"init_lora: .*notes\.txt is no safetensors file"):
        fitting_init_lora(config_with(tmp_path, text), QWEN, SHAPES)
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.ones(2, 2)}, weights := tmp_path / "base.safetensors")
    with pytest.raises(PixtuneError, match="so it is no LoRA, but other weights"):
        fitting_init_lora(config_with(tmp_path, weights), QWEN, SHAPES)
    with pytest.raises(PixtuneError, match="method is full, which trains no LoRA"):
        config_with(tmp_path, text, method="full")
