"""Which part of a control is used, and at which size: by hand, and never squeezed."""

from __future__ import annotations

import pytest

from pixtune.data.buckets import Framing
from pixtune.data.controls import ControlRules, frame_control, same_shape
from pixtune.sizes import Size


def longest_side(pixels: int, size: Size) -> Size:
    longest = max(size)
    return size[0] * pixels // longest, size[1] * pixels // longest


RULES = ControlRules(1, lambda size: longest_side(48, size), lambda size: longest_side(24, size))
MIDDLE = Framing(64, 64, 0.064, (500.0, 0.0, 1500.0, 1000.0), 0.5)
"""The square in the middle of a target of 2000x1000."""
WHOLE = Framing(128, 64, 0.064, (0.0, 0.0, 2000.0, 1000.0), 0.0)


@pytest.mark.parametrize(
    ("control", "target_framing", "box", "latents", "vision", "share_lost"),
    [
        ((1000, 500), MIDDLE, (250, 0, 750, 500), (48, 48), (24, 24), 0.5),
        ((1000, 500), WHOLE, (0, 0, 1000, 500), (48, 24), (24, 12), 0.0),
        ((500, 1000), MIDDLE, (0, 0, 500, 1000), (24, 48), (12, 24), 0.0),  # a reference, which shows something else
    ],
)
def test_a_control_is_cut_where_its_target_is_cut_and_keeps_its_proportions(
    control: Size, target_framing: Framing, box: tuple[int, ...], latents: Size, vision: Size, share_lost: float
) -> None:
    framed = frame_control(control, (2000, 1000), target_framing, RULES)
    assert framed.vision is not None
    for framing, size in ((framed.latents, latents), (framed.vision, vision)):
        assert (framing.size, framing.crop_box, framing.share_lost) == (size, box, share_lost)
        left, top, right, bottom = framing.crop_box
        assert framing.scale == size[0] / (right - left) == size[1] / (bottom - top), "squeezed"


def test_without_a_text_encoder_that_sees_there_is_one_size() -> None:
    assert frame_control((1000, 500), (2000, 1000), MIDDLE, ControlRules(1, lambda size: size, None)).vision is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((1000, 333), (3000, 1000), True),  # sides are whole pixels
        ((1000, 500), (1005, 500), True),
        ((1005, 500), (1000, 500), True),
        ((1000, 500), (1011, 500), False),
        ((1011, 500), (1000, 500), False),
        ((1000, 500), (500, 1000), False),
    ],
)
def test_the_same_shape_is_one_percent_apart_at_most(one: Size, other: Size, same: bool) -> None:
    assert same_shape(one, other) is same
