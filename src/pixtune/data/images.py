"""Picture files to upright sRGB pixels, the way a person sees them in a viewer.

What is put right: EXIF orientation, transparency (over white), 16-bit, 1-bit, palette, CMYK, Lab and float pictures,
embedded colour profiles. What cannot be put right is one `DataError` that names the file, never a stack trace from a
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
"""Width times height that is still opened (13,377 x 13,377; half a gigabyte as RGB). Pillow's own bomb limit."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF")
"""Decided by content, not by name: a JPEG named .png is read. No format that starts other programs (EPS)."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to the turn that makes the picture upright."""

_WHITE_IS_ZERO = 0
"""TIFF's PhotometricInterpretation of a negative; Pillow turns 1 and 8 bits round, but not 16 bits and floats."""

_OPENING = threading.Lock()
"""Silencing a warning changes the process's warning filters, so only one thread may do it at a time."""

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
"""What Pillow's decoders raise on damaged files (found by fuzzing; see tests/faults/test_bad_pictures.py)."""


@dataclass(frozen=True)
class Decoded:
    """An upright RGB picture and what a person should know about how it was read (sentences without the name)."""

    image: Image.Image
    notes: tuple[str, ...]


def open_rgb(path: Path) -> Image.Image:
    """The picture as upright 8-bit sRGB.

    Raises:
        DataError: with one fault that names the file, what is wrong and what to do.
    """
    return decode(path).image


def decode(path: Path) -> Decoded:
    """`open_rgb` with notes on what was guessed or left out. The first frame of an animation. Raises as it does."""
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
        turn = _TURNS.get(_orientation(image))
        upright = rgb.transpose(turn) if turn is not None else rgb
    upright.info = {}  # the profile, orientation and resolution of the file no longer describe these pixels
    return Decoded(upright, tuple(notes))


def read_size(path: Path) -> Size:
    """(width, height) of the upright picture in pixels, from the header alone; equals `open_rgb(path).size`.

    Raises:
        DataError: the header cannot be read. A file that is damaged further on is only found by `open_rgb`.
    """
    with _naming_the_file(path), _opened(path) as image:
        if image.format == "TIFF":  # Pillow already reports a TIFF's upright size
            return image.size
        if image.format == "PNG" and _has_chunks_after_pixels(path):
            image.load()  # the orientation may stand behind the pixels
        width, height = image.size
        return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def picture_digest(path: Path) -> str:
    """SHA-256 of a picture file, read again only if its size or time of change has changed.

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
    """Makes sure that a picture file is the one whose digest was taken before.

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
    """The framed part of an upright RGB picture at its training size.

    One Lanczos step straight from the uncropped original: its filter grows with the reduction, so nothing aliases.
    """
    return image.resize(framing.size, Image.Resampling.LANCZOS, box=framing.crop_box)


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB picture as float32 of shape 3HW: 0 becomes -1, 255 becomes 1."""
    import torch

    pixels_HW3 = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels_HW3.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The file with its header read and its size within the limit."""
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit below, in our own words
        image = Image.open(path, formats=_FORMATS)
    with image:
        if image.width * image.height > MAX_PICTURE_PIXELS:
            raise Image.DecompressionBombError
        yield image


@contextlib.contextmanager
def _naming_the_file(path: Path) -> Iterator[None]:
    """Turns whatever a decoder raises into a `DataError` with one sentence about this file."""
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
    """A well-formed picture that we will not guess about."""


def _describe_content(path: Path) -> str:
    """What a file that no decoder knows seems to be."""
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
    """How levels are stored in the file, for example "L;4": only known before the pixels are loaded."""
    tiles = getattr(image, "tile", [])  # of files only, not of pictures made in memory
    arguments = tiles[0].args if tiles else None
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments or image.mode)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8. Damaged EXIF counts as none: the pixels are still good."""
    try:
        # The base class's method: PNG's own decodes the whole picture when its header holds no EXIF.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) else 1


def _has_chunks_after_pixels(path: Path) -> bool:
    """Whether a PNG has metadata behind its pixels. Reads chunk headers only, 8 bytes each."""
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
    """Opacity as an 8-bit picture, 255 for opaque; None where the picture has no transparency."""
    if image.mode in ("RGBA", "LA", "PA"):
        return image.getchannel("A")
    if image.mode == "P":
        return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    key = image.info.get("transparency")
    if key is None:
        return None
    # PNG's tRNS: one colour that is transparent, in the file's own bit depth. Pillow compares it with 8-bit pixels,
    # which is wrong for 2, 4 and 16 bits.
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
    """One of the modes L, RGB and CMYK, without alpha. Deep pictures are scaled, never clipped.

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
        if not (levels.min() >= 0.0 and levels.max() <= 1.0):  # false for NaN, too
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
    """Levels from 0 to `white` as mode L."""
    scaled = np.rint(levels.astype(np.float64) * (255.0 / white)).astype(np.uint8)
    tags = getattr(image, "tag_v2", {})
    return Image.fromarray(255 - scaled if tags.get(262) == _WHITE_IS_ZERO else scaled)


def _to_srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """A picture of mode L, RGB or CMYK as RGB, through its embedded profile where there is a usable one."""
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
    """Colours converted with perceptual intent (a matrix profile ignores it). Exactly the input if it is sRGB already.

    Raises:
        ImageCms.PyCMSError, OSError, ...: the profile is damaged or for another kind of picture.
        ImportError: this Pillow was built without littlecms.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if image.mode == "L" and source.profile.xcolor_space.strip() == "RGB":
        image = image.convert("RGB")  # programs that save grey as JPEG often leave the colour profile in
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB")
    if image.mode == "RGB":
        probe = _color_cube()
        change = ImageChops.difference(probe, ImageCms.applyTransform(probe, transform) or probe)
        # Most pictures carry sRGB itself. Rounding through it would move every pixel by a level for nothing.
        if np.asarray(change).max() <= 2:
            return image
    return ImageCms.applyTransform(image, transform) or image


def _color_cube() -> Image.Image:
    """9 levels of each channel in all combinations."""
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
    return Image.fromarray(cube.reshape(27, 27, 3))
