"""Picture files as upright sRGB pixels, the way a person sees them in a viewer.

EXIF orientation, transparency (over white), 16-bit, 1-bit, palette, CMYK, Lab and float pictures and embedded colour
profiles are all converted. A picture that cannot be is a `DataError` that names the file, never a stack trace from a
decoder. Only `to_pixels` needs torch.
"""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, UnidentifiedImageError

from pixtune.data.buckets import Framing
from pixtune.errors import DataError
from pixtune.sizes import Size
from pixtune.storage.files import file_digest

if TYPE_CHECKING:
    from torch import Tensor

MAX_PICTURE_PIXELS = 178_956_970
"""Largest width times height that is opened (13,377 x 13,377; half a gigabyte as RGB). It is Pillow's own limit."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF")
"""Formats that are read, by content and not by name: a JPEG named .png is one. None starts programs, as EPS does."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that makes a picture upright, by its EXIF orientation."""

_WHITE_IS_ZERO = 0
"""TIFF's PhotometricInterpretation of a negative. Pillow inverts 1 and 8 bits, but not 16 bits and floats."""

_OPENING = threading.Lock()
"""Lock around opening: silencing a warning changes the process's filters, so one thread at a time may do it."""

_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""Errors that Pillow's decoders raise on damaged files (found by fuzzing; see tests/faults/test_bad_pictures.py)."""


@dataclass(frozen=True)
class Decoded:
    """An upright RGB picture, with notes on how it was read."""

    image: Image.Image
    notes: tuple[str, ...]
    """Sentences for people that lack the picture's name at their beginning."""


def open_rgb(path: Path) -> Image.Image:
    """Decodes a picture as upright 8-bit sRGB.

    Raises:
        DataError: one problem, with the file, what is wrong and what to do.
    """
    return decode(path).image


def decode(path: Path) -> Decoded:
    """Decodes a picture as `open_rgb`, with notes on what was guessed or left out, such as an animation's later frames.

    Raises:
        DataError: as `open_rgb`.
    """
    notes: list[str] = []
    with _naming_the_file(path), _opened(path) as image:
        if image.format != "MPO" and (num_frames := getattr(image, "n_frames", 1)) > 1:
            # A phone's MPO holds depth maps or previews behind the picture: nobody misses those.
            notes.append(f"has {num_frames} frames; only the first is used")
        raw_mode = _raw_mode(image)
        image.load()
        alpha = _alpha(image, raw_mode)
        rgb = _to_srgb(_to_eight_bits(image, raw_mode), image.info.get("icc_profile"), notes)
        if alpha is not None:
            rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
        transposition = _UPRIGHT.get(_orientation(image))
        upright = rgb.transpose(transposition) if transposition is not None else rgb
    upright.info = {}  # the profile, orientation and resolution of the file no longer describe these pixels
    return Decoded(upright, tuple(notes))


