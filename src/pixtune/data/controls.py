"""Control pictures of an edit model: the size at which each is used, and the part of it.

Pure arithmetic, like `buckets.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from pixtune.data.buckets import Box, Framing, build_buckets, frame_picture
from pixtune.sizes import Size

MOST_CONTROLS = 3
"""Number of control pictures of an example that the models with most of them take."""
SAME_SHAPE = 0.01
"""Difference of the logarithms of two aspect ratios below which they count as the same: sides are whole pixels."""


@dataclass(frozen=True)
class ControlRules:
    """A model family's use of control pictures."""

    most: int
    """Number of control pictures that an example may have."""
    latents_size: Callable[[Size], Size]
    """Function from the size of a picture's used part to the size at which it joins the latents."""
    vision_size: Callable[[Size], Size] | None
    """Function from that size to the one that the text encoder sees; None where it sees no pictures."""


@dataclass(frozen=True)
class ControlFraming:
    """Framings that turn one control picture into model input."""

    latents: Framing
    """Framing for the autoencoder."""
    vision: Framing | None
    """Framing for the text encoder; None where it sees no pictures."""


def usual_rules(side: int, multiple: int) -> ControlRules:
    """Returns the rules of the models that take most controls: each near `side` squared pixels, by its own ratio.

    For data that are read without a model.
    """
    buckets = build_buckets(side, multiple)
    return ControlRules(MOST_CONTROLS, lambda size: frame_picture(*size, buckets, upscale=True).size, None)


def same_shape(one: Size, other: Size) -> bool:
    """Returns whether two pictures have the same aspect ratio, but for sides rounded to whole pixels."""
    return abs(math.log(one[0] / one[1] / (other[0] / other[1]))) < SAME_SHAPE


def same_part(box: Box, picture: Size, other: Size) -> Box:
    """Returns the part of another picture of the same shape that shows what `box` cuts out of `picture`."""
    across, down = other[0] / picture[0], other[1] / picture[1]
    left, top, right, bottom = box
    return left * across, top * down, min(right * across, other[0]), min(bottom * down, other[1])


def frame_box(box: Box, size: Size, share_lost: float) -> Framing:
    """Returns the framing that brings `box` to a size of about its shape."""
    return Framing(size[0], size[1], size[0] / (box[2] - box[0]), box, share_lost)


def frame_control(control: Size, target: Size, target_framing: Framing, rules: ControlRules) -> ControlFraming:
    """Frames a control picture beside its target.

    A control of the target's own shape shows the same scene, so it is cut where the target is cut. One of another shape
    is a reference and stays whole. Beside a mirrored target each control is mirrored.

    Args:
        control, target: sizes of the upright originals.
    """
    if same_shape(control, target) and target_framing.share_lost > 0:
        box, used = same_part(target_framing.crop_box, target, control), target_framing.size
    else:
        box, used = (0.0, 0.0, float(control[0]), float(control[1])), control

    def frame(size: Size) -> Framing:
        share_kept = (box[2] - box[0]) * (box[3] - box[1]) / (control[0] * control[1])
        return replace(frame_box(box, size, 1.0 - share_kept), flipped=target_framing.flipped)

    return ControlFraming(
        frame(rules.latents_size(used)), frame(rules.vision_size(used)) if rules.vision_size else None
    )
