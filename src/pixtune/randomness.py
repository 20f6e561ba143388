"""Randomness without state: every draw is a pure function of (seed, purpose, when, which).

So a resumed run, another number of processes or of loader workers, and samples in between change nothing. Numbers are
made on the CPU, where PyTorch's generator gives the same ones on every machine of a version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Purpose = Literal[
    "order",
    "ratio",
    "repeats",
    "caption",
    "tags",
    "tag dropout",
    "caption dropout",
    "sigma",
    "noise",
    "latents",
    "validation noise",
    "random weights",
    "hold out",
    "swap check",
    "rounding",
    "caption",
    "read back",
    "measured",
    "rivals",
    "directions",
]


def draw_key(seed: int, purpose: Purpose, *where: int | str) -> int:
    """Returns a 63-bit generator seed for one draw, independent of all others."""
    text = "\0".join([str(seed), purpose, *map(str, where)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def uniform(seed: int, purpose: Purpose, *where: int | str) -> float:
    """Draws one number from the open interval (0, 1)."""
    # 52 bits of the key are as uniform as any generator's, and far cheaper than building one. With 53 the largest
    # number would round to 1.
    return ((draw_key(seed, purpose, *where) >> 11) + 0.5) / 2**52


def normal(shape: Sequence[int], seed: int, purpose: Purpose, *where: int | str) -> Tensor:
    """Draws standard normal numbers, in fp32 on the CPU."""
    import torch

    generator = torch.Generator().manual_seed(draw_key(seed, purpose, *where))
    return torch.randn(tuple(shape), generator=generator)


def shuffled(count: int, seed: int, purpose: Purpose, *where: int | str) -> list[int]:
    """Returns the numbers 0 to `count` - 1 in random order."""
    return sorted(range(count), key=lambda number: draw_key(seed, purpose, *where, number))
