"""A transformer in one safetensors file, as ComfyUI and other tools keep it: its names, and its weights in 8 bits.

What is here is read from the file's header, and from the notes of a few bytes that stand beside weights in 8 bits, so
that a plan needs neither torch nor a weight. The forms of ComfyUI are those of its own documentation of checkpoints:

* `fp8_e4m3fn`, `fp8_e5m2`: weights rounded to 8 bits, without a scale.
* `fp8_scaled`: codes and a scale for each weight, `NAME.scale_weight` (with `scaled_fp8` as a mark of the file) or
  `NAME.weight_scale` (with a note: `NAME.comfy_quant`, or `_quantization_metadata` of the header).
* `int8`: codes and a scale for each row, `NAME.weight_scale`, with a note. Such a note may say `convrot`: then each
  group of neighbours of a row was rotated before it was rounded (ConvRot, arXiv 2512.03673).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pixtune.errors import WeightsError
from pixtune.inputs.reading import MEBIBYTE

EIGHT_BIT_CODES = ("F8_E4M3", "F8_E5M2", "I8")
"""Number formats, as headers name them, of weights in 8 bits."""
CODES_OF_NOTES = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}
"""Formats of notes that can be read, with the number format of their codes."""
PLAIN_CODES = ("F64", "F32", "F16", "BF16")
SCALES = ("weight_scale", "scale_weight")
"""Last parts of the names of a weight's scales."""
BESIDE_WEIGHTS = ("comfy_quant", "input_scale", "scale_input", *SCALES)
"""Last parts of the names of tensors that belong to a weight beside them. The inputs' scales are not read: pixtune
measures its inputs when they come."""
MARKS = ("scaled_fp8",)
"""Tensors that mark the whole file, and are read for nothing."""
METADATA_OF_NOTES = "_quantization_metadata"
LONGEST_NOTE = MEBIBYTE // 64
DEFAULT_GROUP = 256
"""Neighbours that are rotated together where a note gives no number: the default of ComfyUI's reader."""


@dataclass(frozen=True)
class Place:
    """The place in a file of a tensor of the model."""

    name: str
    """Name of the file's tensor."""
    rows: tuple[int, int] | None = None
    """First row and the one after the last, of a file's tensor that several of the model are parts of; None: all."""
    halves_swapped: bool = False
    """Whether the second half of the rows comes first in the model."""


@dataclass(frozen=True)
class Scaling:
    """The way from the codes of a weight in 8 bits to its numbers."""

    codes: str
    """One of `EIGHT_BIT_CODES`."""
    scale: str | None = None
    """Name of the tensor with its scale, or with a scale for each row; None: the codes are the numbers."""
    group: int = 0
    """Neighbours of a row that were rotated together; 0: none were."""


@dataclass(frozen=True)
class TransformerFile:
    """A transformer in one file."""

    path: Path
    header: Mapping[str, Any]
    """The file's header, as `read_header` returns it."""
    places: Mapping[str, Place]
    """Place of each tensor of the model."""
    scalings: Mapping[str, Scaling]
    """Scalings of weights in 8 bits, by their names in the file."""
    config: Mapping[str, Any]
    """Config of the transformer, as its class takes it."""
    is_gguf: bool = False
    """Whether it is a GGUF file, and the header's formats and places are those of `gguf_file`."""

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the model's tensors."""
        shapes = {}
        for name, place in self.places.items():
            shape = tuple(self.header[place.name]["shape"])
            shapes[name] = shape if place.rows is None else (place.rows[1] - place.rows[0], *shape[1:])
        return shapes

    @property
    def form(self) -> str:
        """The form of its weights, in a word or two."""
        kinds = set(self.scalings.values())
        if any(each.group for each in kinds):
            return "int8, rotated (ConvRot)"
        if any(each.codes == "I8" for each in kinds):
            return "int8"
        if kinds:
            return "fp8 with scales" if any(each.scale for each in kinds) else "fp8"
        return "16 bits or more"


def check_whole(file: Path, header: Mapping[str, Any]) -> None:
    """Checks that a file is as long as its header says, before a plan counts on it.

    Raises:
        WeightsError: it is cut off.
    """
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    end, size = start + max(ends, default=0), file.stat().st_size
    if end > size:
        raise WeightsError(
            f"{file} is cut off: it has {size:,} bytes, and its header says {end:,}. Was the download interrupted? "
            "Fetch the model again."
        )


