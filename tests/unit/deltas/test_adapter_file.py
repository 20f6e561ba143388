"""Adapter files are read with the scale that PEFT and diffusers give each layer, or refused in words that say why."""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pixtune.deltas.adapter_file import AdapterFile, read_adapter
from pixtune.deltas.delta import Dora, Kronecker, dense
from pixtune.errors import WeightsError
from pixtune.families import FAMILIES
from pixtune.trained.fused_layers import LowRank
from tests.unit.deltas.loras import lora_tensors, write_lora

Q, K = "transformer_blocks.0.attn.to_q", "transformer_blocks.30.attn.to_k"
SHAPES = {Q: (6, 5), K: (6, 5)}
PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 10, "target_modules": ["to_q"]}


def scales(adapter: AdapterFile) -> dict[str, float]:
    found = {}
    for layer, change in adapter.changes.items():
        assert isinstance(change, LowRank | Kronecker)
        found[layer] = change.scale
    return found


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {Q: 1.0, K: 1.0}),
        (PLAIN, {Q: 2.5, K: 2.5}),
        ({**PLAIN, "use_rslora": True}, {Q: 5.0, K: 5.0}),
        ({**PLAIN, "alpha_pattern": {"to_k": 4}}, {Q: 2.5, K: 1.0}),
        ({**PLAIN, "r": 9, "rank_pattern": {r".*": 4}}, {Q: 2.5, K: 2.5}),
    ],
)
def test_the_scale_is_peft_s(config: dict[str, Any], expected: dict[str, float], tmp_path: Path) -> None:
    adapter = read_adapter(write_lora(tmp_path / "a.safetensors", lora_tensors(SHAPES), **config))
    assert scales(adapter) == pytest.approx(expected)


