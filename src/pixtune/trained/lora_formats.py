"""A LoRA's tensors by layer, as the files of diffusers, ComfyUI and kohya's trainers have them, both ways.

In memory a LoRA has diffusers' layers and PEFT's names for what belongs to a layer, and each layer its alpha. The names
in files are those of `lora_names.py`. Layers that are one in kohya's files and several in diffusers are split and
joined by `fused_layers.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pixtune.errors import WeightsError
from pixtune.family import ModelFamily
from pixtune.storage.model_names import OriginalLayer
from pixtune.trained import fused_layers
from pixtune.trained.fused_layers import LowRank, Ranks
from pixtune.trained.lora_names import (
    DIFFUSERS_PREFIX,
    DOWN,
    KOHYA_ENDINGS,
    MAGNITUDE,
    UP,
    describe_strange,
    general_path,
    original_of,
    original_of_part,
    place_of,
)

RANKS_KEY = "pixtune.joined_ranks"
"""Metadata that say how joined layers are split, as JSON, where their numbers do not."""


@dataclass(frozen=True)
class AdapterLayer:
    """Tensors and alpha that a LoRA has for one linear layer."""

    tensors: Mapping[str, Tensor]
    """By PEFT's names."""
    alpha: float | None = None
    """Alpha of its scale alpha / rank; None: the scale is 1."""

    @property
    def is_plain(self) -> bool:
        """Whether it is a down- and an up-matrix, with or without DoRA's magnitudes."""
        return DOWN in self.tensors and UP in self.tensors and self.tensors.keys() <= {DOWN, UP, MAGNITUDE}

    @property
    def low_rank(self) -> LowRank:
        down = self.tensors[DOWN]
        return LowRank(down, self.tensors[UP], 1.0 if self.alpha is None else self.alpha / down.shape[0])


@dataclass(frozen=True)
class NamedTensors:
    """The tensors of a LoRA file by their names there, and what its metadata need for reading them back."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    rounded: tuple[str, ...] = ()
    """Layers whose numbers had to be rounded, since the format has no place for what they are."""


def read_layers(
    tensors: Mapping[str, Tensor], family: ModelFamily, metadata: Mapping[str, str] | None = None
) -> dict[str, AdapterLayer]:
    """Reads the tensors of a file in any of the formats, by diffusers' paths of the layers.

    The alphas are those of `.alpha` tensors alone: diffusers' metadata are the caller's to read.

    Raises:
        WeightsError: a name is unknown, stands for two tensors, or the layer is no pair that can be split; names it.
    """
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in tensors.items():
        place = place_of(name, family)
        if place is None:
            strange.append(name)
            continue
        layer, part = place
        if part in found.setdefault(layer, {}):
            raise WeightsError(f"{name} stands for a tensor that the file has under another name too.")
        found[layer][part] = tensor
    if strange:
        raise WeightsError(describe_strange(strange, tuple(tensors), family))
    ranks = _stored_ranks(metadata or {})
    read: dict[str, AdapterLayer] = {}
    for layer, parts in found.items():
        alpha = parts.pop("alpha", None)
        if not parts:
            raise WeightsError(f"{layer} has an alpha and no weights.")
        adapter = AdapterLayer(parts, None if alpha is None else _number(alpha, layer))
        original, number = original_of(layer, family)
        for general, own in _split(layer, adapter, original, ranks.get(layer)).items():
            path = general.replace("{}", number)
            if path in read:
                raise WeightsError(f"{path} is in the file both alone and as a part of {layer}.")
            read[path] = own
    return read


def diffusers_tensors(layers: Mapping[str, AdapterLayer]) -> NamedTensors:
    """Names a LoRA's tensors as diffusers does; the scales belong into its metadata."""
    return NamedTensors(
        {
            f"transformer.{path}.{part}": tensor
            for path, layer in layers.items()
            for part, tensor in layer.tensors.items()
        }
    )


def comfyui_tensors(
    layers: Mapping[str, AdapterLayer], family: ModelFamily, *, keep_alpha: bool = False
) -> NamedTensors:
    """Names a LoRA's tensors as ComfyUI finds them for this model, with its scale.

    Args:
        keep_alpha: the scale stands in `.alpha` also where diffusers' loader refuses that; ComfyUI reads either.
    """
    prefix, rounded = family.comfyui_prefix, []
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        parts = dict(layer.tensors)
        if MAGNITUDE in parts:
            parts["dora_scale"] = parts.pop(MAGNITUDE)[:, None]
        if prefix != DIFFUSERS_PREFIX or keep_alpha or not layer.is_plain:
            tensors |= _alpha(f"{prefix}{path}", layer)
        else:
            scale = layer.low_rank.scale
            parts[UP] = layer.tensors[UP] * scale
            if not (parts[UP] / scale).equal(layer.tensors[UP]):
                rounded.append(path)
        tensors |= {f"{prefix}{path}.{part}": tensor for part, tensor in parts.items()}
    return NamedTensors(tensors, {}, tuple(rounded))


