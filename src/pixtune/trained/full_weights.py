"""Trains all weights of a transformer, and saves the model.

`weight_update.py` steps one weight, `fused_step.py` all of them within the backward pass. Where processes hold the
weights together (`engine/sharding.py`), everything here is of this process's rows; `sharded_files.py` writes them.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pixtune.config import to_dict
from pixtune.config.schema import TrainConfig
from pixtune.engine.sharding import local_of, norms_across
from pixtune.errors import CheckpointError, DamagedError, WriteError
from pixtune.hardware.facts import package_versions
from pixtune.plan.optimizers import KERNEL, SEPARATE, TrainedTensors
from pixtune.plan.training import TrainingPlan, with_todays_names
from pixtune.storage.base_reference import copy_without_paths, refer_to_base
from pixtune.storage.checkpoint import (
    OPTIMIZER_STEM,
    Checkpoint,
    CheckpointFiles,
    joined,
    read_decision,
    sharded,
)
from pixtune.storage.files import sync_folder, write_atomically
from pixtune.storage.grouping import group_neighbours
from pixtune.storage.model_folder import MODEL_INDEX, READ_SUFFIXES, ModelFolder
from pixtune.storage.resume import config_hash
from pixtune.storage.slices import StoredTensor, rows_in, whole
from pixtune.storage.state_form import fault_of_record
from pixtune.trained import optim
from pixtune.trained.base import Base
from pixtune.trained.fused_step import FusedStep
from pixtune.trained.host_states import HostStates
from pixtune.trained.optimizers import build_optimizer
from pixtune.trained.read_back import ReadBack, Velocity, drawn_names, read_back_sample
from pixtune.trained.sharded_files import (
    check_shape,
    files_of_part,
    states_in_rows,
    states_of_part,
    weights_of_part,
    write_files_in_turn,
)
from pixtune.trained.skipped_step import is_spoiled
from pixtune.trained.step_trial import step_obstacle
from pixtune.trained.weight_update import WeightUpdate

log = logging.getLogger(__name__)

WEIGHTS_STEM = "transformer"
MODEL_FOLDER = "model"
MODEL_FILE = "diffusion_pytorch_model.safetensors"
MODEL_FILE_BYTES = 5 * 10**9
ABOUT_FILE = "pixtune.json"
LEAST_RATE = 1e-8
"""Learning rate below which whole tensors may stay as they are: rounding swallows nearly all of each step."""
LARGE_NUMBERS = 1 << 16
"""Numbers of a tensor from which a few steps are sure to move some of them, although each is rounded by chance."""
NUM_READ_BACK = 16
"""Number of a checkpoint's tensors that are compared with the live ones."""


