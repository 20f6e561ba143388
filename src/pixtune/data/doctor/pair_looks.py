"""Looks of a target beside its control: whether it lies where the control does, and whether one has a border."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixtune.judging.alignment import MOST_PIXELS_ASIDE, Alignment, align_pictures
from pixtune.sizes import Size

_EVEN_LEVELS = 10
"""Largest difference of levels within a border, and between it and the picture's rim."""
_NARROWEST_SHARE = 0.015
"""Share of a side from which a border is worth a word."""
_CONTENT_SHARE = 0.5
"""Share of a border's pixels where the other picture must show something else, lest a plain background be one."""
_STRAIGHT_SHARE = 0.8
"""Share of the pixels just within a border that differ from it."""

SIDES = ("left", "top", "right", "bottom")


@dataclass(frozen=True)
class PairLook:
    """A target beside its control."""

    alignment: Alignment
    control_size: Size
    control_border: tuple[float, ...]
    target_border: tuple[float, ...]
    """Widths of plain borders that the other picture lacks, as shares of the sides, in the order of `SIDES`."""


def reduce_for_pairs(picture: Image.Image) -> Image.Image:
    """Returns a picture at the size that pairs are compared at: small enough to keep while the other is decoded."""
    factor = min(1.0, MOST_PIXELS_ASIDE / max(picture.size))
    size = (max(round(picture.width * factor), 1), max(round(picture.height * factor), 1))
    return picture.resize(size, Image.Resampling.BOX) if size != picture.size else picture.copy()


def compare_pair(control: Image.Image, control_size: Size, target: Image.Image) -> PairLook:
    """Compares a target with its control of the same shape.

    Args:
        control: `reduce_for_pairs` of the control, whose own size is `control_size`.
    """
    alignment = align_pictures(control, target)
    small = target.resize(control.size, Image.Resampling.BOX)
    at_control, at_target = np.asarray(control, np.int16), np.asarray(small, np.int16)
    return PairLook(
        alignment, control_size, _borders(at_control, at_target), _borders(at_target, at_control)
    )  # fmt: skip


def _borders(picture_HW3: NDArray[np.int16], other_HW3: NDArray[np.int16]) -> tuple[float, ...]:
    """Measures plain borders on the four sides where the other picture shows something else."""
    found = [_border_on_top(*(np.rot90(each, turns) for each in (picture_HW3, other_HW3))) for turns in (-1, 0, 1, 2)]
    # A colour that lies in an opposite corner, too, without a border there, is the ground of a drawing.
    return tuple(
        0.0 if on_ground and not found[(side + 2) % 4][0] else width for side, (width, on_ground) in enumerate(found)
    )


def _border_on_top(picture_HW3: NDArray[np.int16], other_HW3: NDArray[np.int16]) -> tuple[float, bool]:
    """Returns the share of the height that a border on top has, and whether a lower corner has its colour."""
    height, colour = len(picture_HW3), picture_HW3[:1, :1]
    narrowest = max(math.ceil(_NARROWEST_SHARE * height), 1)
    if np.abs(picture_HW3[:narrowest] - colour).max() > _EVEN_LEVELS:
        return 0.0, False
    differs = _apart(picture_HW3, colour)
    plain = differs.max(1) <= _EVEN_LEVELS
    width = height if plain.all() else int(plain.argmin())
    if width == height:
        return 0.0, False
    # It ends in a straight line; a drawing does not.
    within = (differs[width + 1 : width + 3] > 2 * _EVEN_LEVELS).mean()
    beside = (_apart(other_HW3[:width], colour) > 2 * _EVEN_LEVELS).mean()
    is_border = within > _STRAIGHT_SHARE and beside > _CONTENT_SHARE
    on_ground = bool(differs[-1, [0, -1]].min() <= _EVEN_LEVELS)
    return (width / height if is_border else 0.0), on_ground


def _apart(picture_HW3: NDArray[np.int16], colour: NDArray[np.int16]) -> NDArray[np.int16]:
    """Returns by how many levels each pixel differs from a colour, in the channel that differs most."""
    red, green, blue = (np.abs(picture_HW3[..., channel] - colour[..., channel]) for channel in range(3))
    apart: NDArray[np.int16] = np.maximum(np.maximum(red, green), blue)
    return apart
