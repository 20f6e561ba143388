"""How a picture lies to its control: shifts and scales that the tests make themselves, under edits of several kinds."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from pixtune.judging.alignment import SURE, Alignment, align_pictures, measure_alignment

ASSETS = Path(__file__).parents[3] / "assets"


def pairs(folder: str, step: int = 1) -> Iterator[tuple[Image.Image, Image.Image]]:
    for path in sorted((ASSETS / folder / "images").glob("*.png"))[::step]:
        yield Image.open(ASSETS / folder / "control" / path.name).convert("RGB"), Image.open(path).convert("RGB")


def move(picture: Image.Image, scale: float, right: float, down: float) -> Image.Image:
    """Resizes the picture's part that will be seen: another way of Pillow than the module's."""
    (width, height), margin = picture.size, 40
    x, y = width / 2 - right / scale + margin, height / 2 - down / scale + margin
    box = (x - width / 2 / scale, y - height / 2 / scale, x + width / 2 / scale, y + height / 2 / scale)
    padded = ImageOps.expand(picture, margin, fill=(128, 128, 128))
    return padded.resize(picture.size, Image.Resampling.BICUBIC, box)


def test_pairs_that_lie_on_each_other_are_seen_to():
    for control, target in pairs("known-edit", 4):
        found = align_pictures(control, target)
        assert found.off_pixels < 0.05 and found.is_sure


@pytest.mark.parametrize("seed", range(2))
def test_random_shifts_and_scales_are_measured(seed):
    draw = np.random.default_rng(seed)
    for control, target in pairs("known-edit", 5):
        scale, (right, down) = math.exp(draw.uniform(-0.1, 0.1)), draw.uniform(-9, 9, 2)
        found = align_pictures(control, move(target, scale, right, down))
        assert found.scale == pytest.approx(scale, abs=0.003)
        assert found.shift_pixels == pytest.approx((right, down), abs=0.2)
        assert found.is_sure


def invert(picture: Image.Image) -> Image.Image:
    return ImageOps.invert(picture)


def grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def jpeg(picture: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=30)
    return Image.open(stream).convert("RGB")


def darker_with_a_tint(picture: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(picture) * [0.5, 0.7, 0.9]).astype(np.uint8))


def with_a_new_corner(picture: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    edited = picture.copy()
    edited.paste(Image.fromarray(noise).resize((110, 110), Image.Resampling.NEAREST), (0, 0))
    return edited


@pytest.mark.parametrize("edit", [invert, grey, jpeg, darker_with_a_tint, with_a_new_corner])
def test_the_edit_does_not_matter(edit):
    for control, target in pairs("known-edit", 9):
        found = align_pictures(control, edit(move(target, 1.02, 3.4, -1.7)))
        assert found.scale == pytest.approx(1.02, abs=0.003)
        assert found.shift_pixels == pytest.approx((3.4, -1.7), abs=0.25)
        assert found.is_sure


def test_a_large_picture_is_measured_in_its_own_pixels():
    control, target = (picture.resize((1200, 900)) for picture in next(pairs("known-edit")))
    found = align_pictures(control, move(target, 1.0, -13.0, 5.5))
    assert found.shift_pixels == pytest.approx((-13.0, 5.5), abs=0.5) and found.size == (1200, 900)


def test_a_control_of_another_size_is_brought_to_the_targets():
    control, target = next(pairs("known-edit"))
    found = align_pictures(control.resize((128, 128), Image.Resampling.BOX), target)
    assert found.off_pixels < 0.5 and found.is_sure


def test_pictures_drawn_anew_have_no_alignment():
    assert not any(align_pictures(control, target).is_sure for control, target in pairs("demo-edit/train", 5))


def test_a_blurred_control_is_measured_where_it_is_sure_of_it():
    control, target = next(pairs("known-edit"))
    found = align_pictures(control.filter(ImageFilter.GaussianBlur(2)), move(target, 1.0, 2.0, 0.0))
    assert found.is_sure and found.shift_pixels == pytest.approx((2.0, 0.0), abs=0.3)


@pytest.mark.parametrize("size", [(1, 1), (8, 200), (16, 16), (17, 400), (64, 64)])
def test_pictures_without_edges_or_room_give_no_figures(size):
    plain = np.full((size[1], size[0], 3), 90, np.uint8)
    found = measure_alignment(plain, plain)
    assert (found.shift_pixels, found.scale, found.confidence, found.size) == ((0.0, 0.0), 1.0, 0.0, size)


def test_one_straight_edge_says_nothing_along_itself():
    half = np.zeros((96, 96, 3), np.uint8)
    half[:, 48:] = 255
    found = measure_alignment(half, np.roll(half, 3, axis=1))
    assert all(math.isfinite(value) for value in (*found.shift_pixels, found.scale, found.confidence))
    assert abs(found.shift_pixels[1]) < 3


def test_noise_is_not_taken_for_a_picture():
    draw = np.random.default_rng(0)
    one, other = draw.integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    assert measure_alignment(one, other).confidence < SURE / 2


def test_what_is_off_counts_shift_and_scale():
    assert Alignment((3.0, -4.0), 1.0, 1.0, (640, 480)).off_pixels == pytest.approx(5)
    # The mean square distance from the centre of a square of side 2 is 2/3, by integration.
    assert Alignment((0.0, 0.0), 1.5, 1.0, (2, 2)).off_pixels == pytest.approx(0.5 * math.sqrt(2 / 3))
