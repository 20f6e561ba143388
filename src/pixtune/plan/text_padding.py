"""How long a run makes its captions: each as it is, or the next multiple of some number of tokens.

A step is captured for one shape, so captions of any length would leave nothing to replay. Attention to padded captions
without a mask (`padded_attention.py`) lets many lengths share a shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pixtune.config.schema import TrainConfig
from pixtune.plan.demands import demands_of

LEAST_MULTIPLE = 64
"""Tokens. Half of it is added to a caption on average: below one percent of a picture's 4096."""
MOST_PADDING = 0.05
"""Share of a step's tokens above which no multiple but the least is taken: a plain step would be as fast."""


@dataclass(frozen=True)
class CaptionedSize:
    """Training pictures of one size, their control pictures' sizes included."""

    image_tokens: int
    """Of one example, its control pictures included."""
    draws_by_length: Mapping[int, float]
    """How often captions of so many tokens are drawn in an epoch. The dropped caption is one of them."""


@dataclass(frozen=True)
class Captions:
    """What is known of a data set's captions before the first step."""

    differ: bool
    """They come in several numbers of tokens, as far as is known."""
    sizes: tuple[CaptionedSize, ...] = ()
    """Empty where lengths are not known: captions are encoded in the loop, or all are taken to be of one length."""


def padded_length(num_tokens: int, multiple: int) -> int:
    """The next multiple, or the same number."""
    return -(-num_tokens // multiple) * multiple


def least_multiple(config: TrainConfig, captions: Captions | None) -> int:
    """Of tokens; what a run on a GPU pads to at least if its kernels can. Memory is counted, and kernels tried, for it.

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
    """What it does pad to, and why.

    Args:
        captures: of how many shapes steps are captured.
        kernel_pads: attention to padded captions by the run's kernel was tried on this machine, and is right.
    """
    least = least_multiple(config, captions) if captures and kernel_pads else 1
    if captions is None or least == 1:
        return 1, []
    if not captions.sizes:
        return least, [f"captions padded to multiples of {least} tokens: how long they are is known in the loop alone"]
    as_they_are, room = num_shapes(captions.sizes, 1), f"{captures} can be captured"
    # Larger batches of captions that differ would be split, into parts of any size, or masked.
    is_whole = config.batch_size == 1 or all(len(size.draws_by_length) == 1 for size in captions.sizes)
    if is_whole and as_they_are <= captures:
        return 1, [f"captions not padded: pictures and captions have {as_they_are} shapes, and {room}"]
    multiple = fitting_multiple(captions.sizes, captures)
    shapes, added = num_shapes(captions.sizes, multiple), padding_share(captions.sizes, multiple)
    if is_whole and shapes == as_they_are:
        return 1, [f"captions not padded: pictures and captions would have {shapes} shapes all the same"]
    return multiple, [
        f"captions padded to multiples of {multiple} tokens, without a mask: {shapes} instead of {as_they_are} shapes, "
        f"and {room}; {added:.1%} of all tokens are padding"
    ]


def fitting_multiple(sizes: Sequence[CaptionedSize], most_shapes: int) -> int:
    """The smallest by which pictures and captions come in no more than so many shapes, or in as few as can be.

    Above the least one it doubles, up to what makes all captions as long as the longest, as long as `MOST_PADDING` is
    not passed.
    """
    longest = padded_length(max(length for size in sizes for length in size.draws_by_length), LEAST_MULTIPLE)
    tried = [LEAST_MULTIPLE]
    while 2 * tried[-1] < longest:
        tried.append(2 * tried[-1])
    larger = [*tried[1:], *([longest] if longest > LEAST_MULTIPLE else [])]
    allowed = [LEAST_MULTIPLE, *(multiple for multiple in larger if padding_share(sizes, multiple) <= MOST_PADDING)]
    shapes = {multiple: num_shapes(sizes, multiple) for multiple in allowed}
    enough = max(most_shapes, min(shapes.values()))
    return next(multiple for multiple in allowed if shapes[multiple] <= enough)


def num_shapes(sizes: Sequence[CaptionedSize], multiple: int) -> int:
    """Of whole batches: pictures of one size with captions padded to one length, the longest of the batch."""
    return sum(len({padded_length(length, multiple) for length in size.draws_by_length}) for size in sizes)


def padding_share(sizes: Sequence[CaptionedSize], multiple: int) -> float:
    """Of all tokens of an epoch, where batches are of one example; larger ones have more."""
    added = whole = 0.0
    for size in sizes:
        for length, draws in size.draws_by_length.items():
            added += draws * (padded_length(length, multiple) - length)
            whole += draws * (size.image_tokens + padded_length(length, multiple))
    return added / whole
