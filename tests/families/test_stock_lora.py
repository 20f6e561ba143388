"""The stock pipelines load every family's LoRA whole, and draw with it what `pixtune sample` draws."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

from pixtune.commands.sample import sample_pictures
from pixtune.data.drawing import SampleRequest
from pixtune.data.sample_prompts import AskedPrompt
from pixtune.engine.load import load_transformer
from pixtune.families import FAMILIES
from pixtune.family import ModelFamily, Placement
from pixtune.sampler import SamplerSettings
from pixtune.storage.base_reference import BaseReference
from pixtune.storage.model_folder import ModelFolder
from pixtune.trained import adapters
from pixtune.trained.export import COMFYUI_FILE, DIFFUSERS_FILE, LoraDescription, export_lora
from tests.families.stock import edit_pipeline, remembered_encodings
from tests.shallow import shallow_model

MODELS = {
    "qwen_image": "tiny-qwen-image",
    "qwen_image_edit": "tiny-qwen-image-edit",
    "qwen_image_edit_plus": "tiny-qwen-image-edit",
    "flux": "tiny-flux",
    "flux_kontext": "tiny-flux",
}
SIZE = (64, 96)
PROMPT, SEED, STEPS, GUIDANCE = "red heart, flat emoji style", 4, 2, 3.0
LEAST_PSNR = 40.0
"""Decibels; pictures rounded to 8 bits from equal numbers have more than 50."""


def test_no_family_is_forgotten() -> None:
    assert MODELS.keys() == FAMILIES.keys()


def model_folder(family: ModelFamily, path: Path) -> ModelFolder:
    """A small model under the family's own pipeline class: some families differ in nothing else."""
    path.mkdir()
    source = shallow_model(MODELS[family.name])
    for part in source.iterdir():
        if part.is_dir():
            (path / part.name).symlink_to(part)
    index = json.loads((source / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, "_class_name": family.pipeline_classes[0]}))
    return ModelFolder(path)


def write_lora(family: ModelFamily, folder: ModelFolder, path: Path) -> None:
    """Both files of a LoRA that changes pictures, at a scale that is not 1."""
    transformer = load_transformer(family, folder, Placement(torch.device("cpu"), torch.float32)).module
    lora = adapters.attach_lora(transformer, family.lora_targets, 4, 10.0, 3, family.lora_presets)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapters.lora_weights(transformer).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    about = LoraDescription(4, 10.0, lora.targets, BaseReference("base", None), family.name, 1, "0" * 16, [], {})
    export_lora(path, adapters.lora_weights(transformer), about, family)


def write_controls(family: ModelFamily, path: Path) -> list[Path]:
    """Two pictures of different shapes where the model takes several; one of the pipeline's own size for Kontext."""
    sizes = {0: [], 1: [(300, 300)]}.get(family.max_controls, [(300, 300), (500, 320)])
    if family.embedded_guidance and family.max_controls:
        sizes = [(64, 64)]
    paths = []
    for size, colour in zip(sizes, ("red", "green"), strict=False):
        paths.append(path / f"{colour}.png")
        ImageOps.colorize(Image.radial_gradient("L").resize(size), colour, "white").save(paths[-1])
    return paths


def stock_picture(family: ModelFamily, folder: ModelFolder, lora: Path, controls: list[Path]) -> Image.Image:
    import diffusers

    if family.controls_in_text:
        pipeline = edit_pipeline(family, folder)
    else:
        pipeline = getattr(diffusers, folder.pipeline_class).from_pretrained(folder.path, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    settings: dict[str, Any] = {"guidance_scale": GUIDANCE}
    if not family.embedded_guidance:
        settings = {"true_cfg_scale": GUIDANCE, "negative_prompt": " "}
    if controls:
        pictures = [Image.open(path) for path in controls]
        settings["image"] = pictures if family.max_controls > 1 else pictures[0]
        if family.embedded_guidance:  # at its own 64x64: the stock 4096 tokens of a control take minutes
            settings |= {"max_area": SIZE[0] * SIZE[1], "_auto_resize": False}
    generator = torch.Generator().manual_seed(SEED)
    return pipeline(
        prompt=PROMPT, width=SIZE[0], height=SIZE[1], num_inference_steps=STEPS, generator=generator, **settings
    ).images[0]


def our_picture(folder: ModelFolder, lora: Path | None, controls: list[Path], control_size: int, path: Path) -> Any:
    request = SampleRequest(
        str(folder.path), (AskedPrompt(PROMPT, None, tuple(controls), SIZE),), lora, "fp32",
        SamplerSettings((SEED,), STEPS, GUIDANCE), None, control_size,
    )  # fmt: skip
    (written,) = sample_pictures(request, path)
    return Image.open(written)


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Decibels of two 8-bit pictures."""
    assert one.size == other.size
    levels = [torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8) for image in (one, other)]
    error = (levels[0].double() - levels[1].double()).square().mean().item()
    return float("inf") if error == 0 else float(10 * torch.log10(torch.tensor(255**2 / error)))


@pytest.fixture
def encodings() -> Iterator[None]:
    """Control pictures are encoded once for both pipelines and both of our pictures."""
    with remembered_encodings():
        yield


@pytest.mark.usefixtures("encodings")
@pytest.mark.parametrize("name", MODELS)
def test_the_stock_pipeline_draws_our_picture(
    name: str, tmp_path: Path, diffusers_warnings: pytest.LogCaptureFixture
) -> None:
    family = FAMILIES[name]
    folder = model_folder(family, tmp_path / "model")
    write_lora(family, folder, tmp_path)
    controls = write_controls(family, tmp_path)
    control_size = 64 if family.embedded_guidance else 1024
    ours = our_picture(folder, tmp_path / DIFFUSERS_FILE, controls, control_size, tmp_path / "with")
    # The dear edit pipelines run once; that both files give the same velocity is tested in unit/trained/test_export.py.
    for file_name in (DIFFUSERS_FILE,) if family.controls_in_text else (DIFFUSERS_FILE, COMFYUI_FILE):
        stock = stock_picture(family, folder, tmp_path / file_name, controls)
        assert psnr(ours, stock) >= LEAST_PSNR, file_name
    said = [record.getMessage() for record in diffusers_warnings.records]
    # Of the text encoder, which has no LoRA; the same sentence about the transformer would be a fault.
    assert not [text for text in said if "key" in text.lower() and "associated to CLIPTextModel" not in text]
    without = our_picture(folder, None, controls, control_size, tmp_path / "without")
    assert psnr(ours, without) < LEAST_PSNR - 10, "a LoRA without effect would prove nothing"
