"""Full-size models' folders with random weights, written in seconds: what loading, caching and sampling need.

Every file has the names, shapes and number format of the real one, so the usual code reads it. Values are those of one
pool of random numbers, used again and again: none overflows, and none means anything. Tokenizers are a small model's;
the vocabulary is as large as the real one.
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
from architectures import Architecture
from torch import Tensor, nn

from pixtune.errors import WriteError
from pixtune.hardware.facts import GIB
from pixtune.storage.loading import save_safetensors_sharded

ASSETS = Path(__file__).resolve().parents[1] / "assets"
STANDARD_DEVIATION = 0.02
"""Of weights, as models are commonly initialised."""
DRAWN_NUMBERS = 1 << 25
"""So many different values; the pool is these over and over, as long as the largest tensor."""
WRITING_THREADS = 8
SPARE_BYTES = GIB
"""Left free on the disk."""


@dataclass(frozen=True)
class Part:
    """A component with weights."""

    name: str
    stem: str
    """Of its files' names."""
    config: dict[str, Any]
    model: nn.Module
    """On the meta device."""
    names_in_files: Mapping[str, str] = field(default_factory=dict)
    """See `TextEncoder`."""

    @property
    def num_bytes(self) -> int:
        return sum(2 * parameter.numel() for parameter in self.model.parameters())


def write_random_model(folder: Path, model: Architecture, with_transformer: bool = True) -> int:
    """A model folder with random weights in bf16. Parts that are there already stay as they are.

    Args:
        with_transformer: False: caching needs its config alone.

    Returns:
        Bytes of weights that were written.

    Raises:
        WriteError: they do not fit the disk, or could not be written.
    """
    missing = [part for part in parts_of(model, with_transformer) if not is_complete(folder / part.name)]
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
"""Written last: a part without it was broken off, and is made again."""


def is_complete(part_folder: Path) -> bool:
    """Whether a part was written to its end."""
    return (part_folder / COMPLETE).is_file()


def parts_of(model: Architecture, with_transformer: bool) -> list[Part]:
    """All components with weights, none of which has values."""
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
    """A parameter's, with its beginning as the published files have it."""
    for in_class, in_files in beginnings.items():
        if name.startswith(in_class):
            return in_files + name.removeprefix(in_class)
    return name


def merged(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `values` in their places, section by section."""
    inner = {key: merged(config[key], value) for key, value in values.items() if isinstance(value, dict)}
    return {**config, **values, **inner}


def random_weights(model: nn.Module) -> dict[str, Tensor]:
    """Values for a model on the meta device, all of them views of one pool. A tied weight comes once, as in real files.

    Scales are one and offsets zero: a norm's weights are no matrix.
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
    """
    Raises:
        WriteError: the disk that `folder` is to be on has no room for so much.
    """
    place = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(place).free
    if num_bytes and num_bytes + SPARE_BYTES > free:
        raise WriteError(
            f"{folder} would take {num_bytes / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free in {place}. Give a "
            "--folder on another disk, or write less: --phases caching needs no transformer."
        )


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """With its folder, if that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1))
