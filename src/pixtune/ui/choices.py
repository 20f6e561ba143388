"""Three plain words for how good a run is to be, and the keys that each stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALL_MODEL_BYTES = 500 << 20
"""Size of a transformer's files below which a model is one to try things with, as those of this repository."""


@dataclass(frozen=True)
class Quality:
    """One choice."""

    word: str
    title: str
    sentence: str
    side: int
    rank: int
    passes: int
    """Number of times that each picture is used."""
    fewest_steps: int
    most_steps: int
    learning_rate: float


QUALITIES = (
    Quality("quick", "Quick look", "Does it work at all? Small pictures, few steps.", 512, 8, 20, 100, 600, 2e-4),
    Quality("usual", "Usual", "What most subjects and styles need.", 768, 16, 40, 400, 2000, 1e-4),
    Quality("thorough", "Thorough", "Full size and twice the detail; takes longest.", 1024, 32, 60, 800, 4000, 1e-4),
)
SMALL_SIDES = {"quick": 64, "usual": 96, "thorough": 128}
SMALL_STEPS = {"quick": 40, "usual": 150, "thorough": 300}


def is_small_model(name_or_path: str) -> bool:
    """Returns whether a model is a local one of toy size, which learns from small pictures on any CPU."""
    try:
        files = list((Path(name_or_path).expanduser() / "transformer").glob("*.safetensors"))
        return bool(files) and sum(file.stat().st_size for file in files) < SMALL_MODEL_BYTES
    except (OSError, RuntimeError):
        return False


def keys_of(quality: Quality, num_pictures: int, is_small: bool) -> dict[str, Any]:
    """Returns the keys that a choice sets, for a number of pictures and a kind of model."""
    if is_small:
        steps = SMALL_STEPS[quality.word]
        return {
            "data_config.img_size": SMALL_SIDES[quality.word],
            "rank": quality.rank,
            "learning_rate": 1e-3,
            "max_train_steps": steps,
            "train_batch_size": 8,
            "checkpointing_steps": steps // 2,
            "samples.every": steps // 2,
            "samples.num_steps": 8,
        }
    steps = min(max(num_pictures * quality.passes, quality.fewest_steps), quality.most_steps)
    steps = round(steps, -1 if steps < 1000 else -2)
    every = max(steps // 4, 25)
    return {
        "data_config.img_size": quality.side,
        "rank": quality.rank,
        "learning_rate": quality.learning_rate,
        "max_train_steps": steps,
        "train_batch_size": 1,
        "checkpointing_steps": every,
        "samples.every": every,
        "samples.num_steps": 20,
    }


def chosen(given: Mapping[str, Any], num_pictures: int, is_small: bool) -> str:
    """Returns the word whose keys a config has; "" where it has others."""
    for quality in QUALITIES:
        if all(given.get(key) == value for key, value in keys_of(quality, num_pictures, is_small).items()):
            return quality.word
    return ""


def first_keys(name: str, model: str, pictures: str, is_small: bool) -> dict[str, Any]:
    """Returns the nested keys of a new config, besides those of its quality."""
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": model,
        "output_dir": f"runs/{name}",
        "resume_from_checkpoint": "latest",
    }
    if is_small:
        values |= {"mixed_precision": "no", "lora_targets": ["attention_mlp"], "logging_steps": 5}
    else:
        values |= {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 20}
    return values | {"checkpoints_total_limit": 3, "data_config": {"img_dir": pictures, "caption_dropout_rate": 0.1}}
