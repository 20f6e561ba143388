"""Whatever is named as a model and is none: the error says what it is, and nothing of it is executed."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from pixtune.config.model_parts import ModelParts
from pixtune.errors import WeightsError
from pixtune.families.opening import find_model, open_model
from tests import single_files
from tests.runs import ROOT

FLUX, QWEN = ROOT / "assets" / "tiny-flux", ROOT / "assets" / "tiny-qwen-image"
WORKFLOW = {"nodes": [{"type": "UNETLoader"}], "links": []}
API_WORKFLOW = {"1": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux.safetensors"}}}


class Explosive:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return exec, ("raise SystemExit('a pickle was opened')",)


def picture(workflow: bool) -> bytes:
    about = PngImagePlugin.PngInfo()
    if workflow:
        about.add_text("workflow", json.dumps(WORKFLOW))
    written = io.BytesIO()
    Image.new("RGB", (8, 8)).save(written, "PNG", pnginfo=about)
    return written.getvalue()


def jpeg() -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (8, 8)).save(written, "JPEG")
    return written.getvalue()


BYTES: dict[str, tuple[bytes, str]] = {
    "pickle": (pickle.dumps(Explosive()), "a PyTorch pickle"),
    "zip": (b"PK\x03\x04" + bytes(100), "a PyTorch pickle"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
        "git-lfs pointer.*git lfs pull",
    ),
    "login page": (b"<!DOCTYPE html><html><title>Log in</title></html>", "a web page"),
    "workflow picture": (picture(True), "a picture with a ComfyUI workflow"),
    "picture": (picture(False), "a picture. Give"),
    "jpeg": (jpeg(), "a picture. Give"),
    "workflow": (json.dumps(WORKFLOW).encode(), "a ComfyUI workflow"),
    "api workflow": (json.dumps(API_WORKFLOW, indent=2).encode(), "a ComfyUI workflow"),
    "index": (json.dumps({"weight_map": {"a": "b"}}).encode(), "the index of weights"),
    "config": (json.dumps({"_class_name": "FluxTransformer2DModel"}).encode(), "a model's config, without weights"),
    "json": (b'{"steps": 3}', "JSON, without weights"),
    "api error": (b'{"error": "Repository not found"}', "JSON, without weights"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(64), "a GGUF file"),
    "text": (
        b"Access to model black-forest-labs/FLUX.1-dev is restricted.\n",
        "text, which begins with 'Access to model",
    ),
    "yaml": (b"job: extension\nconfig:\n  name: x\n", "text, which begins"),
    "archive": (b"\x1f\x8b" + bytes(60), "a compressed archive"),
    "empty": (b"", "empty"),
    "zeros": (bytes(4096), "filled with zeros"),
    "noise": (bytes(range(255, 0, -1)) * 4, "something else, or cut off"),
}


def tensors_of(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(2, 2) for name in names}


TENSORS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "autoencoder": (
        tensors_of("encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"),
        r"only an autoencoder.*model_parts\.vae",
    ),
    "diffusers' autoencoder": (
        tensors_of("encoder.conv_in.weight", "decoder.mid_block.attentions.0.to_q.weight", "quant_conv.weight"),
        "only an autoencoder",
    ),
    "Wan's autoencoder": (
        tensors_of("encoder.conv1.weight", "conv1.weight", "conv2.weight", "decoder.head.0.gamma"),
        "only an autoencoder",
    ),
    "CLIP": (
        tensors_of("text_model.encoder.layers.0.mlp.fc1.weight", "text_model.embeddings.token_embedding.weight"),
        r"only a text encoder \(CLIP\)",
    ),
    "T5": (
        tensors_of("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"),
        r"only a text encoder \(T5\)",
    ),
    "Qwen2.5-VL": (
        tensors_of("model.layers.0.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.weight"),
        r"only a text encoder \(Qwen2.5-VL\)",
    ),
    "LoRA": (tensors_of("transformer.transformer_blocks.0.attn.to_q.lora_A.weight"), "a LoRA"),
    "kohya LoRA": (tensors_of("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"), "a LoRA"),
    "LoKr": (tensors_of("lycoris_transformer_blocks_0_attn_to_q.lokr_w1"), "a LoRA"),
    "SDXL": (
        tensors_of(
            "model.diffusion_model.input_blocks.0.0.weight",
            "model.diffusion_model.label_emb.0.0.weight",
            "conditioner.embedders.1.model.ln_final.weight",
        ),
        "SDXL, which no family here trains",
    ),
    "SD 1.5": (
        tensors_of("model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x"),
        "Stable Diffusion 1 or 2",
    ),
    "SD 3": (tensors_of("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), "Stable Diffusion 3"),
    "Wan": (tensors_of("blocks.0.cross_attn.k.weight", "patch_embedding.weight"), "Wan"),
    "FLUX.2": (
        tensors_of("double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"),
        r"FLUX\.2",
    ),
    "Chroma": (
        tensors_of("double_blocks.0.img_attn.qkv.weight", "img_in.weight", "distilled_guidance_layer.in_proj.weight"),
        "Chroma",
    ),
    "Z-Image": (tensors_of("noise_refiner.0.attention.qkv.weight", "cap_embedder.0.weight"), "Z-Image"),
    "ControlNet": (
        tensors_of(
            "controlnet_blocks.0.weight", "transformer_blocks.0.img_mod.1.weight", "img_in.weight", "txt_norm.weight"
        ),
        "a ControlNet",
    ),
    "embedding": (tensors_of("emb_params"), "textual inversion"),
    "no tensors": ({}, "without a tensor"),
    "something": (tensors_of("linear.weight"), "no model that pixtune knows.*linear.weight"),
}


@pytest.mark.parametrize(("content", "message"), BYTES.values(), ids=BYTES)
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_by_its_bytes(content: bytes, message: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{ending}"
    path.write_bytes(content)
    for opening in (open_model, find_model):
        with pytest.raises(WeightsError, match=message) as caught:
            opening(str(path), ModelParts(others=str(FLUX)))
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(("tensors", "message"), TENSORS.values(), ids=TENSORS)
def test_by_its_tensors(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        open_model(str(FLUX), ModelParts(transformer=tmp_path / "model.safetensors"))


def flux(tmp_path: Path, change: Callable[[single_files.Tensors], object], form: str = "fp8_scaled") -> Path:
    """A small FLUX.1 in one file, with something wrong in it."""
    tensors = single_files.published("tiny-flux")
    tensors = getattr(single_files, form)(tensors) if form else tensors
    change(tensors)
    return single_files.write(tensors, tmp_path / "model.safetensors")


LAYER = "double_blocks.0.img_mlp.0"
CHANGES: dict[str, tuple[Callable[[single_files.Tensors], object], str]] = {
    "another format": (
        lambda t: t.update({f"{LAYER}.comfy_quant": single_files.note(format="nvfp4")}),
        f"{LAYER}.weight is in the format 'nvfp4'",
    ),
    "4 bits": (
        lambda t: t.update({f"{LAYER}.comfy_quant": single_files.note(format="convrot_w4a4")}),
        "'convrot_w4a4'",
    ),
    "note without a format": (
        lambda t: t.update({f"{LAYER}.comfy_quant": single_files.note(group=3)}),
        "no note on a format",
    ),
    "note that is no JSON": (
        lambda t: t.update({f"{LAYER}.comfy_quant": torch.zeros(9, dtype=torch.uint8)}),
        "no note on a format",
    ),
    "int8 without a note": (
        lambda t: t.update(
            {
                f"{LAYER}.weight": torch.ones(1024, 256, dtype=torch.int8),
                f"{LAYER}.comfy_quant": single_files.note(format="float8_e4m3fn"),
            }
        ),
        "is I8, and noted as 'float8_e4m3fn'",
    ),
    "scales by block": (lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(8, 2)}), r"has scales .*\[8, 2\]"),
    "scale that is no number": (
        lambda t: t.update({f"{LAYER}.weight_scale": torch.tensor(float("nan"))}),
        "no scales of a weight",
    ),
    "scale below zero": (lambda t: t.update({f"{LAYER}.weight_scale": torch.tensor(-1.0)}), "no scales of a weight"),
    "scale beside plain numbers": (
        lambda t: t.update({"img_in.weight_scale": torch.ones(())}),
        "is BF16 and has a scale",
    ),
    "foreign tensor": (
        lambda t: t.update({"double_blocks.0.extra.weight": torch.ones(2, 2)}),
        "double_blocks.0.extra.weight, which no FLUX.1",
    ),
    "missing layer": (
        lambda t: t.pop("txt_in.weight"),
        "lacks tensors of a FLUX.1 transformer, 'context_embedder.weight'",
    ),
    "missing norm": (lambda t: t.pop("double_blocks.0.img_attn.norm.query_norm.scale"), "lacks tensors"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_form_that_is_not_known_is_named_with_its_layer(
    change: Callable[[single_files.Tensors], object], message: str, tmp_path: Path
) -> None:
    from pixtune.storage.loading import open_transformer

    path = flux(tmp_path, change)
    with pytest.raises(WeightsError, match=message) as caught:
        open_transformer(open_model(str(path), ModelParts(others=str(FLUX))))
    assert str(path) in str(caught.value)


def test_int8_without_notes_may_be_rotated_and_is_refused(tmp_path: Path) -> None:
    def forget(tensors: single_files.Tensors) -> None:
        for name in [name for name in tensors if name.endswith("comfy_quant")]:
            del tensors[name]

    with pytest.raises(WeightsError, match=r"is I8 without a note.*rotated"):
        open_model(str(flux(tmp_path, forget, "int8_convrot")), ModelParts(others=str(FLUX)))


def test_an_inpainting_model_of_the_same_names_is_refused(tmp_path: Path) -> None:
    tensors = single_files.published("tiny-flux")
    tensors["img_in.weight"] = torch.ones(256, 384)
    path = single_files.write(tensors, tmp_path / "fill.safetensors")
    with pytest.raises(WeightsError, match="reads 384 channels and makes 64"):
        open_model(str(path), ModelParts(others=str(FLUX)))


def test_a_file_that_ends_early_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    path = flux(tmp_path, lambda tensors: None)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"cut off: it has .* bytes, and its header says"):
        find_model(str(path), ModelParts(others=str(FLUX)))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(WeightsError, match="cut off"):
        open_model(str(path), ModelParts(others=str(FLUX)))


def test_one_of_several_files_is_not_taken_for_a_smaller_model(tmp_path: Path) -> None:
    tensors = single_files.published("tiny-qwen-image")
    path = single_files.write(tensors, tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors")
    with pytest.raises(WeightsError, match=r"is one of several files that belong together. Name the folder"):
        open_model(str(path), ModelParts(others=str(QWEN)))


def test_a_folder_of_such_files_names_them(tmp_path: Path) -> None:
    single_files.write(single_files.published("tiny-flux"), tmp_path / "flux1-dev.safetensors")
    with pytest.raises(WeightsError, match=r"no model_index.json. It has flux1-dev.safetensors: is one of them meant"):
        open_model(str(tmp_path))


def words(**parts: object) -> ModelParts:
    return ModelParts.model_validate(parts)


@pytest.mark.parametrize(
    ("model", "parts", "message"),
    [
        ("FILE", {}, "a FLUX.1 transformer alone. A FluxPipeline needs .*vae.*model_parts.others, for example black-f"),
        ("FILE", {"others": str(QWEN)}, "is a FLUX.1 transformer, and .* is a QwenImagePipeline"),
        ("FILE", {"others": str(FLUX), "transformer": "FILE"}, "two transformers are named"),
        ("FILE", {"others": str(FLUX), "pipeline": "FluxPipeline"}, "Leave out one of them"),
        ("FILE", {"others": "/nowhere/at/all"}, "^model_parts.others: there is no /nowhere/at/all"),
        (str(FLUX), {"others": str(FLUX)}, "no file but a model that has it. Leave out model_parts.others"),
        (str(FLUX), {"vae": "/nowhere"}, "model_parts.vae: there is no /nowhere"),
        (str(FLUX), {"vae": "FILE"}, "model_parts.vae: .* is a file, and a folder with its config is needed"),
        (str(FLUX), {"vae": str(FLUX)}, "model_parts.vae: .* has no config.json"),
        (str(FLUX), {"scheduler": str(FLUX / "vae")}, "has no scheduler_config.json"),
        (str(FLUX), {"processor": str(FLUX / "tokenizer")}, "a FluxPipeline has no such part"),
        (str(QWEN), {"text_encoder_2": str(FLUX / "text_encoder_2")}, "a QwenImagePipeline has no such part"),
        (
            "FILE",
            {"pipeline": "StableDiffusionPipeline"},
            "is StableDiffusionPipeline, and a FLUX.1 transformer is one",
        ),
        ("/nowhere/flux.safetensors", {"others": str(FLUX)}, "there is no /nowhere/flux.safetensors"),
    ],
)
def test_parts_that_do_not_go_together_are_named(
    model: str, parts: dict[str, object], message: str, tmp_path: Path
) -> None:
    file = single_files.write(single_files.published("tiny-flux"), tmp_path / "flux.safetensors")
    named = {key: str(file) if value == "FILE" else value for key, value in parts.items()}
    with pytest.raises(WeightsError, match=message):
        open_model(str(file) if model == "FILE" else model, words(**named))
