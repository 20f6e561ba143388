"""Adapters are written so that other programs load them, and converted without a bit that changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixtune.deltas.adapter_file import read_adapter
from pixtune.deltas.delta import Dora, changed_weight, dense
from pixtune.deltas.writing import (
    as_layers,
    carried_metadata,
    check_file_target,
    joined_metadata,
    settled,
    write_adapter,
)
from pixtune.errors import WeightsError, WriteError
from pixtune.families import FAMILIES
from pixtune.trained.fused_layers import LowRank
from pixtune.trained.saved_lora import read_saved_lora
from tests.unit.deltas.loras import MODELS, lora_tensors, shapes_of, write_lora


def convert(source: Path, target: Path, to: str) -> Path:
    adapter = read_adapter(source)
    assert write_adapter(target, settled(adapter), to, adapter.family, carried_metadata(adapter.metadata)) == ()
    return target


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {
        name: (each.dtype, tuple(each.shape), each.contiguous().view(torch.uint8).numpy().tobytes())
        for name, each in tensors.items()
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        (("kohya", "comfyui"), torch.float32),
        (("comfyui", "kohya"), torch.bfloat16),
        (("kohya",), torch.float16),
        (("comfyui",), torch.bfloat16),
    ],
)
def test_a_lora_comes_back_the_same_to_the_bit(
    way: tuple[str, ...], name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Ranks and scales differ by layer, with neither a power of two: multiplied in, they would show."""
    shapes = shapes_of(name, lambda layer: "blocks." in layer)
    tensors = lora_tensors(shapes, lambda layer: 3 if "_k" in layer else 5)
    tensors = {each: tensor.to(dtype) for each, tensor in tensors.items()}
    config = {"r": 5, "lora_alpha": 7.3, "rank_pattern": {".*_k.*": 3}, "alpha_pattern": {".*_k.*": 4.38}}
    source = write_lora(tmp_path / "a.safetensors", tensors, {"pixtune.family": name}, **config, target_modules=["x"])
    path = source
    for number, to in enumerate((*way, "diffusers")):
        path = convert(path, tmp_path / f"{number}.safetensors", to)
    assert bits(load_file(path)) == bits(load_file(source))
    before, after = read_adapter(source), read_adapter(path)
    for layer, change in before.changes.items():
        other = after.changes[layer]
        assert isinstance(change, LowRank) and isinstance(other, LowRank)
        assert other.scale == pytest.approx(change.scale, rel=1e-7)


