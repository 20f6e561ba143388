"""A layer's delta: what an adapter adds to its weight, kept as the small factors that the adapter's file holds.

Products of the factors have the size of the model, so whatever can be known from the factors is taken from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pixtune.trained.fused_layers import LowRank
from pixtune.trained.low_rank import Svd, cores, norm_of


@dataclass(frozen=True)
class Kronecker:
    """The delta of a LoKr: scale times the Kronecker product of two matrices (Yeh et al. 2024, arXiv 2309.14859).

    Norms and singular values of such a product are products of those of its factors.
    """

    left: Tensor
    right: Tensor
    scale: float


@dataclass(frozen=True)
class Dora:
    """The weights of a DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5), which has no delta apart from its base.

    The new weight is magnitude * (weight + delta) / the norms of that sum's rows.
    """

    direction: LowRank
    magnitude_O: Tensor


Delta = LowRank | Kronecker
"""Matrix that is added to a weight."""
Change = Delta | Dora
"""Anything that an adapter does to a weight."""


def shape_of(change: Change) -> tuple[int, int]:
    """Returns the numbers of outputs and inputs of the layer."""
    if isinstance(change, Kronecker):
        return change.left.shape[0] * change.right.shape[0], change.left.shape[1] * change.right.shape[1]
    factors = change.direction if isinstance(change, Dora) else change
    return factors.up.shape[0], factors.down.shape[1]


def times(delta: Delta, factor: float) -> Delta:
    """Returns a delta with another scale."""
    return replace(delta, scale=delta.scale * factor)


def dense(delta: Delta) -> Tensor:
    """Forms the whole matrix of a delta, in fp32."""
    if isinstance(delta, Kronecker):
        return torch.kron(delta.left.float(), delta.right.float()).mul_(delta.scale)
    return (delta.up.float() @ delta.down.float()).mul_(delta.scale)


def norm(delta: Delta) -> float:
    """Returns the Frobenius norm of a delta."""
    if isinstance(delta, Kronecker):
        return abs(delta.scale) * float(delta.left.double().norm()) * float(delta.right.double().norm())
    return norm_of(delta)


def changed_weight(weight_OI: Tensor, changes: Sequence[Change]) -> tuple[Tensor, float]:
    """Computes a weight with adapters merged into it, in fp32, as PEFT's layers do it to a weight in fp32.

    Args:
        changes: deltas, which are added up; or one DoRA alone.

    Returns:
        The new weight, and the norm of what was added.
    """
    first = changes[0]
    whole_OI = dense(first.direction if isinstance(first, Dora) else first)
    for delta in changes[1:]:
        assert not isinstance(delta, Dora)
        whole_OI += dense(delta)
    added = float(torch.linalg.vector_norm(whole_OI))
    whole_OI += weight_OI
    if isinstance(first, Dora):
        # A row of zeros has no direction, and stays one of zeros.
        rows_O = torch.linalg.vector_norm(whole_OI, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        whole_OI *= (first.magnitude_O.float() / rows_O)[:, None]
        added = float(torch.linalg.vector_norm(whole_OI - weight_OI))
    return whole_OI, added


def kronecker_svd(delta: Kronecker, rank: int | None = None) -> tuple[Svd, Tensor]:
    """Returns the largest singular values of a Kronecker product with their vectors, and all values without, in fp64.

    Args:
        rank: number of the values with vectors; None: all, which may be as large as the layer.
    """
    one, other = (torch.linalg.svd(factor.double(), full_matrices=False) for factor in (delta.left, delta.right))
    products, order = torch.outer(one[1], other[1]).flatten().mul(abs(delta.scale)).sort(descending=True, stable=True)
    kept = order[:rank]
    first, second = kept // len(other[1]), kept % len(other[1])
    left_OK = torch.einsum("ak,bk->abk", one[0][:, first], other[0][:, second]).flatten(0, 1)
    right_KI = torch.einsum("kc,kd->kcd", one[2][first], other[2][second]).flatten(1)
    return Svd(left_OK * math.copysign(1.0, delta.scale), products[:rank], right_KI), products


class Angle(NamedTuple):
    """Lengths of two deltas of one layer, and the angle between them."""

    first_norm: float
    second_norm: float
    product: float
    """Sum of the products of their numbers."""
    distance: float
    """Norm of their difference."""

    @property
    def cosine(self) -> float | None:
        """1 where they point the same way, 0 where they have nothing in common; None where one of them is zero."""
        length = self.first_norm * self.second_norm
        return max(-1.0, min(1.0, self.product / length)) if length else None


def angle_between(first: Delta, second: Delta) -> Angle:
    """Compares two deltas of one layer; through small matrices where both are of one kind."""
    if isinstance(first, Kronecker) and isinstance(second, Kronecker):
        pairs = [(first.left, second.left), (first.right, second.right)]
        if all(one.shape == other.shape for one, other in pairs):
            product = first.scale * second.scale * math.prod(float((a.double() * b.double()).sum()) for a, b in pairs)
            norms = norm(first), norm(second)
            return Angle(*norms, product, math.sqrt(max(norms[0] ** 2 + norms[1] ** 2 - 2 * product, 0.0)))
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        one, other = cores([first, second])
        if first.scale == second.scale and first.down.equal(second.down) and first.up.equal(second.up):
            return Angle(float(one.norm()), float(one.norm()), float(one.square().sum()), 0.0)
    else:
        one, other = dense(first).double(), dense(second).double()
    return Angle(float(one.norm()), float(other.norm()), float((one * other).sum()), float((one - other).norm()))
