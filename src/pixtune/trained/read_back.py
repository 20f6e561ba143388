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
from pixtune.engine.sharding import Rows, local_of
from pixtune.engine.together import Together
from pixtune.errors import DamagedError, WeightsError
from pixtune.storage.slices import map_file, put_together, rows_in, whole

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


def read_back_sample(truest: Callable[[str], Tensor], rows: Mapping[str, Rows], files: Sequence[Path]) -> ReadBack:
    """Compares some of a checkpoint's tensors with the live ones: all weights of a model cannot be held twice.

    Args:
        truest: returns those rows of a live weight that this process has, as checkpoints hold them.
        rows: these rows of each tensor to compare.
        files: the checkpoint's files of weights.

    Raises:
        WeightsError: one of them lacks, or cannot be read.
    """
    from safetensors import SafetensorError

    mapped = []
    for path in files:
        try:
            mapped.append(map_file(path))
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{path} cannot be read ({error}).") from error
        except DamagedError as error:
            raise WeightsError(str(error)) from error
    try:
        found = put_together([tensors for tensors, _ in mapped], [firsts for _, firsts in mapped])
    except DamagedError as error:
        raise WeightsError(str(error)) from error
    if left := sorted(rows.keys() - found.keys()):
        raise WeightsError(f"no file of {[path.name for path in files]} holds {left[0]}.")
    unequal = []
    for name, own in rows.items():
        stored = whole(found[name]) if own.is_whole else rows_in(found[name], own.start, own.end)
        if not truest(name).cpu().equal(stored):
            unequal.append(name)
    return ReadBack(1.0, len(unequal) / len(rows), tuple(sorted(unequal)))


def drawn_names(names: Sequence[str], seed: int, most: int) -> list[str]:
    """Returns some names by lot, the same ones each time."""
    return sorted(names, key=lambda name: randomness.draw_key(seed, "read back", name))[:most]


def _words(tensor: Tensor) -> Tensor:
    """Returns a tensor's bits as whole numbers, of 8 bytes where it divides into such.

    Where thousands of numbers of 2 bytes move by one unit up or down, their sum is often the same again. Four of them
    side by side would have to cancel each by itself.
    """
    size = tensor.element_size()
    if tensor.numel() * size % 8 == 0 and tensor.storage_offset() * size % 8 == 0:
        return tensor.view(torch.int64)
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[size])


def checksums(weights: Mapping[str, Tensor], together: Together) -> dict[str, int]:
    """Returns a sum of each tensor's bits, which changes where one number of it changes. Waits for the device once.

    All processes that hold the tensors together must call it.
    """
    sums = [_words(local_of(tensor).detach().flatten()).sum(dtype=torch.int64) for tensor in weights.values()]
    device = max((each.device for each in sums), key=lambda device: device.type == "cuda", default=None)
    sums = [each.to(device) for each in sums]  # those of blocks in host memory are made there
    return dict(zip(weights, together.sum(torch.stack(sums)).tolist() if sums else [], strict=True))