@pytest.mark.parametrize("to", ["diffusers", "comfyui", "kohya"])
def test_stock_diffusers_loads_what_is_written(
    to: str, tmp_path: Path, diffusers_warnings: pytest.LogCaptureFixture
) -> None:
    """Each layer gets the delta that it has, of ranks and scales by layer."""
    from diffusers import QwenImagePipeline
    from peft.tuners.lora import LoraLayer

    shapes = shapes_of("qwen_image")
    loras = {
        layer: LowRank(torch.randn(2 + n % 3, shape[1]), torch.randn(shape[0], 2 + n % 3), 0.5 + n % 2)
        for n, (layer, shape) in enumerate(shapes.items())
    }
    write_adapter(tmp_path / "a.safetensors", as_layers(loras), to, FAMILIES["qwen_image"], {})
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    pipeline = QwenImagePipeline.from_pretrained(MODELS["qwen_image"], torch_dtype=torch.float32, **parts)
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    assert not [record.getMessage() for record in diffusers_warnings.records if "key" in record.getMessage().lower()]
    found = {path: each for path, each in pipeline.transformer.named_modules() if isinstance(each, LoraLayer)}
    assert found.keys() == loras.keys()
    for layer, module in found.items():
        (adapter,) = module.lora_A
        torch.testing.assert_close(module.get_delta_weight(adapter), dense(loras[layer]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["diffusers", "comfyui", "kohya"])
def test_runs_and_samples_read_ranks_and_scales_by_layer(to: str, tmp_path: Path) -> None:
    """As `init_lora`, `training_adapter` and `pixtune sample` read LoRAs, which is another way than these tools'."""
    loras = {
        f"transformer_blocks.{n}.attn.to_q": LowRank(torch.randn(1 + n % 3, 5), torch.randn(6, 1 + n % 3), 0.5 + n)
        for n in range(20, 26)
    }
    path, family = tmp_path / "a.safetensors", FAMILIES["qwen_image"]
    write_adapter(path, as_layers(loras), to, family, {})
    found = read_saved_lora(path, family).low_ranks()
    assert found.keys() == loras.keys()
    for layer, lora in loras.items():
        torch.testing.assert_close(dense(found[layer]), dense(lora))


def test_a_lokr_comes_back_the_same_to_the_bit(tmp_path: Path) -> None:
    layer = "transformer_blocks.30.attn.to_q"
    parts = {"lokr_w1": torch.randn(2, 2), "lokr_w2_a": torch.randn(3, 1), "lokr_w2_b": torch.randn(1, 2)}
    tensors = {f"{layer}.{name}": tensor for name, tensor in parts.items()}
    source = write_lora(tmp_path / "a.safetensors", tensors, r=1, alpha=3, peft_type="LOKR")
    path = source
    for to in ("kohya", "comfyui", "diffusers"):
        path = convert(path, tmp_path / f"{to}.safetensors", to)
    assert bits(load_file(path)) == bits(load_file(source))
    weight = torch.randn(6, 4)
    one, other = (changed_weight(weight, [read_adapter(each).changes[layer]])[0] for each in (source, path))
    torch.testing.assert_close(one, other)


def test_a_dora_s_magnitudes_mean_something_else_to_comfyui(tmp_path: Path) -> None:
    """It multiplies by the lengths of the base's rows; LyCORIS, which has the same name, as PEFT."""
    layer = "transformer_blocks.30.attn.to_q"
    tensors = {**lora_tensors({layer: (6, 4)}), f"{layer}.lora_magnitude_vector": torch.rand(6)}
    source = read_adapter(write_lora(tmp_path / "a.safetensors", tensors, r=4, lora_alpha=3, use_dora=True))
    for to in ("comfyui", "kohya"):
        with pytest.raises(WeightsError, match=r"b.safetensors.*base's lengths.*export"):
            write_adapter(tmp_path / "b.safetensors", settled(source), to, source.family, {})
    layers = {name: each.clone() for name, each in tensors.items() if "magnitude" not in name}
    layers[f"{layer}.dora_scale"] = tensors[f"{layer}.lora_magnitude_vector"][:, None].clone()
    comfyui = {f"diffusion_model.{name}": tensor for name, tensor in layers.items()}
    save_file(comfyui, tmp_path / "comfyui.safetensors")
    with pytest.raises(WeightsError, match=r"comfyui.safetensors.*ComfyUI's names"):
        settled(read_adapter(tmp_path / "comfyui.safetensors"))
    names = ("lora_down.weight", "lora_up.weight", "dora_scale")
    flat = f"lora_unet_{layer.replace('.', '_')}"
    lycoris = {f"{flat}.{name}": tensor for name, tensor in zip(names, layers.values(), strict=True)}
    save_file(lycoris, tmp_path / "lycoris.safetensors")
    back = convert(tmp_path / "lycoris.safetensors", tmp_path / "back.safetensors", "diffusers")
    assert bits(load_file(back)) == bits(load_file(source.path))
    change = read_adapter(back).changes[layer]
    assert isinstance(change, Dora) and change.magnitude_O.equal(tensors[f"{layer}.lora_magnitude_vector"])


def test_the_scale_of_a_lokr_of_two_whole_factors_is_multiplied_in(tmp_path: Path) -> None:
    """ComfyUI and kohya's trainers ignore its alpha."""
    layer = "transformer_blocks.30.attn.to_q"
    tensors = {f"{layer}.lokr_w1": torch.randn(2, 2), f"{layer}.lokr_w2": torch.randn(3, 2)}
    source = write_lora(tmp_path / "a.safetensors", tensors, r=4, alpha=3, peft_type="LOKR")
    target = convert(source, tmp_path / "b.safetensors", "comfyui")
    assert {name.rsplit(".", 1)[1] for name in load_file(target)} == {"lokr_w1", "lokr_w2"}
    expected = 0.75 * torch.kron(*tensors.values())
    change = read_adapter(target).changes[layer]
    assert not isinstance(change, Dora)
    torch.testing.assert_close(dense(change), expected)


def test_no_path_and_no_caption_goes_along_unasked(tmp_path: Path) -> None:
    metadata = {
        "ss_dataset_dirs": '{"/somewhere/mine": 1}', "ss_tag_frequency": "a caption", "modelspec.title": "mine",
        "modelspec.hash_sha256": "0x12", "pixtune.trigger_words": '["tw"]', "pixtune.rank": "4",
    }  # fmt: skip
    assert carried_metadata(metadata) == {"modelspec.title": "mine", "pixtune.trigger_words": '["tw"]'}
    assert carried_metadata({"pixtune.base_model": "/somewhere/mine/Qwen-Image"}) == {
        "pixtune.base_model": "Qwen-Image"
    }
    hub = {"pixtune.base_model": "Qwen/Qwen-Image", "pixtune.base_model_hash": "12"}
    assert carried_metadata(hub) == hub
    kept = carried_metadata(metadata, keep_all=True)
    assert "ss_tag_frequency" in kept and "modelspec.hash_sha256" not in kept


def test_joined_loras_keep_what_they_share_and_all_trigger_words(tmp_path: Path) -> None:
    layer = {"transformer_blocks.30.attn.to_q": (4, 4)}
    one = {"pixtune.trigger_words": '["a", "b"]', "pixtune.base_model": "Qwen/Qwen-Image", "modelspec.title": "one"}
    other = {"ss_trigger_word": "c", "pixtune.base_model": "Qwen/Qwen-Image", "modelspec.title": "other"}
    files = [
        read_adapter(write_lora(tmp_path / f"{number}.safetensors", lora_tensors(layer), metadata))
        for number, metadata in enumerate((one, other))
    ]
    assert joined_metadata(files) == {
        "pixtune.base_model": "Qwen/Qwen-Image", "pixtune.trigger_words": '["a", "b", "c"]',
        "modelspec.trigger_phrase": "a, b, c",
    }  # fmt: skip
    assert joined_metadata(files[:1]) == one


def test_layers_of_different_kinds_have_no_diffusers_format(tmp_path: Path) -> None:
    one, other = "transformer_blocks.30.attn.to_q", "transformer_blocks.31.attn.to_q"
    tensors = {
        **lora_tensors({one: (4, 4)}),
        f"{other}.lokr_w1": torch.ones(2, 2),
        f"{other}.lokr_w2": torch.ones(2, 2),
    }
    adapter = read_adapter(write_lora(tmp_path / "a.safetensors", tensors))
    with pytest.raises(WeightsError, match=r"b.safetensors.*different kinds"):
        write_adapter(tmp_path / "b.safetensors", settled(adapter), "diffusers", adapter.family, {})
    assert not (tmp_path / "b.safetensors").exists()


def test_a_new_file_takes_nothing_s_place(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    source.write_bytes(b"a")
    (tmp_path / "link.safetensors").symlink_to(source)
    (tmp_path / "hard.safetensors").hardlink_to(source)
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "other.safetensors").write_bytes(b"b")
    expected = {
        "a": "is what is read", "link": "is what is read", "hard": "is what is read", "folder": "is a folder",
        "dangling": "exists already", "other": "exists already",
    }  # fmt: skip
    for name, words in expected.items():
        with pytest.raises(WriteError, match=words):
            check_file_target(tmp_path / f"{name}.safetensors", [source])
    with pytest.raises(WriteError, match="could not be written"):
        check_file_target(tmp_path / f"{'n' * 300}.safetensors", [source])
    with pytest.raises(WriteError, match=r"end in .safetensors"):
        check_file_target(tmp_path / "b.pt", [source])
    with pytest.raises(WriteError, match="lies in"):
        check_file_target(tmp_path / "b.safetensors", [tmp_path])
    check_file_target(tmp_path / "b.safetensors", [source])
    with safe_open(convert(
        write_lora(tmp_path / "c.safetensors", lora_tensors({"transformer_blocks.30.attn.to_q": (4, 4)})),
        tmp_path / "d.safetensors", "diffusers",
    ), framework="pt") as file:  # fmt: skip
        assert file.metadata()["format"] == "pt"
