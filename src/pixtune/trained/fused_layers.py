"""Splits the LoRA of a layer that is several in diffusers, and joins the LoRAs of these to one; no number changes.

FLUX's authors compute queries, keys and values (of single-stream blocks the MLP's first half too) in one linear layer;
diffusers has a layer for each. A LoRA adds `scale * up @ down` to a layer's weight. Therefore:

* *Joined* LoRAs have their downs one below the other, and their ups along the diagonal, with zeros beside them. Where
  all downs are the same numbers, one stands for all and the ups stand one below the other.
* *Split*, a LoRA whose ups lie along such a diagonal gives each part its own rows of the down. Any other gives each
  part the whole down, at the whole rank, with the part's rows of the up.

Both are exact: tensors are cut and put together. One case is not, that of parts with different scales, since the whole
has one: the scale is then multiplied into the ups, which rounds unless the scales differ by a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

SHARED = "shared"
"""Ranks of parts that have one down together."""
Ranks = list[int] | str
"""Rank of each part's own LoRA, 0 where it has none; or `SHARED`."""


@dataclass(frozen=True)
class LowRank:
    """The LoRA of one layer, which adds `scale * up @ down` to its weight."""

    down: Tensor
    """Shape (rank, inputs)."""
    up: Tensor
    """Shape (outputs, rank)."""
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def split(whole: LowRank, shares: Sequence[int], ranks: Ranks | None = None) -> list[LowRank | None]:
    """Splits a LoRA into those of a layer's parts; None for a part that has none.

    Args:
        shares: numbers of the parts' outputs, in proportion.
        ranks: those of the parts, where they are known; None: they are recognized by the zeros of the up.

    Raises:
        ValueError: the outputs cannot be divided so, or other numbers than zeros stand beside the diagonal.
    """
    outputs = len(whole.up)
    if outputs % sum(shares):
        raise ValueError(f"{outputs} outputs cannot be divided in the proportion {':'.join(map(str, shares))}")
    ups = whole.up.split([outputs // sum(shares) * share for share in shares])
    if ranks is None:
        ranks = _recognized_ranks(ups)
    if isinstance(ranks, str):
        return [LowRank(whole.down, up.contiguous(), whole.scale) for up in ups]
    if sum(ranks) != whole.rank or len(ranks) != len(ups) or not _is_diagonal(ups, ranks):
        raise ValueError(f"the parts do not have the ranks {ranks}")
    columns = [up.split(ranks, dim=1)[number] for number, up in enumerate(ups)]
    return [
        LowRank(down.contiguous(), up.contiguous(), whole.scale) if rank else None
        for rank, down, up in zip(ranks, whole.down.split(ranks), columns, strict=True)
    ]


def join(parts: Sequence[LowRank | None], shares: Sequence[int]) -> tuple[LowRank, Ranks, bool]:
    """Joins the LoRAs of a layer's parts, of which one at least is there.

    Returns:
        The LoRA, the ranks by which `split` undoes it, and whether it is exact.
    """
    present = [part for part in parts if part is not None]
    unit = next(len(part.up) // share for part, share in zip(parts, shares, strict=True) if part is not None)
    scale, is_exact, ups = present[0].scale, True, []
    for part in present:
        ups.append(part.up if part.scale == scale else part.up * (part.scale / scale))
        is_exact &= part.scale == scale or (ups[-1] / (part.scale / scale)).equal(part.up)
    first = present[0].down
    if 1 < len(present) == len(parts) and all(part.down.equal(first) for part in present):
        return LowRank(first, torch.cat(ups), scale), SHARED, is_exact
    ranks = [0 if part is None else part.rank for part in parts]
    up = torch.zeros(unit * sum(shares), sum(ranks), dtype=torch.cat([each[:0, :0] for each in ups]).dtype)
    row = column = 0
    for share, rank in zip(shares, ranks, strict=True):
        if rank:
            up[row : row + unit * share, column : column + rank] = ups.pop(0)
        row, column = row + unit * share, column + rank
    return LowRank(torch.cat([part.down for part in present]), up, scale), ranks, is_exact


def _is_diagonal(ups: Sequence[Tensor], ranks: Sequence[int]) -> bool:
    """Returns whether each part's outputs read its own ranks alone."""
    blocks = [up.split(list(ranks), dim=1) for up in ups]
    return not any(
        block.any() for row, of_part in enumerate(blocks) for column, block in enumerate(of_part) if row != column
    )


def _recognized_ranks(ups: Sequence[Tensor]) -> Ranks:
    """Returns the parts' ranks by the zeros of their ups: equal ones, others, or that they share one down.

    Equal ones come first, as kohya's and diffusers' converters read such files; a LoRA whose ups are still all zero is
    read so, too.
    """
    rank = ups[0].shape[1]
    if rank % len(ups) == 0 and _is_diagonal(ups, equal := [rank // len(ups)] * len(ups)):
        return equal
    reads = torch.stack([up.any(dim=0) for up in ups])  # (parts, rank)
    if (reads.sum(dim=0) != 1).any():
        return SHARED
    readers = reads.int().argmax(dim=0).tolist()
    in_order = all(one <= other for one, other in pairwise(readers))
    return [readers.count(number) for number in range(len(ups))] if in_order else SHARED
