"""Length to which a run pads its captions: none, or the next multiple of some number of tokens.

A step is captured for one shape, so captions of any length would leave nothing to replay. Attention to padded captions
without a mask (`padded_attention.py`) lets many lengths share a shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pixtune.config.schema import TrainConfig
from pixtune.plan.demands import demands_of

LEAST_MULTIPLE = 64
"""Smallest multiple, in tokens. Half of it is added to a caption on average: below one percent of a picture's 4096."""
MOST_PADDING = 0.05
"""Share of padding in a step's tokens above which only the least multiple is taken: a plain step would be as fast."""


@dataclass(frozen=True)
class CaptionedSize:
    """Training pictures of one size, their control pictures' sizes included."""

    image_tokens: int
    """Image tokens of one example, its control pictures included."""
    turns_by_length: Mapping[int, float]
    """Expected turns in an epoch by a caption's number of tokens. The dropped caption is one of them."""


@dataclass(frozen=True)
class Captions:
    """Lengths of a data set's captions, as far as they are known before the first step."""

    differ: bool
    """Captions have different numbers of tokens, as far as is known."""
    sizes: tuple[CaptionedSize, ...] = ()
    """Empty where lengths are not known: captions are encoded in the loop, or all are taken to have one length."""


def padded_length(num_tokens: int, multiple: int) -> int:
    """Returns `num_tokens` rounded up to a multiple."""
    return -(-num_tokens // multiple) * multiple


def least_multiple(config: TrainConfig, captions: Captions | None) -> int:
    """Returns the multiple of tokens to which a run on a GPU pads at least, if its kernels can.

    Memory is counted, and kernels are tried, for captions of that length.

    Args:
        captions: None: the family cannot pad them.
    """
    demands = demands_of(config)
    can_gain = captions is not None and captions.differ and demands.captures
    # The kernels that take no mask compute in half the width alone.
    return LEAST_MULTIPLE if can_gain and demands.compute_format == "bf16" else 1


def choose_text_multiple(
    config: TrainConfig,
    captions: Captions | None,
    captures: int,
    kernel_pads: bool,
) -> tuple[int, list[str]]:
    """Returns the multiple of tokens to which captions are padded, and why.

    Args:
        captures: number of shapes whose steps are captured.
        kernel_pads: attention to padded captions by the run's kernel was tried on this machine, and is right.
    """
    least = least_multiple(config, captions) if captures and kernel_pads else 1
    if captions is None or least == 1:
        return 1, []
    if not captions.sizes:
        return least, [f"captions padded to multiples of {least} tokens: their lengths are known only in the loop"]
    as_they_are, room = num_shapes(captions.sizes, 1), f"{captures} can be captured"
    # Larger batches of captions that differ would be split, into parts of any size, or masked.
    is_whole = config.batch_size == 1 or all(len(size.turns_by_length) == 1 for size in captions.sizes)
    if is_whole and as_they_are <= captures:
        return 1, [f"captions not padded: pictures and captions have {as_they_are} shapes, and {room}"]
    multiple = fitting_multiple(captions.sizes, captures)
    shapes, added = num_shapes(captions.sizes, multiple), padding_share(captions.sizes, multiple)
    if is_whole and shapes == as_they_are:
        return 1, [f"captions not padded: pictures and captions would have {shapes} shapes even so"]
    return multiple, [
        f"captions padded to multiples of {multiple} tokens, without a mask: {shapes} instead of {as_they_are} shapes, "
        f"and {room}; {added:.1%} of all tokens are padding"
    ]


def fitting_multiple(sizes: Sequence[CaptionedSize], most_shapes: int) -> int:
    """Returns the smallest multiple that leaves at most `most_shapes` shapes, or else the fewest.

    Multiples double from the least one on, up to the one that makes all captions as long as the longest, while
    `MOST_PADDING` is not exceeded.
    """
    longest = padded_length(max(length for size in sizes for length in size.turns_by_length), LEAST_MULTIPLE)
    tried = [LEAST_MULTIPLE]
    while 2 * tried[-1] < longest:
        tried.append(2 * tried[-1])
    larger = [*tried[1:], *([longest] if longest > LEAST_MULTIPLE else [])]
    allowed = [LEAST_MULTIPLE, *(multiple for multiple in larger if padding_share(sizes, multiple) <= MOST_PADDING)]
    shapes = {multiple: num_shapes(sizes, multiple) for multiple in allowed}
    enough = max(most_shapes, min(shapes.values()))
    return next(multiple for multiple in allowed if shapes[multiple] <= enough)


def num_shapes(sizes: Sequence[CaptionedSize], multiple: int) -> int:
    """Counts the shapes of whole batches: pictures of one size with captions padded to the longest of the batch."""
    return sum(len({padded_length(length, multiple) for length in size.turns_by_length}) for size in sizes)


def padding_share(sizes: Sequence[CaptionedSize], multiple: int) -> float:
    """Returns the share of padding in an epoch's tokens with batches of one example; larger batches have more."""
    added = whole = 0.0
    for size in sizes:
        for length, turns in size.turns_by_length.items():
            added += turns * (padded_length(length, multiple) - length)
            whole += turns * (size.image_tokens + padded_length(length, multiple))
    return added / whole
