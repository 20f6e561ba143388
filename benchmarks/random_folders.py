"""Writes full-size models' folders with random weights in seconds, for loading, caching and sampling.

Every file has the names, shapes and number format of the real one, so the usual code reads it. Values come from one
pool of random numbers that is used again and again: none overflows, and none means anything. Tokenizers are a small
model's; the vocabulary is as large as the real one.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from architectures import Architecture, write_json
from torch import Tensor, nn

from pixtune.errors import WriteError
from pixtune.hardware.facts import GIB
from pixtune.storage.loading import save_safetensors_sharded

ASSETS = Path(__file__).resolve().parents[1] / "assets"
STANDARD_DEVIATION = 0.02
"""Standard deviation of weights, as models are commonly initialized."""
DRAWN_NUMBERS = 1 << 25
"""Number of different values; the pool repeats them up to the length of the largest tensor."""
WRITING_THREADS = 8
SPARE_BYTES = GIB
"""Disk space that is left free."""


@dataclass(frozen=True)
class Part:
    """A component with weights."""

    name: str
    stem: str
    """Beginning of its files' names."""
    config: dict[str, Any]
    model: nn.Module
    """Model on the meta device."""
    names_in_files: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of parameters' names, as in `TextEncoder`."""

    @property
    def num_bytes(self) -> int:
        return sum(2 * parameter.numel() for parameter in self.model.parameters())


def write_random_model(folder: Path, model: Architecture, with_transformer: bool = True) -> int:
    """Writes a model folder with random weights in bf16. Parts that exist already stay as they are.

    Args:
        with_transformer: whether the transformer's weights are needed; caching needs its config alone.

    Returns:
        Bytes of weights that were written.

    Raises:
        WriteError: the weights do not fit the disk, or could not be written.
    """
    parts = parts_of(model, with_transformer)
    missing = [part for part in parts if not (folder / part.name / COMPLETE).is_file()]
    check_space(folder, sum(part.num_bytes for part in missing))
    small = ASSETS / model.small_model
    shutil.copytree(small, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"), dirs_exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", model.scheduler)
    write_json(folder / "transformer" / "config.json", model.transformer)
    for part in missing:
        save_safetensors_sharded(
            {name_in_file(name, part.names_in_files): tensor for name, tensor in random_weights(part.model).items()},
            folder / part.name,
            stem=part.stem,
            num_threads=WRITING_THREADS,
        )
        write_json(folder / part.name / "config.json", part.config)
        (folder / part.name / COMPLETE).touch()
    return sum(part.num_bytes for part in missing)


COMPLETE = ".complete"
"""File that is written last: a part without it was interrupted, and is written again."""


def parts_of(model: Architecture, with_transformer: bool) -> list[Part]:
    """Builds all components that have weights on the meta device."""
    parts = []
    for name, encoder in model.text_encoders.items():
        config = merged(json.loads((ASSETS / model.small_model / name / "config.json").read_text()), encoder.values)
        kind: Any = getattr(transformers, encoder.model_class)
        with torch.device("meta"):
            text_encoder = kind(kind.config_class.from_dict(config))
        parts.append(Part(name, "model", config, text_encoder, encoder.names_in_files))
    with torch.device("meta"):
        stock = {"vae": model.autoencoder} | ({"transformer": model.transformer} if with_transformer else {})
        for name, config in stock.items():
            built = getattr(diffusers, config["_class_name"]).from_config(config)
            parts.append(Part(name, "diffusion_pytorch_model", config, built))
    return parts


def name_in_file(name: str, beginnings: Mapping[str, str]) -> str:
    """Returns a parameter's name with its beginning as the published files have it."""
    for in_class, in_files in beginnings.items():
        if name.startswith(in_class):
            return in_files + name.removeprefix(in_class)
    return name


def merged(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `config` with `values` in their places, section by section."""
    inner = {key: merged(config[key], value) for key, value in values.items() if isinstance(value, dict)}
    return {**config, **values, **inner}


def random_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns values for a model on the meta device, all views of one pool. Tied weights come once, as in files.

    Scales are one and offsets zero: a norm's weights are not a matrix.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    longest = max(shape.numel() for shape in shapes.values())
    drawn = torch.randn(min(DRAWN_NUMBERS, longest), generator=torch.Generator().manual_seed(0)) * STANDARD_DEVIATION
    pool = drawn.bfloat16().repeat(math.ceil(longest / len(drawn)))
    tensors, start = {}, 0
    for name, shape in shapes.items():
        count = shape.numel()
        if count == max(shape):  # a vector, of however many dimensions
            fill = torch.zeros if name.endswith("bias") else torch.ones
            tensors[name] = fill(shape, dtype=torch.bfloat16)
            continue
        start = start % (len(pool) - count + 1)
        tensors[name] = pool[start : start + count].view(shape)
        start += count
    return tensors


def check_space(folder: Path, num_bytes: int) -> None:
    """Checks that a folder's disk has room for `num_bytes`.

    Raises:
        WriteError: it has not.
    """
    place = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(place).free
    if num_bytes and num_bytes + SPARE_BYTES > free:
        raise WriteError(
            f"{folder} would take {num_bytes / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free in {place}. Give a "
            "--folder on another disk, or write less: --phases caching needs no transformer."
        )
