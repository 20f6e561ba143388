"""Reads an adapter's file, whoever wrote it: LoRA, LoKr or DoRA, with the names of diffusers, ComfyUI or kohya.

Each way in which such a file can be wrong is one error that says what it is. Of a file that is mapped, no number is
read from the disk before it is used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixtune.deltas.delta import Change, Delta, Dora, Kronecker, shape_of
from pixtune.deltas.recognizing import recognize
from pixtune.errors import WeightsError
from pixtune.family import ModelFamily
from pixtune.trained.adapter_config import METADATA_KEY, kind_of, read_adapter_config, stated_sizes
from pixtune.trained.export import read_tensors
from pixtune.trained.find_lora import find_lora
from pixtune.trained.fused_layers import LowRank
from pixtune.trained.lora_formats import AdapterLayer
from pixtune.trained.lora_names import DOWN, MAGNITUDE, UP, format_of
from pixtune.trained.saved_lora import HARMLESS_STARTS, WITHOUT_EFFECT
from pixtune.trained.scheme import Scheme

LARGEST_SCALE = 1e6
"""Scale that no LoRA reaches: an alpha of 1,000 at rank 1 is a thousandth of it."""
CONFIG_READ = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules", "peft_type",
    "init_lora_weights",
)  # fmt: skip
"""Keys of PEFT's config of a LoRA that are read here, or shown by the tensors."""


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter's file, by diffusers' paths of the layers."""

    path: Path
    format: str
    """Whose names its tensors have: "diffusers", "comfyui" or "kohya"."""
    families: tuple[ModelFamily, ...]
    """Families whose transformer has all its layers, the one that it names foremost."""
    layers: Mapping[str, AdapterLayer]
    """Tensors as they are stored, with the alphas of `.alpha` tensors alone."""
    changes: Mapping[str, Change]
    """Change of each layer's weight, the scale included."""
    metadata: Mapping[str, str]

    @property
    def family(self) -> ModelFamily:
        return self.families[0]

    @property
    def dtype(self) -> torch.dtype:
        """Number format that holds all of its factors."""
        dtypes = [tensor.dtype for layer in self.layers.values() for tensor in layer.tensors.values()]
        return functools.reduce(torch.promote_types, dtypes)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of adapter that it holds: "LoRA", "LoKr" or "DoRA"."""
        names = {LowRank: "LoRA", Kronecker: "LoKr", Dora: "DoRA"}
        return tuple(dict.fromkeys(names[type(change)] for change in self.changes.values()))

    def refuse_other_lengths(self) -> None:
        """Checks that a DoRA's magnitudes are the rows' lengths that training gave them.

        Under `dora_scale`, ComfyUI takes what is multiplied by the sum's rows over the length of the base's rows, where
        PEFT and LyCORIS divide by the length of the sum's. A file with ComfyUI's names has numbers for the former.

        Raises:
            WeightsError: they may be something else.
        """
        if self.format == "comfyui" and "DoRA" in self.kinds:
            raise WeightsError(
                f"{self.path} is a DoRA with ComfyUI's names, which scales rows by the base's lengths and not by its "
                "own, as training does. Give the file of the same run for diffusers."
            )

    def deltas(self, purpose: str) -> dict[str, Delta]:
        """Returns the layers' deltas.

        Args:
            purpose: what they are for, as the beginning of a sentence: "resizing it".

        Raises:
            WeightsError: it is a DoRA, which has none apart from its base.
        """
        found: dict[str, Delta] = {}
        for layer, change in self.changes.items():
            if isinstance(change, Dora):
                raise WeightsError(
                    f"{self.path} is a DoRA: what it adds to {layer} depends on that layer's weight, so {purpose} is "
                    "not defined without the base. Merge it into its base with `pixtune lora merge --base`; `pixtune "
                    "lora extract` takes a LoRA out of the result."
                )
            found[layer] = change
        return found


def find_adapter(path: Path) -> Path:
    """Returns the adapter's file that a path means: a file, or the newest of a run's output folder or a checkpoint.

    Raises:
        WeightsError: there is none.
    """
    found = find_lora(path).path if path.is_dir() else path
    assert found is not None, "of a path, a file is found or an error is raised"
    return found


def read_adapter(path: Path) -> AdapterFile:
    """Reads an adapter's file.

    Raises:
        WeightsError: it is none, is for a model that no family here is, or is damaged; says what it is.
    """
    tensors, metadata = read_tensors(path)
    try:
        families, layers = recognize(path, tensors, metadata)
    except (IndexError, RuntimeError, TypeError) as error:  # of shapes that no matrix has
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise WeightsError(f"{path} holds tensors that are no matrices of a LoRA ({reason}).") from error
    for name, tensor in tensors.items():
        check_numbers(path, name, tensor)
    scales = _scales(path, layers, metadata)
    changes = {layer: _change(path, layer, adapter, scales[layer]) for layer, adapter in layers.items()}
    return AdapterFile(path, format_of(tensors), families, layers, changes, metadata)


def check_numbers(path: Path, name: str, tensor: Tensor) -> None:
    """Checks that a tensor of an adapter holds finite numbers of a kind that weights have.

    Raises:
        WeightsError: it does not.
    """
    if not tensor.is_floating_point():
        raise WeightsError(f"{path} holds {name} as {str(tensor.dtype).removeprefix('torch.')}, which no LoRA is of.")
    if not tensor.numel():
        raise WeightsError(f"{path} holds {name} without a number, of shape {list(tensor.shape)}.")
    if not (numbers := tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all():
        count = int((~numbers.isfinite()).sum())
        raise WeightsError(
            f"{path} holds NaN or infinity in {count:,} of {tensor.numel():,} numbers of {name}: its training "
            "diverged, or the file is damaged. Take an earlier checkpoint."
        )


def _change(path: Path, layer: str, adapter: AdapterLayer, scale: float) -> Change:
    """Builds what an adapter does to a layer.

    Raises:
        WeightsError: matrices are missing, their shapes do not belong together, or the scale is beyond any.
    """
    tensors = dict(adapter.tensors)
    magnitude = tensors.pop(MAGNITUDE, None)
    if not abs(scale) <= LARGEST_SCALE:
        raise WeightsError(f"{path} has the scale {scale:g} for {layer}, which no training gives. Is it damaged?")
    if tensors.keys() == {DOWN, UP}:
        down, up = tensors[DOWN], tensors[UP]
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise _misfit(path, layer, tensors, "(rank, inputs) and (outputs, rank)")
        low_rank = LowRank(down, up, scale)
        if magnitude is None:
            return low_rank
        if magnitude.numel() != up.shape[0]:
            raise _misfit(path, layer, {**tensors, MAGNITUDE: magnitude}, "a magnitude for each output")
        return Dora(low_rank, magnitude.flatten())
    if magnitude is None and not tensors.keys() & {DOWN, UP}:
        left, right = (_factor(path, layer, tensors, name) for name in ("lokr_w1", "lokr_w2"))
        return Kronecker(left, right, scale)
    raise _misfit(
        path, layer, adapter.tensors, "lora_A and lora_B, or lokr_w1 and lokr_w2 (each whole, or as _a and _b)"
    )


def _factor(path: Path, layer: str, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Returns one of a Kronecker product's factors, which may be stored as a product itself."""
    whole, one, other = (tensors.get(f"{name}{end}") for end in ("", "_a", "_b"))
    if (whole is None) == (one is None or other is None) or "lokr_t2" in tensors:
        raise _misfit(path, layer, tensors, f"{name}, or {name}_a and {name}_b")
    factor = whole
    if factor is None:
        assert one is not None and other is not None
        if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[0]:
            raise _misfit(path, layer, tensors, f"{name}_a and {name}_b that can be multiplied")
        factor = one.float() @ other.float()
    if factor.ndim != 2:
        raise _misfit(path, layer, tensors, "matrices")
    return factor


