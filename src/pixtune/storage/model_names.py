"""Names that other programs have for a model and its layers in the files that they read and write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
    """Architecture of a base whose name has no word of `variants`."""
    implementation: str
    version: str
    """kohya's name of the base."""
    network_module: str
    """kohya's name of the code that trains LoRAs of it."""
    licenses: Mapping[str, str]
    """Licences of published bases, by the last part of their hub names in lower case."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """Architectures by words in names of bases, in lower case, of which the first counts."""

    def architecture_of(self, base_name: str) -> str:
        """Returns the architecture of a base by its hub name, folder or file."""
        name = base_name.rpartition("/")[2].lower()
        return next((found for word, found in self.variants.items() if word in name), self.architecture)
