"""`pixtune sample`: pictures from a model folder, with a saved LoRA put onto the base as others would load it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from pixtune import adapters
from pixtune.data.buckets import Size
from pixtune.data.cache import Ledger, MemoryStore
from pixtune.data.encode import Encoder
from pixtune.data.encodings import Encodings, control_pictures, text_item
from pixtune.data.prepare import control_rules, encode_prompt, prompt_sample
from pixtune.errors import WeightsError
from pixtune.export import read_lora_file
from pixtune.families import family_of
from pixtune.families.base import CONTROL_SIDE, ModelFamily, Placement
from pixtune.fit.apply import FORMATS
from pixtune.fit.encoders import encode_plainly
from pixtune.fit.load import load_transformer
from pixtune.sample import EncodedPrompt, PromptSampler, SamplerSettings
from pixtune.weights import ModelFolder, open_model_folder


@dataclass(frozen=True)
class DrawRequest:
    """What to draw with what."""

    model: str
    prompts: tuple[str, ...]
    controls: tuple[Path, ...]
    """Control pictures of every prompt (edit models)."""
    lora: Path | None
    weights_format: str
    settings: SamplerSettings
    size: Size | None
    """(width, height) in pixels; None: the last control's shape, or a square, at the stock pipelines' area."""
    max_text_tokens: int | None
    control_size: int
    """Side in pixels of the square whose area control pictures get."""


def draw(request: DrawRequest, output_dir: Path) -> Iterator[Path]:
    """Draws each prompt with each seed and yields the paths of the PNG files.

    Raises:
        WeightsError: model or LoRA cannot be used.
        DataError: a control picture cannot be used.
    """
    folder = open_model_folder(request.model)
    family = family_of(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    placement = Placement(device, FORMATS[request.weights_format])
    prompts = encode_request(request, family, folder, placement)

    transformer = load_transformer(family, folder, placement)
    if request.lora is not None:
        put_on_lora(transformer, request.lora)
    sampler = PromptSampler(family, folder, prompts, request.settings, placement, keep_autoencoder=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(sampler.draw(transformer)):
        path = output_dir / f"{number:03d}-seed{picture.seed}.png"
        picture.image.save(path)
        yield path


def encode_request(
    request: DrawRequest, family: ModelFamily, folder: ModelFolder, placement: Placement
) -> list[EncodedPrompt]:
    """Prompts and control pictures, encoded as in training; encoders leave the device before the transformer comes."""
    encoder = Encoder(
        family=family,
        folder=folder,
        placement=placement,
        plan=encode_plainly(batch_size=1),
        max_text_tokens=request.max_text_tokens,
        store=MemoryStore(),
        ledger=Ledger(None),
        console=Console(quiet=True),
        memo_dir=None,
    )
    encodings = Encodings(encoder)
    multiple = family.pixel_multiple(folder)
    rules = control_rules(family, folder, request.control_size)
    size = request.size or (CONTROL_SIDE, CONTROL_SIDE)
    samples = [
        prompt_sample(text, request.controls, size, request.size is None, multiple, rules) for text in request.prompts
    ]
    items = [text_item(text, s, 0) for s in samples for text in (s.caption, family.dropped_caption)]
    encodings.fill_texts(list(dict.fromkeys(items)))
    encodings.fill_pictures(list(dict.fromkeys(p for sample in samples for p in control_pictures(sample, 0))))
    return [encode_prompt(family, encodings, sample, request.settings.guidance_scale) for sample in samples]


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