def read_size(path: Path) -> Size:
    """Reads the size of the upright picture from the header alone; equals `open_rgb(path).size`.

    Raises:
        DataError: the header cannot be read. Damage further on is found by `open_rgb` only.
    """
    with _naming_the_file(path), _opened(path) as image:
        if image.format == "TIFF":  # Pillow reports a TIFF's upright size itself
            return image.size
        if image.format == "PNG" and _has_chunks_after_pixels(path):
            image.load()  # the orientation may stand behind the pixels
        width, height = image.size
        return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def picture_digest(path: Path) -> str:
    """Returns the SHA-256 of a picture file, which is read again only if its size or time of change differs.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        stat = path.stat()
        return _digest(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise _data_error(path, f"cannot be read: {error.strerror or error}.") from error


@cache
def _digest(path: Path, size: int, changed_ns: int) -> str:
    return file_digest(path)


def check_unchanged(path: Path, digest: str) -> None:
    """Checks that a picture file is the one whose digest was taken before.

    Raises:
        DataError: it is gone, or has other content.
    """
    try:
        if picture_digest(path) == digest:
            return
        changed = f"{datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M:%S}"
        problem = f"has other content than when it was first read (the file is now of {changed})"
    except (DataError, OSError):
        problem = "was moved or deleted after it was first read, or its folder cannot be reached"
    raise DataError(
        "a picture changed while it was in use",
        [f"{path} {problem}. Put it back as it was and resume, or start a new run with the pictures as they are now."],
    )


def crop_resize(image: Image.Image, framing: Framing) -> Image.Image:
    """Cuts the framed part out of an upright RGB picture, at its training size.

    It takes one Lanczos step from the uncropped original: the filter grows with the reduction, so nothing aliases.
    """
    return image.resize(framing.size, Image.Resampling.LANCZOS, box=framing.crop_box)


def to_pixels(image: Image.Image) -> Tensor:
    """Converts an RGB picture to float32 of shape 3HW: 0 becomes -1, 255 becomes 1."""
    import torch

    pixels_HW3 = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels_HW3.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Opens a file: its header is read and its size is within the limit."""
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below has its own message
        image = Image.open(path, formats=_FORMATS)
    with image:
        if image.width * image.height > MAX_PICTURE_PIXELS:
            raise Image.DecompressionBombError
        yield image


@contextlib.contextmanager
def _naming_the_file(path: Path) -> Iterator[None]:
    """Turns any error of a decoder into a `DataError` with one sentence about this file."""
    try:
        yield
    except _Unusable as error:
        raise _data_error(path, str(error)) from error
    except Image.DecompressionBombError as error:
        raise _data_error(
            path, f"has more than {MAX_PICTURE_PIXELS:,} pixels (width times height), the limit. Scale it down."
        ) from error
    except UnidentifiedImageError as error:
        raise _data_error(path, _describe_content(path)) from error
    except _DECODER_ERRORS as error:
        cause = str(error) or type(error).__name__
        raise _data_error(path, f"cannot be decoded: {cause}. Save or download it again, or remove it.") from error


def _data_error(path: Path, sentence: str) -> DataError:
    return DataError("a picture cannot be used", [f"{path} {sentence}"])


class _Unusable(Exception):
    """A picture is well formed, but its meaning would have to be guessed."""


def _describe_content(path: Path) -> str:
    """Describes what a file that no decoder knows seems to be."""
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head:
        return "is empty (0 bytes). Download it again, or remove it."
    if head[4:8] == b"ftyp":
        return "is a HEIC picture or a film with the wrong extension. Convert it to JPEG or PNG."
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the picture. Run `git lfs pull`."
    kind = "is text" if all(byte in b"\t\n\r" or byte >= 32 for byte in head) else "is damaged or of another kind"
    return f"is not a picture that can be read: it {kind}. Replace it by a JPEG, PNG, WebP, BMP or TIFF, or remove it."


def _raw_mode(image: Image.Image) -> str:
    """Returns how levels are stored in the file, for example "L;4"; known only before the pixels are loaded."""
    tiles = getattr(image, "tile", [])  # pictures that were made in memory have none
    arguments = tiles[0].args if tiles else None
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments or image.mode)


def _orientation(image: Image.Image) -> int:
    """Reads the EXIF orientation, 1 to 8. Damaged EXIF counts as none: the pixels are good."""
    try:
        # The base class's method: PNG's own decodes the whole picture when its header holds no EXIF.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) else 1