@pytest.mark.parametrize("form", ["diffusion_model.{}.lora_A.weight", "lora_unet_{}.lora_down.weight"])
def test_the_scale_of_an_alpha_tensor_is_alpha_by_rank(form: str, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for layer in SHAPES:
        name = form.format(layer.replace(".", "_") if "unet" in form else layer)
        up_name = name.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
        tensors |= {name: torch.randn(4, 5), up_name: torch.randn(6, 4)}
        tensors[f"{name.rsplit('.lora_', 1)[0]}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert scales(adapter) == {Q: 0.5, K: 0.5}
    assert adapter.format == ("kohya" if "unet" in form else "comfyui")


LOKR = {"lokr_w1": torch.randn(2, 5), "lokr_w2_a": torch.randn(3, 2), "lokr_w2_b": torch.randn(2, 1)}
WHOLE_LOKR = {"lokr_w1": torch.randn(2, 5), "lokr_w2": torch.randn(3, 1)}


def test_a_lokr_has_the_scale_that_programs_give_it(tmp_path: Path) -> None:
    """In ComfyUI and LyCORIS the alpha of two whole factors has no effect; by PEFT's config it has."""

    def read(parts: dict[str, Tensor], **config: Any) -> Kronecker:
        path = write_lora(tmp_path / "a.safetensors", {f"{K}.{name}": each for name, each in parts.items()}, **config)
        change = read_adapter(path).changes[K]
        assert isinstance(change, Kronecker)
        return change

    alpha = {"alpha": torch.tensor(3.0)}
    assert read({**LOKR, **alpha}).scale == 1.5
    assert read({**WHOLE_LOKR, **alpha}).scale == 1.0
    assert read(WHOLE_LOKR, peft_type="LOKR", r=4, alpha=2).scale == 0.5
    expected = 1.5 * torch.kron(LOKR["lokr_w1"], LOKR["lokr_w2_a"] @ LOKR["lokr_w2_b"])
    torch.testing.assert_close(dense(read({**LOKR, **alpha})), expected)


def test_a_dora_is_read_whole_and_has_no_delta(tmp_path: Path) -> None:
    tensors = {**lora_tensors({K: (6, 5)}), f"{K}.lora_magnitude_vector": torch.rand(6)}
    adapter = read_adapter(write_lora(tmp_path / "a.safetensors", tensors))
    assert isinstance(adapter.changes[K], Dora) and adapter.kinds == ("DoRA",)
    with pytest.raises(WeightsError, match=r"DoRA.*not defined without the base.*merge --base"):
        adapter.deltas("resizing it")


@pytest.mark.parametrize(
    ("layers", "metadata", "family"),
    [
        ([f"transformer_blocks.{n}.attn.to_q" for n in range(60)], {}, "qwen_image"),
        ([f"transformer_blocks.{n}.attn.to_q" for n in range(19)], {}, "flux"),
        (["single_transformer_blocks.3.attn.to_q"], {}, "flux"),
        (["transformer_blocks.3.img_mlp.net.2"], {}, "qwen_image"),
        (["transformer_blocks.3.attn.to_q"], {"pixtune.family": "flux_kontext"}, "flux_kontext"),
        (["transformer_blocks.3.attn.to_q"], {"modelspec.architecture": "flux-1-dev/lora"}, "flux"),
        (["transformer_blocks.3.attn.to_q"], {"modelspec.architecture": "qwen-image-edit/lora"}, "qwen_image_edit"),
        (["transformer_blocks.3.attn.to_q"], {"ss_base_model_version": "flux1"}, "flux"),
        (["transformer_blocks.3.attn.to_q"], {"pixtune.base_model": "Qwen/Qwen-Image"}, "qwen_image"),
        (["transformer_blocks.30.attn.to_q"], {"pixtune.family": "flux"}, "qwen_image"),
    ],
)
def test_the_family_is_that_of_the_blocks_and_of_what_is_stated(
    layers: list[str], metadata: dict[str, str], family: str, tmp_path: Path
) -> None:
    path = write_lora(tmp_path / "a.safetensors", lora_tensors(dict.fromkeys(layers, (4, 4)), 1), metadata)
    adapter = read_adapter(path)
    assert adapter.family.name == family
    assert {each.original_layers for each in adapter.families} == {FAMILIES[family].original_layers}


# ---- bad files


def header(length: int, text: bytes = b"{}", data: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + text + data


RAW: dict[str, tuple[bytes, str]] = {
    "a pickle": (pickle.dumps({"a": 1}), "pickle"),
    "a zip of a pickle": (b"PK\x03\x04" + bytes(100), "pickle"),
    "a truncated header": (header(500, b'{"a": {"dtype": "F32", "sha'), "cut off"),
    "a header of 2^63 bytes": (header(2**63), "no safetensors file"),
    "a header of 2^40 bytes": (header(2**40), "no safetensors file"),
    "nothing": (b"", "cut off"),
    "no tensor": (header(2), "no tensor|without a tensor"),
    "a text": (b"trigger: my cat, a photo of my cat\n" * 9, "no safetensors file"),
}


@pytest.mark.parametrize("kind", RAW)
def test_what_is_no_safetensors_file_is_named(kind: str, tmp_path: Path) -> None:
    data, words = RAW[kind]
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match=words) as caught:
        read_adapter(tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(caught.value)


def one(name: str, *shape: int) -> dict[str, Tensor]:
    return {name: torch.ones(*shape)}


OTHERS: dict[str, tuple[dict[str, Tensor], str]] = {
    "a base checkpoint": (one(f"{Q}.weight", 4, 4), "the weights of a transformer"),
    "ComfyUI's base checkpoint": (one("model.diffusion_model.double_blocks.0.img_mlp.0.weight", 4, 4), r"\(flux\)"),
    "a VAE": (one("decoder.conv_in.weight", 4, 4, 3, 3), r"\(VAE\)"),
    "a text encoder": (one("model.layers.0.self_attn.q_proj.weight", 4, 4), "text encoder"),
    "another model's weights": (one("noise_refiner.0.attention.to_q.weight", 4, 4), "Z-Image"),
    "an embedding": (one("clip_l", 4, 4), "textual inversion"),
    "a LoHa": (one(f"diffusion_model.{Q}.hada_w1_a", 4, 4), "LoHa"),
    "an OFT": (one(f"lora_unet_{Q.replace('.', '_')}.oft_blocks", 4, 4, 4), "OFT"),
    "whole differences": (one(f"diffusion_model.{Q}.diff", 4, 4), "whole differences"),
    "something unknown": (one("a.b.c", 4), "a.b.c"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_lora_is_named(kind: str, tmp_path: Path) -> None:
    tensors, words = OTHERS[kind]
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError, match=rf"bad.safetensors.*holds no LoRA.*({words})"):
        read_adapter(tmp_path / "bad.safetensors")


def test_a_lora_of_a_text_encoder_is_named(tmp_path: Path) -> None:
    save_file(pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", KOHYA), tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError, match=r"bad.safetensors is a LoRA of a text encoder alone"):
        read_adapter(tmp_path / "bad.safetensors")


def pair(name: str, ends: tuple[str, str] = ("lora_A.weight", "lora_B.weight")) -> dict[str, Tensor]:
    return {f"{name}.{ends[0]}": torch.ones(2, 4), f"{name}.{ends[1]}": torch.ones(4, 2)}


KOHYA = ("lora_down.weight", "lora_up.weight")
FOREIGN = {
    "Stable Diffusion": pair("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", KOHYA),
    "Wan": pair("diffusion_model.blocks.0.self_attn.q"),
    "Z-Image": pair("diffusion_model.layers.0.attention.to_q"),
    "FLUX.2": pair("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj"),
    "HunyuanVideo": pair("diffusion_model.txt_in.individual_token_refiner.blocks.0.mlp.fc1"),
    "another model": pair("transformer.some.layer"),
    "not as many blocks": pair("transformer.transformer_blocks.77.attn.to_q"),
}


@pytest.mark.parametrize("model", FOREIGN)
def test_a_lora_for_another_model_is_named(model: str, tmp_path: Path) -> None:
    save_file(FOREIGN[model], tmp_path / "bad.safetensors")
    with pytest.raises(
        WeightsError, match=rf"bad.safetensors.*another model.*{model if model != 'another model' else ''}"
    ):
        read_adapter(tmp_path / "bad.safetensors")


Change = Callable[[dict[str, Tensor]], object]
FIRST = f"{Q}.lora_A.weight"
DAMAGE: dict[str, tuple[Change, dict[str, Any], str]] = {
    "an unknown name": (lambda t: t.update(one("transformer_blocks.0.attn.to_z.lora_A.weight", 4, 4)), {}, "to_z"),
    "a text encoder's part": (lambda t: t.update(one("text_encoder.a.lora_A.weight", 4, 4)), {}, "text_encoder"),
    "two ranks in one layer": (lambda t: t.update(one(FIRST, 3, 5)), {}, r"\[3, 5\].*\(rank, inputs\)"),
    "one matrix missing": (lambda t: t.pop(FIRST), {}, "where lora_A and lora_B"),
    "NaN": (lambda t: t[FIRST].view(-1)[7:9].fill_(math.nan), {}, "NaN or infinity in 2 of 20 numbers"),
    "infinity": (lambda t: t[FIRST].view(-1)[7:8].fill_(math.inf), {}, "NaN or infinity in 1 of 20"),
    "an alpha that is NaN": (lambda t: t.update({f"{Q}.alpha": torch.tensor(math.nan)}), {}, "alpha of"),
    "an alpha of two numbers": (lambda t: t.update({f"{Q}.alpha": torch.ones(2)}), {}, "alpha of"),
    "whole numbers": (lambda t: t.update({FIRST: torch.ones(4, 5, dtype=torch.int32)}), {}, "int32"),
    "vectors": (lambda t: t.update(one(FIRST, 20)), {}, r"\[20\]"),
    "four sides": (lambda t: t.update(one(FIRST, 4, 5, 1, 1)), {}, r"\[4, 5, 1, 1\]"),
    "a rank of 0": (lambda t: t.update(one(FIRST, 0, 5)), {}, "without a number"),
    "both scales": (lambda t: t.update({f"{Q}.alpha": torch.tensor(8.0)}), PLAIN, "scale of .* twice"),
    "another rank in the metadata": (lambda t: None, {**PLAIN, "r": 8}, "gives the rank 8"),
    "no rank in the metadata": (lambda t: None, {"lora_alpha": 8}, "damaged lora_adapter_metadata"),
    "an alpha in the metadata that is NaN": (lambda t: None, {**PLAIN, "lora_alpha": math.nan}, "damaged"),
    "PiSSA": (lambda t: None, {**PLAIN, "init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "a start by a class": (lambda t: None, {**PLAIN, "init_lora_weights": {"a": 1}}, "init_lora_weights"),
    "biases": (lambda t: None, {**PLAIN, "bias": "all"}, "bias='all'"),
    "layers that are repeated": (lambda t: None, {**PLAIN, "layer_replication": [[0, 1]]}, "layer_replication"),
    "another kind": (lambda t: None, {**PLAIN, "peft_type": "LOHA"}, "peft_type=LOHA"),
    "a setting of next year": (lambda t: None, {**PLAIN, "a_setting": 1}, "a_setting=1"),
    "an alpha beyond any": (lambda t: None, {**PLAIN, "lora_alpha": 1e300}, "has the scale 2.5e.299"),
    "an alpha tensor beyond any": (lambda t: t.update({f"{Q}.alpha": torch.tensor(3e38)}), {}, "has the scale"),
    "an endless pattern": (lambda t: None, {**PLAIN, "rank_pattern": {"(a+)+$": 4}}, "damaged"),
    "DoRA's magnitudes of another number": (
        lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(5)}), {}, "one for each output",
    ),
    "a name twice": (lambda t: t.update(one(f"{Q}.lora_down.weight", 4, 5)), {}, "under another name too"),
    "LoRA and LoKr in one layer": (lambda t: t.update(one(f"{Q}.lokr_w1", 2, 2)), {}, "lokr_w1"),
    "half a LoKr": (lambda t: t.update(one("transformer_blocks.1.attn.to_q.lokr_w2_a", 2, 2)), {}, "lokr_w1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_lora_is_one_error_that_says_what_is_wrong(kind: str, tmp_path: Path) -> None:
    change, config, words = DAMAGE[kind]
    tensors = lora_tensors(SHAPES)
    change(tensors)
    path = write_lora(tmp_path / "bad.safetensors", tensors, **config)
    with pytest.raises(WeightsError, match=words) as caught:
        read_adapter(path)
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{", "[1]", "[" * 100_000, "7", '{"transformer.r": true, "transformer.lora_alpha": 1}']
)
def test_damaged_metadata_is_an_error(text: str, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", lora_tensors(SHAPES), {"lora_adapter_metadata": text})
    with pytest.raises(WeightsError, match="damaged lora_adapter_metadata"):
        read_adapter(path)


def test_scales_that_are_stated_twice_and_change_nothing_are_one(tmp_path: Path) -> None:
    tensors = {**lora_tensors(SHAPES), f"{Q}.alpha": torch.tensor(4.0)}
    config: dict[str, Any] = {**PLAIN, "lora_alpha": 4}
    assert scales(read_adapter(write_lora(tmp_path / "a.safetensors", tensors, **config))) == {Q: 1.0, K: 1.0}


def test_adapters_in_8_bits_are_read(tmp_path: Path) -> None:
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in lora_tensors(SHAPES, size=1.0).items()}
    adapter = read_adapter(write_lora(tmp_path / "a.safetensors", tensors))
    change = adapter.changes[Q]
    assert isinstance(change, LowRank)
    expected = tensors[f"{Q}.lora_B.weight"].float() @ tensors[FIRST].float()
    torch.testing.assert_close(dense(change), expected)


def test_metadata_may_be_any_text(tmp_path: Path) -> None:
    metadata = {"pixtune.trigger_words": "[" * 50_000, "a": "\x1b[31m", "b": json.dumps({"c": 1})}
    assert (
        read_adapter(write_lora(tmp_path / "a.safetensors", lora_tensors(SHAPES), metadata)).metadata["a"] == "\x1b[31m"
    )