def kohya_tensors(layers: Mapping[str, AdapterLayer], family: ModelFamily) -> NamedTensors:
    """Names a LoRA's tensors as kohya's trainers do; layers that are one there are joined.

    Raises:
        WeightsError: layers cannot be joined, or have no name there; names one.
    """
    joined: dict[str, tuple[OriginalLayer, dict[str, AdapterLayer]]] = {}
    for path, layer in layers.items():
        original, number = original_of_part(path, family)
        _, parts = joined.setdefault(original.path.replace("{}", number), (original, {}))
        parts[general_path(path, original.parts, number)] = layer
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, Ranks] = {}
    rounded = []
    for path, (original, parts) in joined.items():
        whole, used, is_exact = _join(path, original, parts)
        name = f"lora_unet_{path.replace('.', '_')}"
        for part, tensor in whole.tensors.items():
            is_vector = part == MAGNITUDE
            tensors[f"{name}.{KOHYA_ENDINGS.get(part, part)}"] = tensor[:, None] if is_vector else tensor
        tensors |= _alpha(name, whole)
        if used is not None:
            ranks[path] = used
        if not is_exact:
            rounded.append(path)
    metadata = {RANKS_KEY: json.dumps(ranks, sort_keys=True)} if ranks else {}
    return NamedTensors(tensors, metadata, tuple(rounded))


def shortest(value: float) -> float:
    """Returns the number of fewest decimal digits that has these 32 bits: 0.1 for the fp32 nearest to it."""
    single = torch.tensor(value, dtype=torch.float32)
    texts = (f"{value:.{digits}g}" for digits in range(1, 10))
    return next((float(text) for text in texts if torch.tensor(float(text), dtype=torch.float32) == single), value)


def _alpha(name: str, layer: AdapterLayer) -> dict[str, Tensor]:
    """Returns the tensor that holds a layer's alpha; a LoRA without one has the scale 1, so its alpha is its rank."""
    alpha = len(layer.tensors[DOWN]) if layer.alpha is None and layer.is_plain else layer.alpha
    return {} if alpha is None else {f"{name}.alpha": torch.tensor(float(alpha))}


def _number(alpha: Tensor, layer: str) -> float:
    if alpha.numel() != 1 or not alpha.isfinite().all():
        raise WeightsError(f"the alpha of {layer} is no finite number.")
    if not alpha.any():
        raise WeightsError(f"the alpha of {layer} is 0, so that it does nothing.")
    return shortest(float(alpha))


def _split(layer: str, adapter: AdapterLayer, original: OriginalLayer, ranks: Ranks | None) -> dict[str, AdapterLayer]:
    """Returns the adapters of a layer's parts in diffusers, by their paths with `{}`."""
    tensors = dict(adapter.tensors)
    if MAGNITUDE in tensors:
        tensors[MAGNITUDE] = _vector(tensors[MAGNITUDE], tensors.get(UP), layer)
    if original.swaps_halves:
        tensors = _swapped(tensors, layer)
    if len(original.parts) == 1:
        return {original.parts[0]: AdapterLayer(tensors, adapter.alpha)}
    plain = AdapterLayer(tensors, adapter.alpha)
    if plain.is_plain:
        down, up = tuple(tensors[DOWN].shape), tuple(tensors[UP].shape)
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
            raise WeightsError(f"{layer} has matrices of shapes {down} and {up}, not (rank, in) and (out, rank).")
    else:
        return _split_kronecker(layer, plain, original)
    try:
        split = fused_layers.split(plain.low_rank, original.shares, ranks)
    except (ValueError, RuntimeError) as error:
        raise WeightsError(f"{layer} cannot be split into {len(original.parts)} layers: {error}.") from error
    read, row = {}, 0
    for path, part, share in zip(original.parts, split, original.shares, strict=True):
        rows = len(tensors[UP]) // sum(original.shares) * share
        if part is not None:
            alpha = None if adapter.alpha is None else shortest(part.scale * part.rank)
            own = {DOWN: part.down, UP: part.up}
            if MAGNITUDE in tensors:
                own[MAGNITUDE] = tensors[MAGNITUDE][row : row + rows].clone()
            read[path] = AdapterLayer(own, alpha)
        row += rows
    return read