def _misfit(path: Path, layer: str, tensors: Mapping[str, Tensor], need: str) -> WeightsError:
    found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items()))
    return WeightsError(f"{path} has {found} for {layer}, where {need} is needed. Is the file whole? Fetch it again.")


def _scales(path: Path, layers: Mapping[str, AdapterLayer], metadata: Mapping[str, str]) -> dict[str, float]:
    """Returns each layer's scale: by its `.alpha` tensor, or by diffusers' metadata.

    Raises:
        WeightsError: the metadata are damaged, give another rank than the tensors, or give a second scale.
    """
    by_tensors = {layer: _scale(adapter, adapter.alpha) for layer, adapter in layers.items()}
    if METADATA_KEY not in metadata:
        return by_tensors
    stated = stated_scales(path, layers, metadata[METADATA_KEY])
    for layer, adapter in layers.items():
        one, other = by_tensors[layer], stated[layer]
        if adapter.alpha is not None and not math.isclose(other, 1.0) and not math.isclose(one, 1.0):
            raise WeightsError(
                f"{path} has the scale of {layer} twice: {one:g} by its .alpha tensor and {other:g} by "
                f"{METADATA_KEY}. Programs apply either one or both, so what it does is unknown. Export it again."
            )
    return {layer: by_tensors[layer] * stated[layer] for layer in layers}


