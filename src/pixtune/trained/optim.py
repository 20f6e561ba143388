"""Builds optimizers from one table, and learning-rate schedules that are pure functions of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pixtune.config.schema import TrainConfig
from pixtune.errors import ConfigError
from pixtune.plan.optimizers import OPTIMIZERS
from pixtune.storage.grouping import group_neighbours
from pixtune.trained.skipped_step import Undo, is_spoiled, num_bytes, step_unless


class OptimizerState(Protocol):
    """The part of an optimizer that the schedule and the checkpoint use."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    @property
    def state(self) -> Any:
        """State of each parameter, by name."""


class Optimizer(OptimizerState, Protocol):
    """An optimizer, which steps parameters by their gradients.

    It reads an attribute `found_inf` at each step, as torch's fused ones do: see `skipped_step.step_unless`.
    """

    def step(self) -> Any: ...


def _adamw(parameters: Iterable[nn.Parameter], **settings: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, fused=True, **settings)


def _adamw_8bit(parameters: Iterable[nn.Parameter], **settings: Any) -> Optimizer:
    return WithoutWaiting(import_bitsandbytes().optim.AdamW8bit(parameters, **settings))


def import_bitsandbytes() -> Any:
    """Imports bitsandbytes, which only 8-bit optimizer states need.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            "the plan keeps optimizer states in 8 bits",
            [
                f"8-bit AdamW needs bitsandbytes, which cannot be imported ({error}). Run `pip install bitsandbytes`, "
                "or set adam8bit: false, which takes 6 more bytes for each trained parameter."
            ],
        ) from error
    return bitsandbytes


UNDO_BYTES = 1 << 25
"""Bytes of weights and states that are kept at once while 8-bit optimizers step, unless one weight has more."""
CHANGED_STATES = ("state1", "state2", "absmax1", "absmax2")
"""Names of the tensors that a step of bitsandbytes changes. Code books are constant, and parameters share them."""


@dataclass
class WithoutWaiting:
    """An optimizer of bitsandbytes whose step does not wait for the device, and changes nothing where it is spoiled.

    Its own waits after each parameter, and a LoRA on 60 blocks has 480: about 30 ms a step on an H100, by the
    difference between runs with 8-bit and 32-bit states.

    Its counter of steps, by which it corrects the bias of the moments, is a number of the host, which does not know yet
    whether a step is spoiled. So it counts skipped steps too: from the tenth step on, one of them changes the length
    of the next step by 1.2% at most, and of the second step by 26%.
    """

    inner: Any
    found_inf: Tensor | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.inner.param_groups
        return groups

    @property
    def state(self) -> Any:
        return self.inner.state

    @torch.no_grad()
    def step(self) -> None:
        if not self.inner.initialized:
            self.inner.check_overrides()
            self.inner.to_gpu()
            self.inner.initialized = True
        stepped = [
            (group, parameter, number, place)
            for number, group in enumerate(self.inner.param_groups)
            for place, parameter in enumerate(group["params"])
            if parameter.grad is not None
        ]
        for each in stepped:  # all before the first step: where memory for them is short, no parameter has moved
            if not self.inner.state[each[1]]:
                self.inner.init_state(*each)

        if not stepped:
            return
        groups = group_neighbours(stepped, lambda each: num_bytes(self._changed(each[1])), UNDO_BYTES)
        changed = [[tensor for each in group for tensor in self._changed(each[1])] for group in groups]
        # Likewise all the memory that undoing takes.
        memory = changed[0][0].new_empty(max(map(num_bytes, changed)), dtype=torch.uint8)
        for group, tensors in zip(groups, changed, strict=True):
            undo = Undo(tensors, memory)
            for each in group:
                self.inner.update_step(*each)
            if self.found_inf is not None:
                undo.if_spoiled(self.found_inf)

    def _changed(self, parameter: nn.Parameter) -> list[Tensor]:
        """Returns everything on the device that a step of this parameter changes."""
        states = self.inner.state[parameter]
        return [parameter.data, *(states[name] for name in CHANGED_STATES if name in states)]


BUILDERS: dict[str, Callable[..., Optimizer]] = {"adamw": _adamw, "adamw_8bit": _adamw_8bit}
"""Builders of the optimizers in `plan.optimizers.OPTIMIZERS`, under the same names."""


def check_optimizer(name: str) -> None:
    """Checks that an optimizer's package is there, before weights are loaded, which takes minutes.

    Raises:
        ConfigError: a package is missing.
    """
    if OPTIMIZERS[name].package is not None:  # building one, for a single number, imports it
        BUILDERS[name]([nn.Parameter(torch.zeros(1))], lr=0.0)


def build_optimizer(config: TrainConfig, name: str, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Builds the optimizer of a run (AdamW: Loshchilov and Hutter 2017, arXiv 1711.05101, algorithm 2)."""
    return BUILDERS[name](
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )


