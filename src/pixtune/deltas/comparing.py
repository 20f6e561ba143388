"""Compares two adapters layer by layer: how far each reaches, and whether they point the same way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pixtune.deltas.adapter_file import AdapterFile
from pixtune.deltas.delta import Angle, angle_between, norm
from pixtune.deltas.joining import refuse_different_models
from pixtune.errors import WeightsError


@dataclass(frozen=True)
class Comparison:
    """Two adapters beside each other."""

    layers: dict[str, Angle]
    """Angles of the layers that both have."""
    only_first: dict[str, float]
    """Norms of the layers that the second lacks."""
    only_second: dict[str, float]

    @property
    def whole(self) -> Angle:
        """The angle between all deltas of one and all of the other, where a missing layer counts as zero."""
        alone = [Angle(length, 0.0, 0.0, length) for length in self.only_first.values()]
        others = [Angle(0.0, length, 0.0, length) for length in self.only_second.values()]
        return sum_of([*self.layers.values(), *alone, *others])


def sum_of(angles: Sequence[Angle]) -> Angle:
    """Returns the angle between the deltas of some layers, taken as one long vector each."""
    columns = zip(*angles, strict=True)
    first, second, products, distances = columns
    return Angle(math.hypot(*first), math.hypot(*second), math.fsum(products), math.hypot(*distances))


def compare_adapters(first: AdapterFile, second: AdapterFile) -> Comparison:
    """Compares two adapters of one model.

    Raises:
        WeightsError: they are for different models, or one is a DoRA.
    """
    refuse_different_models([first, second])
    one, other = first.deltas("comparing it"), second.deltas("comparing it")
    both = {layer: angle_between(one[layer], other[layer]) for layer in one if layer in other}
    if not both and not one.keys() & other.keys():
        raise WeightsError(
            f"{first.path} and {second.path} have no layer in common: one begins with {next(iter(one))}, the other "
            f"with {next(iter(other))}."
        )
    return Comparison(
        both,
        {layer: norm(delta) for layer, delta in one.items() if layer not in other},
        {layer: norm(delta) for layer, delta in other.items() if layer not in one},
    )
