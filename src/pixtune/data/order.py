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

    def _epoch(self, epoch: int) -> list[list[Turn]]:
        """Builds the micro-batches of one epoch: each example once, or as often as it repeats.

        Some come again to fill each bucket's last batch.
        """
        by_bucket: dict[Signature, list[Turn]] = {}
        for example, *again in self._in_random_order(epoch):
            variants, use = self.buckets[example], self.uses[example]
            variant = _pick(randomness.uniform(self.seed, "ratio", epoch, example, *again), len(variants), use.shares)
            caption = 0
            if use.num_captions > 1:
                caption = _pick(randomness.uniform(self.seed, "caption", epoch, example, *again), use.num_captions)
            by_bucket.setdefault(variants[variant], []).append(Turn(example, variant, caption))
        size = self.global_batch_size
        micro_batches = []
        for members in by_bucket.values():
            # A short batch would weigh its examples more. Repeating some keeps each step's size and each rank's work.
            padded = [members[i % len(members)] for i in range(-(-len(members) // size) * size)]
            micro_batches += [padded[i : i + size] for i in range(0, len(padded), size)]
        return [micro_batches[i] for i in randomness.shuffled(len(micro_batches), self.seed, "order", epoch, "batches")]

    def _in_random_order(self, epoch: int) -> list[tuple[int, ...]]:
        """Lists the examples of an epoch in random order: (example,) for its first use, (example, 1) for its second."""
        uses = [
            (example, number) if number else (example,)
            for example in range(len(self.buckets))
            for number in range(self._num_uses(epoch, example))
        ]
        return sorted(uses, key=lambda use: randomness.draw_key(self.seed, "order", epoch, *use))

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


def _pick(uniform: float, count: int, shares: Sequence[float] = ()) -> int:
    """Returns which of `count` things a uniform number falls on, by their shares or else equal ones."""
    if not shares:
        return int(uniform * count)
    return min(bisect(list(accumulate(shares)), uniform), count - 1)
