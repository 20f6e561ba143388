"""Reads and restores the states of optimizers, and prepares gradients for their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pixtune.plan.optimizers import OPTIMIZERS, USUAL_STATES, StateOptions, TrainedTensors
from pixtune.trained.skipped_step import is_spoiled, step_unless


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


def estimates_of(optimizer: OptimizerState) -> Mapping[str, Tensor]:
    """Returns what an optimizer estimates of itself, by name: scalars, as Prodigy's d. Most estimate nothing."""
    estimates = getattr(optimizer, "estimates", None)
    return {} if estimates is None else estimates()


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


def norms_of(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Returns each gradient's norm, as `norm_of` does but for the order of sums, by few launches for all."""
    there = [gradient for gradient in gradients if gradient.numel()]
    norms = iter(torch._foreach_norm(there, 2, dtype=torch.float32) if there else ())
    return [next(norms) if gradient.numel() else norm_of(gradient) for gradient in gradients]


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
            elif not isinstance(value, tuple):  # which follows from the parameter's shape, and is made again
                plain.setdefault(name, {})[key] = value
    return tensors, plain


def saw_gradient(name: str, states: Mapping[str, Any]) -> bool:
    """Returns whether a parameter's states have met a gradient that is not zero. Waits for the device.

    Args:
        name: name of the optimizer.
        states: those of one parameter, by name.
    """
    needs = OPTIMIZERS[name]
    # Eight bits say nothing without their scale, which is zero where all is.
    key = "absmax1" if "absmax1" in states else next(key for key in needs.moments if key in states)
    return bool((states[key].abs() > needs.least_moment).any())


def check_states(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Mapping[str, Any]],
    options: StateOptions = USUAL_STATES,
) -> None:
    """Checks that stored states are those of an optimizer for these parameters: native code trusts their sizes.

    Args:
        name: name of the optimizer.
        tensors, plain: as `optimizer_state` returned them.
        options: keys of the config that decide the states' sizes.

    Raises:
        KeyError: they are others; says which.
    """
    needs = OPTIMIZERS[name]
    found: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        parameter_name, _, key = path.rpartition("/")
        found.setdefault(parameter_name, {})[key] = tensor
    if unknown := [each for each in (*found, *plain) if each not in parameters]:
        raise KeyError(f"it has optimizer states of {unknown[0]!r}, which is not trained")
    for parameter_name, values in plain.items():
        if wrong := [key for key, value in values.items() if type(value) not in (int, float)]:
            raise KeyError(f"its {wrong[0][:60]!r} of {parameter_name} is no number")
    for parameter_name, states in found.items():
        shape = tuple(parameters[parameter_name].shape)
        # Whether a tensor belongs to a block, or was held in parts, decides the kind of its states.
        kinds = [
            needs.states_of(TrainedTensors(shape, in_block=in_block, in_parts=in_parts), options)
            for in_parts in (False, True)
            for in_block in (True, False)
        ]
        wanted = next((kind for kind in kinds if kind.keys() <= states.keys()), kinds[0])
        if missing := [key for key in wanted if key not in states]:
            raise KeyError(f"its states of {parameter_name} are none of {name}: {missing[0]} is missing")
        for key, state in states.items():
            size = {**wanted, **needs.of_first}.get(key)
            is_number = state.is_floating_point() or state.dtype == torch.uint8
            if size is None or not is_number or not size.fits(state.numel(), state.element_size()):
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
