"""Arithmetic of LoRAs' deltas, scale * up @ down, through matrices as small as their ranks, in fp64.

The products have the size of the model. Norms and angles are taken from orthonormal bases that the factors span, and
singular values from those of small matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pixtune.trained.fused_layers import LowRank


class Svd(NamedTuple):
    """A matrix as left @ diag(values) @ right, the largest values first; the smallest ones may be left out."""

    left_OK: Tensor
    values_K: Tensor
    right_KI: Tensor

    def cut(self, rank: int) -> Svd:
        """Returns the first `rank` terms: no matrix of this rank is closer (Eckart and Young 1936)."""
        return Svd(self.left_OK[:, :rank], self.values_K[:rank], self.right_KI[:rank])


def norm_of(delta: LowRank) -> float:
    """Returns the Frobenius norm of a delta."""
    return float(cores([delta])[0].norm())


def cores(deltas: Sequence[LowRank]) -> list[Tensor]:
    """Returns deltas of one layer as small matrices in orthonormal bases that they share.

    Norms, angles and singular values of the small matrices, and of their sums, are those of the large ones.
    """
    return _in_common_bases(deltas)[1]


def svd_of_sum(deltas: Sequence[LowRank]) -> Svd:
    """Returns the singular values of a sum of deltas, in fp64, through matrices as large as the sum of their ranks."""
    columns_OK, found, rows_KI = _in_common_bases(deltas)
    left, values, right = torch.linalg.svd(torch.stack(found).sum(dim=0), full_matrices=False)
    return Svd(columns_OK @ left, values, right @ rows_KI)


def _in_common_bases(deltas: Sequence[LowRank]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Returns orthonormal columns and rows, and each delta's core between them: delta = columns @ core @ rows."""
    columns_OK, upper_KR = torch.linalg.qr(torch.cat([delta.up.double() for delta in deltas], dim=1))
    rows_IK, lower_KR = torch.linalg.qr(torch.cat([delta.down.double() for delta in deltas]).T)
    ranks = [delta.rank for delta in deltas]
    pairs = zip(deltas, upper_KR.split(ranks, dim=1), lower_KR.split(ranks, dim=1), strict=True)
    return columns_OK, [delta.scale * upper @ lower.T for delta, upper, lower in pairs], rows_IK.T