SCHEDULE_KEYS = (
    "learning_rate", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "lr_step_rules",
)  # fmt: skip
"""Keys of the config that `build_schedule` reads."""


def build_schedule(config: TrainConfig, num_steps: int) -> Callable[[int], float]:
    """Builds the learning rate as a function of the step (0 for the first), by diffusers' `get_scheduler`.

    It has no state, so there is nothing to resume.
    """
    from diffusers.optimization import get_scheduler

    placeholder = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    # diffusers' "constant" ignores a warm-up, but a key that is set must have an effect.
    warm_constant = config.lr_scheduler == "constant" and config.lr_warmup_steps > 0
    schedule = get_scheduler(
        "constant_with_warmup" if warm_constant else config.lr_scheduler,
        placeholder,
        step_rules=config.lr_step_rules,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=num_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    factor = schedule.lr_lambdas[0]
    return lambda step: config.learning_rate * float(factor(step))


def rate_in(config: TrainConfig, recorded: Mapping[str, Any], num_steps: int, step: int) -> float:
    """Returns the learning rate of a step (0 for the first) by the schedule that a checkpoint's config describes.

    Args:
        recorded: that config, as `to_dict` gives it. Keys that it lacks have the values of `config`.
    """
    then = config.model_copy(update={key: recorded[key] for key in SCHEDULE_KEYS if key in recorded})
    return build_schedule(then, num_steps)(step)


STEPS_COMPARED = 100_000
"""Steps that `check_schedule` looks at, at most: a moment's work in a run of any length."""


def check_schedule(config: TrainConfig, num_steps: int) -> str | None:
    """Compares a run's rates with the one that was asked for. Returns a warning, or None.

    Raises:
        ConfigError: the rate is 0 at every step, so that nothing would be learned.
    """
    rate_at = build_schedule(config, num_steps)
    highest = max(map(rate_at, range(0, num_steps, max(num_steps // STEPS_COMPARED, 1))))
    keys = f"lr_scheduler {config.lr_scheduler}, lr_warmup_steps {config.lr_warmup_steps}"
    if highest == 0:
        raise ConfigError(
            f"the learning rate is 0 at each of the run's {num_steps} steps",
            [f"{keys}: nothing would be learned. Make the run longer, or the warm-up shorter."],
        )
    if config.lr_warmup_steps < num_steps or config.lr_scheduler == "piecewise_constant":  # which has no warm-up
        return None
    return (
        f"the warm-up of {config.lr_warmup_steps} steps (lr_warmup_steps) is as long as the run of {num_steps}, or "
        f"longer: its rate reaches {highest:.3g}, {highest / config.learning_rate:.0%} of learning_rate"
    )


def set_learning_rate(optimizer: OptimizerState, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def gradients_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Returns the gradients of all parameters that have one, in a stable order, the same set in all processes.

    Some parameters never have one: the last block's output for the text, for example, is not used.
    """
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


def require_some(gradients: Sequence[Tensor]) -> None:
    """Raises RuntimeError where there is no gradient at all."""
    if not gradients:
        raise RuntimeError("no gradient reached any trained parameter: the loss does not depend on them")


def norm_of(gradient: Tensor) -> Tensor:
    """Returns a gradient's norm, in fp32 whatever its format: bf16 would round each of thousands to 3 digits."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)


def global_norm(norms: Sequence[Tensor]) -> Tensor:
    """Returns the norm of all gradients together, from the norm of each."""
    require_some(norms)
    return torch.linalg.vector_norm(torch.stack(list(norms)))


def clipping_factor(norm: Tensor, max_norm: float) -> Tensor | None:
    """Returns the factor that brings gradients to at most that norm; None where a norm of 0 switches clipping off."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else None


def clipped_step(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], max_norm: float, loss: Tensor) -> Tensor:
    """Scales the gradients down to a global norm (0: leaves them) and steps; returns the norm before.

    Where it or the loss is no number, nothing changes but the gradients.
    """
    gradients = list(gradients_of(parameters).values())
    require_some(gradients)
    norm = nn.utils.get_total_norm(gradients)
    if max_norm:
        nn.utils.clip_grads_with_norm_(parameters.values(), max_norm, norm)
    step_unless(optimizer, is_spoiled(loss, norm))
    return norm


def optimizer_state(
    optimizer: OptimizerState, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Returns an optimizer's state as flat tensors `PARAMETER/KEY`, and its other values (step counters) by parameter.

    8-bit codes, scales and code books are taken as they are, so that nothing is quantized again on the way back. A code
    book that parameters share is copied for each: a safetensors file holds no tensor twice.
    """
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    state = optimizer.state
    for name, parameter in parameters.items():
        for key, value in state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.clone() if value.data_ptr() in seen else value
                seen.add(value.data_ptr())
            else:
                plain.setdefault(name, {})[key] = value
    return tensors, plain


def saw_gradient(name: str, states: Mapping[str, Any]) -> bool:
    """Returns whether a parameter's states have met a gradient that is not zero. Waits for the device.

    Args:
        name: name of the optimizer.
        states: those of one parameter, by name.
    """
    # Eight bits say nothing without their scale, which is zero where all is.
    moment: Tensor = states["absmax1"] if "absmax1" in states else states[OPTIMIZERS[name].moments[0]]
    return bool(moment.any())


def check_states(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Mapping[str, Any]],
) -> None:
    """Checks that stored states are those of an optimizer for these parameters: native code trusts their sizes.

    Args:
        name: name of the optimizer.
        tensors, plain: as `optimizer_state` returned them.

    Raises:
        KeyError: they are others; says which.
    """
    sizes = OPTIMIZERS[name].state_sizes
    found: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        parameter_name, _, key = path.rpartition("/")
        found.setdefault(parameter_name, {})[key] = tensor
    if unknown := [each for each in (*found, *plain) if each not in parameters]:
        raise KeyError(f"it has optimizer states of {unknown[0]!r}, which is not trained")
    for parameter_name, states in found.items():
        parameter = parameters[parameter_name]
        if missing := [key for key in OPTIMIZERS[name].moments if key not in states]:
            raise KeyError(f"its states of {parameter_name} are none of {name}: {missing[0]} is missing")
        for key, state in states.items():
            size = sizes[key](parameter.numel()) if key in sizes else None
            if size is None or state.numel() != size or not (state.is_floating_point() or state.dtype == torch.uint8):
                raise KeyError(
                    f"its state {key[:60]!r} of {parameter_name}, {state.dtype} {list(state.shape)}, is none of {name}"
                )


def restore_optimizer_state(
    state: Mapping[nn.Parameter, dict[str, Any]],
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Mapping[str, Any]],
) -> None:
    """Puts the tensors and values of `optimizer_state` back into an optimizer's `state`, number formats included."""
    for name, values in plain.items():
        state[parameters[name]].update(values)
    for path, tensor in tensors.items():
        name, key = path.rsplit("/", 1)
        parameter = parameters[name]
        # AdamW keeps its scalar step counter on the CPU unless it is fused on a GPU: as torch's own loading decides.
        device = parameter.device if key != "step" or parameter.is_cuda else torch.device("cpu")
        state[parameter][key] = tensor.to(device)
