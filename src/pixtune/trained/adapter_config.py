"""PEFT's config of an adapter, which diffusers' files have in their metadata: its kind, ranks and alphas by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixtune.errors import WeightsError
from pixtune.trained.layer_patterns import values_by_layer
from pixtune.trained.lora_names import DIFFUSERS_PREFIX

METADATA_KEY = "lora_adapter_metadata"


@dataclass(frozen=True)
class StatedSizes:
    """The ranks and alphas that a config states."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    """Rank of each layer, by its path."""
    alphas: Mapping[str, float]
    """Alpha of each layer, likewise."""


def read_adapter_config(path: Path, text: str) -> dict[str, Any]:
    """Reads an adapter's config by PEFT's names of its keys.

    Raises:
        WeightsError: it is none.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} has a damaged {METADATA_KEY}, which is not JSON. Fetch the file again.") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} has a damaged {METADATA_KEY}, which is no object. Fetch the file again.")
    return {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in config.items()}


def kind_of(config: Mapping[str, Any]) -> str:
    """Returns the kind of adapter that PEFT's config of it is for."""
    return "lokr" if str(config.get("peft_type")) == "LOKR" else "dora" if config.get("use_dora") else "lora"


def stated_sizes(path: Path, config: Mapping[str, Any], layers: Sequence[str]) -> StatedSizes:
    """Returns the ranks and alphas of layers by an adapter's config.

    Raises:
        WeightsError: it is damaged.
    """
    try:
        rank = number(config["r"], int)
        alpha = number(config["alpha" if kind_of(config) == "lokr" else "lora_alpha"], float)
        ranks = _values(config.get("rank_pattern"), layers, rank, int)
        alphas = _values(config.get("alpha_pattern"), layers, alpha, float)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{path} has a damaged {METADATA_KEY} ({error!r:.300}). Fetch the file again.") from error
    return StatedSizes(rank, alpha, ranks, alphas)


def number(value: Any, kind: type) -> Any:
    """Returns a number of a config: a rank, which is at least 1, or another one.

    Raises:
        ValueError: it is none.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value != kind(value)
    ):
        raise ValueError(f"{value!r} is no number that can stand there")
    if kind is int and value < 1:
        raise ValueError(f"{value!r} is no rank")
    return kind(value)


def _values(patterns: Any, layers: Sequence[str], default: Any, kind: type) -> dict[str, Any]:
    """Returns the value of each layer by an adapter's patterns, which map texts to numbers."""
    numbers = {key: number(value, kind) for key, value in (patterns or {}).items()}
    return values_by_layer(numbers, tuple(layers), default)
