"""Reads the tensors of a GGUF file, decoded one after the other by the package `gguf`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixtune.storage.gguf_file import gguf_package
from pixtune.storage.loading.entries import TensorEntry


def entries_of_gguf(path: Path, header: Mapping[str, Any]) -> list[TensorEntry]:
    """Lists the tensors of a file by its header, as bytes."""
    return [
        TensorEntry(name, path, torch.uint8, tuple(entry["shape"]), begin, end - begin)
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    ]


def iterate_gguf(
    entries: Sequence[TensorEntry], header: Mapping[str, Any], device: torch.device | str
) -> Iterator[tuple[str, Tensor]]:
    """Yields name and numbers of entries, fp32: more than the file's bits hold, and no more than one at a time.

    Args:
        header: the file's header, as `read_gguf_header` returns it.
    """
    import numpy

    for entry in entries:
        package = gguf_package(entry.file)
        kind = package.GGMLQuantizationType[header[entry.stored_name or entry.name]["dtype"]]
        bytes_B = numpy.fromfile(entry.file, numpy.uint8, entry.num_bytes, offset=entry.offset_bytes)
        rows = math.prod(entry.shape[:-1])
        numbers = package.quants.dequantize(bytes_B.reshape(max(rows, 1), -1), kind)
        yield entry.name, torch.from_numpy(numbers.astype(numpy.float32, copy=False)).view(entry.shape).to(device)
