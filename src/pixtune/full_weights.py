"""All weights of a transformer as what is trained: how a small update reaches a bf16 weight, and the saved model.

A bf16 number has 8 significant bits, so an update below 1/512 of a weight is lost when it is rounded to the nearest.
Either the update goes to an fp32 copy (`fp32_master`), or the sum is rounded up or down with a chance in proportion to
its distance, so that it is right on average (`stochastic_rounding`; Gupta et al. 2015, arXiv 1502.02551, section 3).
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixtune import draws, optim
from pixtune.checkpoint import Checkpoint, CheckpointFiles, joined, sharded
from pixtune.config.schema import TrainConfig
from pixtune.errors import CheckpointError, WriteError
from pixtune.files import sync_folder, write_atomically
from pixtune.hardware.facts import package_versions
from pixtune.resume import config_hash
from pixtune.weights import READ_SUFFIXES, ModelFolder

WEIGHTS_STEM = "transformer"
MODEL_FOLDER = "model"
ABOUT_FILE = "pixtune.json"


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 to bf16, up or down by chance; what bf16 holds exactly stays, and so does what is no finite number.

    Args:
        values: fp32, any shape.
        generator: on the same device.
    """
    bits = values.contiguous().view(torch.int32)  # bf16 is the upper half of fp32's bits
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


class RoundedUpdate:
    """An optimizer over bf16 weights that steps each in fp32 and rounds the result by chance.

    One weight at a time stands in fp32, so the cost in memory is that of the largest one.

    Args:
        build: makes the optimizer of some parameters.
        first_step: steps already done: the draws of a resumed run go on.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        build: Callable[[Iterable[nn.Parameter]], optim.Optimizer],
        seed: int,
        first_step: int,
    ) -> None:
        self._weights, self._seed, self._steps_done = weights, seed, first_step
        self._stand_ins = {name: nn.Parameter(_nothing(weight)) for name, weight in weights.items()}
        self._optimizers = {name: build([stand_in]) for name, stand_in in self._stand_ins.items()}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers.values() for group in optimizer.param_groups]

    @functools.cached_property
    def state(self) -> dict[nn.Parameter, dict[str, Any]]:
        """By weight; the very dictionaries that the optimizers of the stand-ins read and write."""
        return {weight: self._optimizers[name].state[self._stand_ins[name]] for name, weight in self._weights.items()}

    @torch.no_grad()
    def step(self) -> None:
        for name, weight in self._weights.items():
            if weight.grad is None:
                continue
            stand_in = self._stand_ins[name]
            stand_in.data, stand_in.grad = weight.float(), weight.grad.float()
            self._optimizers[name].step()
            generator = torch.Generator(weight.device)
            generator.manual_seed(draws.draw_key(self._seed, "rounding", self._steps_done, name))
            weight.copy_(round_stochastically(stand_in.data, generator))
            stand_in.grad = None
            stand_in.data = _nothing(weight)
        self._steps_done += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self._weights.values():
            weight.grad = None


def _nothing(weight: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=weight.device)


def make_masters(weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """fp32 copies that gather the gradients of the weights, in fp32 and as they come, so that none is kept twice."""
    masters = {name: nn.Parameter(weight.detach().float()) for name, weight in weights.items()}

    def hand_over(master: nn.Parameter, weight: Tensor) -> None:
        if weight.grad is not None:
            gradient = weight.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            weight.grad = None

    for name, weight in weights.items():
        weight.register_post_accumulate_grad_hook(functools.partial(hand_over, masters[name]))
    return masters


@torch.no_grad()
def copy_weights(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Values of the same names, in the targets' number format.

    Raises:
        KeyError: the names differ.
    """
    if targets.keys() != sources.keys():
        raise KeyError(f"weights differ: {sorted(targets.keys() ^ sources.keys())[:4]} and perhaps more")
    for name, target in targets.items():
        target.copy_(sources[name])


class FullWeights:
    """See `trained.TrainedWeights`. A checkpoint holds the weights in their truest form: fp32 copies where there are.

    Args:
        optimizer: a name in `optim.OPTIMIZERS`.
        first_step: steps already done.
    """

    def __init__(
        self, config: TrainConfig, folder: ModelFolder, optimizer: str, transformer: nn.Module, first_step: int
    ) -> None:
        self.config, self.folder, self.transformer = config, folder, transformer
        transformer.requires_grad_(True)
        weights = dict(transformer.named_parameters())
        is_bf16 = any(weight.dtype == torch.bfloat16 for weight in weights.values())
        self.parameters: Mapping[str, nn.Parameter] = weights
        self.optimizer: optim.Optimizer
        if is_bf16 and config.weight_update == "stochastic_rounding":
            build = functools.partial(optim.build_optimizer, config, optimizer)
            self.optimizer = RoundedUpdate(weights, build, config.seed, first_step)
            return
        if is_bf16:
            self.parameters = masters = make_masters(weights)
        stepping = optim.build_optimizer(config, optimizer, self.parameters.values())
        if is_bf16:
            stepping.register_step_post_hook(lambda *_: copy_weights(weights, masters))
        self.optimizer = stepping

    def summary(self) -> str:
        return f"all weights: {len(self.parameters)} tensors, {self._count():,} trained parameters"

    def facts(self) -> dict[str, int]:
        return {"trained tensors": len(self.parameters), "trained parameters": self._count()}

    def _count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    def checkpoint_files(self, step: int) -> CheckpointFiles:
        return sharded(WEIGHTS_STEM, {name: parameter.detach() for name, parameter in self.parameters.items()})

    def load(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        copy_weights(self.parameters, joined(files, WEIGHTS_STEM))
        copy_weights(dict(self.transformer.named_parameters()), self.parameters)

    def export(self, output_dir: Path, step: int) -> list[Path]:
        about = {
            "base_model": self.config.pretrained_model_name_or_path,
            "step": step,
            "config_hash": config_hash(self.config),
            "trigger_words": list(self.config.trigger_words),
            "versions": package_versions(),
        }
        return [export_model(output_dir / MODEL_FOLDER, self.folder, self.transformer, about)]


def export_model(target: Path, base: ModelFolder, transformer: nn.Module, about: Mapping[str, Any]) -> Path:
    """A whole model folder in diffusers' layout: this transformer, sharded, and the other parts of its base.

    The other parts are copied, not linked: a tool that writes into the folder must not reach the user's base model.

    Raises:
        WriteError: it could not be written. A folder that stood there before still stands.
    """
    temporary = target.with_name(f".{target.name}.writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(base.path, temporary, ignore=_only_parts_of(base))
        transformer.save_pretrained(temporary / "transformer", max_shard_size="5GB")  # type: ignore[operator]
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
    from pixtune.families import family_of
    from pixtune.families.base import Placement
    from pixtune.fit.apply import FORMATS
    from pixtune.fit.load import load_transformer
    from pixtune.weights import open_model_folder

    config, weights_format = checkpoint.record["config"], checkpoint.record["plan"]["compute_format"]
    base = open_model_folder(config["pretrained_model_name_or_path"])
    placement = Placement(torch.device("cpu"), FORMATS[weights_format])
    transformer = load_transformer(family_of(base), base, placement)
    try:
        copy_weights(dict(transformer.named_parameters()), joined(checkpoint.tensors, WEIGHTS_STEM))
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path} does not fit {base.path}: {error.args[0]}") from error
    about = {
        "base_model": config["pretrained_model_name_or_path"],
        "step": checkpoint.step,
        "trigger_words": config["trigger_words"],
        "versions": checkpoint.record["versions"],
    }
    return export_model(target, base, transformer, about)
