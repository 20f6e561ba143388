"""Joins adapters to one LoRA, and cuts LoRAs to a rank: both layer by layer, with the error measured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from pixtune.deltas.adapter_file import AdapterFile
from pixtune.deltas.delta import Delta, Kronecker, dense, norm, shape_of, times
from pixtune.deltas.svd import Cut, Wanted, cut_dense, cut_kronecker, cut_sum
from pixtune.errors import WeightsError
from pixtune.trained.fused_layers import LowRank


class Joined(NamedTuple):
    """The LoRA of one layer that stands for one or several."""

    cut: Cut
    rank_before: int | None
    """Sum of the ranks that it stands for; None where one of them is a LoKr."""


def join_adapters(
    adapters: Sequence[tuple[AdapterFile, float]],
    wanted: Wanted,
    dtype: torch.dtype,
    count: Callable[[], object] = lambda: None,
) -> dict[str, Joined]:
    """Returns one LoRA that adds what all of some adapters add, each with its weight.

    Where nothing is cut, their matrices are put side by side: the rank is the sum of theirs, and the result exact but
    for the number format.

    Args:
        wanted: what of each layer is kept; with neither rank nor energy, everything.
        count: is called after each layer.

    Raises:
        WeightsError: one is a DoRA, they are for different models, or a LoKr is to be joined without a rank.
    """
    refuse_different_models([adapter for adapter, _ in adapters])
    purpose = "joining it with others" if len(adapters) > 1 else "cutting it to a rank"
    by_layer: dict[str, list[Delta]] = {}
    for adapter, weight in adapters:
        for layer, delta in adapter.deltas(purpose).items():
            by_layer.setdefault(layer, []).append(times(delta, weight))
    joined = {}
    for layer, deltas in by_layer.items():
        joined[layer] = _join_layer(layer, deltas, wanted, dtype)
        count()
    return joined


def refuse_different_models(adapters: Sequence[AdapterFile]) -> None:
    """Checks that adapters are for one model: the same families, and layers of the same sizes.

    Raises:
        WeightsError: they are not; names both.
    """
    first, shapes = adapters[0], dict[str, tuple[tuple[int, int], AdapterFile]]()
    for adapter in adapters:
        if not {family.name for family in adapter.families} & {family.name for family in first.families}:
            raise WeightsError(
                f"{first.path} is for {first.family.name} and {adapter.path} for {adapter.family.name}, which have "
                "different layers."
            )
        for layer, change in adapter.changes.items():
            shape, other = shapes.setdefault(layer, (shape_of(change), adapter))
            if shape != shape_of(change):
                raise WeightsError(
                    f"{other.path} and {adapter.path} are for models of different sizes: {layer} has "
                    f"{shape[1]} inputs and {shape[0]} outputs in one, {shape_of(change)[1]} and {shape_of(change)[0]} "
                    "in the other."
                )


def _join_layer(layer: str, deltas: list[Delta], wanted: Wanted, dtype: torch.dtype) -> Joined:
    low_rank = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(low_rank) == len(deltas):
        rank = sum(delta.rank for delta in low_rank)
        if wanted.energy is None and (wanted.rank is None or rank <= wanted.rank):
            return Joined(_side_by_side(low_rank, dtype), rank)
        return Joined(cut_sum(low_rank, wanted, dtype), rank)
    if wanted == Wanted():
        raise WeightsError(
            f"a LoKr for {layer} has as many directions as the layer itself, and cannot be joined whole. Give a rank "
            "or a share of energy to keep, as --rank 64 or --energy 0.95."
        )
    if len(deltas) == 1 and isinstance(delta := deltas[0], Kronecker):
        return Joined(cut_kronecker(delta, wanted, dtype), None)
    whole = dense(deltas[0])
    for delta in deltas[1:]:
        whole += dense(delta)
    return Joined(cut_dense(whole, wanted, dtype, layer), None)


def _side_by_side(deltas: Sequence[LowRank], dtype: torch.dtype) -> Cut:
    """Puts the matrices of some deltas side by side. The scale is the first one's, by which the others' ups are
    multiplied: of deltas with one scale, no number changes."""
    scale = next((delta.scale for delta in deltas if delta.scale), 1.0)
    exact_OR = torch.cat([delta.up.double() * (delta.scale / scale) for delta in deltas], dim=1)
    down_RI, up_OR = torch.cat([delta.down.to(dtype) for delta in deltas]), exact_OR.to(dtype)
    rounding = norm(LowRank(down_RI, exact_OR - up_OR.double(), scale)) if not exact_OR.equal(up_OR.double()) else 0.0
    joined = LowRank(down_RI, up_OR, scale)
    return Cut(joined, norm(joined), rounding)


def common_dtype(adapters: Sequence[AdapterFile]) -> torch.dtype:
    """Returns the number format that holds the factors of all adapters."""
    return functools.reduce(torch.promote_types, [adapter.dtype for adapter in adapters])
