"""Writes safetensors files straight from the tensors' memory, and takes their SHA-256 on the way.

The stock library builds a file in memory first, and a digest then reads all of it again: for checkpoints of tens of
gigabytes that takes longer than the disk does.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from pixtune.storage import files

PIECE_BYTES = 8 * 2**20
"""Bytes that are copied from a GPU, hashed and written at once: enough for the bus, few enough for the CPU's cache."""
ALIGNMENT_BYTES = 8
"""Multiple to which headers are padded, so that a mapped file's tensors are aligned."""

CODES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Number formats by the names that headers have for them, in the order in which their tensors lie in a file."""
RANKS = {dtype: rank for rank, dtype in enumerate(CODES)}


class TensorFile(NamedTuple):
    """The content of a safetensors file."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = MappingProxyType({})


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Writes tensors as one safetensors file, atomically, with the bytes that `safetensors.torch.save` gives.

    Two things differ: metadata are sorted by name, where the stock library's order varies, and tensors that share
    memory are each written whole, where it refuses them. Tensors in host memory are not copied, unless they are not
    contiguous; those on a device pass through a buffer of at most `PIECE_BYTES`.

    Returns:
        The file's SHA-256, as hex.

    Raises:
        TypeError: a number format or a value of the metadata that such files cannot hold.
        WriteError: it could not be written. The old file is kept and nothing half-written is left.
    """
    digest = hashlib.sha256()
    _write(path, tensors, metadata or {}, digest.update)
    return digest.hexdigest()


def save_without_digest(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes as `save_safetensors` does, without the SHA-256, which is most of the CPU's work on a file."""
    _write(path, tensors, metadata or {}, lambda piece: None)


def save_one_by_one(
    path: Path,
    outline: Mapping[str, Tensor],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file as `save_without_digest` does, with one of its tensors in memory at a time.

    Args:
        outline: number format and shape of each tensor, as tensors on the meta device.
        tensor_of: returns a tensor by its name; called once for each, in the order in which they lie in the file.

    Raises:
        TypeError, WriteError: as `save_safetensors`.
    """
    _refuse_formats(outline)
    ordered = in_file_order(outline)
    header = _header(ordered, metadata or {})
    with files.replacing(path) as stream:
        stream.write(header)
        for name, expected in ordered.items():
            tensor = tensor_of(name)
            if (tensor.dtype, tensor.shape) != (expected.dtype, expected.shape):
                raise TypeError(f"{name} is {tensor.dtype} {list(tensor.shape)}, and the header has another")
            for piece in _pieces([tensor]):
                stream.write(piece)


def _write(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    look_at: Callable[[memoryview], object],
) -> None:
    """Writes the file, and hands every piece of it to `look_at` on the way."""
    pieces = file_pieces(tensors, metadata)
    with files.replacing(path) as stream:
        for piece in pieces:
            look_at(piece)
            stream.write(piece)


def file_pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """Returns the bytes of a file as `save_safetensors` writes it, piece by piece: first the header, metadata foremost.

    A piece is valid until the next one is asked for; where all tensors are in host memory, for as long as it is held.

    Raises:
        TypeError: as `save_safetensors`, before the first piece is asked for.
    """
    _refuse_formats(tensors)
    ordered = in_file_order(tensors)
    return itertools.chain([memoryview(_header(ordered, metadata))], _pieces(list(ordered.values())))


def _refuse_formats(tensors: Mapping[str, Tensor]) -> None:
    unknown = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in CODES]
    if unknown:
        raise TypeError(f"safetensors files cannot hold the number format of {', '.join(unknown)}")


def in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors in the order in which they lie in a file: by format, then by name."""
    return dict(sorted(tensors.items(), key=lambda item: (RANKS[item[1].dtype], item[0])))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Builds the part before the tensors' bytes: a length, and JSON that says which tensor lies where."""
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise TypeError(f"safetensors files hold metadata as texts by text, not {dict(metadata)}")
    content: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        content[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _pieces(tensors: Sequence[Tensor]) -> Iterator[memoryview]:
    """Yields the tensors' bytes, one after the other. A piece is valid until the next one is asked for."""
    on_device = [tensor for tensor in tensors if not tensor.is_cpu]
    staging_bytes = min(PIECE_BYTES, max((tensor.nbytes for tensor in on_device), default=0))
    staging_B = torch.empty(
        staging_bytes, dtype=torch.uint8, pin_memory=any(tensor.is_cuda and tensor.nbytes for tensor in on_device)
    )
    for tensor in tensors:
        for piece_B in _flat_bytes(tensor).split(PIECE_BYTES):
            yield (piece_B if piece_B.is_cpu else staging_B[: piece_B.numel()].copy_(piece_B)).numpy().data


def _flat_bytes(tensor: Tensor) -> Tensor:
    """Returns a view of a tensor's memory; of a host copy where it is not contiguous, as a device may be full."""
    tensor = tensor.detach()
    return (tensor if tensor.is_contiguous() else tensor.cpu().contiguous()).flatten().view(torch.uint8)
