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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pixtune.data.buckets import Framing
from pixtune.data.levels import DECODER_ERRORS, WHITE_IS_ZERO, Stored, Unusable, read_alpha, to_rgb
from pixtune.errors import DataError
from pixtune.inputs.reading import MEBIBYTE, check_size
from pixtune.sizes import Size
from pixtune.storage.files import file_digest

if TYPE_CHECKING:
    from torch import Tensor

MAX_PICTURE_PIXELS = 178_956_970
"""Largest width times height that is opened (13,377 x 13,377; 0.7 GiB as RGB). It is Pillow's own limit."""

LARGEST_PICTURE_BYTES = 2048 * MEBIBYTE
"""Size of the largest picture file that is opened, or hashed: a picture of the most pixels has 1.4 GiB in the deepest
format, uncompressed."""

LARGE_PIXELS = 1 << 25
"""Pixels from which pictures are worked on one at a time, whatever the number of threads: they would add up."""

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

_OPENING = threading.Lock()
"""Lock around opening: silencing a warning changes the process's filters, so one thread at a time may do it."""

_LARGE = threading.RLock()
"""Lock that is held while a picture of `LARGE_PIXELS` is in memory."""


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


@contextlib.contextmanager
def decoded(path: Path) -> Iterator[Decoded]:
    """Decodes a picture for as long as it is needed; large ones are in memory one at a time.

    Raises:
        DataError: as `open_rgb`.
    """
    with contextlib.ExitStack() as stack:
        with _naming_the_file(path), _opened(path) as image:
            is_large = image.width * image.height >= LARGE_PIXELS
        if is_large:
            stack.enter_context(_LARGE)
        yield decode(path)


def decode(path: Path, backdrop: str = "white") -> Decoded:
    """Decodes a picture as `open_rgb`, with notes on what was guessed or left out, such as an animation's later frames.

    Args:
        backdrop: name of the colour that shows where the picture is transparent.

    Raises:
        DataError: as `open_rgb`.
    """
    notes: dict[str, None] = {}
    with _loaded(path, notes) as (image, stored):
        transposition = _UPRIGHT.get(_orientation(image))
        rgb = to_rgb(image, stored, notes, backdrop)
    del image  # frees the pixels as they were stored before a copy is turned upright
    upright = rgb.transpose(transposition) if transposition is not None else rgb
    upright.info = {}  # the profile, orientation and resolution of the file no longer describe these pixels
    return Decoded(upright, tuple(notes))


@contextlib.contextmanager
def _loaded(path: Path, notes: dict[str, None]) -> Iterator[tuple[Image.Image, Stored]]:
    """Opens a picture and decodes its first frame, with what only the open file tells of its levels."""
    with _naming_the_file(path), _opened(path) as image:
        if image.format != "MPO" and (num_frames := getattr(image, "n_frames", 1)) > 1:
            # A phone's MPO holds depth maps or previews behind the picture: nobody misses those.
            notes[f"has {num_frames} frames; only the first is used"] = None
        raw_mode = _raw_mode(image)
        image.load()
        yield image, Stored(raw_mode, getattr(image, "tag_v2", {}).get(262) == WHITE_IS_ZERO)


def has_alpha(path: Path) -> bool:
    """Returns whether a picture has an alpha channel or transparent colours, from its header alone.

    Raises:
        DataError: the header cannot be read.
    """
    with _naming_the_file(path), _opened(path) as image:
        return image.has_transparency_data


def read_levels(path: Path, of_alpha: bool, note: Callable[[str], None]) -> np.ndarray:
    """Decodes a mask as its upright levels, 0 to 255, shape (height, width).

    They are its opacity, or else its brightness, where what is transparent is black.

    Args:
        note: called with sentences on how it was read that lack the picture's name at their beginning.

    Raises:
        DataError: as `open_rgb`.
    """
    notes: dict[str, None] = {}
    with _loaded(path, notes) as (image, stored):
        transposition, alpha = _UPRIGHT.get(_orientation(image)), read_alpha(image, stored.raw_mode)
        if of_alpha:
            levels = alpha or Image.new("L", image.size, 255)
        else:
            levels = to_rgb(image, stored, notes, "black").convert("L")
            if alpha is not None and alpha.getextrema()[0] != 255:
                notes["is a mask with an alpha channel: what is transparent counts as black"] = None
    for sentence in notes:
        note(sentence)
    return np.asarray(levels.transpose(transposition) if transposition is not None else levels)


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
    """Returns the SHA-256 of a picture file, which is read again only if its size or a time of change differs.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        stat = path.stat()
        return _digest(str(path), stat.st_size, (stat.st_mtime_ns, stat.st_ctime_ns))
    except OSError as error:
        raise _data_error(path, f"cannot be read: {error.strerror or error}.") from error


@lru_cache(maxsize=1 << 15)
def _digest(name: str, size: int, changed_ns: tuple[int, int]) -> str:
    path = Path(name)
    check_size(path, LARGEST_PICTURE_BYTES)
    return file_digest(path)


@contextlib.contextmanager
def while_unchanged(path: Path, digest: str) -> Iterator[None]:
    """Checks before and after the picture file is read that it is the one whose digest was taken before.

    What the reading makes of a file that is replaced meanwhile, an error included, counts for nothing.

    Raises:
        DataError: the file is gone, or has other content.
    """
    _check_unchanged(path, digest)
    try:
        yield
    finally:
        _check_unchanged(path, digest)


def _check_unchanged(path: Path, digest: str) -> None:
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
    """Cuts the framed part out of an upright RGB picture, at its training size, mirrored if the framing says so.

    It takes one Lanczos step from the uncropped original: the filter grows with the reduction, so nothing aliases.
    """
    framed = image.resize(framing.size, Image.Resampling.LANCZOS, box=framing.crop_box)
    return framed.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if framing.flipped else framed


def to_pixels(image: Image.Image) -> Tensor:
    """Converts an RGB picture to float32 of shape 3HW: 0 becomes -1, 255 becomes 1."""
    import torch

    pixels_HW3 = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels_HW3.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Opens a file: its header is read and its size is within the limit."""
    check_size(path, LARGEST_PICTURE_BYTES)
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
    except Unusable as error:
        raise _data_error(path, str(error)) from error
    except Image.DecompressionBombError as error:
        raise _data_error(
            path, f"has more than {MAX_PICTURE_PIXELS:,} pixels (width times height), the limit. Scale it down."
        ) from error
    except UnidentifiedImageError as error:
        raise _data_error(path, _describe_content(path)) from error
    except Exception as error:  # decoders raise anything on damaged files; the cause stays attached
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not a decoder's
            raise _data_error(path, f"cannot be read: {error.strerror or error}.") from error
        cause = str(error) or type(error).__name__
        raise _data_error(path, f"cannot be decoded: {cause}. Save or download it again, or remove it.") from error


def _data_error(path: Path, sentence: str) -> DataError:
    return DataError("a picture cannot be used", [f"{path} {sentence}"])


def _describe_content(path: Path) -> str:
    """Describes what a file that no decoder knows seems to be."""
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head:
        return "is empty (0 bytes). Download it again, or remove it."
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "is a damaged AVIF picture. Save or download it again, or remove it."
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
    except DECODER_ERRORS:
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
