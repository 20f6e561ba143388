"""LoRA files' names and scales among diffusers, ComfyUI and kohya's trainers: exact both ways, read as by diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixtune.errors import WeightsError
from pixtune.families import FAMILIES
from pixtune.family import ModelFamily
from pixtune.trained import fused_layers
from pixtune.trained.fused_layers import LowRank
from pixtune.trained.lora_formats import (
    AdapterLayer,
    NamedTensors,
    comfyui_tensors,
    diffusers_tensors,
    kohya_tensors,
    read_layers,
)
from pixtune.trained.lora_names import DOWN, MAGNITUDE, UP, fits, format_of

QWEN, FLUX = FAMILIES["qwen_image"], FAMILIES["flux"]
SHAPES = {
    "qwen_image": QWEN.transformer_shapes({"num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 1}),
    "flux": FLUX.transformer_shapes(
        {
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 1,
            "guidance_embeds": True,
        }
    ),
}


def linear_layers(family: ModelFamily) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear layer: what has a bias, and a matrix."""
    shapes = SHAPES[family.name]
    weights = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}
    return {path: (shape[0], shape[1]) for path, shape in weights.items() if f"{path}.bias" in shapes}


def random_lora(family: ModelFamily, rank: int = 4, alpha: float | None = 10.0) -> dict[str, AdapterLayer]:
    generator = torch.Generator().manual_seed(5)
    return {
        path: AdapterLayer(
            {
                DOWN: torch.randn(rank, inputs, generator=generator),
                UP: torch.randn(outputs, rank, generator=generator),
            },
            alpha,
        )
        for path, (outputs, inputs) in linear_layers(family).items()
    }


def change(layer: AdapterLayer) -> Tensor:
    """What a layer's LoRA adds to its weight, by the definition."""
    low = layer.low_rank
    return low.scale * (low.up.double() @ low.down.double())


def same(ones: dict[str, AdapterLayer], others: dict[str, AdapterLayer]) -> bool:
    return ones.keys() == others.keys() and all(
        one.tensors.keys() == others[path].tensors.keys()
        and all(tensor.equal(others[path].tensors[part]) for part, tensor in one.tensors.items())
        for path, one in ones.items()
    )


@pytest.mark.parametrize("family", [QWEN, FLUX], ids=lambda family: family.name)
@pytest.mark.parametrize(("rank", "alpha"), [(4, 10.0), (3, 0.1), (1, 1.0)])
def test_a_round_through_all_formats_gives_every_bit_back(family: ModelFamily, rank: int, alpha: float) -> None:
    """diffusers -> kohya -> ComfyUI -> diffusers, of every linear layer that the model has."""
    lora = random_lora(family, rank, alpha)
    kohya = kohya_tensors(lora, family)
    assert format_of(kohya.tensors) == "kohya" and not kohya.rounded
    from_kohya = read_layers(kohya.tensors, family, kohya.metadata)
    comfyui = comfyui_tensors(from_kohya, family, keep_alpha=True)
    assert format_of(comfyui.tensors) == "comfyui"
    again = read_layers(comfyui.tensors, family, comfyui.metadata)
    assert {layer.alpha for layer in again.values()} == {alpha}
    assert same(again, lora)
    first, last = diffusers_tensors(lora).tensors, diffusers_tensors(again).tensors
    assert first.keys() == last.keys() and format_of(first) == "diffusers"
    assert all(tensor.equal(last[name]) for name, tensor in first.items())


