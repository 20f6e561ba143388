"""The order of a run: which examples meet in a batch, and when, as a pure function of the seed that a run can resume.

The unit is the *global micro-batch*: `batch_size * num_processes` turns of one bucket, of which process r takes its
contiguous share. So two processes see exactly what one process with twice the batch size sees.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import overload

import numpy as np
from numpy.typing import NDArray

from pixtune import randomness
from pixtune.sizes import Size

Signature = tuple[Size, ...]
"""Sizes in pixels of an example's target and control pictures."""


@dataclass(frozen=True)
class Turn:
    """One use of an example in a batch: its number, which of its framings, and which of its captions."""

    example: int
    variant: int
    caption: int = 0


@dataclass(frozen=True)
class Use:
    """Way in which epochs use an example: how often, and what each of its turns draws from."""

    repeats: float = 1.0
    """Number of turns in an epoch, on average."""
    shares: tuple[float, ...] = ()
    """Shares of its turns that its variants have, which sum to 1; empty: equal ones."""
    num_captions: int = 1
    """Number of its captions, each with an equal share."""
    caption_dropout_rate: float | None = None
    """Share of its turns in which the empty caption replaces its own; None: the run's."""

    def drops(self, common: float) -> float:
        """Returns the share of turns in which its caption is dropped, where the run's is `common`."""
        return common if self.caption_dropout_rate is None else self.caption_dropout_rate


ONCE = Use()


class Epoch(Sequence[list[Turn]]):
    """The micro-batches of an epoch, as arrays: a million turns take twelve megabytes.

    Args:
        turns_BS3: for each micro-batch and place in it the example, variant and caption.
    """

    def __init__(self, turns_BS3: NDArray[np.int32]) -> None:
        self._turns_BS3 = turns_BS3

    def __len__(self) -> int:
        return len(self._turns_BS3)

    @overload
    def __getitem__(self, number: int) -> list[Turn]: ...

    @overload
    def __getitem__(self, number: slice) -> list[list[Turn]]: ...

    def __getitem__(self, number: int | slice) -> list[Turn] | list[list[Turn]]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        return [Turn(*turn) for turn in self._turns_BS3[number].tolist()]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Epoch) and np.array_equal(self._turns_BS3, other._turns_BS3)

    __hash__ = None  # type: ignore[assignment]


