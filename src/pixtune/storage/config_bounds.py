"""Bounds of the numbers in a model's configs: libraries build what they describe before they look at weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pixtune.errors import WeightsError

LARGEST_NUMBER = 2**24
"""Number that no size, position or word of a model reaches; some buffers have so many numbers."""
MOST_LAYERS = 1000
"""Number of layers or blocks that no model has: Qwen-Image has 60. Each takes a library milliseconds."""
LONGEST_LIST = 1000
MOST_LEVELS = 20
COUNTS = ("layers", "depth", "blocks", "layers_per_block")
"""Ends of the names of keys that count what is built one by one."""

KINDS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(
        (
            "num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim",
            "pooled_projection_dim", "in_channels", "out_channels", "z_dim", "latent_channels",
        ),
        int,
    ),
    **dict.fromkeys(("temperal_downsample", "latents_mean", "latents_std", "block_out_channels"), list),
    **dict.fromkeys(("scaling_factor", "shift_factor"), (int, float)),
}  # fmt: skip
"""Kinds of the values that pixtune itself computes with."""


def check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Checks a component's config before anything is built by it.

    Raises:
        WeightsError: a value is of another kind than models have, larger, or nested too deeply; names the key.
    """
    for key, kind in KINDS.items():
        value = config.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise WeightsError(f"{file} cannot be a model's config: {key} is {value!r:.60}. Fetch the model again.")
    for key in ("latents_mean", "latents_std"):
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in config.get(key) or ()):
            raise WeightsError(
                f"{file} cannot be a model's config: {key} holds what is no number. Fetch the model again."
            )
    for key, value, level in _values(config, "", 0):
        if level > MOST_LEVELS:
            problem = f"is nested more than {MOST_LEVELS} levels deep"
        elif isinstance(value, list) and len(value) > LONGEST_LIST:
            problem = f"lists {len(value):,} values"
        elif type(value) is int and not -1 <= value <= (MOST_LAYERS if key.endswith(COUNTS) else LARGEST_NUMBER):
            problem = f"is {str(value)[:60]}"
        else:
            continue
        raise WeightsError(f"{file} cannot be a model's config: {key} {problem}. Fetch the model again.")


def _values(value: Any, key: str, level: int) -> Iterator[tuple[str, Any, int]]:
    """Yields a value and all within it, each with its key."""
    yield key, value, level
    if level > MOST_LEVELS:
        return
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _values(inner, str(name), level + 1)
    elif isinstance(value, list) and len(value) <= LONGEST_LIST:
        for inner in value:
            yield from _values(inner, key, level + 1)
