"""Names that other programs have for a model and its layers in the files that they read and write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class OriginalLayer:
    """A linear layer as a model's authors name it, and kohya's trainers after them; in diffusers it may be several.

    In paths `{}` stands for the number of a block.
    """

    path: str
    parts: tuple[str, ...]
    """Paths in diffusers; the layer's outputs are theirs, one part after the other."""
    shares: tuple[int, ...] = (1,)
    """Numbers of the parts' outputs, in proportion."""
    swaps_halves: bool = False
    """Whether the first half of its outputs is the second in diffusers."""


@dataclass(frozen=True)
class ModelSpec:
    """Names by which LoRA managers know a model."""

    architecture: str
    implementation: str
    version: str
    """kohya's name of the base."""
    network_module: str
    """kohya's name of the code that trains LoRAs of it."""
    licenses: Mapping[str, str]
    """Licences of published bases, by the last part of their hub names in lower case."""