def require_same_names(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raises KeyError where names are not those of the same model."""
    if one.keys() != other.keys():
        raise KeyError(f"weights differ: {sorted(one.keys() ^ other.keys())[:4]} and perhaps more")


def gather_in_fp32(weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Sums the weights' gradients in fp32 as each is computed, so that none is kept twice.

    Returns:
        The sums by name, to which every later backward pass adds.
    """
    sums: dict[str, Tensor] = {}

    def hand_over(name: str, weight: nn.Parameter) -> None:
        arrived, weight.grad = weight.grad, None
        assert arrived is not None, "the hook runs once a gradient is there"
        gradient = local_of(arrived)
        sums[name] = sums[name].add_(gradient) if name in sums else gradient.float()

    for name, weight in weights.items():
        weight.register_post_accumulate_grad_hook(functools.partial(hand_over, name))
    return sums


class FullWeights:
    """All weights of a transformer as `methods.TrainedWeights`.

    A checkpoint holds the weights in their truest form: their fp32 copies, where they have them.

    Args:
        first_step: number of steps already done.
    """

    def __init__(self, config: TrainConfig, plan: TrainingPlan, base: Base, first_step: int) -> None:
        self.config, self.base, self._optimizer_name = config, base, plan.optimizer
        self._together = base.transformer.together
        base.module.requires_grad_(True)
        self.parameters: Mapping[str, nn.Parameter] = dict(base.module.named_parameters())
        weights = self.parameters.values()
        has_masters = config.weight_update == "fp32_master" and any(w.dtype == torch.bfloat16 for w in weights)
        self.optimizer = WeightUpdate(
            self.parameters,
            self._build_optimizer,
            config.seed,
            first_step,
            keeps_masters=has_masters,
            host=HostStates(next(iter(weights)).device) if plan.states_on_host else None,
            together=self._together,
            form=self._step_form(plan.step_form, next(iter(weights)).device),
            stream=base.transformer.stream,
        )
        self._fused = FusedStep(self.optimizer, config.max_grad_norm) if plan.fused_step else None
        # Runs of earlier versions keep the order of their sums.
        one_by_one = plan.step_form is None
        self._norms_of = (lambda given: [*map(optim.norm_of, given)]) if one_by_one else optim.norms_of
        self._sums: dict[str, Tensor] | None = None
        if has_masters and not self._fused:
            self._sums = gather_in_fp32(self.parameters)
        self._together.define("write the model", self._write_part)
        self._together.define("read back", self._read_back_part)

    def _step_form(self, planned: str | None, device: torch.device) -> str | None:
        """Returns the plan's form of a step, or the one without the kernel where a run has moved to where it fails."""
        if planned == KERNEL and (obstacle := step_obstacle(device)) is not None:
            log.warning("the run was planned to step each weight by one kernel, and several do: %s", obstacle)
            return SEPARATE
        return planned

    def _build_optimizer(self, name: str, weight: Iterable[nn.Parameter]) -> optim.Optimizer:
        in_block = name.startswith(tuple(f"{path}." for path in self.base.family.block_paths))
        if self._together.is_alone:
            return build_optimizer(self.config, self._optimizer_name, weight, in_block)
        whole_weight = TrainedTensors(tuple(self.parameters[name].shape), in_block=in_block, in_parts=True)
        return build_optimizer(self.config, self._optimizer_name, weight, in_block, whole_weight)

    def summary(self) -> str:
        return f"all weights: {len(self.parameters)} tensors, {self._count():,} trained parameters"

    def counts(self) -> dict[str, int]:
        return {"trained tensors": len(self.parameters), "trained parameters": self._count()}

    def _count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    def backward(self, loss: Tensor) -> None:
        if self._fused:
            self._fused.backward(loss)
        else:
            loss.backward()

    def gradients(self) -> list[Tensor]:
        # Those of weights in parts have been averaged in the backward pass.
        return list(self._gradients().values()) if self._together.is_alone else []

    def step(self, loss: Tensor) -> Tensor:
        if self._fused:
            return self._fused.norm()
        gradients = self._gradients()
        norms = self._norms_of([*gradients.values()])
        norm = optim.global_norm(norms_across(norms, self._together))
        factor, spoiled = optim.clipping_factor(norm, self.config.max_grad_norm), is_spoiled(loss, norm)
        self.optimizer.begin_step()
        self.optimizer.step_weights(gradients, factor, spoiled)
        for parameter in self.parameters.values():
            parameter.grad = None
        self.optimizer.end_step()
        if self._sums is not None:
            self._sums.clear()
        return norm

    def abandon_step(self) -> bool:
        for parameter in self.parameters.values():
            parameter.grad = None
        if self._sums is not None:
            self._sums.clear()
        return not self.optimizer.is_torn

    def _gradients(self) -> dict[str, Tensor]:
        if self._sums is None:
            return {name: local_of(grad) for name, grad in optim.gradients_of(self.parameters).items()}
        return {name: self._sums[name] for name in self.parameters if name in self._sums}

    def result_in_place(self, in_training: bool = False, strength: float = 1.0) -> AbstractContextManager[None]:
        return nullcontext()

    def checkpoint_files(self, step: int) -> CheckpointFiles:
        state, _ = optim.optimizer_state(self.optimizer, self.parameters)
        if self._together.is_alone:
            weights = {name: self.optimizer.truest(name) for name in self.parameters}
            return {**sharded(WEIGHTS_STEM, weights), **sharded(OPTIMIZER_STEM, state)}
        rows, together = {name: self.optimizer.rows(name) for name in self.parameters}, self._together
        return {
            **files_of_part(WEIGHTS_STEM, *weights_of_part(self.optimizer.truest, rows), together),
            **files_of_part(OPTIMIZER_STEM, *states_of_part(state, rows, together.part), together),
        }

    def load(self, files: Mapping[str, Mapping[str, Tensor]], plain: Mapping[str, Mapping[str, Any]]) -> None:
        values: Mapping[str, StoredTensor] = joined(files, WEIGHTS_STEM)
        tensors: Mapping[str, StoredTensor] = joined(files, OPTIMIZER_STEM)
        require_same_names(self.parameters, values)
        of_weight: dict[str, dict[str, StoredTensor]] = {name: {} for name in self.parameters}
        for path, tensor in tensors.items():
            name, key = path.rsplit("/", 1)
            of_weight[name][key] = tensor
        for name, weight in self.parameters.items():  # one at a time: all would not fit on a device
            check_shape(name, values[name], weight.shape)
            rows = self.optimizer.rows(name)
            value = whole(values[name]) if rows.is_whole else rows_in(values[name], rows.start, rows.end)
            states = {f"{name}/{key}": state for key, state in states_in_rows(of_weight[name], rows).items()}
            self.optimizer.restore(name, value, states, plain.get(name, {}))

    def export(self, output_dir: Path, step: int) -> list[Path]:
        about = describe_model(to_dict(self.config), self.base.folder, step, package_versions())
        is_whole_here = self._together.mesh is None and self.base.transformer.stream is None
        write = None if is_whole_here else self._write_model
        return [export_model(output_dir / MODEL_FOLDER, self.base, about, write)]

    def _write_model(self, folder: Path) -> None:
        """Writes the transformer from where its weights are, with the other processes, each some of its files."""
        folder.mkdir()
        config = self.base.folder.component_config("transformer")
        self.base.family.build_transformer(config).save_config(folder)  # type: ignore[operator]
        self._together.call("write the model", folder)
        files = model_files(self.parameters)
        num_bytes = sum(weight.numel() * weight.element_size() for weight in self.parameters.values())
        places = {name: file for file, tensors in files.items() for name in tensors}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": places}
        if len(files) > 1:
            write_atomically(folder / f"{MODEL_FILE}.index.json", json.dumps(index, indent=2, sort_keys=True).encode())

    def _write_part(self, folder: Path) -> None:
        is_alone = self._together.is_alone
        weights: Mapping[str, Tensor] = self.held if is_alone else self.parameters  # gathered as they are written
        write_files_in_turn(folder, model_files(weights), self._together, {"format": "pt"})

    def export_so_far(self, output_dir: Path, step: int) -> None:
        """Writes nothing: a model of tens of gigabytes is written once; `pixtune export` writes one of a checkpoint."""

    @property
    def held(self) -> dict[str, Tensor]:
        return {name: self.optimizer.held(name) for name in self.parameters}

    @property
    def must_move(self) -> list[str]:
        """Large tensors: of numbers that are rounded, a few steps move some of many. None where the rate is too low."""
        if self.config.learning_rate < LEAST_RATE:
            return []
        return [name for name, weight in self.parameters.items() if weight.numel() >= LARGE_NUMBERS]

    @property
    def least_rate_share(self) -> float:
        return 0.5

    def read_back(self, folder: Path, velocity: Velocity) -> ReadBack:
        parts: list[ReadBack] = self._together.call("read back", folder)
        unequal = {name for part in parts for name in part.unequal}
        return ReadBack(1.0, max(part.distance for part in parts), tuple(sorted(unequal)))

    def _read_back_part(self, folder: Path) -> ReadBack:
        names = drawn_names([*self.parameters], self.config.seed, NUM_READ_BACK)
        files = sorted(folder.glob(f"{WEIGHTS_STEM}*.safetensors"))
        return read_back_sample(self.optimizer.truest, {name: self.optimizer.rows(name) for name in names}, files)


def model_files(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Divides a transformer's weights among files as `save_pretrained` does, by the files' names."""
    groups = group_neighbours(weights.items(), lambda item: item[1].numel() * item[1].element_size(), MODEL_FILE_BYTES)
    stem, ending = MODEL_FILE.split(".")
    total = len(groups)
    names = [f"{stem}-{number:05d}-of-{total:05d}.{ending}" for number in range(1, total + 1)]
    return dict(zip(names if total > 1 else [MODEL_FILE], map(dict, groups), strict=True))


def describe_model(
    config: Mapping[str, Any], folder: ModelFolder, step: int, versions: Mapping[str, str]
) -> dict[str, Any]:
    """Builds the content of a saved model's `pixtune.json`: where its weights come from, without a path.

    Args:
        config: the config of the run that trained it, as `to_dict` gives it.
        folder: the base model's folder.
    """
    return {
        **refer_to_base(config["pretrained_model_name_or_path"], folder).entries(),
        "step": step,
        "config_hash": config_hash(config),
        "trigger_words": list(config["trigger_words"]),
        "versions": dict(versions),
    }


def export_model(
    target: Path, base: Base, about: Mapping[str, Any], write: Callable[[Path], None] | None = None
) -> Path:
    """Writes a whole model folder in diffusers' layout: the transformer, sharded, and the other parts of its base.

    The other parts are copied, not linked: a tool that writes into the folder must not reach the user's base model.

    Args:
        write: writes the transformer into a folder; None: its own `save_pretrained` does.

    Raises:
        WriteError: it could not be written. An older folder in its place is kept.
    """
    temporary = target.with_name(f".{target.name}.writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        _copy_parts(base.folder, temporary)
        if write is None:
            base.module.save_pretrained(temporary / "transformer", max_shard_size="5GB")  # type: ignore[operator]
        else:
            write(temporary / "transformer")
        own_config = str(temporary / "transformer" / "config.json")
        copy_without_paths(own_config, own_config)
        write_atomically(temporary / ABOUT_FILE, json.dumps(about, indent=1).encode())
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
        sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise WriteError(f"the model could not be written to {target} ({error}). Is the disk full?") from error
    return target


def _copy_parts(folder: ModelFolder, target: Path) -> None:
    """Copies the parts of a pipeline but the transformer, without other weight formats, and writes their index."""

    def ignored(copied: str, names: list[str]) -> list[str]:
        files = (name for name in names if not (Path(copied) / name).is_dir())
        return [name for name in files if Path(name).suffix not in READ_SUFFIXES]

    target.mkdir(parents=True)
    for part in folder.components:
        if part != "transformer":
            shutil.copytree(folder.part(part), target / part, ignore=ignored, copy_function=copy_without_paths)
    if folder.given_index is None:
        copy_without_paths(str(folder.path / MODEL_INDEX), str(target / MODEL_INDEX))
    else:
        (target / MODEL_INDEX).write_text(json.dumps(folder.given_index, indent=2), encoding="utf-8")


def export_full_checkpoint(checkpoint: Checkpoint, target: Path) -> Path:
    """Writes the model folder of a checkpoint of `method: full`.

    Raises:
        CheckpointError: its weights are not those of the base model that it names.
    """
    from pixtune.config.model_parts import ModelParts
    from pixtune.engine.apply import COMPUTE_DTYPES
    from pixtune.engine.load import load_transformer
    from pixtune.families import family_of
    from pixtune.families.opening import open_model
    from pixtune.family import Placement

    if fault := fault_of_record(checkpoint.record):
        raise DamagedError(f"{checkpoint.path} is of another form than pixtune writes: {fault}.")
    plan = read_decision(TrainingPlan, with_todays_names(checkpoint.record["plan"]), "plan")
    config, weights_format = checkpoint.record["config"], plan.compute_format
    parts = ModelParts.model_validate(config.get("model_parts", {}))
    folder = open_model(config["pretrained_model_name_or_path"], parts)
    family, placement = family_of(folder), Placement(torch.device("cpu"), COMPUTE_DTYPES[weights_format])
    base = Base(folder, family, load_transformer(family, folder, placement))
    weights = dict(base.module.named_parameters())
    values: Mapping[str, StoredTensor] = joined(checkpoint.tensors, WEIGHTS_STEM)
    try:
        require_same_names(weights, values)
        with torch.no_grad():
            for name, weight in weights.items():
                check_shape(name, values[name], weight.shape)
                weight.copy_(whole(values[name]))
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path} does not fit {folder.path}: {error.args[0]}") from error
    return export_model(target, base, describe_model(config, folder, checkpoint.step, checkpoint.record["versions"]))
