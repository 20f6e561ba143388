"""Chooses the pictures that are held out of a run's own data, where no folder of them is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from pixtune import randomness
from pixtune.config.schema import TrainConfig
from pixtune.data.example_table import Example, chosen_from
from pixtune.data.examples import split_held_out
from pixtune.data.named import with_loss_weights, without_excluded
from pixtune.data.pairs import shorten


def hold_out(
    examples: Sequence[Example], config: TrainConfig, note: Callable[[str], None] = lambda sentence: None
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Splits examples into those to train on and those held out, as the config names them.

    Those that it excludes are left out, and those to which it gives a loss weight have it.

    Where the config leaves the number open, no picture is held out that would leave its size without any to train on.

    Args:
        note: called with each sentence for the user.

    Raises:
        DataError: nothing would be left to train on, or a picture that the config names does not exist.
    """
    examples = without_excluded(examples, config.data_config.exclude)
    examples = with_loss_weights(examples, config.data_config.loss_weights)
    share, seed = config.validation.held_out, config.seed
    if share != "auto":
        training, held_out = split_held_out(examples, share, seed)
        trained = {example.signature(0) for example in training}
        if lost := [example.name for example in held_out if example.signature(0) not in trained]:
            note(f"no picture of their size is left to train on, since they are held out: {shorten(lost)}.")
        return training, held_out
    count = 0 if config.random_weights else config.validation.num_held_out(len(examples))
    chosen = _choose(examples, count, seed)
    held_out = [example for example in examples if example.image_digest in chosen] if chosen else []
    if not held_out:
        if config.validation.patience is not None and config.validation.held_out_dir is None:
            note(f"validation.patience waits in vain: of {len(examples)} pictures none is held out by itself.")
        return examples, []
    note(
        f"{len(held_out)} of {len(examples)} pictures are held out, chosen by lot, to show what the run learns. To "
        "train on all: validation.held_out=0; a number sets the share."
    )
    return chosen_from(examples, lambda example: example.image_digest not in chosen), held_out


def _choose(examples: Sequence[Example], count: int, seed: int) -> set[str]:
    """Returns the digests of `count` pictures by lot, of sizes that keep some; copies go together."""
    chosen: set[str] = set()
    if not count:
        return chosen  # and no file is read for its digest
    num_left = Counter(example.signature(0) for example in examples)
    # Where the copies of each picture are: a counter for each of a million would take gigabytes.
    hashes = np.fromiter((hash(example.image_digest) for example in examples), np.int64, len(examples))
    places = np.argsort(hashes, kind="stable")
    hashes = hashes[places]
    keys = [randomness.draw_key(seed, "hold out", example.name) for example in examples]
    looked_at: set[str] = set()
    for number in sorted(range(len(examples)), key=keys.__getitem__):
        if len(chosen) == count:
            break
        digest = examples[number].image_digest
        if digest in looked_at:
            continue
        looked_at.add(digest)
        first, end = hashes.searchsorted(hash(digest), "left"), hashes.searchsorted(hash(digest), "right")
        sizes = Counter(examples[int(place)].signature(0) for place in places[first:end])
        if all(num_left[size] > number for size, number in sizes.items()):
            num_left.subtract(sizes)
            chosen.add(digest)
    return chosen