def _scale(adapter: AdapterLayer, alpha: float | None) -> float:
    """Returns the scale alpha / rank. A LoKr whose factors are both whole has no rank, and its alpha no effect."""
    rank = rank_of(adapter)
    return 1.0 if alpha is None or rank is None else alpha / rank


def rank_of(adapter: AdapterLayer) -> int | None:
    """Returns a layer's rank by its tensors; None where it is a LoKr of two whole factors, which has none."""
    for name in (DOWN, "lokr_w2_b", "lokr_w1_b"):
        if name in adapter.tensors:
            return adapter.tensors[name].shape[0]
    return None


def stated_scales(path: Path, layers: Mapping[str, AdapterLayer], text: str) -> dict[str, float]:
    """Returns each layer's scale by PEFT's config in the metadata.

    Raises:
        WeightsError: it is damaged, or its ranks are not those of the tensors.
    """
    config = read_adapter_config(path, text)
    sizes = stated_sizes(path, config, tuple(layers))
    for layer, adapter in layers.items():
        found = rank_of(adapter)
        if DOWN in adapter.tensors and found != sizes.ranks[layer]:
            raise WeightsError(
                f"{path} has rank {found} for {layer}, and its {METADATA_KEY} gives the rank {sizes.ranks[layer]}, "
                "from which the scale follows. Fetch the file again."
            )
    _refuse_unapplied(path, config)
    scheme = Scheme(sizes.rank, sizes.alpha, kind_of(config), sizes.ranks, sizes.alphas, bool(config.get("use_rslora")))
    return {layer: scheme.scale_of(layer) for layer in layers}


def _refuse_unapplied(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses a LoRA that does more than its matrices show, by PEFT's config of it.

    Raises:
        WeightsError: it does; names the setting.
    """
    if str(config.get("peft_type", "LORA")) == "LOKR":
        return
    known = {*CONFIG_READ, *WITHOUT_EFFECT}
    unusual = [
        f"{key}={value!r:.60}" for key, value in config.items() if key not in known and value and value != "none"
    ]
    if (start := config.get("init_lora_weights", True)) not in HARMLESS_STARTS:
        unusual.append(f"init_lora_weights={start!r:.60}")
    if (kind := str(config.get("peft_type", "LORA"))) != "LORA":
        unusual.append(f"peft_type={kind:.60}")
    if unusual:
        raise WeightsError(
            f"{path} is an adapter with {', '.join(unusual)}, which changes more than its matrices show, so nothing "
            "can be computed from these alone. Fuse it with PEFT, and extract a LoRA from the result."
        )


def check_base(adapter: AdapterFile, shapes: Mapping[str, tuple[int, int]], base: Path) -> None:
    """Checks that a base has the layers that an adapter is for, in its sizes.

    Raises:
        WeightsError: it has not; names a layer.
    """
    for layer, change in adapter.changes.items():
        if layer not in shapes:
            raise WeightsError(f"{adapter.path} does not fit {base}, which has no linear layer {layer}.")
        if shape_of(change) != shapes[layer]:
            (outputs, inputs), (own_outputs, own_inputs) = shapes[layer], shape_of(change)
            raise WeightsError(
                f"{adapter.path} does not fit {base}: it is for {own_inputs} inputs and {own_outputs} outputs of "
                f"{layer}, which has {inputs} and {outputs}."
            )
