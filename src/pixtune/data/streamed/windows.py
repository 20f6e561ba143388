"""Cuts the rows of a stream into micro-batches, window by window, as a pure function of the rows and a seed.

Rows wait for others of their sizes, also from one window to the next, so none is used twice to fill a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pixtune import randomness
from pixtune.data.order import Signature, Use, pick
from pixtune.sizes import Size


@dataclass(frozen=True, slots=True)
class RowPlace:
    """Place of one use of a row: it has one in each epoch."""

    epoch: int
    shard: int
    row: int


@dataclass(frozen=True, slots=True)
class StreamRow:
    """One row of a stream, as far as its training depends on it, without its pictures."""

    place: RowPlace
    digest: str
    """SHA-256 of the picture's file, as hex."""
    size: Size
    """Size of the upright picture."""
    captions: tuple[str, ...]
    controls: tuple[tuple[str, Size], ...] = ()
    """SHA-256 and size of each control picture."""


@dataclass(frozen=True)
class Window:
    """The micro-batches that a window of rows completed."""

    number: int
    first: int
    """Number of its first global micro-batch in the run."""
    batches: tuple[tuple[int, ...], ...]
    """Numbers of the rows of each."""

    @property
    def end(self) -> int:
        return self.first + len(self.batches)


def in_random_order(rows: Iterable[StreamRow], seed: int) -> list[StreamRow]:
    """Returns the rows of a window mixed; who read them in which order does not matter."""
    return sorted(rows, key=lambda each: (_key(each.place, seed), each.place.shard, each.place.row))


def _key(place: RowPlace, seed: int) -> int:
    return randomness.draw_key(seed, "order", place.epoch, place.shard, place.row)


def draw_variant(place: RowPlace, seed: int, use: Use, num_variants: int) -> int:
    """Draws at which of its framings a row is trained in its epoch."""
    if num_variants == 1:
        return 0
    return pick(randomness.uniform(seed, "ratio", place.epoch, place.shard, place.row), num_variants, use.shares)


def draw_caption(place: RowPlace, seed: int, num_captions: int) -> int:
    """Draws with which of its captions a row is trained in its epoch."""
    if num_captions == 1:
        return 0
    return pick(randomness.uniform(seed, "caption", place.epoch, place.shard, place.row), num_captions)


def cut_batches(
    waiting: Sequence[tuple[int, Signature]], size: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, Signature]]]:
    """Cuts rows into micro-batches of one size each, in their order, and returns those that must wait for others.

    Args:
        waiting: numbers and sizes of rows, those that wait for longest first.
        size: number of rows in a micro-batch.
    """
    batches: list[tuple[int, ...]] = []
    of_signature: dict[Signature, list[int]] = {}
    for number, signature in waiting:
        same = of_signature.setdefault(signature, [])
        same.append(number)
        if len(same) == size:
            batches.append(tuple(same))
            of_signature[signature] = []
    left = {number for numbers in of_signature.values() for number in numbers}
    return batches, [(number, signature) for number, signature in waiting if number in left]


def mixed(batches: Sequence[tuple[int, ...]], seed: int, window: int) -> tuple[tuple[int, ...], ...]:
    """Returns the micro-batches of a window in random order: rows of a common size would come first."""
    return tuple(batches[place] for place in randomness.shuffled(len(batches), seed, "order", "window", window))
