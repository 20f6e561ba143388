"""Attaches a frozen LoRA that is on while a LoRA is trained, and off in samples and in files.

Some bases were distilled to draw in a few steps, and training on pictures undoes that. A training adapter is a LoRA
that undoes it first: what is trained beside it need not, and works on the distilled base without it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from pixtune.config.schema import TrainConfig
from pixtune.family import ModelFamily, Shapes
from pixtune.trained.adapters import scaled
from pixtune.trained.saved_lora import SavedLora, attach_saved_lora, read_lora_of_key

ADAPTER_NAME = "training_adapter"
KEY = "training_adapter.path"


def training_adapter_of(config: TrainConfig, family: ModelFamily) -> SavedLora | None:
    """Returns the training adapter of a run with its strength; None where it has none. No number of it is read yet.

    Raises:
        WeightsError: it cannot be read as a LoRA of the family; names the key.
    """
    path, strength = config.training_adapter.path, config.training_adapter.strength
    return None if path is None else read_lora_of_key(KEY, path, family).scaled(strength)


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
