"""LoRA files of other trainers: each layer changes by what stock diffusers adds to it, or the file is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from pixtune.engine.load import load_transformer
from pixtune.errors import WeightsError
from pixtune.families import FAMILIES
from pixtune.family import Placement
from pixtune.storage.model_folder import open_model_folder
from pixtune.trained.saved_lora import attach_saved_lora, read_saved_lora
from tests.runs import TINY_MODEL

QWEN = FAMILIES["qwen_image"]
BLOCKS = "transformer_blocks"
LAYERS = [f"{BLOCKS}.{block}.attn.{layer}" for block in (0, 1) for layer in ("to_q", "to_k", "to_out.0")]


@pytest.fixture(scope="module")
def shapes() -> dict[str, torch.Size]:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel.from_pretrained(TINY_MODEL / "transformer")
    return {layer: model.get_submodule(layer).weight.shape for layer in LAYERS}


def write(path: Path, shapes: Mapping[str, torch.Size], ranks: Mapping[str, int], **config: Any) -> Path:
    """A file as PEFT and diffusers write it, with random weights."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for layer, rank in ranks.items():
        rows, columns = shapes[layer]
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    metadata = {f"transformer.{key}": value for key, value in config.items()}
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    return path


def deltas(model: nn.Module) -> dict[str, Tensor]:
    """What a model's LoRA adds to each weight."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            (adapter,) = module.lora_A
            product = module.lora_B[adapter].weight @ module.lora_A[adapter].weight
            found[name] = (product * module.scaling[adapter]).detach()
    return {name: delta for name, delta in found.items() if delta.any()}


def ours(path: Path) -> dict[str, Tensor]:
    folder = open_model_folder(str(TINY_MODEL))
    model = load_transformer(QWEN, folder, Placement(torch.device("cpu"), torch.float32)).module
    attach_saved_lora(model, read_saved_lora(path, QWEN))
    return deltas(model)


def stock(path: Path) -> dict[str, Tensor]:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel.from_pretrained(TINY_MODEL / "transformer")
    model.load_lora_adapter(path.parent, weight_name=path.name, prefix="transformer")
    return deltas(model)


ALL_FOUR = dict.fromkeys(LAYERS, 4)
KINDS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "plain": (ALL_FOUR, {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_k", "to_out.0"]}),
    "rank-stabilized": (
        ALL_FOUR,
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["to_q", "to_k", "to_out.0"]},
    ),
    "alphas by layer": (
        ALL_FOUR,
        {
            "r": 4,
            "lora_alpha": 4,
            "alpha_pattern": {"to_q": 16, f"{BLOCKS}.1.attn.to_k": 1.5, r"transformer_blocks\.0\..*to_out.0": 9},
            "target_modules": ["to_q", "to_k", "to_out.0"],
        },
    ),
    "ranks by layer": (
        {layer: 2 if "to_q" in layer else 8 if ".1." in layer else 4 for layer in LAYERS},
        {
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"to_q": 2, rf"{BLOCKS}\.1\.attn\.(to_k|to_out\.0)": 8},
            "target_modules": ["to_q", "to_k", "to_out.0"],
        },
    ),
    "all of it, targets by a pattern": (
        {layer: 2 if "to_q" in layer else 4 for layer in LAYERS},
        {
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "rank_pattern": {"to_q": 2},
            "alpha_pattern": {"to_k": 32},
            "target_modules": r".*\.attn\.(to_q|to_k|to_out\.0)",
            "lora_dropout": 0.3,
            "init_lora_weights": "gaussian",
        },
    ),
    "targets by a word": (ALL_FOUR, {"r": 4, "lora_alpha": 2, "target_modules": "all-linear"}),
    "some layers of many targets": (
        {LAYERS[0]: 4},
        {"r": 4, "lora_alpha": 4, "target_modules": ["to_q"], "layers_to_transform": [0], "layers_pattern": BLOCKS},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_changes_as_in_the_stock_model(kind: str, shapes: dict[str, torch.Size], tmp_path: Path) -> None:
    ranks, config = KINDS[kind]
    path = write(tmp_path / "lora.safetensors", shapes, ranks, **config)
    found, wanted = ours(path), stock(path)
    assert found.keys() == wanted.keys() == ranks.keys()
    for layer, delta in wanted.items():
        torch.testing.assert_close(found[layer], delta, rtol=1e-6, atol=1e-6)


def test_the_scale_of_a_rank_stabilized_lora_is_alpha_by_the_root_of_the_rank(
    shapes: dict[str, torch.Size], tmp_path: Path
) -> None:
    path = write(tmp_path / "a", shapes, {LAYERS[0]: 16}, r=16, lora_alpha=8, use_rslora=True, target_modules=["to_q"])
    lora = read_saved_lora(path, QWEN)
    product = lora.weights[f"{LAYERS[0]}.lora_B.weight"] @ lora.weights[f"{LAYERS[0]}.lora_A.weight"]
    torch.testing.assert_close(ours(path)[LAYERS[0]], product * (8 / math.sqrt(16)))


@pytest.mark.parametrize(
    "config",
    [
        {"lora_bias": True},
        {"bias": "all"},
        {"modules_to_save": ["proj_out"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "loftq"},
        {"layer_replication": [[0, 1]]},
        {"peft_type": "LOHA"},
        {"trainable_token_indices": [1]},
        {"a_setting_of_next_year": True},
    ],
)
def test_what_would_be_ignored_is_refused_by_name(
    config: dict[str, Any], shapes: dict[str, torch.Size], tmp_path: Path
) -> None:
    common = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q"]}
    path = write(tmp_path / "lora.safetensors", shapes, {LAYERS[0]: 4}, **common, **config)
    with pytest.raises(WeightsError, match=next(iter(config))):
        read_saved_lora(path, QWEN)


PAIR = {"lora_A.weight": torch.ones(4, 256), "lora_B.weight": torch.ones(256, 4)}
STATED = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 4})}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"transformer.{LAYERS[0]}.lora_magnitude_vector", f"holds {LAYERS[0]}.lora_magnitude_vector"),
        (f"lora_unet_{LAYERS[0].replace('.', '_')}.dora_scale", f"holds {LAYERS[0]}.lora_magnitude_vector"),
        (f"transformer.{LAYERS[0]}.lora_B.bias", "holds transformer.*bias, which is no part"),
        (f"transformer.{LAYERS[0]}.hada_w1_a", "holds transformer.*hada_w1_a, which is no part"),
        (f"transformer.{LAYERS[0]}.lokr_w1", f"holds {LAYERS[0]}.lokr_w1"),
        ("text_encoder.layer.lora_A.weight", "of a text encoder"),
        (
            f"transformer.{LAYERS[0]}.alpha",
            f"two scales: .*, and an alpha of 1 layers, such as {LAYERS[0]}",
        ),
        (f"diffusion_model.{LAYERS[1]}.lora_up.weight", f"matrices of shapes .*for {LAYERS[1]}"),
    ],
)
def test_what_no_plain_lora_has_is_refused_by_name(name: str, said: str, tmp_path: Path) -> None:
    pair = {f"transformer.{LAYERS[0]}.{part}": tensor for part, tensor in PAIR.items()}
    tensor = torch.tensor(4.0) if name.endswith("alpha") else torch.ones(256, 1)
    save_file({**pair, name: tensor}, tmp_path / "a.safetensors", STATED)
    with pytest.raises(WeightsError, match=said):
        read_saved_lora(tmp_path / "a.safetensors", QWEN)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_B.weight": None}, "matrices of shapes"),
        ({"lora_B.weight": torch.ones(256, 3)}, "matrices of shapes"),
        ({"lora_A.weight": torch.ones(4, 256, 1, 1)}, "matrices of shapes"),
        ({"lora_A.weight": torch.ones(0, 256), "lora_B.weight": torch.ones(256, 0)}, "matrices of shapes"),
        ({"lora_A.weight": torch.ones(4, 256, dtype=torch.int8)}, "torch.int8 in"),
    ],
)
def test_pairs_that_are_none_are_a_message(changes: dict[str, Tensor | None], said: str, tmp_path: Path) -> None:
    pair = {
        f"diffusion_model.{LAYERS[0]}.{part}": tensor
        for part, tensor in {**PAIR, **changes}.items()
        if tensor is not None
    }
    save_file(pair, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=f"a.safetensors has {said}"):
        read_saved_lora(tmp_path / "a.safetensors", QWEN)


def test_files_of_comfyui_and_kohya_change_each_layer_as_in_the_stock_pipeline(
    shapes: dict[str, torch.Size], tmp_path: Path
) -> None:
    """Ranks and alphas by layer; what diffusers' own reader of such files makes of them is the measure."""
    from diffusers import QwenImagePipeline

    generator = torch.Generator().manual_seed(7)
    for prefix, down, up in (("lora_unet_", "lora_down", "lora_up"), ("diffusion_model.", "lora_A", "lora_B")):
        file = {}
        for number, layer in enumerate(LAYERS, 1):
            (rows, columns), name = shapes[layer], layer.replace(".", "_") if prefix.endswith("_") else layer
            file[f"{prefix}{name}.{down}.weight"] = torch.randn(number, columns, generator=generator)
            file[f"{prefix}{name}.{up}.weight"] = torch.randn(rows, number, generator=generator)
            file[f"{prefix}{name}.alpha"] = torch.tensor(1.5 * number**2)
        save_file(file, path := tmp_path / "lora.safetensors")
        theirs = QwenImagePipeline.lora_state_dict(dict(file))
        found = ours(path)
        assert found.keys() == set(LAYERS)
        for layer, delta in found.items():
            down_A, up_B = (theirs[f"transformer.{layer}.lora_{matrix}.weight"] for matrix in "AB")
            torch.testing.assert_close(delta, up_B @ down_A, rtol=1e-5, atol=1e-5)