def read_scalings(file: Path, header: Mapping[str, Any], prefix: str) -> dict[str, Scaling]:
    """Reads how weights in 8 bits are scaled.

    Args:
        prefix: beginning of the names of the transformer's tensors; others are not looked at.

    Raises:
        WeightsError: a weight has a form that is not known; names it, and what is said of it.
    """
    noted = _notes_of_metadata(file, header)
    scalings = {}
    for name, entry in header.items():
        if (
            name == "__metadata__"
            or not name.startswith(prefix)
            or name.rpartition(".")[2] in (*BESIDE_WEIGHTS, *MARKS)
        ):
            continue
        layer = name.removesuffix(".weight")
        note = _read_note(file, header, f"{layer}.comfy_quant") if f"{layer}.comfy_quant" in header else None
        note = note or noted.get(layer) or noted.get(layer.removeprefix(prefix))
        scale = next((f"{layer}.{each}" for each in SCALES if f"{layer}.{each}" in header), None)
        if entry["dtype"] in PLAIN_CODES and note is None:
            if scale is not None:
                raise _unknown(file, name, f"is {entry['dtype']} and has a scale, {scale}")
            continue
        scalings[name] = _scaling(file, header, name, note, scale)
    return scalings


def _scaling(
    file: Path, header: Mapping[str, Any], name: str, note: Mapping[str, Any] | None, scale: str | None
) -> Scaling:
    stored, shape = header[name]["dtype"], header[name]["shape"]
    if note is None:
        if stored in ("F8_E4M3", "F8_E5M2"):
            _check_scale(file, header, name, scale)
            return Scaling(stored, scale)
        about = "bitsandbytes' 4 bits, or the like" if stored == "U8" else "whose rows may be rotated, or not (ConvRot)"
        raise _unknown(file, name, f"is {stored} without a note on how it was made: {about}")
    codes = CODES_OF_NOTES.get(str(note.get("format")))
    if codes is None:
        raise _unknown(file, name, f"is in the format {note.get('format')!r:.60}")
    if stored != codes and (stored != "U8" or codes == "I8"):  # bytes may hold codes of fp8
        raise _unknown(file, name, f"is {stored}, and noted as {note.get('format')!r:.60}")
    if codes == "I8" and scale is None:
        raise _unknown(file, name, "is int8 without a scale")
    _check_scale(file, header, name, scale)
    given = note.get("params")
    inner = {**(given if isinstance(given, dict) else {}), **note}
    if not inner.get("convrot"):
        return Scaling(codes, scale)
    group = inner.get("convrot_groupsize", DEFAULT_GROUP)
    if not _is_power_of_four(group) or len(shape) != 2 or shape[1] % group or codes != "I8":
        raise _unknown(file, name, f"is {codes} {shape}, rotated in groups of {group!r:.20}")
    return Scaling(codes, scale, group)


def _check_scale(file: Path, header: Mapping[str, Any], name: str, scale: str | None) -> None:
    """Checks that a weight has one scale, or one for each row."""
    if scale is None:
        return
    shape, entry = header[name]["shape"], header[scale]
    fitting = [[], [1], [1, 1], *([[shape[0]], [shape[0], 1]] if shape else [])]
    if entry["dtype"] not in PLAIN_CODES or len(shape) != 2 or entry["shape"] not in fitting:
        raise _unknown(file, name, f"{shape} has scales {scale}, {entry['dtype']} {entry['shape']}")


def _is_power_of_four(number: object) -> bool:
    return type(number) is int and number >= 4 and number & (number - 1) == 0 and number.bit_length() % 2 == 1


def _unknown(file: Path, name: str, found: str) -> WeightsError:
    return WeightsError(
        f"{file}: {name} {found}. pixtune reads 16- and 32-bit weights, fp8_e4m3fn and fp8_e5m2 with and without "
        "scales, and int8 with a scale for each row, also rotated (ConvRot), as ComfyUI notes it (comfy_quant). Take "
        "the model in one of these forms."
    )


def _notes_of_metadata(file: Path, header: Mapping[str, Any]) -> Mapping[str, Any]:
    """Reads the notes on layers in the header's metadata; none where there are none."""
    metadata = header.get("__metadata__")
    text = metadata.get(METADATA_OF_NOTES) if isinstance(metadata, dict) else None
    if text is None:
        return {}
    layers = _parsed(text).get("layers")
    if not isinstance(layers, dict) or not all(isinstance(note, dict | str) for note in layers.values()):
        raise WeightsError(f"{file} has notes on its format that cannot be read ({METADATA_OF_NOTES}: {text!r:.80}).")
    return {layer: {"format": note} if isinstance(note, str) else note for layer, note in layers.items()}


def _read_note(file: Path, header: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Reads the note that stands beside a weight: JSON, as bytes."""
    begin, end = header[name]["data_offsets"]
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(start + max(begin, 0))
        data = stream.read(end - begin) if 0 < end - begin <= LONGEST_NOTE else b""
    note = _parsed(data)
    if "format" not in note:
        raise WeightsError(f"{file}: {name} is no note on a format ({data[:80]!r}). Fetch the model again.")
    return note


def _parsed(text: str | bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
