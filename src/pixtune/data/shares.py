"""Shares of the training: which pictures a run draws much oftener than others, because their shape is rare.

A micro-batch holds pictures of one size. Where a size has fewer pictures than a micro-batch has places, each of them
fills several: a lone portrait among squares is drawn eight times an epoch at eight places.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from pixtune.data.order import BatchOrder, Signature
from pixtune.data.pairs import shorten

NOTABLE_FACTOR = 2.0
"""Times the draws of the picture with the fewest from which a picture is named."""
EPOCHS_COUNTED = 8
"""Epochs that are counted where sizes change from epoch to epoch, as `random_ratio` has it."""


def draws_an_epoch(order: BatchOrder) -> list[float]:
    """Computes how often an epoch draws each example: on average, since which of a size come twice changes."""
    if order.sizes_stay:
        members: dict[Signature, float] = defaultdict(float)
        for variants, use in zip(order.buckets, order.uses, strict=True):
            members[variants[0]] += use.repeats
        size = order.global_batch_size
        return [
            use.repeats * (-(-members[variants[0]] // size) * size / members[variants[0]])
            for variants, use in zip(order.buckets, order.uses, strict=True)
        ]
    counts = Counter(turn.example for e in range(EPOCHS_COUNTED) for batch in order.epoch(e) for turn in batch)
    return [counts[example] / EPOCHS_COUNTED for example in range(len(order.buckets))]


def uneven_note(order: BatchOrder, names: Sequence[str]) -> str | None:
    """Returns a sentence that names the pictures of rare shapes, where they are drawn notably more often; else None."""
    draws = draws_an_epoch(order)
    wanted = [use.repeats for use in order.uses]
    factors = [number / repeats for number, repeats in zip(draws, wanted, strict=True)]
    least = min(factors)
    often = [example for example, factor in enumerate(factors) if factor >= NOTABLE_FACTOR * least]
    often.sort(key=lambda example: -factors[example])
    if not often or not least:  # in the few epochs that are counted, an example of a small fraction may not come
        return None
    listed = shorten(f"{names[example]} ({draws[example]:.1f} times an epoch)" for example in often)
    share = sum(draws[example] for example in often) / sum(draws)
    pictures = "1 picture of a rare shape is" if len(often) == 1 else f"{len(often)} pictures of rare shapes are"
    return (
        f"{pictures} drawn to fill micro-batches of {order.global_batch_size}, {share:.0%} of all draws, where others "
        f"come {least * min(wanted):.1f} times an epoch: {listed}. A smaller train_batch_size (with "
        "gradient_accumulation_steps), more pictures of the shape, or crops of them to a common one even it out."
    )


def times_used(mean: float, is_once: bool) -> str:
    """Returns how often a run uses each picture, in words.

    Args:
        mean: number of uses over the run, in units of the folder's repeats.
        is_once: whether all folders have one repeat.
    """
    number = f"about {mean:.0f}" if mean >= 1.5 else f"{mean:.1f}" if mean >= 0.95 else f"{mean:.2g}"
    return f"{number} times" if is_once else f"{number} times its folder's repeats"
