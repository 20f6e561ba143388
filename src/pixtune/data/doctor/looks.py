"""Looks of a picture in a few numbers that are taken while it is decoded: hash, sharpness, contrast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL_PIXELS = 32
"""Side in pixels of the thumbnails that pictures are compared by: 3 KB each."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in how light a colour is, by ITU-R BT.601."""

_MEASURED_PIXELS = 1024**2
"""Pixels from which a picture is reduced before its sharpness is measured: finer detail reaches no model."""
_TILE_PIXELS = 16
_WEAKEST_DETAIL = 60.0
"""Mean square of the coarser Laplacian, in levels, from which a tile shows something that can be sharp."""
_FEWEST_TILES = 4
_SHARPEST = 0.9
"""Quantile of the tiles that speaks for the picture: a blurred background is no blurred picture."""


@dataclass(frozen=True)
class Look:
    """A picture in a few numbers."""

    thumbnail_HW3: NDArray[np.uint8]
    bits: int
    """Signs of the 63 lowest frequencies of the thumbnail; near copies differ in few of them."""
    sharpness: float | None
    """Detail of one pixel in units of the detail of two, in the picture's sharpest parts; None where it has none.

    Pictures have about as much of either, whatever they show; a blur takes the finer one. About 0.6 for drawings.
    """
    contrast: float
    """Standard deviation of how light the pixels are, in levels of 255."""
    is_large: bool
    """Whether it has enough tiles for edges to be missed."""


def take_look(picture: Image.Image) -> Look:
    """Measures an upright RGB picture."""
    thumbnail_HW3 = make_thumbnail(picture)
    step = max(1, math.isqrt(picture.width * picture.height // _MEASURED_PIXELS))
    light = (picture.reduce(step) if step > 1 else picture).convert("L")
    levels_HW = np.asarray(light, np.float32)
    is_large = min(levels_HW.shape) >= 4 * _TILE_PIXELS
    sharpness = measure_sharpness(levels_HW)
    return Look(thumbnail_HW3, hash_bits(thumbnail_HW3), sharpness, float(levels_HW.std()), is_large)


def make_thumbnail(picture: Image.Image) -> NDArray[np.uint8]:
    """Reduces a picture to a small square, whatever its shape."""
    return np.asarray(picture.resize((THUMBNAIL_PIXELS,) * 2, Image.Resampling.BOX))


def hash_bits(thumbnail_HW3: NDArray[np.uint8]) -> int:
    """Returns the signs of a thumbnail's lowest frequencies by a cosine transform, without the mean, as 63 bits.

    What is hardly there counts as negative, lest noise decide: a symmetric drawing lacks half of the frequencies.
    """
    transform = _cosines()
    low = (transform @ (thumbnail_HW3 @ LUMA) @ transform.T).ravel()[1:]
    present = low > 0.02 * math.sqrt(float((low**2).mean())) + 1e-6
    return int.from_bytes(np.packbits(present).tobytes(), "big")


@cache
def _cosines() -> NDArray[np.float32]:
    """Returns the first eight rows of the orthonormal cosine transform (DCT-II)."""
    places, frequencies = np.arange(THUMBNAIL_PIXELS) + 0.5, np.arange(8)[:, None]
    rows = np.cos(np.pi / THUMBNAIL_PIXELS * frequencies * places) * math.sqrt(2 / THUMBNAIL_PIXELS)
    rows[0] /= math.sqrt(2)
    return rows.astype(np.float32)


def measure_sharpness(levels_HW: NDArray[np.float32]) -> float | None:
    """Measures how much detail of one pixel a picture has beside that of two: `Look.sharpness`."""
    tile = _TILE_PIXELS
    rows, columns = levels_HW.shape[0] // tile, levels_HW.shape[1] // tile
    if rows * columns < _FEWEST_TILES:
        return None
    levels = levels_HW[: rows * tile, : columns * tile]
    halves = (levels[::2] + levels[1::2]) / 2
    coarse = _detail(((halves[:, ::2] + halves[:, 1::2]) / 2).astype(np.float32), tile // 2)
    shown = coarse > _WEAKEST_DETAIL
    if shown.sum() < _FEWEST_TILES:
        return None
    return float(np.sqrt(np.quantile(_detail(levels, tile)[shown] / coarse[shown], _SHARPEST)))


def _detail(levels: NDArray[np.float32], tile: int) -> NDArray[np.float32]:
    """Returns the mean square of the Laplacian in each tile; edges of the picture have none."""
    squared = np.zeros_like(levels)
    inner = levels[1:-1, 1:-1] * 4 - levels[:-2, 1:-1] - levels[2:, 1:-1] - levels[1:-1, :-2] - levels[1:-1, 2:]
    squared[1:-1, 1:-1] = inner * inner
    height, width = levels.shape
    means: NDArray[np.float32] = squared.reshape(height // tile, tile, width // tile, tile).mean((1, 3))
    return means
