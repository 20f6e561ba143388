"""Takes a LoRA out of two checkpoints: per layer, the closest matrix of a rank to the difference of the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pixtune.deltas.base_files import PLAIN, BaseFiles, read_tensor
from pixtune.deltas.svd import Cut, Wanted, cut_dense
from pixtune.errors import WeightsError


@dataclass(frozen=True)
class Extracted:
    """The differences of two checkpoints."""

    cuts: dict[str, Cut]
    """LoRAs of the layers whose weights differ."""
    num_equal: int
    """Linear layers whose weights are equal."""
    not_held: tuple[str, ...]
    """Tensors that differ and that no LoRA can hold: norms, biases."""


def extract_lora(
    original: BaseFiles,
    tuned: BaseFiles,
    wanted: Wanted,
    dtype: torch.dtype,
    device: torch.device,
    count: Callable[[], object] = lambda: None,
) -> Extracted:
    """Extracts a LoRA that turns `original` into `tuned`. One layer at a time is in memory.

    Args:
        count: is called after each layer.

    Raises:
        WeightsError: they are different models, are equal, or hold numbers that cannot be subtracted.
    """
    if not {family.name for family in original.families} & {family.name for family in tuned.families}:
        raise WeightsError(
            f"{original.path} is a transformer of {original.families[0].name} and {tuned.path} one of "
            f"{tuned.families[0].name}: nothing can be extracted from two models of different kinds."
        )
    if missing := sorted(original.places.keys() ^ tuned.places.keys()):
        where = tuned.path if missing[0] in original.places else original.path
        raise WeightsError(
            f"{where} lacks {missing[0]}, which the other model has, and {len(missing) - 1} more: are both whole, and "
            "of one model?"
        )
    cuts: dict[str, Cut] = {}
    for layer in original.places:
        if original.shape(layer) != tuned.shape(layer):
            raise WeightsError(
                f"{layer} has the shape {list(original.shape(layer))} in {original.path} and "
                f"{list(tuned.shape(layer))} in {tuned.path}: these are models of different sizes."
            )
        before, after = _weight(original, layer), _weight(tuned, layer)
        if not before.equal(after):
            difference = after.to(device).float().sub_(before.to(device))
            if not difference.isfinite().all():
                raise WeightsError(f"{layer} holds NaN or infinity in {original.path} or {tuned.path}. Is it damaged?")
            cut = cut_dense(difference, wanted, dtype, layer)
            cuts[layer] = cut._replace(delta=replace(cut.delta, down=cut.delta.down.cpu(), up=cut.delta.up.cpu()))
        count()
    if not cuts:
        raise WeightsError(
            f"{original.path} and {tuned.path} have the same weights in all {len(original.places)} layers."
        )
    return Extracted(cuts, len(original.places) - len(cuts), _other_differences(original, tuned))


def _weight(base: BaseFiles, layer: str) -> Tensor:
    place = base.places[layer]
    entry = base.entries[place.tensor]
    if entry.dtype not in PLAIN:
        raise WeightsError(
            f"{base.path} holds {place.tensor} as {str(entry.dtype).removeprefix('torch.')}, and differences of "
            "quantized weights are mostly their rounding. Give both models in 16 or 32 bits."
        )
    return place.of(read_tensor(entry))


def _other_differences(original: BaseFiles, tuned: BaseFiles) -> tuple[str, ...]:
    """Finds what else differs, where both files name it alike."""
    linear = {place.tensor for base in (original, tuned) for place in base.places.values()}
    names = [name for name in original.entries if name in tuned.entries and name not in linear]
    return tuple(
        name
        for name in names
        if not read_tensor(original.entries[name]).float().equal(read_tensor(tuned.entries[name]).float())
    )
