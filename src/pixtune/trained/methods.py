"""Trains a LoRA beside frozen weights, or all weights, behind one protocol: the loop sees no difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from pixtune import randomness
from pixtune.config import to_dict
from pixtune.config.optimizing import SCHEDULE_FREE
from pixtune.config.schema import TrainConfig
from pixtune.engine.apply import COMPUTE_DTYPES
from pixtune.hardware.facts import package_versions
from pixtune.plan.adapter import KINDS
from pixtune.plan.training import TrainingPlan
from pixtune.storage.base_reference import BaseReference, refer_to_base
from pixtune.storage.checkpoint import OPTIMIZER_STEM, CheckpointFiles, joined, sharded
from pixtune.storage.resume import config_hash
from pixtune.storage.safetensors_writer import TensorFile, save_without_digest
from pixtune.trained import adapters, optim
from pixtune.trained.adapters import AttachedLora
from pixtune.trained.average import WeightAverage
from pixtune.trained.base import Base
from pixtune.trained.export import (
    DIFFUSERS_FILE,
    DORA_SCALES_FILE,
    FILES,
    LOADING_LOKR,
    RAW_FILE,
    LoraDescription,
    diffusers_file,
    export_lora,
    weights_by_module,
)
from pixtune.trained.full_weights import FullWeights
from pixtune.trained.init_lora import init_lora_of, start_from
from pixtune.trained.model_spec import model_spec
from pixtune.trained.optimizers import build_optimizer
from pixtune.trained.read_back import ReadBack, Velocity
from pixtune.trained.read_back_lora import read_back_lora, refuse_other_content
from pixtune.trained.schedule_free import AverageOfOptimizer
from pixtune.trained.scheme import scheme_of
from pixtune.trained.skipped_step import is_spoiled
from pixtune.trained.targets import adapter_of, ending_with, resolve_targets
from pixtune.trained.training_adapter import TrainingAdapter, training_adapter_of


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

    def step(self, loss: Tensor) -> Tensor:
        """Scales the gradients down to the config's norm and steps; returns the norm before.

        Where the loss or that norm is no number, weights and states stay as they are: see `skipped_step.py`.
        """

    def abandon_step(self) -> bool:
        """Drops what a step that failed has gathered; returns whether all weights are as they were before it."""

    def result_in_place(self, in_training: bool = False, strength: float = 1.0) -> AbstractContextManager[None]:
        """Has the transformer compute with what the run's files hold, until a `with` block ends.

        Samples and held-out losses are of that. No bit of what is trained changes.

        Args:
            in_training: what is on in training alone stays on, so that losses compare with those of the steps.
            strength: factor of what a LoRA adds.
        """

    def checkpoint_files(self, step: int) -> CheckpointFiles:
        """Returns the weights and the optimizer's state as `load` takes them: what this process has to write of them.

        Where processes hold the weights together, all of them must call it.
        """

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

    @property
    def held(self) -> Mapping[str, Tensor]:
        """The numbers of `parameters` that this process holds, where they are between steps: on its device, or not."""

    @property
    def must_move(self) -> list[str]:
        """Names of parameters that a few steps move for certain; see `judging.learning`."""

    @property
    def least_rate_share(self) -> float:
        """Part of the peak learning rate from which steps move those; 0: any rate above 0 does."""

    def read_back(self, folder: Path, velocity: Velocity) -> ReadBack:
        """Compares what a checkpoint's folder holds with the live weights, which are the same bits afterwards.

        Raises:
            WeightsError: it cannot be read as weights of this model.
        """


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
    average: WeightAverage | AverageOfOptimizer | None = None
    """The run's result, where its weights are averaged; None: they are the result."""
    adapter: TrainingAdapter | None = None
    """A frozen LoRA that is on in training alone."""
    start: str | None = None
    """A line on the LoRA that this session started from; None: it started from none."""

    def summary(self) -> str:
        scheme = self.lora.scheme
        words = [
            f"{KINDS[scheme.kind]}: {len(self.lora.modules)} layers, {self.lora.num_parameters:,} trained parameters"
        ]
        if scheme.ranks:
            ranks = sorted({scheme.ranks.get(layer, scheme.rank) for layer in self.lora.modules})
            words.append(f"of ranks {', '.join(map(str, ranks))}")
        if scheme.kind == "lokr":
            words.append(LOADING_LOKR)
        if self.average:
            decay = self.config.ema.decay
            words.append("averaged by its optimizer" if decay is None else f"averaged with decay {decay:g}")
        if self.adapter:
            file = self.config.training_adapter.path
            words.append(f"trained beside {file and file.name} on {self.adapter.num_layers} layers, off in samples")
        return ", ".join(words) + (f"\n{self.start}" if self.start else "")

    def counts(self) -> dict[str, int]:
        return {"LoRA layers": len(self.lora.modules), "trained parameters": self.lora.num_parameters}

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, loss: Tensor) -> Tensor:
        norm = optim.clipped_step(self.optimizer, self.parameters, self.config.max_grad_norm, loss)
        if self.average:
            self.average.update(is_spoiled(loss, norm))
        return norm

    def abandon_step(self) -> bool:
        # Most optimizers take no memory once all states are there, and these come before the first update.
        return not getattr(self.optimizer, "is_torn", False)

    @contextmanager
    def result_in_place(self, in_training: bool = False, strength: float = 1.0) -> Iterator[None]:
        with (
            self.average.in_place() if self.average else nullcontext(),
            self.adapter.off() if self.adapter and not in_training else nullcontext(),
            adapters.at_strength(self.base.module, adapters.trainable_parameters(self.base.module), strength),
        ):
            yield

    def checkpoint_files(self, step: int) -> CheckpointFiles:
        about = self._describe(step)
        files = {Path(DIFFUSERS_FILE).stem: diffusers_file(self._result(), about)}
        if self.average:
            files[Path(RAW_FILE).stem] = diffusers_file(adapters.lora_weights(self.base.module), about)
        if scales := self._dora_scales():
            files[Path(DORA_SCALES_FILE).stem] = TensorFile(scales, {})
        return {**files, **sharded(OPTIMIZER_STEM, optim.optimizer_state(self.optimizer, self.parameters)[0])}

    def load(self, files: Mapping[str, Mapping[str, Tensor]], plain: Mapping[str, Mapping[str, Any]]) -> None:
        result = files.get(Path(DIFFUSERS_FILE).stem, {})
        raw = files.get(Path(RAW_FILE).stem, result)
        adapters.load_lora_weights(self.base.module, weights_by_module(raw))
        if isinstance(self.average, WeightAverage):  # an optimizer's average follows from weights and states
            adapters.copy_weights(self._result(), weights_by_module(result))
        state = joined(files, OPTIMIZER_STEM)
        optim.restore_optimizer_state(self.optimizer.state, self.parameters, state, plain)

    def export(self, output_dir: Path, step: int) -> list[Path]:
        about, config, family = self._describe(step), self.config, self.base.family
        spec = model_spec(to_dict(config), family, self.reference, step, config.output_dir)
        formats = config.lora_files.formats
        result = self._result()
        paths = list(export_lora(output_dir, result, about, family, formats, spec, self._dora_scales()))
        refuse_other_content(paths, result, self.lora.scheme, family)
        for name in FILES.keys() - set(formats):  # one may be left of an earlier session
            (output_dir / FILES[name]).unlink(missing_ok=True)
        if self.average:
            paths.append(output_dir / RAW_FILE)
            save_without_digest(paths[-1], *diffusers_file(adapters.lora_weights(self.base.module), about))
        else:  # one may be left of a run that was resumed without its average
            (output_dir / RAW_FILE).unlink(missing_ok=True)
        return paths

    def export_so_far(self, output_dir: Path, step: int) -> None:
        self.export(output_dir, step)

    def _result(self) -> dict[str, Tensor]:
        """Returns what the run's files hold, by layer."""
        if self.average:
            return adapters.named_by_layer(self.average.tensors())
        return adapters.lora_weights(self.base.module)

    def _dora_scales(self) -> dict[str, Tensor]:
        if self.lora.scheme.kind != "dora":
            return {}
        transformer = self.base.transformer
        return adapters.dora_scales(transformer.module, self._result(), transformer.stream)

    @property
    def held(self) -> Mapping[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @property
    def must_move(self) -> list[str]:
        return [name for name in self.parameters if any(part in name for part in adapters.FROM_ZERO)]

    @property
    def least_rate_share(self) -> float:
        return 0.0

    def read_back(self, folder: Path, velocity: Velocity) -> ReadBack:
        exported = [self.config.output_dir / FILES[name] for name in self.config.lora_files.formats]
        with self.result_in_place(in_training=True):
            return read_back_lora(self.base, self.lora.scheme, folder, velocity, exported)

    def _describe(self, step: int) -> LoraDescription:
        return LoraDescription(
            rank=self.lora.scheme.rank,
            alpha=self.lora.scheme.alpha,
            targets=self.lora.targets,
            base=self.reference,
            family=self.base.family.name,
            step=step,
            config_hash=config_hash(to_dict(self.config)),
            trigger_words=self.config.trigger_words,
            versions=package_versions(),
            scheme=self.lora.scheme,
        )


def train_lora(config: TrainConfig, plan: TrainingPlan, base: Base, first_step: int) -> LoraWeights:
    """Attaches the adapter that the config describes."""
    family, shapes = base.family, adapters.linear_shapes(base.module)
    targets = resolve_targets(list(shapes), config.lora_targets or family.lora_targets, family.lora_presets)
    layers = ending_with(list(shapes), targets)
    scheme = scheme_of(
        config, adapter_of(config, layers, family.lora_presets), {layer: shapes[layer] for layer in layers}
    )
    seed = randomness.draw_key(config.seed, "random weights", "lora")
    lora = adapters.attach_adapter(base.module, targets, scheme, seed, base.transformer.stream)
    start = None
    if first_step == 0 and (saved := init_lora_of(config, family)) is not None:
        start = start_from(adapters.adapter_layers(base.module), saved)
    parameters = adapters.trainable_parameters(base.module)
    optimizer = build_optimizer(config, plan.optimizer, parameters.values())
    reference = refer_to_base(config.pretrained_model_name_or_path, base.folder)
    average: WeightAverage | AverageOfOptimizer | None = None
    ema, adapter = config.ema, None
    if ema.decay is not None:
        average = WeightAverage(parameters, ema.decay, ema.warm_up, ema.on_host, first_step)
    elif plan.optimizer in SCHEDULE_FREE:
        average = AverageOfOptimizer(parameters, optimizer)
    if (saved := training_adapter_of(config, family)) is not None:
        adapter = TrainingAdapter(base.module, saved, COMPUTE_DTYPES[plan.compute_format])
    return LoraWeights(config, base, reference, lora, parameters, optimizer, average, adapter, start)


METHODS: Mapping[str, Callable[[TrainConfig, TrainingPlan, Base, int], TrainedWeights]] = {
    "lora": train_lora,
    "full": FullWeights,
}
"""Builders of the trained weights on a base, by the config's `method`. The last argument counts steps already done."""
