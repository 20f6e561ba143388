"""Picture files byte by byte, for what Pillow reads but does not write: every bit depth, one colour transparent."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

GREY, RGB, GREY_ALPHA, RGBA = 0, 2, 4, 6
"""Colour types of PNG."""


def chunk(kind: bytes, data: bytes) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    size: tuple[int, int], depth: int, color: int, rows: list[bytes], before: bytes = b"", after: bytes = b""
) -> bytes:
    """A PNG with packed rows; `before` and `after` are chunks on either side of the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, color, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND", b"")


def png16(color: int, *pixels: tuple[int, ...], before: bytes = b"") -> bytes:
    """One row of 16-bit pixels."""
    row = b"".join(struct.pack(f">{len(pixel)}H", *pixel) for pixel in pixels)
    return png((len(pixels), 1), 16, color, [row], before)


def tiff(array: np.ndarray, white_is_zero: bool = False, bits: int | None = None, width: int | None = None) -> bytes:
    """An uncompressed little-endian TIFF; the sample format is the array's."""
    array = np.atleast_3d(array)
    samples = array.shape[2]
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    photometric = 2 if samples == 3 else int(not white_is_zero)
    data = array.tobytes()
    lists = {258: [bits or array.dtype.itemsize * 8] * samples, 339: [kind] * samples}
    first_list, pixels = 8 + 2 + 11 * 12 + 4, 8 + 2 + 11 * 12 + 4 + 2 * 8
    values = {
        256: width or array.shape[1],
        257: array.shape[0],
        259: 1,
        262: photometric,
        273: pixels,
        277: samples,
        278: array.shape[0],
        279: len(data),
        284: 1,
    }
    entries, extra = [], b""
    for tag in sorted(values | lists):
        if tag in values:
            entries.append(struct.pack("<HHII", tag, 4, 1, values[tag]))
        elif samples <= 2:
            entries.append(struct.pack("<HHIHH", tag, 3, samples, *(lists[tag] + [0])[:2]))
        else:
            entries.append(struct.pack("<HHII", tag, 3, samples, first_list + len(extra)))
            extra += struct.pack(f"<{samples}H", *lists[tag])
    assert len(entries) == 11
    return b"II*\0" + struct.pack("<IH", 8, 11) + b"".join(entries) + bytes(4) + extra.ljust(16, b"\0") + data


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """RGB noise: no two seeds, rows or columns alike."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save_pair(
    folder: Path, name: str, seed: int = 0, caption: str | None = None, size: tuple[int, int] = (32, 32)
) -> Path:
    """A noise picture with its caption; returns the picture's path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(*size, seed).save(path)
    path.with_suffix(".txt").write_text(caption or f"a picture of {name}", encoding="utf-8")
    return path