def test_names_are_those_that_kohya_s_trainers_write() -> None:
    """Some by hand, from what sd-scripts lists for FLUX and musubi-tuner makes of Qwen-Image's modules."""
    flux = kohya_tensors(random_lora(FLUX), FLUX).tensors
    for name, shape in {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (12, 8),
        "lora_unet_double_blocks_1_txt_attn_qkv.lora_up.weight": (24, 12),
        "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": (8, 4),
        "lora_unet_double_blocks_0_txt_mlp_2.lora_down.weight": (4, 32),
        "lora_unet_double_blocks_0_img_mod_lin.lora_up.weight": (48, 4),
        "lora_unet_single_blocks_1_linear1.lora_up.weight": (56, 16),
        "lora_unet_single_blocks_1_linear2.lora_down.weight": (4, 40),
        "lora_unet_single_blocks_0_modulation_lin.lora_up.weight": (24, 4),
        "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight": (16, 4),
        "lora_unet_vector_in_in_layer.lora_down.weight": (4, 768),
    }.items():
        assert tuple(flux[name].shape) == shape, name
    assert flux["lora_unet_single_blocks_1_linear1.alpha"] == 40.0, "the scale 10 / 4 at four times the rank"
    qwen = kohya_tensors(random_lora(QWEN), QWEN).tensors
    for name in (
        "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight",
        "lora_unet_transformer_blocks_2_attn_to_out_0.lora_up.weight",
        "lora_unet_transformer_blocks_2_img_mlp_net_0_proj.alpha",
        "lora_unet_transformer_blocks_1_txt_mod_1.lora_up.weight",
    ):
        assert name in qwen
    assert len(qwen) == 3 * len(linear_layers(QWEN))


def wide_lora() -> dict[str, AdapterLayer]:
    """A LoRA on one block of each kind at FLUX's own width, which diffusers' converter takes for granted."""
    generator = torch.Generator().manual_seed(0)
    shapes = FLUX.transformer_shapes({"num_layers": 1, "num_single_layers": 1})
    paths = [name.removesuffix(".weight") for name, shape in shapes.items() if "blocks" in name and len(shape) == 2]
    return {
        path: AdapterLayer(
            {
                DOWN: torch.randn(2, shapes[f"{path}.weight"][1], generator=generator),
                UP: torch.randn(shapes[f"{path}.weight"][0], 2, generator=generator),
            },
            2.0,
        )
        for path in paths
    }


def test_diffusers_own_reader_of_kohya_files_finds_the_same_lora_in_ours() -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers as flux_reader
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_qwen_lora_to_diffusers as qwen_reader

    for lora, family, reader in ((wide_lora(), FLUX, flux_reader), (random_lora(QWEN, alpha=4.0), QWEN, qwen_reader)):
        theirs = reader(dict(kohya_tensors(lora, family).tensors))
        ours = diffusers_tensors(lora).tensors
        assert theirs.keys() == ours.keys()
        assert all(tensor.equal(ours[name]) for name, tensor in theirs.items()), "the scale is 1: nothing is rounded"


