"""Pictures and captions that stand in for a data set while steps are timed: of one size and length, without meaning."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pixtune.config.folders import folders_of
from pixtune.config.schema import TrainConfig
from pixtune.config.streaming import StreamConfig

PATCHES = 8
"""Colour patches along a picture's side, enlarged: quick to write and to read at any size."""
FEWEST_PICTURES = 4
DEFAULT_WORDS = 256
"""Words of a caption, about a token each, where neither the caller nor the config sets a length."""


@dataclass(frozen=True)
class SyntheticData:
    """Folders of pictures."""

    images: Path
    controls: tuple[Path, ...]


def write_pictures(
    folder: Path, size_pixels: int, num_pictures: int, num_controls: int, num_words: int
) -> SyntheticData:
    """Writes square pictures with captions, and controls of the same names and size. Equal calls write equal files."""
    images = folder / "images"
    controls = tuple(folder / f"control_{number}" for number in range(num_controls))
    for part, place in enumerate((images, *controls)):
        place.mkdir(parents=True)
        for number in range(num_pictures):
            colours = random.Random(f"{part} {number}").randbytes(3 * PATCHES**2)
            picture = Image.frombytes("RGB", (PATCHES, PATCHES), colours)
            picture.resize((size_pixels, size_pixels), Image.Resampling.BICUBIC).save(place / f"{number}.png")
    for number in range(num_pictures):
        (images / f"{number}.txt").write_text(" ".join([str(number), *["noise"] * (num_words - 1)]))
    return SyntheticData(images, controls)


def count_controls(config: TrainConfig) -> int:
    """Counts the control pictures that an example of this config has, going by its folders."""
    return max(len(folder.control_dirs) for folder in folders_of(config.data_config))


def count_pictures(config: TrainConfig) -> int:
    """Counts the pictures of two steps without repetition."""
    return max(FEWEST_PICTURES, 2 * config.batch_size * config.gradient_accumulation_steps)


def timing_words(
    folder: Path, data: SyntheticData, num_steps: int, size_pixels: int, num_text_tokens: int | None
) -> list[str]:
    """Returns `key=value` words that turn any config into a run of `num_steps` in `folder`, without traces elsewhere.

    Args:
        num_text_tokens: length of each caption in tokens; None for the config's own.
    """
    values: dict[str, object] = {
        "output_dir": str(folder / "run"),
        "data_config.folders": [],
        "data_config.img_dir": str(data.images),
        "data_config.control_dir": [str(path) for path in data.controls] or None,
        "data_config.metadata_file": None,
        "data_config.caption_type": "txt",
        "data_config.caption_source": "file",
        "data_config.caption_text": None,
        "data_config.caption_prefix": "",
        "data_config.shuffle_tags": False,
        "data_config.tag_dropout_rate": 0.0,
        "data_config.flip": False,
        "data_config.img_size_shares": None,
        "data_config.img_size": size_pixels,
        "data_config.random_ratio": False,
        "data_config.caption_dropout_rate": 0.0,  # empty captions would be shorter than what is stated
        "data_config.cache_dir": str(folder / "cache"),
        "max_train_steps": num_steps,
        "num_train_epochs": None,
        "resume_from_checkpoint": None,
        "report_to": None,
        "validation.held_out": 0.0,
        "validation.held_out_dir": None,
        "samples.prompts": [],
        "samples.controls": [],
        **{f"stream.{key}": value for key, value in StreamConfig().model_dump().items()},
    }
    if num_text_tokens is not None:
        values["data_config.max_text_tokens"] = num_text_tokens
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]  # JSON is YAML
