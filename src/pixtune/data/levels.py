"""Levels of a decoded picture, whatever their kind and depth, as 8-bit sRGB over white."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageCms

WHITE_IS_ZERO = 0
"""TIFF's PhotometricInterpretation of a negative. Pillow inverts 1 and 8 bits, but not 16 bits and floats."""

STRIP_PIXELS = 1 << 24
"""Pixels that are converted at a time: conversions need several copies of what they convert, some of them in floats.

So a picture takes about twice its pixels at four bytes each, 1.6 GiB at the largest size. Measured for 13,000 x 13,000:
1.1 GiB in 16-bit grey and 1.5 with transparency, which took 3.2 and 2.7 in one piece.
"""

DECODER_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""Errors that Pillow raises on damaged parts without which a picture is good: EXIF and colour profiles."""


class Unusable(Exception):
    """A picture is well formed, but its meaning would have to be guessed."""


@dataclass(frozen=True)
class Stored:
    """Properties of a file that decide what its levels mean; parts of the picture no longer hold them."""

    raw_mode: str
    white_is_zero: bool


def to_rgb(image: Image.Image, stored: Stored, notes: dict[str, None], backdrop: str = "white") -> Image.Image:
    """Converts a loaded picture to RGB over a backdrop, in strips of at most `STRIP_PIXELS`.

    Args:
        notes: gets sentences on what was guessed, each once.
        backdrop: name of the colour that shows where a picture is transparent.

    Raises:
        Unusable: the meaning of its levels would have to be guessed.
    """
    height = max(STRIP_PIXELS // image.width, 1)
    if height >= image.height:
        return _strip_to_rgb(image, stored, notes, backdrop)
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, height):
        strip = image.crop((0, top, image.width, min(top + height, image.height)))
        rgb.paste(_strip_to_rgb(strip, stored, notes, backdrop), (0, top))
    return rgb


def _strip_to_rgb(image: Image.Image, stored: Stored, notes: dict[str, None], backdrop: str) -> Image.Image:
    alpha = read_alpha(image, stored.raw_mode)
    rgb = _to_srgb(_to_eight_bits(image, stored), image.info.get("icc_profile"), notes)
    return rgb if alpha is None else Image.composite(rgb, Image.new("RGB", rgb.size, backdrop), alpha)


def read_alpha(image: Image.Image, raw_mode: str) -> Image.Image | None:
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


def _to_eight_bits(image: Image.Image, stored: Stored) -> Image.Image:
    """Converts a picture to mode L, RGB or CMYK without alpha. Deep pictures are scaled, never clipped.

    Raises:
        Unusable: the numbers have no agreed white, so scaling them would be a guess.
    """
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image), 4095 if stored.raw_mode.startswith("I;12") else 65535, stored)
    if image.mode == "I":
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise Unusable("holds whole numbers outside 0 to 65535, so white is unknown. Save it as 8 or 16 bit.")
        return _grey(levels, 65535, stored)
    if image.mode == "F":
        levels = np.asarray(image)
        if not (levels.min() >= 0.0 and levels.max() <= 1.0):  # true for NaN as well
            raise Unusable("holds decimal numbers outside 0 to 1, so white is unknown. Save it as 8 or 16 bit.")
        return _grey(levels, 1, stored)
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    if image.mode in ("1", "LA"):
        return image.getchannel(0).convert("L")
    if image.mode in ("P", "PA"):  # by way of RGBA, because Pillow warns when a palette's transparency is dropped
        image = image.convert("RGBA")
    return image.convert("RGB")


def _grey(levels: np.ndarray, white: int, stored: Stored) -> Image.Image:
    """Converts levels from 0 to `white` to mode L."""
    if levels.dtype == np.float32:
        scaled = np.rint(levels.astype(np.float64) * 255.0).astype(np.uint8)
    else:  # by a table: whole numbers are few, and pixels many
        scaled = np.rint(np.arange(white + 1) * (255.0 / white)).astype(np.uint8)[levels]
    return Image.fromarray(255 - scaled if stored.white_is_zero else scaled)


def _to_srgb(image: Image.Image, profile: bytes | None, notes: dict[str, None]) -> Image.Image:
    """Converts a picture of mode L, RGB or CMYK to RGB, through its embedded profile where that is usable."""
    if profile:
        try:
            return _apply_profile(image, profile)
        except (ImageCms.PyCMSError, ImportError, *DECODER_ERRORS) as error:
            cause = str(error).strip() or type(error).__name__
            notes[f"has a colour profile that cannot be used ({cause}); its colours are taken as sRGB"] = None
    elif image.mode == "CMYK":
        notes["is CMYK without a colour profile; its colours are only near to what was meant"] = None
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
