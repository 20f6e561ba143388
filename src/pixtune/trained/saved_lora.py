"""LoRA files in diffusers' format, pixtune's or others': read, and attached with the scale that each layer has there.

The scale stands in the file's `lora_adapter_metadata`, PEFT's config of the adapter. What pixtune cannot apply as the
stock pipeline does is refused by name: ignored, it would give other pictures without a word.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from pixtune.errors import WeightsError
from pixtune.trained import adapters
from pixtune.trained.export import DIFFUSERS_PREFIX, read_tensors

METADATA_KEY = "lora_adapter_metadata"
APPLIED = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "peft_type"})
"""Keys of PEFT's `LoraConfig` that decide a LoRA's layers and their scales."""
WITHOUT_EFFECT = frozenset(
    {
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
        "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out", "megatron_core",
        "qalora_group_size", "eva_config",
    }
)  # fmt: skip
"""Keys that change nothing once the layers are known by their tensors, and no longer trained."""
HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is. Others, PiSSA for one, subtract the start from it."""
NESTED_REPEATS = re.compile(r"\([^)]*[*+{][^)]*\)[*+{]")
"""Patterns within patterns that take longer than anyone waits."""


@dataclass(frozen=True)
class SavedLora:
    """A LoRA that was read from a file."""

    path: Path
    weights: Mapping[str, Tensor]
    """`MODULE.lora_A.weight` and `MODULE.lora_B.weight`."""
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    """Ranks of layers that differ, by regular expressions over ends of paths, as PEFT matches them."""
    alpha_pattern: Mapping[str, float]
    """Alphas of layers that differ, likewise."""
    use_rslora: bool
    """Whether the scale is alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski 2023, arXiv 2312.03732)."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the layers that it is attached to."""
        return tuple(dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in self.weights))

    def scaled(self, strength: float) -> Self:
        """Returns it with a scale `strength` times as large."""
        alphas = {pattern: strength * alpha for pattern, alpha in self.alpha_pattern.items()}
        return replace(self, alpha=strength * self.alpha, alpha_pattern=alphas)

    @property
    def largest_rank(self) -> int:
        return max(tensor.shape[0] for name, tensor in self.weights.items() if name.endswith(".lora_A.weight"))


def read_saved_lora(path: Path) -> SavedLora:
    """Reads a LoRA from a file in diffusers' format.

    Raises:
        WeightsError: it is none, is damaged, or needs something that pixtune does not do; names it.
    """
    tensors, metadata = read_tensors(path)
    if METADATA_KEY not in metadata:
        raise WeightsError(
            f"{path} has no {METADATA_KEY}, so its scale is unknown. Give a LoRA in diffusers' format, for example the "
            "pytorch_lora_weights.safetensors of a run."
        )
    foreign = [name for name in tensors if not re.fullmatch(r"transformer\..+\.lora_[AB]\.weight", name)]
    if foreign or not tensors:
        what = f"holds {foreign[0]} and {len(foreign) - 1} more such tensors" if foreign else "holds no tensor"
        raise WeightsError(
            f"{path} {what}, and pixtune applies a plain LoRA of the transformer alone (lora_A and lora_B of linear "
            "layers). Sample with diffusers, which knows more kinds."
        )
    config = _lora_config(path, metadata[METADATA_KEY])
    try:
        return SavedLora(
            path,
            {name.removeprefix(DIFFUSERS_PREFIX): tensor for name, tensor in tensors.items()},
            rank=_number(config["r"], int),
            alpha=_number(config["lora_alpha"], float),
            rank_pattern={
                _pattern(key): _number(rank, int) for key, rank in (config.get("rank_pattern") or {}).items()
            },
            alpha_pattern={
                _pattern(key): _number(alpha, float) for key, alpha in (config.get("alpha_pattern") or {}).items()
            },
            use_rslora=bool(config.get("use_rslora")),
        )
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise WeightsError(f"{path} has a damaged {METADATA_KEY} ({error!r}). Fetch the file again.") from error


def _lora_config(path: Path, text: str) -> dict[str, Any]:
    """Reads the adapter's config, and refuses what pixtune does not apply."""
    from peft import LoraConfig

    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} has a {METADATA_KEY} that is not JSON. Fetch the file again.") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} has a {METADATA_KEY} that is no object. Fetch the file again.")
    config = {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in config.items()}
    usual = LoraConfig().to_dict()
    usual |= {"init_lora_weights": config.get("init_lora_weights", True)}
    unusual = [
        f"{key}={value!r:.60}"
        for key, value in config.items()
        if key not in APPLIED | WITHOUT_EFFECT and value != usual.get(key) and (value or usual.get(key))
    ]
    if config.get("init_lora_weights", True) not in HARMLESS_STARTS:
        unusual.append(f"init_lora_weights={config['init_lora_weights']!r:.60}")
    if str(config.get("peft_type", "LORA")) != "LORA":
        unusual.append(f"peft_type={config['peft_type']!r:.60}")
    if unusual:
        raise WeightsError(
            f"{path} is a LoRA with {', '.join(unusual)}, which pixtune does not apply; without it the pictures would "
            "be others. Sample with diffusers, or fuse it into the weights there."
        )
    return config


def _number(value: Any, kind: type) -> Any:
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


def _pattern(text: str) -> str:
    if len(text) > 10_000 or NESTED_REPEATS.search(text):
        raise ValueError(f"the pattern {text[:60]!r} is too intricate")
    re.compile(text)
    return text


def attach_saved_lora(transformer: nn.Module, lora: SavedLora) -> None:
    """Attaches a saved LoRA to a transformer.

    Raises:
        WeightsError: it is for another model.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.modules),
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.use_rslora,
    )
    try:
        adapters.attach_config(transformer, config)
        adapters.load_lora_weights(transformer, lora.weights)
    except (KeyError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{lora.path} does not fit this model: {error}") from error
