"""All weights of a transformer as what is trained, and the saved model.

How a weight is stepped is in `weight_update.py`, the step within the backward pass in `fused_step.py`.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.config import to_dict
from pixtune.config.schema import TrainConfig
from pixtune.errors import CheckpointError, WriteError
from pixtune.hardware.facts import package_versions
from pixtune.plan.training import TrainingPlan
from pixtune.storage.base_reference import copy_without_paths, refer_to_base
from pixtune.storage.checkpoint import OPTIMIZER_STEM, Checkpoint, CheckpointFiles, joined, sharded
from pixtune.storage.files import sync_folder, write_atomically
from pixtune.storage.model_folder import READ_SUFFIXES, ModelFolder
from pixtune.storage.resume import config_hash
from pixtune.trained import optim
from pixtune.trained.fused_step import FusedStep
from pixtune.trained.host_states import HostStates
from pixtune.trained.weight_update import WeightUpdate

WEIGHTS_STEM = "transformer"
MODEL_FOLDER = "model"
ABOUT_FILE = "pixtune.json"


@torch.no_grad()
def copy_weights(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Values of the same names, in the targets' number format.

    Raises:
        KeyError: the names differ.
    """
    require_same_names(targets, sources)
    for name, target in targets.items():
        target.copy_(sources[name])


