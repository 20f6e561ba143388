"""`pixtune sample`: pictures from a model folder, with a saved LoRA put onto the base as others would load it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pixtune import adapters
from pixtune.errors import WeightsError
from pixtune.export import read_lora_file
from pixtune.families import family_of
from pixtune.families.base import Placement
from pixtune.fit.apply import FORMATS
from pixtune.sample import EncodedPrompts, PromptSampler, SamplerSettings
from pixtune.weights import open_model_folder


@dataclass(frozen=True)
class DrawRequest:
    """What to draw with what."""

    model: str
    prompts: tuple[str, ...]
    lora: Path | None
    weights_format: str
    settings: SamplerSettings


def draw(request: DrawRequest, output_dir: Path) -> Iterator[Path]:
    """Draws each prompt with each seed and yields the paths of the PNG files.

    Raises:
        WeightsError: model or LoRA cannot be used.
    """
    folder = open_model_folder(request.model)
    family = family_of(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    placement = Placement(device, FORMATS[request.weights_format])

    text_encoder = family.load_text_encoder(folder, placement)
    texts = [*request.prompts, family.dropped_caption]
    rows = [{name: t.cpu() for name, t in row.items()} for row in family.encode_text(text_encoder, texts)]
    del text_encoder
    negative = rows[-1] if request.settings.guidance_scale > 1 else None
    prompts = EncodedPrompts(request.prompts, tuple(rows[:-1]), negative)

    transformer = family.load_transformer(folder, placement)
    if request.lora is not None:
        put_on_lora(transformer, request.lora)
    sampler = PromptSampler(family, folder, prompts, request.settings, placement, keep_autoencoder=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(sampler.draw(transformer)):
        path = output_dir / f"{number:03d}-seed{picture.seed}.png"
        picture.image.save(path)
        yield path


def put_on_lora(transformer: nn.Module, path: Path) -> None:
    """Attaches a LoRA file of ours to a transformer.

    Raises:
        WeightsError: not a LoRA that pixtune wrote for diffusers, or for another model.
    """
    weights, metadata = read_lora_file(path)
    if "lora_adapter_metadata" not in metadata:
        raise WeightsError(
            f"{path} has no lora_adapter_metadata, so its scale is unknown. Give the pytorch_lora_weights.safetensors "
            "of a run."
        )
    scale = json.loads(metadata["lora_adapter_metadata"])
    adapters.attach_lora(
        transformer, scale["transformer.target_modules"], scale["transformer.r"], scale["transformer.lora_alpha"], 0
    )
    try:
        adapters.load_lora_weights(transformer, weights)
    except (KeyError, RuntimeError) as error:
        raise WeightsError(f"{path} does not fit this model: {error}") from error
