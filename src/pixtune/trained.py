"""What a run trains: a LoRA beside frozen weights, or all weights. The loop and its services see no difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from pixtune import adapters, draws, optim
from pixtune.adapters import AttachedLora
from pixtune.checkpoint import CheckpointFiles
from pixtune.config.schema import TrainConfig
from pixtune.export import DIFFUSERS_FILE, LoraDescription, diffusers_file, export_lora
from pixtune.families.base import ModelFamily
from pixtune.fit.plan import MemoryPlan
from pixtune.full_weights import FullWeights
from pixtune.hardware.facts import package_versions
from pixtune.resume import config_hash
from pixtune.weights import ModelFolder


class TrainedWeights(Protocol):
    """What is trained, with its optimizer and its files."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What the optimizer steps and what is clipped, by name, in a stable order."""

    @property
    def optimizer(self) -> optim.Optimizer: ...

    def summary(self) -> str:
        """One line for the start of a run."""

    def facts(self) -> dict[str, int]:
        """Figures for the report, by name."""

    def checkpoint_files(self, step: int) -> CheckpointFiles:
        """All that `load` needs."""

    def load(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Puts back what a checkpoint holds: file stem -> tensors.

        Raises:
            KeyError: the names are not those of this model.
        """

    def export(self, output_dir: Path, step: int) -> list[Path]:
        """Writes what others load, and returns where."""


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA on a frozen transformer."""

    transformer: nn.Module
    family: ModelFamily
    config: TrainConfig
    lora: AttachedLora
    parameters: Mapping[str, nn.Parameter]
    optimizer: optim.Optimizer

    def summary(self) -> str:
        return f"LoRA: {len(self.lora.modules)} layers, {self.lora.num_parameters:,} trained parameters"

    def facts(self) -> dict[str, int]:
        return {"LoRA layers": len(self.lora.modules), "trained parameters": self.lora.num_parameters}

    def checkpoint_files(self, step: int) -> CheckpointFiles:
        return {Path(DIFFUSERS_FILE).stem: diffusers_file(self._tensors(), self._describe(step))}

    def load(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        saved = files.get(Path(DIFFUSERS_FILE).stem, {})
        weights = {name.removeprefix("transformer."): tensor for name, tensor in saved.items()}
        adapters.load_lora_weights(self.transformer, weights)

    def export(self, output_dir: Path, step: int) -> list[Path]:
        return list(export_lora(output_dir, self._tensors(), self._describe(step), self.family))

    def _tensors(self) -> dict[str, Tensor]:
        return adapters.lora_weights(self.transformer)

    def _describe(self, step: int) -> LoraDescription:
        return LoraDescription(
            rank=self.config.rank,
            alpha=self.config.alpha,
            targets=self.lora.targets,
            base_model=self.config.pretrained_model_name_or_path,
            family=self.family.name,
            step=step,
            config_hash=config_hash(self.config),
            trigger_words=self.config.trigger_words,
            versions=package_versions(),
        )


def train_lora(
    config: TrainConfig, family: ModelFamily, folder: ModelFolder, plan: MemoryPlan, transformer: nn.Module, step: int
) -> LoraWeights:
    """Attaches the LoRA that the config describes."""
    targets = config.lora_targets or family.lora_targets
    seed = draws.draw_key(config.seed, "random weights", "lora")
    lora = adapters.attach_lora(transformer, targets, config.rank, config.alpha, seed, family.lora_presets)
    parameters = adapters.trainable_parameters(transformer)
    optimizer = optim.build_optimizer(config, plan.optimizer, parameters.values())
    return LoraWeights(transformer, family, config, lora, parameters, optimizer)


def train_all(
    config: TrainConfig, family: ModelFamily, folder: ModelFolder, plan: MemoryPlan, transformer: nn.Module, step: int
) -> FullWeights:
    """Makes every weight of the transformer trainable."""
    return FullWeights(config, folder, plan.optimizer, transformer, step)


METHODS: dict[str, Callable[[TrainConfig, ModelFamily, ModelFolder, MemoryPlan, nn.Module, int], TrainedWeights]] = {
    "lora": train_lora,
    "full": train_all,
}
"""The config's `method`. The last argument is the number of steps already done."""