class BatchOrder:
    """The order of turns of a whole run.

    Args:
        buckets: the sizes of each example and variant, target first and then its controls: `buckets[example][variant]`.
            Turns meet only where all sizes are equal.
        global_batch_size: turns in one global micro-batch.
        seed: the run's seed.
        uses: how each example is used; empty: once an epoch, with one caption.
    """

    def __init__(
        self,
        buckets: Sequence[Sequence[Signature]],
        global_batch_size: int,
        seed: int,
        uses: Sequence[Use] = (),
    ) -> None:
        self.buckets = buckets
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.uses = uses or [ONCE] * len(buckets)
        self._epoch_ends: list[int] = []
        # Whether no example changes its size from turn to turn.
        self.sizes_stay = all(len(set(variants)) == 1 for variants in buckets)
        # Whether all epochs have the same number of micro-batches: nor does one change how often it comes.
        self.is_even = self.sizes_stay and all(use.repeats == int(use.repeats) for use in self.uses)
        self.epoch = lru_cache(maxsize=4)(self._epoch)

    @property
    def an_example(self) -> int:
        """Number of some example, for what needs any."""
        return 0

    def _epoch(self, epoch: int) -> Epoch:
        """Builds the micro-batches of one epoch: each example once, or as often as it repeats.

        Some come again to fill each bucket's last batch.
        """
        examples, numbers = self._in_random_order(epoch)
        turns_T3 = np.zeros((len(examples), 3), np.int32)
        turns_T3[:, 0] = examples
        bucket_of: dict[Signature, int] = {}
        buckets_T = np.empty(len(examples), np.int64)
        for place, (example, number) in enumerate(zip(examples.tolist(), numbers.tolist(), strict=True)):
            variants, use = self.buckets[example], self.uses[example]
            again = (number,) if number else ()
            variant = 0
            if len(variants) > 1:
                uniform = randomness.uniform(self.seed, "ratio", epoch, example, *again)
                variant = turns_T3[place, 1] = pick(uniform, len(variants), use.shares)
            if use.num_captions > 1:
                uniform = randomness.uniform(self.seed, "caption", epoch, example, *again)
                turns_T3[place, 2] = pick(uniform, use.num_captions)
            buckets_T[place] = bucket_of.setdefault(variants[variant], len(bucket_of))
        size = self.global_batch_size
        if not len(examples):  # all are of small fractions
            return Epoch(np.zeros((0, size, 3), np.int32))
        by_bucket = np.split(np.argsort(buckets_T, kind="stable"), np.cumsum(np.bincount(buckets_T))[:-1])
        # A short batch would weigh its examples more. Repeating some keeps each step's size and each rank's work.
        places_BS = np.concatenate(
            [np.resize(members, (-(-len(members) // size), size)) for members in by_bucket if len(members)]
        )
        return Epoch(turns_T3[places_BS[randomness.shuffled(len(places_BS), self.seed, "order", epoch, "batches")]])

    def _in_random_order(self, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Lists the examples of an epoch in random order, and the number of each of their uses, 0 for the first."""
        counts = [self._num_uses(epoch, example) for example in range(len(self.buckets))]
        examples = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        numbers = np.arange(len(examples), dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts)
        keys = np.fromiter(
            (
                randomness.draw_key(self.seed, "order", epoch, example, *((number,) if number else ()))
                for example, number in zip(examples.tolist(), numbers.tolist(), strict=True)
            ),
            np.int64,
            len(examples),
        )
        places = np.argsort(keys, kind="stable")
        return examples[places], numbers[places].astype(np.int32)

    def _num_uses(self, epoch: int, example: int) -> int:
        """Counts the uses of an example in an epoch.

        A fraction is spread evenly over the epochs, from a start of the example's own: a half is every second epoch.
        """
        repeats = self.uses[example].repeats
        whole = int(repeats)
        fraction = repeats - whole
        if not fraction:
            return whole
        start = randomness.uniform(self.seed, "repeats", example)
        return whole + int((epoch + 1) * fraction + start) - int(epoch * fraction + start)

    def epoch_end(self, epoch: int) -> int:
        """Counts the micro-batches up to the end of this epoch."""
        if self.is_even:
            return (epoch + 1) * len(self.epoch(0))
        while len(self._epoch_ends) <= epoch:
            before = self._epoch_ends[-1] if self._epoch_ends else 0
            self._epoch_ends.append(before + len(self.epoch(len(self._epoch_ends))))
        return self._epoch_ends[epoch]

    def epoch_of(self, index: int) -> int:
        """Finds the epoch of micro-batch `index`."""
        if self.is_even:
            return index // len(self.epoch(0))
        epoch = max(0, len(self._epoch_ends) - 1)
        while epoch > 0 and self.epoch_end(epoch - 1) > index:
            epoch -= 1
        while self.epoch_end(epoch) <= index:
            epoch += 1
        return epoch

    def micro_batch(self, index: int) -> list[Turn]:
        """Returns the turns of global micro-batch `index` of the run."""
        epoch = self.epoch_of(index)
        start = self.epoch_end(epoch - 1) if epoch else 0
        return self.epoch(epoch)[index - start]


def pick(uniform: float, count: int, shares: Sequence[float] = ()) -> int:
    """Returns which of `count` things a uniform number falls on, by their shares or else equal ones."""
    if not shares:
        return int(uniform * count)
    return min(bisect(list(accumulate(shares)), uniform), count - 1)
