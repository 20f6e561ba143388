"""Compares what a checkpoint has saved, read back from the disk, with the live weights.

A file that is whole may still do nothing: weights that never moved, a scale that was lost, names that nobody finds.
What a checkpoint is worth shows only where it is put to use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pixtune import randomness
from pixtune.errors import WeightsError

Velocity = Callable[[], Tensor]
"""Function that predicts the velocity of fixed inputs with the transformer as it is now."""


@dataclass(frozen=True)
class ReadBack:
    """Effect of a checkpoint's weights on fixed inputs, in parts of the velocity's own length."""

    effect: float
    """Distance of the live weights' velocity from the base's."""
    distance: float
    """Distance of the saved weights' velocity from the live ones'."""
    unequal: tuple[str, ...]
    """Tensors of which the file holds other numbers than the live ones."""
    file: Path | None = None
    """File that this is of; None: the checkpoint's own."""


def read_back_sample(truest: Callable[[str], Tensor], names: Sequence[str], files: Sequence[Path]) -> ReadBack:
    """Compares some of a checkpoint's tensors with the live ones: all weights of a model cannot be held twice.

    Args:
        truest: returns a live weight as checkpoints hold it.
        names: tensors to compare.
        files: the checkpoint's files of weights.

    Raises:
        WeightsError: one of them lacks, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    unequal, left = [], set(names)
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in left & set(file.keys()):
                    if not truest(name).cpu().equal(file.get_tensor(name)):
                        unequal.append(name)
                    left = left - {name}
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{path} cannot be read ({error}).") from error
    if left:
        raise WeightsError(f"no file of {[path.name for path in files]} holds {sorted(left)[0]}.")
    return ReadBack(1.0, len(unequal) / len(names), tuple(sorted(unequal)))


def drawn_names(names: Sequence[str], seed: int, most: int) -> list[str]:
    """Returns some names by lot, the same ones each time."""
    return sorted(names, key=lambda name: randomness.draw_key(seed, "read back", name))[:most]


def checksums(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns a sum of each tensor's bits, which changes where one number of it changes. Waits for the device once."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [tensor.detach().view(words[tensor.element_size()]).sum(dtype=torch.int64) for tensor in weights.values()]
    return dict(zip(weights, torch.stack(sums).tolist() if sums else [], strict=True))
