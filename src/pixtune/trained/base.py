"""The base model of a run, as weights are trained on it and exported with it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pixtune.engine.load import LoadedTransformer
from pixtune.family import ModelFamily
from pixtune.storage.model_folder import ModelFolder


@dataclass(frozen=True)
class Base:
    """A base model: its folder, its family, and its transformer as the run holds it."""

    folder: ModelFolder
    family: ModelFamily
    transformer: LoadedTransformer

    @property
    def module(self) -> nn.Module:
        """The transformer itself."""
        return self.transformer.module
