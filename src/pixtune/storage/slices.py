"""Reads and describes tensors that several files hold some rows of each, as torch.distributed.checkpoint does.

The files are those of torch's `HuggingFaceStorageWriter`: safetensors whose header says under `DCP_SHARDING_INFO` where
in the whole tensor each piece begins. Its `HuggingFaceStorageReader` therefore reads ours (torch 2.11 to 2.13), and no
pickle is among them, which torch's own writer leaves otherwise (`.metadata`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pixtune.errors import DamagedError

OFFSETS_KEY = "DCP_SHARDING_INFO"
"""Entry of a header's metadata with the place of each piece, as JSON."""
OFFSETS = "saved_offsets"


def slice_metadata(first_rows: Mapping[str, int], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Builds the metadata of a file of pieces.

    Args:
        first_rows: number of the row of the whole tensor that each piece begins with.
    """
    places = {
        name: {OFFSETS: [first_rows[name], *[0] * (tensor.dim() - 1)] if tensor.dim() else []}
        for name, tensor in tensors.items()
    }
    return {OFFSETS_KEY: json.dumps(places, sort_keys=True), "DCP_VERSION": "1.0", "format": "pt"}


@dataclass(frozen=True)
class SlicedTensor:
    """A tensor in pieces, each some of its rows. They are views of mapped files: what is not asked for is not read."""

    pieces: tuple[tuple[int, Tensor], ...]
    """Number of each piece's first row, with the piece; in order, without gaps."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole."""
        first, last = self.pieces[-1]
        return torch.Size([first + len(last), *last.shape[1:]])

    @property
    def dtype(self) -> torch.dtype:
        """Number format."""
        return self.pieces[0][1].dtype

    def numel(self) -> int:
        """Returns the number of its numbers."""
        return math.prod(self.shape)

    def element_size(self) -> int:
        """Returns the bytes of each."""
        return self.dtype.itemsize

    def is_floating_point(self) -> bool:
        """Returns whether its numbers may have fractions."""
        return self.dtype.is_floating_point

    def rows(self, start: int, end: int) -> Tensor:
        """Returns some rows; a view where one piece has them."""
        parts = [
            piece[max(start - first, 0) : end - first]
            for first, piece in self.pieces
            if first < end and start < first + len(piece)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else self.pieces[0][1][:0]


StoredTensor = Tensor | SlicedTensor


def rows_in(tensor: StoredTensor, start: int, end: int) -> Tensor:
    """Returns some rows of a tensor, whole or in pieces."""
    return tensor.rows(start, end) if isinstance(tensor, SlicedTensor) else tensor[start:end]


def whole(tensor: StoredTensor) -> Tensor:
    """Returns all of a tensor, whole or in pieces."""
    return tensor.rows(0, tensor.shape[0]) if isinstance(tensor, SlicedTensor) else tensor


def map_file(path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Maps a safetensors file into memory.

    Returns:
        Its tensors, and the first row of each that is a piece.

    Raises:
        SafetensorError, OSError: it cannot be read.
        DamagedError: it does not say where its pieces belong.
    """
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
        metadata = file.metadata() or {}
    if OFFSETS_KEY not in metadata:
        return tensors, {}
    try:
        return tensors, _first_rows(json.loads(metadata[OFFSETS_KEY]), tensors)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DamagedError(f"{path} does not say where its pieces of tensors belong ({OFFSETS_KEY}).") from error


def _first_rows(places: Any, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    first_rows = {}
    for name, tensor in tensors.items():
        offsets = places[name][OFFSETS]
        if len(offsets) != tensor.dim() or any(type(each) is not int or each < 0 for each in offsets):
            raise ValueError(name)
        if any(offsets[1:]):
            raise ValueError(f"{name} is cut along another axis than its first")
        first_rows[name] = offsets[0] if offsets else 0
    return first_rows


def put_together(
    files: Sequence[Mapping[str, Tensor]], first_rows: Sequence[Mapping[str, int]]
) -> dict[str, StoredTensor]:
    """Puts tensors together of some files, of which each may hold some rows.

    Args:
        first_rows: for each file, the first row of every piece in it; tensors that are not among them are whole.

    Raises:
        DamagedError: rows of a tensor are missing, or are there twice.
    """
    found: dict[str, StoredTensor] = {}
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for tensors, firsts in zip(files, first_rows, strict=True):
        for name, tensor in tensors.items():
            if name not in firsts:
                found[name] = tensor
            elif tensor.dim() == 0:
                found.setdefault(name, tensor)
            else:
                pieces.setdefault(name, []).append((firsts[name], tensor))
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        end = 0
        for first, piece in parts:
            if first != end or piece.shape[1:] != parts[0][1].shape[1:] or piece.dtype != parts[0][1].dtype:
                raise DamagedError(f"the rows of {name} from {min(first, end)} on are missing, or do not fit together.")
            end = first + len(piece)
        found[name] = parts[0][1] if len(parts) == 1 else SlicedTensor(tuple(parts))
    return found
