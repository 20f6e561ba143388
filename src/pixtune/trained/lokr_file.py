"""Checks that a file has a layer's LoKr whole, and in the shapes that its metadata state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pixtune.errors import WeightsError
from pixtune.plan.adapter import Adapter


def check_lokr(path: Path, layer: str, tensors: Mapping[str, Tensor], stated: Adapter) -> None:
    """Checks that a layer has LoKr's matrices, in the shapes that the file states.

    Raises:
        WeightsError: it has not.
    """
    shapes, sides = {name: tuple(each.shape) for name, each in tensors.items()}, lokr_sides(tensors)
    wanted = stated.lokr_shapes(layer, sides) if all(sides) else None
    if shapes != wanted:
        raise WeightsError(
            f"{path} has matrices of shapes {shapes} for {layer}, where its metadata give "
            f"{wanted or 'lokr_w1 and lokr_w2, or _a and _b of each'}. Fetch the file again."
        )


def lokr_sides(tensors: Mapping[str, Tensor | None]) -> tuple[int, int]:
    """Returns output and input features of the layer that LoKr's matrices are for; 0: one of them is missing."""
    sides = [1, 1]
    for factor in ("lokr_w1", "lokr_w2"):
        whole = tensors.get(factor)
        parts = [whole, whole] if whole is not None else [tensors.get(f"{factor}_{each}") for each in "ab"]
        for number, matrix in enumerate(parts):
            sides[number] *= 0 if matrix is None or matrix.ndim != 2 else matrix.shape[number]
    return sides[0], sides[1]
