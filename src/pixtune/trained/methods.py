"""Trains a LoRA beside frozen weights, or all weights, behind one protocol: the loop sees no difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from pixtune import randomness
from pixtune.config import to_dict
from pixtune.config.schema import TrainConfig
from pixtune.hardware.facts import package_versions
from pixtune.plan.training import TrainingPlan
from pixtune.storage.base_reference import BaseReference, refer_to_base
from pixtune.storage.checkpoint import OPTIMIZER_STEM, CheckpointFiles, joined
from pixtune.storage.resume import config_hash
from pixtune.trained import adapters, optim
from pixtune.trained.adapters import AttachedLora
from pixtune.trained.base import Base
from pixtune.trained.export import DIFFUSERS_FILE, LoraDescription, diffusers_file, export_lora, weights_by_module
from pixtune.trained.full_weights import FullWeights


class TrainedWeights(Protocol):
    """The trained weights of a run, with their optimizer and their files."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Trained parameters by name, in a stable order."""

    @property
    def optimizer(self) -> optim.OptimizerState: ...

    def summary(self) -> str:
        """Returns a line for the start of a run."""

    def counts(self) -> dict[str, int]:
        """Counts what is trained, for the report, by the words to show."""

    def backward(self, loss: Tensor) -> None:
        """Gathers gradients; where the plan steps within the backward pass, it steps instead."""

    def gradients(self) -> list[Tensor]:
        """Returns the gradients that wait for the step, which may be averaged in place.

        They are of the same parameters in all processes.
        """

    def step(self, loss: Tensor) -> Tensor:
        """Scales the gradients down to the config's norm and steps; returns the norm before.

        Where the loss or that norm is no number, weights and states stay as they are: see `skipped_step.py`.
        """

    def abandon_step(self) -> bool:
        """Drops what a step that failed has gathered; returns whether all weights are as they were before it."""

    def checkpoint_files(self, step: int) -> CheckpointFiles:
        """Returns the weights as `load` takes them. The optimizer's state is read by `optim.optimizer_state`."""

    def load(self, files: Mapping[str, Mapping[str, Tensor]], plain: Mapping[str, Mapping[str, Any]]) -> None:
        """Puts back the weights and the optimizer's state.

        Args:
            files: tensors of a checkpoint's files, by the files' names without their ending.
            plain: the part of the optimizer's state that is no tensor.

        Raises:
            KeyError: the names are not those of this model.
        """

    def export(self, output_dir: Path, step: int) -> list[Path]:
        """Writes the files that others load, and returns their paths."""

    def export_so_far(self, output_dir: Path, step: int) -> None:
        """Writes those of them that are small enough to be written after each checkpoint."""


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA on a frozen transformer."""

    config: TrainConfig
    base: Base
    reference: BaseReference
    """The base as exported files name it."""
    lora: AttachedLora
    parameters: Mapping[str, nn.Parameter]
    optimizer: optim.Optimizer

    def summary(self) -> str:
        return f"LoRA: {len(self.lora.modules)} layers, {self.lora.num_parameters:,} trained parameters"

    def counts(self) -> dict[str, int]:
        return {"LoRA layers": len(self.lora.modules), "trained parameters": self.lora.num_parameters}

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradients(self) -> list[Tensor]:
        return list(optim.gradients_of(self.parameters).values())

    def step(self, loss: Tensor) -> Tensor:
        return optim.clipped_step(self.optimizer, self.parameters, self.config.max_grad_norm, loss)

    def abandon_step(self) -> bool:
        return True  # its optimizer takes no memory once all states are there, and these come before the first update

    def checkpoint_files(self, step: int) -> CheckpointFiles:
        weights = adapters.lora_weights(self.base.module)
        return {Path(DIFFUSERS_FILE).stem: diffusers_file(weights, self._describe(step))}

    def load(self, files: Mapping[str, Mapping[str, Tensor]], plain: Mapping[str, Mapping[str, Any]]) -> None:
        saved = files.get(Path(DIFFUSERS_FILE).stem, {})
        adapters.load_lora_weights(self.base.module, weights_by_module(saved))
        state = joined(files, OPTIMIZER_STEM)
        optim.restore_optimizer_state(self.optimizer.state, self.parameters, state, plain)

    def export(self, output_dir: Path, step: int) -> list[Path]:
        weights = adapters.lora_weights(self.base.module)
        return list(export_lora(output_dir, weights, self._describe(step), self.base.family))

    def export_so_far(self, output_dir: Path, step: int) -> None:
        self.export(output_dir, step)

    def _describe(self, step: int) -> LoraDescription:
        return LoraDescription(
            rank=self.config.rank,
            alpha=self.config.alpha,
            targets=self.lora.targets,
            base=self.reference,
            family=self.base.family.name,
            step=step,
            config_hash=config_hash(to_dict(self.config)),
            trigger_words=self.config.trigger_words,
            versions=package_versions(),
        )


def train_lora(config: TrainConfig, plan: TrainingPlan, base: Base, first_step: int) -> LoraWeights:
    """Attaches the LoRA that the config describes."""
    family = base.family
    targets = config.lora_targets or family.lora_targets
    seed = randomness.draw_key(config.seed, "random weights", "lora")
    lora = adapters.attach_lora(base.module, targets, config.rank, config.alpha, seed, family.lora_presets)
    parameters = adapters.trainable_parameters(base.module)
    optimizer = optim.build_optimizer(config, plan.optimizer, parameters.values())
    reference = refer_to_base(config.pretrained_model_name_or_path, base.folder)
    return LoraWeights(config, base, reference, lora, parameters, optimizer)


METHODS: Mapping[str, Callable[[TrainConfig, TrainingPlan, Base, int], TrainedWeights]] = {
    "lora": train_lora,
    "full": FullWeights,
}
"""Builders of the trained weights on a base, by the config's `method`. The last argument counts steps already done."""