def require_same_names(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Raises KeyError where weights are not those of the same model."""
    if one.keys() != other.keys():
        raise KeyError(f"weights differ: {sorted(one.keys() ^ other.keys())[:4]} and perhaps more")


def gather_in_fp32(weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Sums of the gradients of the weights, in fp32 and as they come, so that none is kept twice.

    Returns:
        Filled by every backward pass from now on.
    """
    sums: dict[str, Tensor] = {}

    def hand_over(name: str, weight: nn.Parameter) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None, "the hook runs once a gradient is there"
        sums[name] = sums[name].add_(gradient) if name in sums else gradient.float()

    for name, weight in weights.items():
        weight.register_post_accumulate_grad_hook(functools.partial(hand_over, name))
    return sums


class FullWeights:
    """See `trained.TrainedWeights`. A checkpoint holds the weights in their truest form: fp32 copies where there are.

    Args:
        first_step: steps already done.
    """

    def __init__(
        self, config: TrainConfig, folder: ModelFolder, plan: TrainingPlan, transformer: nn.Module, first_step: int
    ) -> None:
        self.config, self.folder, self.transformer = config, folder, transformer
        transformer.requires_grad_(True)
        self.parameters: Mapping[str, nn.Parameter] = dict(transformer.named_parameters())
        weights = self.parameters.values()
        has_masters = config.weight_update == "fp32_master" and any(w.dtype == torch.bfloat16 for w in weights)
        self.optimizer = WeightUpdate(
            self.parameters,
            functools.partial(optim.build_optimizer, config, plan.optimizer),
            config.seed,
            first_step,
            keeps_masters=has_masters,
            host=HostStates(next(iter(weights)).device) if plan.states_on_host else None,
        )
        self._fused = FusedStep(self.optimizer, config.max_grad_norm) if plan.fused_step else None
        self._sums: dict[str, Tensor] | None = None
        if has_masters and not self._fused:
            self._sums = gather_in_fp32(self.parameters)

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
        return list(self._gradients().values())

    def step(self) -> Tensor:
        if self._fused:
            return self._fused.norm()
        gradients = self._gradients()
        norm = optim.global_norm([optim.norm_of(gradient) for gradient in gradients.values()])
        factor = optim.clipping_factor(norm, self.config.max_grad_norm)
        self.optimizer.begin_step()
        for name, gradient in gradients.items():
            self.optimizer.step_weight(name, gradient, factor)
            self.parameters[name].grad = None
        self.optimizer.end_step()
        if self._sums is not None:
            self._sums.clear()
        return norm

    def _gradients(self) -> dict[str, Tensor]:
        if self._sums is None:
            return optim.gradients_of(self.parameters)
        return {name: self._sums[name] for name in self.parameters if name in self._sums}

    def checkpoint_files(self, step: int) -> CheckpointFiles:
        return sharded(WEIGHTS_STEM, {name: self.optimizer.truest(name) for name in self.parameters})

    def load(self, files: Mapping[str, Mapping[str, Tensor]], plain: Mapping[str, Mapping[str, Any]]) -> None:
        values, tensors = joined(files, WEIGHTS_STEM), joined(files, OPTIMIZER_STEM)
        require_same_names(self.parameters, values)
        of_weight: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        for path, tensor in tensors.items():
            of_weight[path.rsplit("/", 1)[0]][path] = tensor
        for name in self.parameters:  # one at a time on the device: what waits in host memory would not fit there
            self.optimizer.restore(name, values[name], of_weight[name], plain.get(name, {}))

    def export(self, output_dir: Path, step: int) -> list[Path]:
        about = describe_model(to_dict(self.config), self.folder, step, package_versions())
        return [export_model(output_dir / MODEL_FOLDER, self.folder, self.transformer, about)]


def describe_model(
    config: Mapping[str, Any], base: ModelFolder, step: int, versions: Mapping[str, str]
) -> dict[str, Any]:
    """Builds the content of a saved model's `pixtune.json`: where its weights come from, without a path.

    Args:
        config: of the run that trained it, as `to_dict` gives it.
    """
    return {
        **refer_to_base(config["pretrained_model_name_or_path"], base).entries(),
        "step": step,
        "config_hash": config_hash(config),
        "trigger_words": list(config["trigger_words"]),
        "versions": dict(versions),
    }


def export_model(target: Path, base: ModelFolder, transformer: nn.Module, about: Mapping[str, Any]) -> Path:
    """Writes a whole model folder in diffusers' layout: this transformer, sharded, and the other parts of its base.

    The other parts are copied, not linked: a tool that writes into the folder must not reach the user's base model.

    Raises:
        WriteError: it could not be written. A folder that stood there before still stands.
    """
    temporary = target.with_name(f".{target.name}.writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(base.path, temporary, ignore=_only_parts_of(base), copy_function=copy_without_paths)
        transformer.save_pretrained(temporary / "transformer", max_shard_size="5GB")  # type: ignore[operator]
        own_config = str(temporary / "transformer" / "config.json")
        copy_without_paths(own_config, own_config)
        write_atomically(temporary / ABOUT_FILE, json.dumps(about, indent=1).encode())
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise WriteError(f"the model could not be written to {target} ({error}). Is the disk full?") from error
    return target


def _only_parts_of(base: ModelFolder) -> Callable[[str, list[str]], list[str]]:
    """Leaves out the transformer, what lies beside a pipeline's parts, and other formats of weights."""
    wanted = {*base.components, "model_index.json"} - {"transformer"}

    def ignored(folder: str, names: list[str]) -> list[str]:
        if Path(folder) == base.path:
            return [name for name in names if name not in wanted]
        files = (name for name in names if not (Path(folder) / name).is_dir())
        return [name for name in files if Path(name).suffix not in READ_SUFFIXES]

    return ignored


def export_full_checkpoint(checkpoint: Checkpoint, target: Path) -> Path:
    """The model folder of a checkpoint of `method: full`.

    Raises:
        CheckpointError: its weights are not those of the base model that it names.
    """
    from pixtune.engine.apply import COMPUTE_DTYPES
    from pixtune.engine.load import load_transformer
    from pixtune.families import family_of
    from pixtune.family import Placement
    from pixtune.storage.model_folder import open_model_folder

    config, weights_format = checkpoint.record["config"], checkpoint.record["plan"]["compute_format"]
    base = open_model_folder(config["pretrained_model_name_or_path"])
    placement = Placement(torch.device("cpu"), COMPUTE_DTYPES[weights_format])
    transformer = load_transformer(family_of(base), base, placement).module
    try:
        copy_weights(dict(transformer.named_parameters()), joined(checkpoint.tensors, WEIGHTS_STEM))
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path} does not fit {base.path}: {error.args[0]}") from error
    about = describe_model(config, base, checkpoint.step, checkpoint.record["versions"])
    return export_model(target, base, transformer, about)
