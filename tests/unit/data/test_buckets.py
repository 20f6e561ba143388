"""Aspect-ratio buckets keep the four promises at the top of buckets.py."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixtune.data.buckets import RATIOS, Framing, build_buckets, frame_picture, frame_variants
from pixtune.sizes import Size

SETTINGS = [(1024, 16), (1328, 16), (1000, 16), (512, 32), (64, 16), (16, 16)]


@pytest.mark.parametrize(("img_size", "multiple"), SETTINGS)
def test_bucket_sides_are_multiples_and_areas_close_from_below(img_size, multiple):
    sizes = build_buckets(img_size, multiple).sizes
    assert len(set(sizes)) == len(sizes)
    square = img_size // multiple * multiple
    assert (square, square) in sizes
    for width, height in sizes:
        assert width % multiple == 0 and height % multiple == 0
        assert max(width, height) / min(width, height) <= 4
        assert width * height <= img_size**2
        longer, shorter = max(width, height), min(width, height)
        assert longer * (shorter + multiple) > img_size**2 or longer == square  # no larger one of this length
        assert (height, width) in sizes


def test_common_camera_shapes_have_a_bucket_of_their_own():
    sizes = build_buckets(1024, 16).sizes
    assert {(1024, 1024), (1248, 832), (832, 1248), (1360, 768), (1184, 880)} <= set(sizes)


def test_max_aspect_limits_buckets_and_crops_panoramas():
    buckets = build_buckets(512, 16, max_aspect=2)
    assert max(width / height for width, height in buckets.sizes) <= 2
    framing = frame_picture(6000, 1000, buckets)
    assert framing.width / framing.height <= 2.1
    assert framing.share_lost == pytest.approx(2 / 3, abs=0.02)


def test_a_larger_step_gives_fewer_buckets():
    fine, coarse = build_buckets(1024, 16), build_buckets(1024, 16, step=64)
    assert len(coarse.sizes) < len(fine.sizes) / 3
    assert set(coarse.sizes) <= set(fine.sizes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((8, 16), "img_size is 8; it must be at least 16"),
        ((64, 0), "multiple|unit"),
        ((64, 16, 0.5), "max_aspect is 0.5"),
        ((64, 16, math.nan), "max_aspect is nan"),
        ((64, 16, 4.0, 8), "step is 8"),
        ((64, 16, 4.0, 40), "step is 40"),
    ],
)
def test_impossible_settings_say_which(arguments, words):
    with pytest.raises(ValueError, match=words):
        build_buckets(*arguments)


@st.composite
def pictures(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """A training size, a multiple, and the sides of a picture from the smallest to a large one, of any shape."""
    multiple = draw(st.sampled_from((8, 16, 32, 64)))
    img_size = draw(st.integers(multiple, 1600))
    width, height = (int(multiple * 2 ** draw(st.floats(0, 8))) for _ in range(2))
    return img_size, multiple, width, height


@settings(max_examples=250)
@given(pictures(), st.sampled_from(list(RATIOS.values())), st.booleans())
def test_framing_never_distorts_and_never_leaves_the_picture(picture, ratio, upscale):
    img_size, multiple, width, height = picture
    buckets = build_buckets(img_size, multiple)
    framing = frame_picture(width, height, buckets, ratio, upscale)
    left, top, right, bottom = framing.crop_box
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    # One scale on both axes, and nothing beyond one axis is cut.
    assert (right - left) * framing.scale == pytest.approx(framing.width, rel=1e-9)
    assert (bottom - top) * framing.scale == pytest.approx(framing.height, rel=1e-9)
    assert (left, right) == (0, width) or (top, bottom) == (0, height)
    # A centre crop.
    assert left == pytest.approx(width - right, abs=1e-6) and top == pytest.approx(height - bottom, abs=1e-6)
    lost = 1 - (right - left) * (bottom - top) / (width * height)
    assert framing.share_lost == pytest.approx(lost, abs=1e-9) and framing.share_lost >= 0
    assert framing.width % multiple == 0 and framing.height % multiple == 0
    assert framing.width * framing.height <= img_size**2
    if upscale:
        assert framing.size in buckets.sizes
    else:
        assert not framing.upscaled


def widest(img_size: int, multiple: int) -> list[Size]:
    """All sizes of allowed shape that no longer one of the same long side fits beside, found by trying every pair."""
    sides = range(multiple, 2 * img_size + 1, multiple)
    fitting = [(a, b) for a in sides for b in sides if b <= a <= 4 * b and a * b <= img_size**2]
    square = img_size // multiple * multiple
    best = [(a, b) for a, b in fitting if a >= square and not any(c == a and d > b for c, d in fitting)]
    return [*best, *((b, a) for a, b in best)]


@settings(max_examples=60)
@given(st.sampled_from((16, 32, 64)), st.integers(1, 14), st.floats(1, 4), st.booleans(), st.data())
def test_no_bucket_would_lose_less_of_a_large_picture(multiple, units, aspect, upright, data):
    img_size = multiple * units + data.draw(st.integers(0, multiple - 1))
    width, height = int(4 * img_size * aspect), 4 * img_size
    width, height = (height, width) if upright else (width, height)
    framing = frame_picture(width, height, build_buckets(img_size, multiple))
    losses = {
        size: 1 - min(a := size[0] * height, b := size[1] * width) / max(a, b) for size in widest(img_size, multiple)
    }
    assert framing.size in losses
    assert framing.share_lost == pytest.approx(min(losses.values()), abs=1e-8)


@given(st.sampled_from((1024, 1328)), st.integers(1024, 6000), st.floats(1, 4), st.booleans())
def test_large_pictures_lose_little(img_size, short_side, aspect, upright):
    short_side = max(short_side, img_size)
    width, height = short_side, int(short_side * aspect)
    width, height = (width, height) if upright else (height, width)
    assert frame_picture(width, height, build_buckets(img_size, 16)).share_lost < 0.025


def test_a_picture_of_bucket_size_is_taken_whole():
    buckets = build_buckets(1024, 16)
    for width, height in buckets.sizes:
        if width * (height + 16) > 1024**2 >= width * height:  # the best of its shape
            framing = frame_picture(width, height, buckets)
            assert framing == Framing(width, height, 1.0, (0.0, 0.0, width, height), 0.0)


@pytest.mark.parametrize(
    ("size", "kept"),
    [((700, 500), (688, 496)), ((500, 700), (496, 688)), ((300, 300), (288, 288)), ((16, 16), (16, 16))],
)
def test_small_pictures_keep_their_size_unless_asked(size: tuple[int, int], kept):
    buckets = build_buckets(1024, 16)
    framing = frame_picture(*size, buckets)
    assert framing.size == kept and not framing.upscaled
    enlarged = frame_picture(*size, buckets, upscale=True)
    assert enlarged.upscaled and enlarged.size in buckets.sizes
    assert enlarged.width * enlarged.height > 0.9 * 1024**2


def test_a_picture_just_short_of_its_bucket_is_not_enlarged_and_stays_below_the_area():
    buckets = build_buckets(1024, 16)
    for width in range(1000, 1060):
        for height in range(1000, 1060, 7):
            framing = frame_picture(width, height, buckets)
            assert not framing.upscaled and framing.width * framing.height <= 1024**2
            assert framing.width * framing.height > 0.93 * min(width * height, 1024**2)


@pytest.mark.parametrize(("size", "kept"), [((1389, 795), (1376, 752)), ((802, 1484), (704, 1472))])
def test_the_area_is_kept_where_coarse_steps_leave_no_bucket(size: tuple[int, int], kept):
    framing = frame_picture(*size, build_buckets(1024, 16, step=256))
    assert framing.size == kept and kept[0] * kept[1] <= 1024**2


def test_extreme_pictures_are_cropped_to_their_middle():
    framing = frame_picture(20_000, 100, build_buckets(1024, 16))
    assert framing.size == (400, 96)
    left, top, right, bottom = framing.crop_box
    assert (left + right, top, bottom) == (20_000, 0, 100)
    assert framing.share_lost > 0.97


@pytest.mark.parametrize("size", [(1, 1), (15, 4000), (4000, 15)])
@pytest.mark.parametrize("upscale", [False, True])
def test_a_side_below_the_multiple_is_refused_even_with_upscale(size: tuple[int, int], upscale):
    with pytest.raises(ValueError, match=rf"is {size[0]}x{size[1]} pixels; each side must have at least 16"):
        frame_picture(*size, build_buckets(64, 16), upscale=upscale)


@pytest.mark.parametrize("size", [(4000, 3000), (3000, 4000), (2000, 2000), (5000, 2000)])
def test_random_ratio_variants_have_the_promised_ratios(size: tuple[int, int]):
    buckets = build_buckets(1024, 16)
    variants = frame_variants(*size, buckets)
    assert list(variants) == ["16:9", "4:3", "1:1", "own"]
    for name, framing in variants.items():
        width, height = (int(part) for part in name.split(":")) if name != "own" else size
        assert framing.width / framing.height == pytest.approx(width / height, rel=0.02)
    assert variants["own"] == frame_picture(*size, buckets)


def test_random_ratio_of_a_small_picture_is_not_enlarged():
    for framing in frame_variants(300, 200, build_buckets(1024, 16)).values():
        assert not framing.upscaled and framing.width <= 300 and framing.height <= 200


def test_pairs_buckets_and_validate_need_no_torch():
    code = (
        "import sys, pixtune.data.buckets; assert not {'PIL', 'numpy'} & set(sys.modules);"
        "import pixtune.data.pairs; assert not {'PIL', 'numpy'} & set(sys.modules);"
        "import pixtune.data.validate, pixtune.data.images; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
