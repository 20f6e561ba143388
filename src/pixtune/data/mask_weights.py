"""Masks as the loss takes them: read once, kept in the cache beside the encodings, and turned into weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pixtune.data.ahead import made_ahead
from pixtune.data.cache import CacheKey, Entry, Ledger, Store
from pixtune.data.example_table import Example
from pixtune.data.filling import Work, fill
from pixtune.data.masks import FramedMask
from pixtune.data.pairs import shorten
from pixtune.errors import DataError
from pixtune.family import ModelFamily
from pixtune.launch.crew import ALONE, Crew, Share
from pixtune.storage.model_folder import ModelFolder

READ_THREADS = 4
"""Number of threads that read masks."""
Variants = Sequence[tuple[Example, int]]
"""Examples, each with the number of one of its framings."""


@dataclass(frozen=True)
class Masks:
    """Access to masks at the size of latents, which the cache holds. Several threads may use it."""

    family: ModelFamily
    folder: ModelFolder
    store: Store
    ledger: Ledger
    crew: Crew = ALONE
    """Processes that share the store, and divide the reading."""

    def keys(self, variants: Variants) -> list[CacheKey]:
        """Returns the keys of those that have a mask."""
        return [_key(mask) for mask in self._framed(variants)]

    def fill(self, variants: Variants) -> list[str]:
        """Reads the masks that the cache lacks, and returns notes on them.

        Raises:
            DataError: masks that cannot be used, all together.
            TrainingError: in the other processes of the crew, then.
        """
        of_digest: dict[str, list[FramedMask]] = {}
        for mask in self._framed(variants):
            of_digest.setdefault(_key(mask).digest, []).append(mask)
        notes, faults = dict[str, dict[str, None]](), dict[str, None]()

        def note(path: str, sentence: str) -> None:
            notes.setdefault(sentence, {})[path] = None

        def read(key: CacheKey) -> np.ndarray | None:
            for mask in of_digest[key.digest]:  # one serves for all, unless each is to be named as wrong
                try:
                    return mask.read(partial(note, str(mask.path)))
                except DataError as error:
                    faults.update(dict.fromkeys(error.faults))
            return None

        def read_all(missing: Sequence[CacheKey], share: Share) -> Iterator[tuple[CacheKey, Entry]]:
            ahead = share.ahead(4 * READ_THREADS)
            for key, shares_HW in made_ahead(read, share.take(missing), ahead, READ_THREADS):
                if shares_HW is not None:
                    yield key, {"shares": torch.from_numpy(shares_HW)}

        keys = self.keys(variants)
        if not keys:
            return []
        fill(self.store, self.ledger, keys, read_all, Work("reading masks", self.crew))
        found: dict[str, dict[str, None]] = {}
        for sentences, wrong in self.crew.gather("reading masks", [notes, list(faults)]):
            faults.update(dict.fromkeys(wrong))
            for sentence, paths in sentences.items():
                found.setdefault(sentence, {}).update(dict.fromkeys(paths))
        with self.crew.sharing("reading masks", 0):
            if faults and self.crew.is_first:
                raise DataError("masks cannot be used", sorted(faults))
        return [f"mask {shorten(sorted(paths))}: {sentence}." for sentence, paths in sorted(found.items())]

    def weights(self, example: Example, variant: int) -> Tensor:
        """Returns the weights of the positions of an example's latents, shape 11HW: 1 everywhere without a mask.

        Raises:
            DataError: its entry in the cache cannot be used any more.
        """
        _, height, width = self.family.latent_shape(self.folder, *example.framings[variant].size)
        if example.mask is None:
            return torch.ones(1, 1, height, width)
        key = _key(example.mask.framed(example.framings[variant], height, width))
        shares_HW = self.store.read(key.digest).get("shares")
        if shares_HW is None or shares_HW.shape != (height, width):
            raise DataError(
                "an encoding in the cache cannot be used",
                [f"The entry {key.digest} of {key.item} holds other tensors than a mask's. Delete the cache."],
            )
        outside = example.mask.outside
        return (outside + (1 - outside) * shares_HW)[None, None]

    def _framed(self, variants: Variants) -> list[FramedMask]:
        framed = []
        for example, variant in variants:
            if example.mask is not None:
                framing = example.framings[variant]
                _, height, width = self.family.latent_shape(self.folder, *framing.size)
                framed.append(example.mask.framed(framing, height, width))
        return framed


def _key(mask: FramedMask) -> CacheKey:
    return CacheKey(mask.name, mask.parts)
