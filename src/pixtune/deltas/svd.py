"""Cuts matrices to a rank by their singular values, and measures what that loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pixtune import randomness
from pixtune.deltas.delta import Kronecker, dense, kronecker_svd, norm
from pixtune.trained.fused_layers import LowRank
from pixtune.trained.low_rank import Svd, cores, svd_of_sum

EXACT_SIDE = 512
"""Shorter side up to which a whole matrix's singular values are computed: a second, not minutes."""
OVERSAMPLING = 16
"""Directions that are drawn beyond the rank, so that the last ones kept are as good as the first."""
POWER_ITERATIONS = 4
"""Times that the drawn directions are turned towards the largest singular values. Differences of trained weights have
values that fall slowly, where none or one would leave several percent of error."""
FIRST_RANK = 64
"""Rank that is tried first where a share of energy is wanted; it is doubled until it holds that share."""
SEED = 0
"""Seed of the drawn directions: a file comes out the same each time."""


@dataclass(frozen=True)
class Wanted:
    """Part of a delta that is kept: a rank, or the least rank that holds a share of its energy."""

    rank: int | None = None
    """Rank; with `energy`, the largest one."""
    energy: float | None = None
    """Share of the sum of the squared singular values, in (0, 1]."""

    def rank_of(self, values_K: Tensor, energy: float | None = None) -> int:
        """Returns the rank for these singular values, at least 1.

        Args:
            energy: sum of all squared singular values, where `values_K` has only the largest ones.
        """
        rank = min(self.rank or len(values_K), len(values_K))
        if self.energy is not None:
            held = values_K.double().square().cumsum(0)
            enough = (held < self.energy * (float(held[-1]) if energy is None else energy)).sum()
            rank = min(rank, int(enough) + 1)
        return max(rank, 1)


class Cut(NamedTuple):
    """A delta of lower rank in another's place."""

    delta: LowRank
    norm: float
    """Norm of the original."""
    error: float
    """Norm of the difference, number format included."""


def factors(svd: Svd, dtype: torch.dtype) -> LowRank:
    """Returns a cut matrix as a LoRA of scale 1, with the singular values shared evenly between down and up."""
    root_K = svd.values_K.sqrt()
    down_RI, up_OR = root_K[:, None] * svd.right_KI, svd.left_OK * root_K
    return LowRank(down_RI.to(dtype).contiguous(), up_OR.to(dtype).contiguous(), 1.0)


def cut_sum(deltas: Sequence[LowRank], wanted: Wanted, dtype: torch.dtype) -> Cut:
    """Cuts the sum of some deltas of one layer, without forming it."""
    svd = svd_of_sum(deltas)
    kept = factors(svd.cut(wanted.rank_of(svd.values_K)), dtype)
    *own, cut = cores([*deltas, kept])
    whole = torch.stack(own).sum(dim=0)
    return Cut(kept, float(whole.norm()), float((whole - cut).norm()))


def cut_kronecker(delta: Kronecker, wanted: Wanted, dtype: torch.dtype) -> Cut:
    """Cuts the delta of a LoKr, whose singular values are the products of those of its two factors."""
    _, values_K = kronecker_svd(delta, rank=0)
    kept = factors(kronecker_svd(delta, wanted.rank_of(values_K))[0], dtype)
    return Cut(kept, norm(delta), float((dense(delta) - dense(kept)).double().norm()))


def cut_dense(matrix_OI: Tensor, wanted: Wanted, dtype: torch.dtype, name: str) -> Cut:
    """Cuts a whole matrix.

    A large one is first projected onto directions that are drawn and turned towards its largest singular values
    (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1).

    Args:
        matrix_OI: fp32.
        name: names the matrix, for its own draws.
    """
    whole = float(torch.linalg.vector_norm(matrix_OI, dtype=torch.float64))
    most = min(matrix_OI.shape)
    tried = min(wanted.rank or FIRST_RANK, most)
    while True:
        svd = leading_svd(matrix_OI, tried, name)
        rank = wanted.rank_of(svd.values_K, whole**2)
        if wanted.rank is not None or rank < tried or tried == most:
            break
        tried = min(2 * tried, most)
    kept = factors(svd.cut(rank), dtype)
    difference = matrix_OI - dense(kept)
    return Cut(kept, whole, float(torch.linalg.vector_norm(difference, dtype=torch.float64)))


def leading_svd(matrix_OI: Tensor, rank: int, name: str) -> Svd:
    """Returns the largest singular values of a matrix, on its device; exact where its shorter side is `EXACT_SIDE`."""
    num_drawn = rank + OVERSAMPLING
    if min(matrix_OI.shape) <= max(EXACT_SIDE, 2 * num_drawn):
        return Svd(*torch.linalg.svd(matrix_OI, full_matrices=False)).cut(rank)
    drawn = randomness.normal((matrix_OI.shape[1], num_drawn), SEED, "directions", name).to(matrix_OI.device)
    columns_OK = torch.linalg.qr(matrix_OI @ drawn)[0]
    for _ in range(POWER_ITERATIONS):
        rows_IK = torch.linalg.qr(matrix_OI.T @ columns_OK)[0]
        columns_OK = torch.linalg.qr(matrix_OI @ rows_IK)[0]
    inner, values, right = torch.linalg.svd(columns_OK.T @ matrix_OI, full_matrices=False)
    return Svd(columns_OK @ inner, values, right).cut(rank)
