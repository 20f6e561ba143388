"""Puts a saved LoRA on the base, measures what it does there, and puts the live one back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pixtune.errors import WeightsError
from pixtune.trained import adapters
from pixtune.trained.base import Base
from pixtune.trained.export import DIFFUSERS_FILE
from pixtune.trained.read_back import ReadBack, Velocity
from pixtune.trained.saved_lora import read_saved_lora

UP = ".lora_B."
"""Part of the names of up-matrices, which start at zero: a LoRA does nothing until they move."""


def read_back_lora(base: Base, alpha: float, folder: Path, velocity: Velocity) -> ReadBack:
    """Puts a checkpoint's LoRA file on the base, and then the live weights back, bit for bit.

    Args:
        alpha: alpha of the live LoRA.
        folder: the checkpoint.

    Raises:
        WeightsError: the file cannot be read as a LoRA of this model.
    """
    module = base.module
    saved, live = read_saved_lora(folder / DIFFUSERS_FILE, base.family), adapters.lora_weights(module)
    kept = {name: tensor.cpu().clone() for name, tensor in live.items()}
    if saved.weights.keys() != live.keys() or set(saved.alphas.values()) != {alpha} or saved.use_rslora:
        what = sorted(saved.weights.keys() ^ live.keys()) or [f"alpha {saved.alpha:g} in place of {alpha:g}"]
        raise WeightsError(f"{saved.path} is not the LoRA that is trained: {', '.join(what[:3])}.")
    unequal = tuple(name for name, tensor in kept.items() if not tensor.equal(saved.weights[name].to(tensor.dtype)))
    with_live = velocity()
    try:
        with torch.no_grad():
            for name, tensor in live.items():
                if UP in name:
                    tensor.zero_()
        effect = _distance(velocity(), with_live)
        adapters.load_lora_weights(module, saved.weights)
        distance = _distance(velocity(), with_live)
    except KeyError as error:
        raise WeightsError(f"{saved.path} does not fit this model: {error.args[0]}.") from error
    finally:
        adapters.load_lora_weights(module, kept)
    return ReadBack(effect, distance, unequal)


def _distance(velocity: Tensor, reference: Tensor) -> float:
    """Returns the length of the difference, as a part of the reference's length; no number where either is none."""
    difference, length = (velocity - reference).float().norm(), reference.float().norm()
    return float(difference / length) if difference else float(0 * length)
