"""Hostile pictures: every extension that is read, damaged, lying, huge, or something else in disguise."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from tests.hostile.case import EITHER, REFUSED, TAKEN, Attack, Case, damage, put, put_sparse
from tests.pictures import chunk, noise, png, png16, tiff

PICTURES = "pictures"
LARGEST_MIB = 1700
"""Memory that the largest pictures take, which are within the limit of pixels: `data/levels.py` states it."""


def encoded(format: str, mode: str = "RGB", size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    """Returns a good picture's file."""
    stream = io.BytesIO()
    noise(*size).convert(mode).save(stream, format, **options)
    return stream.getvalue()


def frames(format: str, number: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """Returns an animation, or a TIFF of several pages."""
    first, *others = [noise(*size, seed) for seed in range(number)]
    stream = io.BytesIO()
    first.save(stream, format, save_all=True, append_images=others)
    return stream.getvalue()


def exif(**others: bytes) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = 6
    tags[0x010E] = others.get("description", b"a picture").decode("latin-1")
    return tags.tobytes()


@cache
def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


GOOD: dict[str, tuple[str, Callable[[], bytes]]] = {  # what it is: extension, bytes
    "JPEG": ("jpg", lambda: encoded("JPEG", exif=exif(), icc_profile=srgb())),
    "progressive JPEG": ("jpeg", lambda: encoded("JPEG", progressive=True)),
    "CMYK JPEG": ("jpg", lambda: encoded("JPEG", "CMYK")),
    "PNG": ("png", lambda: encoded("PNG", exif=exif(), icc_profile=srgb())),
    "palette PNG": ("png", lambda: encoded("PNG", "P", transparency=3)),
    "16-bit PNG": ("png", lambda: png16(0, *((level,) for level in range(0, 65535, 999)))),
    "WebP": ("webp", lambda: encoded("WEBP", exif=exif(), icc_profile=srgb())),
    "lossless WebP": ("webp", lambda: encoded("WEBP", "RGBA", lossless=True)),
    "animated WebP": ("webp", lambda: frames("WEBP", 3)),
    "BMP": ("bmp", lambda: encoded("BMP")),
    "palette BMP": ("bmp", lambda: encoded("BMP", "P")),
    "TIFF": ("tif", lambda: encoded("TIFF")),
    "LZW TIFF": ("tiff", lambda: encoded("TIFF", compression="tiff_lzw")),
    "JPEG in TIFF": ("tiff", lambda: encoded("TIFF", compression="jpeg")),
    "deflated TIFF of 3 pages": ("tif", lambda: frames("TIFF", 3)),
    "16-bit TIFF": ("tif", lambda: tiff(np.arange(900, dtype="<u2").reshape(30, 30))),
    "float TIFF": ("tif", lambda: tiff(np.linspace(0, 1, 900, dtype="<f4").reshape(30, 30))),
    "GIF named PNG": ("png", lambda: encoded("GIF", "P")),
    "AVIF named JPEG": ("jpg", lambda: encoded("AVIF")),
}


def ihdr(width: int, height: int, depth: int = 8, color: int = 2, before: bytes = b"", data: bytes = b"") -> bytes:
    """Returns a PNG whose header may say anything."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + chunk(b"IEND", b"")


def large_png(width: int, height: int, mode: str) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (width, height)).save(stream, "PNG")
    return stream.getvalue()


def bmp(width: int, height: int, compression: int, bits: int, data: bytes, colors: int = 0) -> bytes:
    palette = bytes(4 * (1 << bits)) if bits <= 8 else b""
    offset = 14 + 40 + len(palette)
    information = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, colors, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + information + palette + data


def exif_in_jpeg(payload: bytes) -> bytes:
    data = encoded("JPEG")
    segment = b"Exif\0\0" + payload
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def chained_tiff(loops: bool) -> bytes:
    """Returns a TIFF whose list of pages comes back to its beginning, or lies outside."""
    data = bytearray(tiff(np.zeros((20, 20), "u1")))
    struct.pack_into("<I", data, 8 + 2 + 11 * 12, 8 if loops else 0x80000000)
    return bytes(data)


def repeated_tag(number: int) -> bytes:
    """Returns a TIFF with a directory of thousands of entries, each of which claims gigabytes."""
    entries = b"".join(struct.pack("<HHII", 700 + n % 60000, 2, 0x7FFFFFFF, 8) for n in range(number))
    return b"II*\0" + struct.pack("<IH", 8, number) + entries + bytes(4)


def icc_bomb() -> bytes:
    return encoded("PNG")[:33] + chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(64_000_000), 9)) + encoded("PNG")[33:]


def text_bomb(kind: bytes, number: int = 1) -> bytes:
    before = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0"}[kind]
    bombs = chunk(kind, before + zlib.compress(bytes(1_000_000), 9)) * number
    return encoded("PNG")[:33] + bombs + encoded("PNG")[33:]


def apng(number: int) -> bytes:
    data = encoded("PNG")
    return data[:33] + chunk(b"acTL", struct.pack(">II", number, 0)) + data[33:]


def webp_size(width: int, height: int) -> bytes:
    data = bytearray(encoded("WEBP", "RGBA", lossless=True, exif=exif()))
    if data[12:16] == b"VP8X":
        data[24:27], data[27:30] = (width - 1).to_bytes(3, "little"), (height - 1).to_bytes(3, "little")
    return bytes(data)


def jpeg_size(width: int, height: int) -> bytes:
    data = bytearray(encoded("JPEG"))
    at = data.index(b"\xff\xc0") + 5
    struct.pack_into(">HH", data, at, height, width)
    return bytes(data)


SPECIAL: dict[str, tuple[str, Callable[[], bytes], str]] = {  # what it is: file's name, bytes, what is expected
    "zero bytes": ("a.jpg", lambda: b"", REFUSED),
    "one byte": ("a.bmp", lambda: b"B", REFUSED),
    "text in disguise": ("a.png", lambda: b"this is no picture\n" * 50, REFUSED),
    "HTML": ("a.webp", lambda: b"<!DOCTYPE html><html>404</html>", REFUSED),
    "SVG with entities": (
        "a.png",
        lambda: b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa">]><svg>&a;</svg>',
        REFUSED,
    ),
    "PostScript": ("a.jpg", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\n", REFUSED),
    "PDF": ("a.tif", lambda: b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n", REFUSED),
    "a zip with a pickle": ("a.png", lambda: b"PK\x03\x04" + bytes(200), REFUSED),
    "a program": ("a.jpg", lambda: b"\x7fELF" + bytes(500), REFUSED),
    "PSD": ("a.tiff", lambda: b"8BPS\0\1" + bytes(100), REFUSED),
    "FLI film": ("a.bmp", lambda: bytes(4) + b"\x11\xaf" + bytes(200), REFUSED),
    "ICO": ("a.png", lambda: b"\0\0\1\0\1\0\x10\x10\0\0\1\0 \0" + bytes(100), REFUSED),
    "JPEG 2000": ("a.jpg", lambda: encoded("JPEG2000"), REFUSED),
    "TGA": ("a.bmp", lambda: encoded("TGA"), REFUSED),
    "PPM bomb": ("a.png", lambda: b"P6\n100000 100000\n255\n", REFUSED),
    "Git LFS pointer": ("a.png", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", REFUSED),
    "HEIC": ("a.jpg", lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), REFUSED),
    "PNG and zip in one": ("a.png", lambda: encoded("PNG") + b"PK\x05\x06" + bytes(18), TAKEN),
    "JPEG and script in one": ("a.jpg", lambda: encoded("JPEG") + b"<?php system('id'); ?>", TAKEN),
    "JPEG named BMP": ("a.bmp", lambda: encoded("JPEG"), TAKEN),
    "PNG of 2^31 pixels a side": ("a.png", lambda: ihdr(2**31 - 1, 2**31 - 1), REFUSED),
    "PNG of 2^32-1 pixels a side": ("a.png", lambda: ihdr(2**32 - 1, 1), REFUSED),
    "PNG of no width": ("a.png", lambda: ihdr(0, 40), REFUSED),
    "PNG of no size": ("a.png", lambda: ihdr(0, 0), REFUSED),
    "PNG bomb of 20,000 x 20,000": ("a.png", lambda: large_png(20_000, 20_000, "1"), REFUSED),
    "PNG just above the limit": ("a.png", lambda: large_png(13_378, 13_378, "1"), REFUSED),
    "PNG of which only the header is there": ("a.png", lambda: encoded("PNG")[:33], REFUSED),
    "PNG of depth 3": ("a.png", lambda: ihdr(40, 40, depth=3), REFUSED),
    "PNG of colour type 5": ("a.png", lambda: ihdr(40, 40, color=5), REFUSED),
    "PNG without pixels": ("a.png", lambda: ihdr(40, 40), REFUSED),
    "PNG with pixels for a larger one": ("a.png", lambda: ihdr(20, 20, data=bytes(2_000_000)), EITHER),
    "PNG with two headers": ("a.png", lambda: encoded("PNG")[:33] + encoded("PNG")[8:33] + encoded("PNG")[33:], EITHER),
    "PNG with a wrong checksum": ("a.png", lambda: encoded("PNG")[:29] + bytes(4) + encoded("PNG")[33:], REFUSED),
    "palette PNG without a palette": ("a.png", lambda: ihdr(20, 20, color=3, data=bytes(21 * 20)), EITHER),
    "PNG with a palette of 999": (
        "a.png",
        lambda: ihdr(20, 20, color=3, before=chunk(b"PLTE", bytes(2997)), data=bytes(420)),
        EITHER,
    ),
    "PNG with tRNS too long": (
        "a.png",
        lambda: png((20, 20), 8, 0, [bytes(20)] * 20, chunk(b"tRNS", bytes(999))),
        EITHER,
    ),
    "PNG with tRNS too short": ("a.png", lambda: png((20, 20), 8, 2, [bytes(60)] * 20, chunk(b"tRNS", b"\0")), EITHER),
    "PNG with an ICC bomb": ("a.png", icc_bomb, EITHER),
    "PNG with a text bomb": ("a.png", lambda: text_bomb(b"zTXt", 80), EITHER),
    "PNG with an XMP bomb": ("a.png", lambda: text_bomb(b"iTXt", 80), EITHER),
    "PNG of a million frames": ("a.png", lambda: apng(2**20), EITHER),
    "PNG of 2^32-1 frames": ("a.png", lambda: apng(2**32 - 1), EITHER),
    "PNG with EXIF rubbish": (
        "a.png",
        lambda: encoded("PNG")[:33] + chunk(b"eXIf", b"MM\0*" + b"\xff" * 500) + encoded("PNG")[33:],
        EITHER,
    ),
    "PNG with a chunk of 2 GB": (
        "a.png",
        lambda: encoded("PNG")[:33] + struct.pack(">I", 2**31 - 1) + b"zTXt" + encoded("PNG")[33:],
        REFUSED,
    ),
    "PNG with gamma 0": ("a.png", lambda: encoded("PNG")[:33] + chunk(b"gAMA", bytes(4)) + encoded("PNG")[33:], TAKEN),
    "PNG whose ICC profile is text": ("a.png", lambda: encoded("PNG", icc_profile=b"no profile" * 99), TAKEN),
    "PNG whose ICC profile is cut": ("a.png", lambda: encoded("PNG", icc_profile=srgb()[:200]), TAKEN),
    "ICC profile that claims 4 GB": (
        "a.png",
        lambda: encoded("PNG", icc_profile=b"\xff\xff\xff\xff" + srgb()[4:]),
        TAKEN,
    ),
    "grey picture with a CMYK profile": (
        "a.jpg",
        lambda: encoded("JPEG", "L", icc_profile=srgb()[:16] + b"CMYK" + srgb()[20:]),
        TAKEN,
    ),
    "JPEG of 65,535 x 65,535": ("a.jpg", lambda: jpeg_size(65_535, 65_535), REFUSED),
    "JPEG of 13,000 x 13,000 without data": ("a.jpg", lambda: jpeg_size(13_000, 13_000), EITHER),
    "JPEG of no height": ("a.jpg", lambda: jpeg_size(64, 0), REFUSED),
    "JPEG with EXIF that points at itself": (
        "a.jpg",
        lambda: exif_in_jpeg(b"II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0"),
        TAKEN,
    ),
    "JPEG with EXIF of 65,535 entries": (
        "a.jpg",
        lambda: exif_in_jpeg(b"II*\0\x08\0\0\0\xff\xff" + bytes(range(256)) * 200),
        TAKEN,
    ),
    "JPEG with a rotation of 99": (
        "a.jpg",
        lambda: exif_in_jpeg(b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x63\0\0\0\0\0\0\0"),
        TAKEN,
    ),
    "JPEG with a thousand comments": (
        "a.jpg",
        lambda: encoded("JPEG")[:2] + (b"\xff\xfe\xff\xff" + bytes(65_533)) * 1000 + encoded("JPEG")[2:],
        TAKEN,
    ),
    "JPEG of zeros after the header": ("a.jpg", lambda: encoded("JPEG")[:300] + bytes(5000), EITHER),
    "JPEG that ends twice": ("a.jpg", lambda: encoded("JPEG") * 2, TAKEN),
    "JPEG with restarts without end": ("a.jpg", lambda: encoded("JPEG")[:620] + b"\xff\xd0" * 200_000, EITHER),
    "WebP of 16 million pixels a side": ("a.webp", lambda: webp_size(2**24, 2**24), REFUSED),
    "WebP with a wrong length": ("a.webp", lambda: b"RIFF\xff\xff\xff\xff" + encoded("WEBP")[8:], EITHER),
    "animated WebP": ("a.webp", lambda: frames("WEBP", 30), TAKEN),
    "BMP of negative height": ("a.bmp", lambda: bmp(20, -20, 0, 24, bytes(1200)), TAKEN),
    "BMP of negative width": ("a.bmp", lambda: bmp(-20, 20, 0, 24, bytes(1200)), REFUSED),
    "BMP of 2^31 pixels a side": ("a.bmp", lambda: bmp(2**31 - 1, 2**31 - 1, 0, 24, bytes(100)), REFUSED),
    "BMP of the lowest height": ("a.bmp", lambda: bmp(20, -(2**31), 0, 24, bytes(100)), REFUSED),
    "BMP with runs": ("a.bmp", lambda: bmp(32, 32, 1, 8, b"\x20\x01\0\0" * 32 + b"\0\1"), TAKEN),
    "BMP with runs beyond its edge": ("a.bmp", lambda: bmp(32, 32, 1, 8, b"\xff\x01" * 5000), EITHER),
    "BMP with runs without end": ("a.bmp", lambda: bmp(32, 32, 1, 8, b"\0\0" * 200_000), EITHER),
    "BMP with runs that jump": ("a.bmp", lambda: bmp(32, 32, 1, 8, b"\0\2\xff\xff" * 500), EITHER),
    "BMP of 13,000 x 13,000 by one run": ("a.bmp", lambda: bmp(13_000, 13_000, 1, 8, b"\0\1"), EITHER),
    "BMP of compression 99": ("a.bmp", lambda: bmp(20, 20, 99, 24, bytes(1200)), REFUSED),
    "BMP of 7 bits": ("a.bmp", lambda: bmp(20, 20, 0, 7, bytes(1200)), REFUSED),
    "BMP of 4 billion colours": ("a.bmp", lambda: bmp(20, 20, 0, 8, bytes(400), 2**32 - 1), REFUSED),
    "TIFF whose pages form a ring": ("a.tif", lambda: chained_tiff(True), EITHER),
    "TIFF whose second page lies outside": ("a.tif", lambda: chained_tiff(False), EITHER),
    "TIFF of 60 pages": ("a.tif", lambda: frames("TIFF", 60, (20, 20)), TAKEN),
    "TIFF with tags of gigabytes": ("a.tif", lambda: repeated_tag(2000), REFUSED),
    "TIFF that says it is wider": ("a.tif", lambda: tiff(np.zeros((20, 20), "u1"), width=2**31 - 1), REFUSED),
    "TIFF of 64 bits": ("a.tif", lambda: tiff(np.zeros((20, 20), "u1"), bits=64), REFUSED),
    "TIFF with NaN": ("a.tif", lambda: tiff(np.full((20, 20), np.nan, "<f4")), REFUSED),
    "TIFF with infinity": ("a.tif", lambda: tiff(np.full((20, 20), np.inf, "<f4")), REFUSED),
    "TIFF of negative numbers": ("a.tif", lambda: tiff(np.full((20, 20), -5, "<i4")), EITHER),
    "BigTIFF": ("a.tif", lambda: b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**60), REFUSED),
    "GIF bomb": ("a.png", lambda: b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b";", REFUSED),
    "GIF without a frame": ("a.png", lambda: b"GIF89a" + struct.pack("<HHBBB", 20, 20, 0, 0, 0) + b";", REFUSED),
    "16-bit RGBA PNG": ("a.png", lambda: png((20, 20), 16, 6, [bytes(range(160))] * 20), TAKEN),
    "picture of 100,000 x 16": ("a.png", lambda: large_png(100_000, 16, "RGB"), TAKEN),
    "one pixel": ("a.png", lambda: large_png(1, 1, "RGB"), REFUSED),
}

LARGE: dict[str, tuple[int, int, str]] = {  # within the limit, so they are taken, and their memory is measured
    "largest 1-bit PNG": (13_377, 13_377, "1"),
    "largest RGBA PNG": (13_377, 13_377, "RGBA"),
    "largest 16-bit PNG": (13_000, 13_000, "I;16"),
    "largest palette PNG": (13_377, 13_377, "P"),
}


def validate(folder: Path, *culprits: str) -> Attack:
    return Attack(("validate", "--path", str(folder)), culprits)


def lay_picture(name: str, data: Callable[[random.Random], bytes], folder: Path, draw: random.Random) -> Attack:
    put(folder / name, data(draw))
    put((folder / name).with_suffix(".txt"), "a picture")
    return validate(folder, name)


def lay_path(kind: str, folder: Path, draw: random.Random) -> Attack:
    """Writes something under a picture's name that is no file, or cannot be reached."""
    path = folder / "a.png"
    put(folder / "a.txt", "a picture")
    if kind == "named pipe":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "link to a terminal":
        path.symlink_to("/dev/tty")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "link to nowhere":
        path.symlink_to(folder / "absent")
    elif kind == "link to a secret":
        path.symlink_to("/etc/hostname")
    elif kind == "folder":
        path.mkdir()
        put(path / "b.jpg", encoded("JPEG"))
    elif kind == "sparse file of 1 TB":
        put_sparse(path, 2**40, encoded("PNG"))
    elif kind == "empty file of 1 TB":
        put_sparse(path, 2**40)
    elif kind == "folders in a ring":
        put(folder / "sub" / "a.png", encoded("PNG"))
        put(folder / "sub" / "a.txt", "a picture")
        (folder / "sub" / "again").symlink_to(folder)
        put(path, encoded("PNG"))
    elif kind == "200 folders deep":
        deep = folder.joinpath(*(["d"] * 200))
        put(deep / "b.png", encoded("PNG"))
        put(deep / "b.txt", "a picture")
        put(path, encoded("PNG"))
    return validate(folder, "a.png", "a.txt", "b.jpg")


PATHS = {
    "named pipe": REFUSED,
    "link to a device": REFUSED,
    "link to a terminal": REFUSED,
    "link to itself": REFUSED,
    "link to nowhere": REFUSED,
    "link to a secret": REFUSED,
    "folder": REFUSED,
    "sparse file of 1 TB": REFUSED,
    "empty file of 1 TB": REFUSED,
    "folders in a ring": TAKEN,
    "200 folders deep": TAKEN,
}


def same(data: Callable[[], bytes], draw: random.Random) -> bytes:
    return data()


def damaged(data: Callable[[], bytes], draw: random.Random) -> bytes:
    return damage(data(), draw)


def cut(data: Callable[[], bytes], share: float, draw: random.Random) -> bytes:
    return (whole := data())[: int(len(whole) * share)]


def cases(rounds: int = 8) -> Iterator[Case]:
    """Yields the cases: `rounds` damaged copies of every good picture, cut ones, and those that are made by hand."""
    for kind, (extension, data) in GOOD.items():
        name = f"a.{extension}"
        for number in range(rounds):
            yield Case(PICTURES, f"damaged {kind} {number}", partial(lay_picture, name, partial(damaged, data)))
        for share in (0.1, 0.5, 0.97):
            yield Case(PICTURES, f"{share:.0%} of a {kind}", partial(lay_picture, name, partial(cut, data, share)))
        other = f"a.{'jpg' if extension == 'png' else 'png'}"
        yield Case(PICTURES, f"{kind} under another extension", partial(lay_picture, other, partial(same, data)))
    for what, (name, make, expected) in SPECIAL.items():
        most_mib = LARGEST_MIB if "13,000" in what else 512
        yield Case(PICTURES, what, partial(lay_picture, name, partial(same, make)), expected, most_mib)
    for what, (width, height, mode) in LARGE.items():
        large = partial(same, partial(large_png, width, height, mode))
        yield Case(PICTURES, what, partial(lay_picture, "a.png", large), TAKEN, LARGEST_MIB, 60)
    for kind, expected in PATHS.items():
        yield Case(PICTURES, kind, partial(lay_path, kind), expected)
