"""Lists what safetensors files hold and where, and checks it against the files before a tensor is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from pixtune.errors import WeightsError
from pixtune.storage.file_kinds import kind_of_bytes
from pixtune.storage.model_folder import LONGEST_HEADER_BYTES, read_header
from pixtune.storage.safetensors_writer import CODES
from pixtune.storage.transformer_file import check_whole

LENGTH_BYTES = 8
"""Size of the little-endian integer that a safetensors file begins with: the length of its JSON header."""

DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int
    """Position of its first byte, from the start of the file."""
    num_bytes: int
    stored_name: str = ""
    """Name that the file has for the tensor that this one is a part of; empty: it has the same, and this is all."""
    first_row: int = 0
    """Row of the file's tensor that this one begins with."""


def read_entries(files: Iterable[Path]) -> list[TensorEntry]:
    """Lists all tensors of some files, file by file, in the order in which they lie there. Reads headers alone.

    Raises:
        WeightsError: a file is missing, cut off or of another format, or a name occurs twice.
    """
    entries = [entry for file in files for entry in _entries_of(file)]
    twice = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
    if twice:
        where = sorted({str(entry.file) for entry in entries if entry.name == twice[0]})
        raise WeightsError(
            f"{len(twice)} tensors, {twice[0]} among them, are in more than one file ({', '.join(where)}). Are there "
            "two variants of the weights in one folder? Leave one."
        )
    return entries


def _entries_of(file: Path) -> list[TensorEntry]:
    start_bytes = LENGTH_BYTES + _header_bytes(file)
    header = read_header(file)
    entries = [_entry(file, start_bytes, name, place) for name, place in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: entry.offset_bytes)
    for before, after in pairwise(entries):
        if before.offset_bytes + before.num_bytes > after.offset_bytes:
            raise WeightsError(
                f"{file} has a damaged header: {before.name} and {after.name} share bytes. Fetch the model again."
            )
    check_whole(file, header)
    return entries


def _header_bytes(file: Path) -> int:
    """Reads the length of the JSON header; refuses a file that begins like one of another format."""
    if not file.is_file():
        raise WeightsError(f"{file} is missing. Is the path right, or was the download interrupted?")
    with file.open("rb") as stream:
        first_bytes = stream.read(LENGTH_BYTES)
    length = int.from_bytes(first_bytes, "little")
    if length > LONGEST_HEADER_BYTES:
        raise WeightsError(f"{file} is no safetensors file but {kind_of_bytes(file)}.")
    return length


def _entry(file: Path, start_bytes: int, name: str, place: Any) -> TensorEntry:
    (begin, end), shape, dtype_name = place["data_offsets"], tuple(place["shape"]), place["dtype"]
    if dtype_name not in DTYPES:
        raise WeightsError(
            f"{file} holds {name} as {dtype_name}, which pixtune cannot read (it reads {', '.join(DTYPES)}). Take "
            "another variant of the model."
        )
    dtype = DTYPES[dtype_name]
    num_bytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or begin < 0 or end - begin != num_bytes:
        raise WeightsError(
            f"{file} has a damaged header: {name} is {dtype_name} {list(shape)}, {num_bytes:,} bytes, and bytes "
            f"{begin:,} to {end:,} are said to hold it. Fetch the model again."
        )
    return TensorEntry(name, file, dtype, shape, start_bytes + begin, num_bytes)
