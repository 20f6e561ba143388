"""Attaches a frozen LoRA that is on while a LoRA is trained, and off in samples and in files.

Some bases were distilled to draw in a few steps, and training on pictures undoes that. A training adapter is a LoRA
that undoes it first: what is trained beside it need not, and works on the distilled base without it.
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pixtune.config.schema import TrainConfig
from pixtune.errors import WeightsError
from pixtune.family import ModelFamily, Shapes
from pixtune.trained.adapters import scaled
from pixtune.trained.export import DIFFUSERS_FILE
from pixtune.trained.saved_lora import SavedLora, attach_saved_lora, read_saved_lora

ADAPTER_NAME = "training_adapter"
CHUNK_BYTES = 1 << 22


def training_adapter_of(config: TrainConfig, family: ModelFamily) -> SavedLora | None:
    """Returns the training adapter of a run with its strength; None where it has none. No number of it is read yet.

    Raises:
        WeightsError: it is a folder, or see `read_saved_lora`; names the key.
    """
    path, strength = config.training_adapter.path, config.training_adapter.strength
    if path is None:
        return None
    if path.is_dir():
        raise WeightsError(
            f"training_adapter.path {path} is a folder. Give the LoRA file in it, such as {path / DIFFUSERS_FILE}."
        )
    try:
        return read_saved_lora(path, family).scaled(strength)
    except WeightsError as error:
        raise WeightsError(f"training_adapter.path: {error}") from error


def adapter_fingerprint(path: Path) -> str:
    """Returns 16 hex digits that identify a training adapter's file by its content.

    Raises:
        WeightsError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for chunk in iter(partial(file.read, CHUNK_BYTES), b""):
                digest.update(chunk)
    except OSError as error:
        raise WeightsError(f"training_adapter.path {path} cannot be read ({error}).") from error
    return digest.hexdigest()[:16]


def check_training_adapter(config: TrainConfig, family: ModelFamily, shapes: Shapes) -> None:
    """Checks before the long work that a run's training adapter can be used; reads all of it.

    Args:
        shapes: shapes of the transformer's tensors.

    Raises:
        WeightsError: it is for another model, or has a weight that is no finite number; names it.
    """
    lora = training_adapter_of(config, family)
    if lora is not None:
        lora.refuse_other_model(shapes)
        lora.refuse_spoiled()


class TrainingAdapter:
    """A frozen LoRA on a transformer that has a trained one already.

    It is switched off by zeros in its up-matrices, so that compiled and captured passes stay as they are.

    Args:
        lora: with its strength in its scale.
        dtype: number format of the transformer's activations, which the adapter's weights get too.
    """

    def __init__(self, transformer: nn.Module, lora: SavedLora, dtype: torch.dtype) -> None:
        attached = attach_saved_lora(transformer, lora, ADAPTER_NAME, dtype)
        self._ups = [layer.lora_B[ADAPTER_NAME].weight for layer in attached.values()]

    @property
    def num_layers(self) -> int:
        return len(self._ups)

    def off(self) -> AbstractContextManager[None]:
        """Has the transformer compute without it until a `with` block ends."""
        return scaled(self._ups, 0)
