"""The header of a GGUF file: its tensors, their formats and places. Reads no weight and needs no torch.

GGUF is llama.cpp's container, in which transformers are passed on at 2 to 8 bits for ComfyUI. Its layout is that of its
specification (docs/gguf.md of ggml); sizes and decoders of the formats are those of its authors' package `gguf`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from pixtune.errors import WeightsError
from pixtune.inputs.reading import MEBIBYTE, check_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_TENSORS, MOST_ENTRIES, MOST_DIMENSIONS = 100_000, 100_000, 4
MOST_TEXTS = 1_000_000
"""Texts in lists that a header may hold; a vocabulary, which no transformer has, has some hundred thousand."""
LONGEST_TEXT = MEBIBYTE
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Sizes in bytes of values in the header, by the numbers of their types."""
TEXT, LIST, UINT32 = 8, 9, 4
USUAL_ALIGNMENT = 32


def is_gguf(path: Path) -> bool:
    """Returns whether a file begins as a GGUF file does."""
    try:
        check_regular(path)
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_gguf_header(path: Path) -> dict[str, Any]:
    """Reads which tensors a GGUF file holds, in the form of a safetensors header.

    Returns:
        For each name `dtype`, GGUF's name of its format; `shape`, as torch has it; and `data_offsets`, its first byte
        in the file and the one after its last.

    Raises:
        WeightsError: the package is missing, or the file is damaged, cut off or in a format that is not decoded.
    """
    package = gguf_package(path)
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            header = _read(stream, size, _sizes(package))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, struct.error) as error:
        raise WeightsError(f"{path} is a damaged GGUF file: {error}. Fetch the model again.") from error
    if not header:
        raise WeightsError(f"{path} is a GGUF file without a tensor in it. Fetch the model again.")
    end = max(entry["data_offsets"][1] for entry in header.values())
    if end > size:
        raise WeightsError(
            f"{path} is cut off: it has {size:,} bytes, and its header says {end:,}. Was the download interrupted? "
            "Fetch the model again."
        )
    _check_formats(path, header, package)
    return header


def gguf_package(path: Path) -> ModuleType:
    """Returns the package `gguf`.

    Raises:
        WeightsError: it is not installed; says how.
    """
    try:
        import gguf
    except ImportError as error:
        raise WeightsError(
            f"{path} is a GGUF file, and the package that decodes them is missing: pip install 'pixtune[gguf]', or "
            "take the model as .safetensors."
        ) from error
    return gguf


def _sizes(package: ModuleType) -> Mapping[int, tuple[str, int, int]]:
    """Returns name, numbers and bytes of a block of each format, by its number."""
    return {int(kind): (kind.name, *package.GGML_QUANT_SIZES[kind]) for kind in package.GGML_QUANT_SIZES}


def _check_formats(path: Path, header: Mapping[str, Any], package: ModuleType) -> None:
    import numpy

    for name, entry in {entry["dtype"]: (name, entry) for name, entry in header.items()}.values():
        kind = package.GGMLQuantizationType[entry["dtype"]]
        try:
            package.quants.dequantize(numpy.zeros((1, package.GGML_QUANT_SIZES[kind][1]), numpy.uint8), kind)
        except NotImplementedError as error:
            raise WeightsError(
                f"{path}: {name} is in the format {entry['dtype']}, which the package gguf does not decode. Take the "
                "model in another format, such as Q8_0 or Q4_K."
            ) from error


def _read(stream: BinaryIO, size: int, sizes: Mapping[int, tuple[str, int, int]]) -> dict[str, Any]:
    def take(form: str) -> Any:
        (value,) = struct.unpack(form, stream.read(struct.calcsize(form)))
        return value

    def take_text() -> str:
        length = take("<Q")
        if length > LONGEST_TEXT:
            raise ValueError(f"a name of {length:,} bytes")
        return stream.read(length).decode("utf-8")

    if stream.read(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin as one")
    version = take("<I")
    if version not in VERSIONS:
        of_big_endian = " (it was made for a big-endian machine)" if version and version & 0xFFFF == 0 else ""
        raise ValueError(f"version {version}{of_big_endian}, of which {' and '.join(map(str, VERSIONS))} are read")
    num_tensors, num_entries = take("<Q"), take("<Q")
    if num_tensors > MOST_TENSORS or num_entries > MOST_ENTRIES:
        raise ValueError(f"{num_tensors:,} tensors and {num_entries:,} entries")
    alignment = USUAL_ALIGNMENT
    for _ in range(num_entries):
        key, kind = take_text(), take("<I")
        if key == "general.alignment" and kind == UINT32:
            alignment = take("<I")
        else:
            _skip(stream, kind, take, size)
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"an alignment of {alignment}")
    header: dict[str, Any] = {}
    for _ in range(num_tensors):
        name, num_dimensions = take_text(), take("<I")
        if num_dimensions > MOST_DIMENSIONS or name in header:
            raise ValueError(f"{name!r:.80} has {num_dimensions} dimensions, or is there twice")
        shape = [take("<Q") for _ in range(num_dimensions)][::-1]  # the file begins with the last one
        number, begin = take("<I"), take("<Q")
        if number not in sizes:
            raise ValueError(f"{name!r:.80} is in format {number}, which is not known")
        format_name, per_block, bytes_per_block = sizes[number]
        if math.prod(shape) >= 2**48 or (shape[-1] if shape else 1) % per_block:
            raise ValueError(f"{name!r:.80} has the shape {shape} in {format_name}, whose blocks have {per_block}")
        num_bytes = math.prod(shape) // per_block * bytes_per_block
        header[name] = {"dtype": format_name, "shape": shape, "data_offsets": [begin, begin + num_bytes]}
    start = -(-stream.tell() // alignment) * alignment
    for entry in header.values():
        entry["data_offsets"] = [start + each for each in entry["data_offsets"]]
    return header


def _skip(stream: BinaryIO, kind: int, take: Callable[[str], Any], size: int) -> None:
    """Passes over a value of the header."""
    if kind == LIST:
        inner, count = take("<I"), take("<Q")
        if inner in SCALARS:
            _forward(stream, count * SCALARS[inner], size)
            return
        if inner != TEXT or count > MOST_TEXTS:
            raise ValueError(f"a list of {count:,} values of type {inner}")
        for _ in range(count):
            _forward(stream, take("<Q"), size)
    elif kind == TEXT:
        _forward(stream, take("<Q"), size)
    elif kind in SCALARS:
        _forward(stream, SCALARS[kind], size)
    else:
        raise ValueError(f"a value of type {kind}, which is not known")


def _forward(stream: BinaryIO, num_bytes: int, size: int) -> None:
    if stream.tell() + num_bytes > size:
        raise ValueError("its header ends early")
    stream.seek(num_bytes, 1)