def test_a_lora_of_kohya_s_whole_layer_shares_its_down() -> None:
    """One that sd-scripts trains on `qkv` itself; read, it adds to each part what it adds to its rows of the whole."""
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(6, 8, generator=generator), torch.randn(56, 6, generator=generator)
    name = "lora_unet_single_blocks_1_linear1"
    file = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(3.0)}
    layers = read_layers(file, FLUX)
    block = "single_transformer_blocks.1"
    paths = [f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"]
    assert list(layers) == paths
    torch.testing.assert_close(torch.cat([change(layers[path]) for path in paths]), 0.5 * (up.double() @ down.double()))
    written = kohya_tensors(layers, FLUX)
    assert written.tensors.keys() == file.keys() and not written.metadata
    assert all(tensor.equal(file[key]) for key, tensor in written.tensors.items())


def test_half_of_the_final_modulation_is_swapped() -> None:
    from diffusers.loaders.lora_conversion_utils import swap_scale_shift

    lora = random_lora(FLUX)
    theirs = kohya_tensors(lora, FLUX).tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    assert swap_scale_shift(theirs).equal(lora["norm_out.linear"].tensors[UP])


LOW_RANKS = st.lists(st.integers(0, 3), min_size=2, max_size=4).filter(any)


@given(ranks=LOW_RANKS, seed=st.integers(0, 99), is_fresh=st.booleans(), one_scale=st.booleans())
def test_joined_loras_add_what_they_added_apart(ranks: list[int], seed: int, is_fresh: bool, one_scale: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    shares = [1, 1, 1, 4][: len(ranks)]
    parts = [
        LowRank(
            torch.randn(rank, 3, generator=generator),
            torch.randn(2 * share, rank, generator=generator) * (not is_fresh),
            0.5 if one_scale or number % 2 else 0.3,
        )
        if rank
        else None
        for number, (rank, share) in enumerate(zip(ranks, shares, strict=True))
    ]
    whole, used, is_exact = fused_layers.join(parts, shares)
    apart = [
        torch.zeros(2 * share, 3) if part is None else part.scale * part.up @ part.down
        for part, share in zip(parts, shares, strict=True)
    ]
    torch.testing.assert_close(whole.scale * whole.up @ whole.down, torch.cat(apart))
    again = fused_layers.split(whole, shares, used)
    assert [part and part.rank for part in again] == [part and part.rank for part in parts]
    if one_scale:
        assert is_exact
        for part, back in zip(parts, again, strict=True):
            if part is not None and back is not None:
                assert part.down.equal(back.down) and part.up.equal(back.up) and part.scale == back.scale
    recognized = fused_layers.split(whole, shares)
    found = [
        torch.zeros(2 * s, 3) if p is None else p.scale * p.up @ p.down for p, s in zip(recognized, shares, strict=True)
    ]
    torch.testing.assert_close(torch.cat(found), torch.cat(apart))


def test_ranks_of_parts_are_kept_where_zeros_do_not_tell() -> None:
    """Queries and values alone, before the first step: all ups are zero."""
    lora = {
        path: AdapterLayer({DOWN: layer.tensors[DOWN], UP: torch.zeros_like(layer.tensors[UP])}, 4.0)
        for path, layer in random_lora(FLUX).items()
        if path.endswith(("attn.to_q", "attn.to_v"))
    }
    written = kohya_tensors(lora, FLUX)
    assert same(read_layers(written.tensors, FLUX, written.metadata), lora)


def test_parts_with_other_scales_are_said_to_be_rounded() -> None:
    lora = {
        path: layer for path, layer in random_lora(FLUX).items() if path.startswith("transformer_blocks.0.attn.to_")
    }
    odd = "transformer_blocks.0.attn.to_k"
    lora[odd] = AdapterLayer(lora[odd].tensors, 7.0)
    written = kohya_tensors(lora, FLUX)
    assert written.rounded == ("double_blocks.0.img_attn.qkv",)
    again = read_layers(written.tensors, FLUX, written.metadata)
    torch.testing.assert_close(change(again[odd]), change(lora[odd]), rtol=1e-6, atol=1e-6)


def test_comfyui_s_file_for_flux_has_the_scale_in_its_weights() -> None:
    lora = random_lora(FLUX)
    file = comfyui_tensors(lora, FLUX)
    assert not [name for name in file.tensors if name.endswith("alpha")]
    again = read_layers(file.tensors, FLUX)
    for path, layer in lora.items():
        torch.testing.assert_close(change(again[path]), change(layer), rtol=1e-6, atol=1e-5)
    assert file.rounded, "2.5 is no power of two"
    assert not comfyui_tensors(random_lora(FLUX, alpha=8.0), FLUX).rounded


@pytest.mark.parametrize("first", ["lokr_w1", "lokr_w1_a"])
def test_a_lokr_of_joined_layers_is_split_where_their_borders_are_between_rows(first: str) -> None:
    """Each layer's change is its rows of the whole Kronecker product."""
    joined = {"double_blocks_0_img_attn_qkv": (6, (1, 1, 1)), "single_blocks_0_linear1": (14, (1, 1, 1, 4))}
    for name, (rows, shares) in joined.items():
        factors = {first: torch.randn(rows, 2), "lokr_w2": torch.randn(5, 3)}
        if first.endswith("a"):
            factors["lokr_w1_b"] = torch.randn(2, 4)
        layers = read_layers({f"lora_unet_{name}.{part}": tensor for part, tensor in factors.items()}, FLUX)
        whole = torch.kron(factors[first] @ factors.get("lokr_w1_b", torch.eye(2)), factors["lokr_w2"])
        parts = whole.split([len(whole) // sum(shares) * share for share in shares])
        assert len(layers) == len(shares)
        for layer, expected in zip(layers.values(), parts, strict=True):
            own = layer.tensors
            w1 = own[first] @ own.get("lokr_w1_b", torch.eye(2))
            torch.testing.assert_close(torch.kron(w1, own["lokr_w2"]), expected, rtol=1e-5, atol=1e-5)


def test_dora_and_lokr_keep_their_tensors() -> None:
    path, flat = "transformer_blocks.1.attn.to_q", "lora_unet_transformer_blocks_1_attn_to_q"
    matrices = random_lora(QWEN)[path].tensors
    dora = {path: AdapterLayer({**matrices, MAGNITUDE: torch.arange(8.0)}, 4.0)}
    lokr = {
        path: AdapterLayer(
            {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(4, 1), "lokr_w2_b": torch.ones(1, 4)}, 1.0
        )
    }
    assert kohya_tensors(dora, QWEN).tensors[f"{flat}.dora_scale"].shape == (8, 1)
    for lora, expected in ((dora, "dora_scale"), (lokr, "lokr_w2_b")):
        for file in (kohya_tensors(lora, QWEN), comfyui_tensors(lora, QWEN)):
            assert any(name.endswith(expected) for name in file.tensors)
            assert same(read_layers(file.tensors, QWEN), lora)


def test_dora_s_magnitudes_go_to_their_parts() -> None:
    paths = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    lora = {path: AdapterLayer({**random_lora(FLUX)[path].tensors, MAGNITUDE: torch.rand(8)}, 4.0) for path in paths}
    file = kohya_tensors(lora, FLUX)
    assert file.tensors["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"].shape == (24, 1)
    assert same(read_layers(file.tensors, FLUX), lora)
    with pytest.raises(WeightsError, match="magnitudes for some of its 3 parts"):
        kohya_tensors({path: lora[path] for path in paths[:2]}, FLUX)


@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("transformer.", "lora_A.weight", "lora_B.weight"),
        ("diffusion_model.", "lora_A.default.weight", "lora_B.default.weight"),
        ("base_model.model.", "lora_A.weight", "lora_B.weight"),
        ("", "lora_down.weight", "lora_up.weight"),
        ("transformer.", "lora.down.weight", "lora.up.weight"),
    ],
)
def test_names_that_others_write_are_read(prefix: str, down: str, up: str) -> None:
    path = "transformer_blocks.59.img_mlp.net.2"
    pair = {f"{prefix}{path}.{down}": torch.ones(1, 8), f"{prefix}{path}.{up}": torch.ones(8, 1)}
    assert read_layers(pair, QWEN).keys() == {path}
    native = {name.replace(path, "double_blocks.3.img_mlp.2"): tensor for name, tensor in pair.items()}
    assert read_layers(native, FLUX).keys() == {"transformer_blocks.3.ff.net.2"}


PAIR = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(8, 2)}
QKV = "lora_unet_double_blocks_0_img_attn_qkv"


@pytest.mark.parametrize(
    ("file", "family", "said"),
    [
        ({"transformer.transformer_blocks.0.attn.to_q.hada_w1_a": 0}, QWEN, "no part of a LoRA of qwen_image"),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": 0}, FLUX, "of a text encoder, whose LoRA"),
        ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": 0}, FLUX, "a LoRA of a U-Net"),
        ({"encoder.conv_in.weight": 0}, FLUX, "so it is no LoRA, but other weights"),
        ({f"{QKV}.lora_down.weight": torch.ones(2), f"{QKV}.lora_up.weight": torch.ones(24)}, FLUX, "of shapes"),
        (
            {f"{QKV}.lora_down.weight": torch.ones(0, 8), f"{QKV}.lora_up.weight": torch.ones(24, 0)},
            FLUX,
            "of shapes",
        ),
        (
            {f"{QKV}.lora_down.weight": torch.ones(2, 8), f"{QKV}.lora_up.weight": torch.ones(24, 3)},
            FLUX,
            "of shapes",
        ),
        (
            {f"transformer.transformer_blocks.0.attn.to_q.{part}": tensor for part, tensor in PAIR.items()}
            | {"transformer.transformer_blocks.0.attn.to_q.alpha": torch.tensor(0.0)},
            QWEN,
            "is 0, so that it does nothing",
        ),
        ({f"{QKV}.lora_down.weight": 0}, QWEN, "no part of a LoRA of qwen_image"),
        ({"transformer.transformer_blocks.00.attn.to_q.lora_A.weight": 0}, QWEN, "no part"),
        ({"transformer.transformer_blocks.0.attn.to_q.alpha": torch.ones(())}, QWEN, "an alpha and no weights"),
        ({f"{QKV}.lora_down.weight": torch.ones(2, 8)}, FLUX, "only a LoRA"),
        ({f"{QKV}.lokr_w1": torch.ones(2, 8)}, FLUX, "inside of rows of its LoKr's first factor, of which there are 2"),
        ({f"{QKV}.lora_down.weight": torch.ones(2, 8), f"{QKV}.lora_up.weight": torch.ones(25, 2)}, FLUX, "25 outputs"),
        (
            {f"{QKV}.lora_down.weight": torch.ones(2, 8), f"{QKV}.lora_up.weight": torch.ones(24, 2)}
            | {f"transformer.transformer_blocks.0.attn.to_q.{part}": tensor for part, tensor in PAIR.items()},
            FLUX,
            "both alone and as a part",
        ),
        (
            {
                f"{prefix}transformer_blocks.0.attn.to_q.{part}": tensor
                for part, tensor in PAIR.items()
                for prefix in ("", "unet.")
            },
            QWEN,
            "under another name too",
        ),
        (
            {
                "transformer.proj_out.alpha": torch.tensor(float("nan")),
                "transformer.proj_out.lora_A.weight": torch.ones(1, 8),
            },
            QWEN,
            "no finite number",
        ),
    ],
)
def test_what_is_no_lora_of_the_family_is_refused_by_name(file: dict[str, Any], family: ModelFamily, said: str) -> None:
    tensors = {name: tensor if isinstance(tensor, Tensor) else torch.zeros(2, 2) for name, tensor in file.items()}
    with pytest.raises(WeightsError, match=said):
        read_layers(tensors, family)


@pytest.mark.parametrize("value", ["[5, -1, 2]", "3", "[1e999, 0]", "[[1]]", "null"])
def test_damaged_ranks_are_refused(value: str) -> None:
    file = {f"{QKV}.lora_down.weight": torch.ones(6, 8), f"{QKV}.lora_up.weight": torch.ones(24, 6)}
    with pytest.raises(WeightsError, match=r"damaged|cannot be split"):
        read_layers(file, FLUX, {"pixtune.joined_ranks": f'{{"double_blocks.0.img_attn.qkv": {value}}}'})


def test_a_file_s_names_tell_which_family_it_fits() -> None:
    flux, qwen = (diffusers_tensors(random_lora(family)).tensors for family in (FLUX, QWEN))
    assert fits(flux, FLUX) and not fits(flux, QWEN)
    assert fits(qwen, QWEN) and not fits(qwen, FLUX)
    assert isinstance(kohya_tensors(random_lora(QWEN), QWEN), NamedTensors)
