"""Aspect-ratio buckets: the size at which a picture is trained, and the part of it.

Pure arithmetic on integers and floats: no torch, no Pillow, no files, the same answer on every machine.

The rules, in the order in which they matter:

1. No picture is distorted. It is scaled by one factor until it covers its bucket, and what sticks out is cut off evenly
   on both sides.
2. No picture is enlarged unasked. One that is too small for its bucket keeps its own size, rounded down to the multiple
   that the model needs. `upscale=True` enlarges it to a full bucket instead, which `Framing.upscaled` shows.
3. No size has more than `img_size` squared pixels, so a memory plan for `img_size` x `img_size` holds for every bucket.
4. As little as possible is cut off; `Framing.share_lost` shows how much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pixtune.sizes import Ratio, Size

RATIOS: Mapping[str, Ratio | None] = MappingProxyType({"16:9": (16, 9), "4:3": (4, 3), "1:1": (1, 1), "own": None})
"""Ratios that `random_ratio` draws from, by name. They are wide, as the option's text says: a portrait becomes 16:9,
not 9:16."""

DEFAULT_MAX_ASPECT = 4.0
"""Longest side over shortest side beyond which a picture is cropped: a panorama trains as its middle."""


Box = tuple[float, float, float, float]
"""(left, top, right, bottom) of a part of a picture, in pixels of the upright original; fractions occur."""


@dataclass(frozen=True)
class Buckets:
    """The sizes that pictures of normal resolution are trained at, and the rules for the others."""

    img_size: int
    multiple: int
    max_aspect: float
    sizes: tuple[Size, ...]


@dataclass(frozen=True)
class Framing:
    """Recipe that turns a picture into training pixels: cut `crop_box` out and scale it to `width` x `height`."""

    width: int
    height: int
    scale: float
    """Output pixels per original pixel, the same for both axes."""
    crop_box: Box
    share_lost: float
    """Share of the picture's area that is cut off, 0 to 1."""
    flipped: bool = False
    """Whether the cut is mirrored left to right afterwards. Whatever else is cut by this framing is mirrored, too."""

    @property
    def size(self) -> Size:
        return self.width, self.height

    @property
    def upscaled(self) -> bool:
        """Whether pixels have to be invented."""
        return self.scale > 1.0


def build_buckets(
    img_size: int, multiple: int, max_aspect: float = DEFAULT_MAX_ASPECT, step: int | None = None
) -> Buckets:
    """Lists the sizes with sides in multiples of `multiple` whose area is nearest to `img_size` squared, and not above.

    Args:
        img_size: side of the square picture with the wanted area, in pixels.
        multiple: both sides of every bucket are divisible by this.
        max_aspect: no bucket is longer than this many times its shorter side.
        step: distance between neighbouring long sides, in pixels; None: `multiple`, which cuts off least. A larger step
            gives fewer buckets (fuller batches, fewer shapes to compile) and cuts off more.

    Raises:
        ValueError: the numbers allow no bucket.
    """
    if multiple < 1 or img_size < multiple:
        raise ValueError(f"img_size is {img_size}; it must be at least {multiple}, the unit of picture sides.")
    if not max_aspect >= 1.0:
        raise ValueError(f"max_aspect is {max_aspect}; it must be at least 1.")
    step = multiple if step is None else step
    if step < multiple or step % multiple:
        raise ValueError(f"step is {step}; it must be a multiple of {multiple}.")
    square = _round_down(img_size, multiple)
    sizes: set[Size] = set()
    for long_side in range(square, int(img_size * math.sqrt(max_aspect)) + 1, step):
        short_side = min(_round_down(img_size**2 // long_side, multiple), long_side)
        if short_side and long_side <= max_aspect * short_side:
            sizes |= {(long_side, short_side), (short_side, long_side)}
    return Buckets(img_size, multiple, max_aspect, tuple(sorted(sizes)))


def frame_picture(
    width: int, height: int, buckets: Buckets, ratio: Ratio | None = None, upscale: bool = False
) -> Framing:
    """Chooses the size and crop of one picture.

    Args:
        width, height: the upright picture's size in pixels.
        buckets: the sizes to choose from.
        ratio: crop to the bucket nearest to this ratio instead of the picture's own, as `random_ratio` does.
        upscale: enlarge a picture that is smaller than its bucket, instead of training it at its own size.

    Raises:
        ValueError: a side is shorter than `buckets.multiple`, so that nothing can be trained on. The message lacks the
            picture's name, which the caller puts before it.
    """
    if min(width, height) < buckets.multiple:
        raise ValueError(f"is {width}x{height} pixels; each side must have at least {buckets.multiple}.")
    aspect = ratio[0] / ratio[1] if ratio else width / height
    wanted = min(max(aspect, 1.0 / buckets.max_aspect), buckets.max_aspect)
    bucket = _nearest(buckets.sizes, wanted)
    if upscale or (bucket[0] <= width and bucket[1] <= height):
        return _cover(width, height, bucket)
    return _cover(width, height, _size_without_upscaling(width, height, wanted, buckets))


def frame_variants(width: int, height: int, buckets: Buckets, upscale: bool = False) -> dict[str, Framing]:
    """Frames a picture for every name of `RATIOS`, by crops from the centre, so that each can be cached.

    Names whose framings are equal (a 16:9 picture's "16:9" and "own") need one cache entry only.
    """
    return {name: frame_picture(width, height, buckets, ratio, upscale) for name, ratio in RATIOS.items()}


def _size_without_upscaling(width: int, height: int, wanted: float, buckets: Buckets) -> Size:
    """Returns the largest size of about the wanted aspect that a picture covers without being enlarged."""
    multiple = buckets.multiple
    region_width, region_height = min(width, height * wanted), min(height, width / wanted)
    own_width = max(_round_down(int(region_width), multiple), multiple)
    own_height = max(_round_down(int(region_height), multiple), multiple)
    # With a coarse step a picture may be too small for its bucket and too large for rule 3: its short side is cut.
    if own_width >= own_height:
        return own_width, max(min(own_height, _round_down(buckets.img_size**2 // own_width, multiple)), multiple)
    return max(min(own_width, _round_down(buckets.img_size**2 // own_height, multiple)), multiple), own_height


def _cover(width: int, height: int, bucket: Size) -> Framing:
    """Scales a picture so that it just covers the bucket, and cuts what sticks out evenly.

    Whole numbers are compared, so the side that fits is kept exactly and the box never leaves the picture.
    """
    bucket_width, bucket_height = bucket
    if bucket_width * height >= bucket_height * width:
        box_width, box_height = float(width), width * bucket_height / bucket_width
        scale = bucket_width / width
    else:
        box_width, box_height = height * bucket_width / bucket_height, float(height)
        scale = bucket_height / height
    left, top = (width - box_width) / 2, (height - box_height) / 2
    box = (left, top, min(left + box_width, float(width)), min(top + box_height, float(height)))
    return Framing(bucket_width, bucket_height, scale, box, 1.0 - box_width * box_height / (width * height))


def _nearest(sizes: tuple[Size, ...], aspect: float) -> Size:
    """Returns the size that loses least of a picture of this aspect; among equals, the one with most pixels."""
    return min(sizes, key=lambda size: (round(abs(math.log(size[0] / size[1] / aspect)), 9), -size[0] * size[1]))


def _round_down(value: int, multiple: int) -> int:
    return value // multiple * multiple