def test_a_file_without_a_scale_has_the_scale_1(shapes: dict[str, torch.Size], tmp_path: Path) -> None:
    pair = {f"transformer.{LAYERS[0]}.{part}": tensor for part, tensor in PAIR.items()}
    save_file(pair, path := tmp_path / "lora.safetensors")
    torch.testing.assert_close(ours(path)[LAYERS[0]], torch.full((256, 256), 4.0))


@pytest.mark.parametrize(
    "text",
    [
        "no JSON", "[1]", "[" * 100_000, "{}", '{"transformer.r": 0, "transformer.lora_alpha": 1}',
        '{"transformer.r": "4", "transformer.lora_alpha": 1}', '{"transformer.r": 4, "transformer.lora_alpha": NaN}',
        '{"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.rank_pattern": [1]}',
        '{"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {"(a+)+$": 1}}',
        '{"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {"(": 1}}',
    ],
)  # fmt: skip
def test_damaged_metadata_is_a_message(text: str, tmp_path: Path) -> None:
    pair = {f"transformer.{LAYERS[0]}.{part}": tensor for part, tensor in PAIR.items()}
    save_file(pair, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(WeightsError, match="lora_adapter_metadata"):
        read_saved_lora(tmp_path / "a.safetensors", QWEN)


def test_ranks_that_are_not_those_of_the_tensors_are_a_message(shapes: dict[str, torch.Size], tmp_path: Path) -> None:
    path = write(tmp_path / "a", shapes, {LAYERS[0]: 4}, r=8, lora_alpha=4, target_modules=["to_q"])
    with pytest.raises(WeightsError, match=f"{LAYERS[0]}.*gives the rank 8"):
        ours(path)
