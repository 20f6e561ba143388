"""Puts a saved LoRA on the base, measures what it does there, and puts the live one back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pixtune.errors import WeightsError, WriteError
from pixtune.family import ModelFamily
from pixtune.storage.model_folder import read_header
from pixtune.trained import adapters
from pixtune.trained.base import Base
from pixtune.trained.export import DIFFUSERS_FILE
from pixtune.trained.lora_names import DOWN, UP
from pixtune.trained.read_back import ReadBack, Velocity
from pixtune.trained.saved_lora import SavedLora, read_saved_lora
from pixtune.trained.scheme import Scheme


def read_back_lora(
    base: Base, scheme: Scheme, folder: Path, velocity: Velocity, exported: Sequence[Path] = ()
) -> ReadBack:
    """Puts a checkpoint's LoRA file on the base, and what was exported of it, and then the live weights, bit for bit.

    Args:
        scheme: PEFT's settings of the live LoRA.
        folder: the checkpoint.
        exported: the files for other programs. One of another step, or that is not there, could not be written, which
            was reported. Of a DoRA or LoKr, only diffusers' file can be read here.

    Returns:
        That of the first file that does something else than the live weights; the checkpoint's own where none does. A
        file with the live weights' numbers does what these do, which takes no pass to tell.

    Raises:
        WeightsError: a file cannot be read as a LoRA of this model.
    """
    module = base.module
    saved, live = read_saved_lora(folder / DIFFUSERS_FILE, base.family), adapters.lora_weights(module)
    kept = {name: tensor.cpu().clone() for name, tensor in live.items()}
    scales = {layer: (saved.scheme.scale_of(layer), scheme.scale_of(layer)) for layer in saved.modules}
    wrong = [f"scale {was:g}, not {wanted:g}, of {layer}" for layer, (was, wanted) in scales.items() if was != wanted]
    if saved.weights.keys() != live.keys() or wrong:
        what = sorted(saved.weights.keys() ^ live.keys()) or wrong
        raise WeightsError(f"{saved.path} is not the LoRA that is trained: {', '.join(what[:3])}.")
    unequal = tuple(name for name, tensor in kept.items() if not tensor.equal(saved.weights[name].to(tensor.dtype)))
    with_live = velocity()

    def distance_of(weights: Mapping[str, Tensor], unequal: tuple[str, ...]) -> float:
        if not unequal:
            return 0.0
        adapters.load_lora_weights(module, weights)
        return _distance(velocity(), with_live)

    try:
        with adapters.at_strength(module, adapters.trainable_parameters(module), 0):
            effect = _distance(velocity(), with_live)
        found = [ReadBack(effect, distance_of(saved.weights, unequal), unequal)]
        for path in _of_the_same_step(exported, folder / DIFFUSERS_FILE):
            if scheme.kind != "lora" and path.name != DIFFUSERS_FILE:
                continue
            exported_lora = read_saved_lora(path, base.family)
            weights = _at_scale_of(module, exported_lora) if scheme.kind == "lora" else dict(exported_lora.weights)
            others = _unequal_beyond_rounding(kept, weights)
            found.append(ReadBack(effect, distance_of(weights, others), others, path))
    except KeyError as error:
        raise WeightsError(f"a file of {folder} does not fit this model: {error.args[0]}.") from error
    finally:
        adapters.load_lora_weights(module, kept)
    return next((read for read in found if read.unequal), max(found, key=lambda read: read.distance))


def refuse_other_content(
    paths: Sequence[Path], weights: Mapping[str, Tensor], scheme: Scheme, family: ModelFamily
) -> None:
    """Checks that files, read from the disk again, hold a LoRA's numbers at their scales.

    Of a DoRA or LoKr, only diffusers' file can be read here.

    Args:
        weights: the LoRA that was written, by layer.

    Raises:
        WriteError: one holds something else, or cannot be read; names a tensor of it.
    """
    live = {name: tensor.cpu() for name, tensor in weights.items()}
    for path in paths:
        if scheme.kind != "lora" and path.name != DIFFUSERS_FILE:
            continue
        try:
            saved = read_saved_lora(path, family)
        except WeightsError as error:
            raise WriteError(f"what was just written cannot be read: {error}") from error
        found = dict(saved.weights)
        for layer in saved.modules:
            factor = saved.scheme.scale_of(layer) / scheme.scale_of(layer)
            part = f"{layer}.{UP}"
            if factor != 1 and part in found:
                found[part] = found[part] * factor
        wrong = sorted(live.keys() ^ found.keys()) or _unequal_beyond_rounding(live, found)
        if wrong:
            raise WriteError(
                f"{path}, read from the disk again, is not the LoRA that was written: {len(wrong)} of {len(live)} "
                f"tensors differ, {wrong[0]} among them"
            )


def _of_the_same_step(exported: Sequence[Path], checkpoint_file: Path) -> list[Path]:
    def step_of(path: Path) -> object:
        return read_header(path).get("__metadata__", {}).get("pixtune.step")

    return [path for path in exported if path.is_file() and step_of(path) == step_of(checkpoint_file)]


def _at_scale_of(module: nn.Module, saved: SavedLora) -> dict[str, Tensor]:
    """Returns a file's LoRA with the scale of the attached one, in weights that are named as its are.

    Raises:
        KeyError: a layer is not attached.
    """
    layers, weights = adapters.adapter_layers(module), {}
    for path, own in saved.low_ranks().items():
        scale = own.scale / layers[path].scaling[adapters.ADAPTER_NAME]
        weights[f"{path}.{DOWN}"] = own.down
        weights[f"{path}.{UP}"] = own.up if scale == 1 else own.up * scale
    return weights


def _unequal_beyond_rounding(live: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names the tensors that differ by more than a scale that was multiplied in and divided out again may make."""
    return tuple(
        name
        for name, tensor in live.items()
        if tensor.shape != weights[name].shape
        or not torch.allclose(tensor, weights[name].to(tensor.dtype), rtol=1e-6, atol=0.0, equal_nan=True)
    )


def _distance(velocity: Tensor, reference: Tensor) -> float:
    """Returns the length of the difference, as a part of the reference's length; no number where either is none."""
    difference, length = (velocity - reference).float().norm(), reference.float().norm()
    return float(difference / length) if difference else float(0 * length)