def _split_kronecker(layer: str, adapter: AdapterLayer, original: OriginalLayer) -> dict[str, AdapterLayer]:
    """Returns the LoKrs of a layer's parts: each has its rows of the first factor, and the second one whole.

    Row i * C + k of a Kronecker product is row i of the first factor times row k of the second, which has C. So a part
    that begins and ends with whole rows of the first factor is the Kronecker product of these, and any other is none.
    """
    first = next((name for name in ("lokr_w1", "lokr_w1_a") if name in adapter.tensors), None)
    if first is None or not all(name.startswith("lokr_") for name in adapter.tensors):
        raise WeightsError(
            f"{layer} is {len(original.parts)} layers in diffusers, and only a LoRA (down and up) or a LoKr can be "
            f"split among them; it has {', '.join(sorted(adapter.tensors))}."
        )
    rows, total = len(adapter.tensors[first]), sum(original.shares)
    ends = [rows * sum(original.shares[: number + 1]) for number in range(len(original.shares))]
    if any(end % total for end in ends):
        raise WeightsError(
            f"{layer} is {len(original.parts)} layers in diffusers, whose borders are inside of rows of its LoKr's "
            f"first factor, of which there are {rows}: these layers' own changes are no LoKrs, so it cannot be split."
        )
    pieces = adapter.tensors[first].split([rows * share // total for share in original.shares])
    return {
        path: AdapterLayer({**adapter.tensors, first: piece.clone()}, adapter.alpha)
        for path, piece in zip(original.parts, pieces, strict=True)
    }


def _join(
    path: str, original: OriginalLayer, parts: Mapping[str, AdapterLayer]
) -> tuple[AdapterLayer, Ranks | None, bool]:
    """Returns the adapter of a whole layer, the ranks where reading needs them, and whether it is exact."""
    if len(original.parts) == 1:
        (layer,) = parts.values()
        tensors = _swapped(layer.tensors, path) if original.swaps_halves else layer.tensors
        return AdapterLayer(tensors, layer.alpha), None, True
    if strange := [part for part, layer in parts.items() if not layer.is_plain]:
        raise WeightsError(
            f"{strange[0].replace('{}', 'N')} is a part of {path} in kohya's files, where only LoRAs (down and up) can "
            "be joined."
        )
    vectors = [layer.tensors[MAGNITUDE] for layer in parts.values() if MAGNITUDE in layer.tensors]
    if vectors and len(vectors) != len(original.parts):
        raise WeightsError(f"{path} has DoRA's magnitudes for some of its {len(original.parts)} parts alone.")
    of_parts = [parts[each].low_rank if each in parts else None for each in original.parts]
    whole, ranks, is_exact = fused_layers.join(of_parts, original.shares)
    tensors = {DOWN: whole.down, UP: whole.up}
    if vectors:
        tensors[MAGNITUDE] = torch.cat([parts[each].tensors[MAGNITUDE] for each in original.parts])
    alpha = shortest(whole.scale * whole.rank)
    again = fused_layers.split(whole, original.shares)
    needed = not _same(again, fused_layers.split(whole, original.shares, ranks))
    return AdapterLayer(tensors, alpha), ranks if needed else None, is_exact


def _same(ones: Sequence[LowRank | None], others: Sequence[LowRank | None]) -> bool:
    return [each and each.rank for each in ones] == [each and each.rank for each in others]


def _swapped(tensors: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """Swaps the halves of a layer's outputs."""
    if not tensors.keys() <= {DOWN, UP, MAGNITUDE}:
        raise WeightsError(f"{layer} has its outputs in another order in diffusers, and only a LoRA's can be swapped.")
    swapped = {part: torch.cat([*reversed(tensor.chunk(2))]) for part, tensor in tensors.items() if part != DOWN}
    return {part: swapped.get(part, tensor) for part, tensor in tensors.items()}


def _vector(magnitudes: Tensor, up: Tensor | None, layer: str) -> Tensor:
    """Returns DoRA's magnitudes as PEFT has them, one for each output; LyCORIS has a column of them."""
    if up is None or magnitudes.numel() != len(up) or magnitudes.shape[0] != len(up):
        raise WeightsError(
            f"{layer} has DoRA's magnitudes of shape {list(magnitudes.shape)}; one for each output can be read alone."
        )
    return magnitudes.reshape(-1)


def _stored_ranks(metadata: Mapping[str, str]) -> dict[str, Ranks]:
    """Reads the ranks of joined layers; none where the metadata have none.

    Raises:
        WeightsError: they are damaged.
    """
    try:
        ranks = json.loads(metadata.get(RANKS_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"the metadata {RANKS_KEY} are damaged.") from error
    if not isinstance(ranks, dict) or not all(map(_are_ranks, ranks.values())):
        raise WeightsError(f"the metadata {RANKS_KEY} are damaged.")
    return ranks


def _are_ranks(value: object) -> bool:
    is_list = isinstance(value, list) and all(type(rank) is int and rank >= 0 for rank in value)
    return is_list or value == fused_layers.SHARED