def _has_chunks_after_pixels(path: Path) -> bool:
    """Returns whether a PNG has metadata behind its pixels. Reads chunk headers only, 8 bytes each."""
    with path.open("rb") as stream:
        stream.seek(8)
        pixels_seen = False
        while len(header := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"IDAT":
                pixels_seen = True
            elif pixels_seen:
                return kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt")
            stream.seek(length + 4, io.SEEK_CUR)
    return False


def _alpha(image: Image.Image, raw_mode: str) -> Image.Image | None:
    """Extracts the opacity as an 8-bit picture, 255 for opaque; None where the picture has no transparency."""
    if image.mode in ("RGBA", "LA", "PA"):
        return image.getchannel("A")
    if image.mode == "P":
        return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    key = image.info.get("transparency")
    if key is None:
        return None
    # PNG's tRNS names one transparent colour in the file's own bit depth. Pillow compares it with 8-bit pixels, which
    # is wrong for 2, 4 and 16 bits.
    if image.mode == "RGB":
        if ";16" in raw_mode:  # let the decoder round the colour as it rounded the pixels
            key = Image.frombytes("RGB", (1, 1), struct.pack(">3H", *key), "raw", "RGB;16B").tobytes()
        return Image.fromarray(np.where((np.asarray(image) == tuple(key)).all(axis=-1), 0, 255).astype(np.uint8))
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
    if image.mode in ("1", "L"):
        key = {"L;2": key * 85, "L;4": key * 17}.get(raw_mode, key)
        return image.convert("L").point([255 * (level != key) for level in range(256)])
    return None


def _to_eight_bits(image: Image.Image, raw_mode: str) -> Image.Image:
    """Converts a picture to mode L, RGB or CMYK without alpha. Deep pictures are scaled, never clipped.

    Raises:
        _Unusable: the numbers have no agreed white, so scaling them would be a guess.
    """
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image), 4095 if raw_mode.startswith("I;12") else 65535, image)
    if image.mode == "I":
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise _Unusable("holds whole numbers outside 0 to 65535, so white is unknown. Save it as 8 or 16 bit.")
        return _grey(levels, 65535, image)
    if image.mode == "F":
        levels = np.asarray(image)
        if not (levels.min() >= 0.0 and levels.max() <= 1.0):  # true for NaN as well
            raise _Unusable("holds decimal numbers outside 0 to 1, so white is unknown. Save it as 8 or 16 bit.")
        return _grey(levels, 1, image)
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    if image.mode in ("1", "LA"):
        return image.getchannel(0).convert("L")
    if image.mode in ("P", "PA"):  # by way of RGBA, because Pillow warns when a palette's transparency is dropped
        image = image.convert("RGBA")
    return image.convert("RGB")


def _grey(levels: np.ndarray, white: int, image: Image.Image) -> Image.Image:
    """Converts levels from 0 to `white` to mode L."""
    scaled = np.rint(levels.astype(np.float64) * (255.0 / white)).astype(np.uint8)
    tags = getattr(image, "tag_v2", {})
    return Image.fromarray(255 - scaled if tags.get(262) == _WHITE_IS_ZERO else scaled)


def _to_srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """Converts a picture of mode L, RGB or CMYK to RGB, through its embedded profile where that is usable."""
    if profile:
        try:
            return _apply_profile(image, profile)
        except (ImageCms.PyCMSError, ImportError, *_DECODER_ERRORS) as error:
            cause = str(error).strip() or type(error).__name__
            notes.append(f"has a colour profile that cannot be used ({cause}); its colours are taken as sRGB")
    elif image.mode == "CMYK":
        notes.append("is CMYK without a colour profile; its colours are only near to what was meant")
    return image.convert("RGB")


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Converts colours with perceptual intent, which a matrix profile ignores. A picture in sRGB is returned as it is.

    Raises:
        ImageCms.PyCMSError, OSError, ...: the profile is damaged or for another kind of picture.
        ImportError: Pillow was built without littlecms.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if image.mode == "L" and source.profile.xcolor_space.strip() == "RGB":
        image = image.convert("RGB")  # programs that save grey as JPEG often leave the colour profile in
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB")
    if image.mode == "RGB":
        probe = _color_cube()
        change = ImageChops.difference(probe, ImageCms.applyTransform(probe, transform) or probe)
        # Most pictures carry sRGB itself, and rounding through it would move every pixel by a level for nothing.
        if np.asarray(change).max() <= 2:
            return image
    return ImageCms.applyTransform(image, transform) or image


def _color_cube() -> Image.Image:
    """Makes a picture of 9 levels of each channel in all combinations."""
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
    return Image.fromarray(cube.reshape(27, 27, 3))
