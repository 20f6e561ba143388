"""Steps optimizers as libraries have them, so that a spoiled step (`skipped_step.py`) changes nothing.

What a library keeps for a whole group of parameters, such as a number of steps, is kept with the states of the first of
them, so that a checkpoint has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.storage.grouping import group_neighbours
from pixtune.trained.skipped_step import UNDO_BYTES, Undo, num_bytes

Build = Callable[[Sequence[nn.Parameter]], Any]
"""Builds an optimizer of a library over some parameters."""


class InGroups:
    """An optimizer that steps each parameter by itself, in groups of neighbours, each undone where it is spoiled.

    Groups keep small what undoing takes. Only the first step of each waits for the device, since states that it makes
    are not there to be put back. Numbers of steps on the host count skipped ones too, as `WithoutWaiting` says.

    Args:
        kept: names of a group's values that its steps change.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], build: Build, kept: Sequence[str] = ()) -> None:
        groups = group_neighbours(parameters, lambda parameter: 12 * parameter.numel(), UNDO_BYTES)
        self._optimizers, self._kept = [build(group) for group in groups], kept
        self.found_inf: Tensor | None = None
        self.is_torn = False
        """Whether a step was begun, has changed some parameters and has not ended."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Any]]:
        """States of each parameter: the very dictionaries that are read and written."""
        return {p: each.state[p] for each in self._optimizers for group in each.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self) -> None:
        self.is_torn = True
        for optimizer in self._optimizers:
            stepped = stepped_by(optimizer)
            if not stepped:
                continue
            recall(optimizer, stepped[0], self._kept)
            if not all(optimizer.state[parameter] for parameter in stepped):
                if self.found_inf is None or not self.found_inf.item():
                    optimizer.step()
            elif self.found_inf is None:
                optimizer.step()
            else:
                tensors = [tensor for parameter in stepped for tensor in _changed(optimizer, parameter)]
                undo = Undo(tensors, tensors[0].new_empty(num_bytes(tensors), dtype=torch.uint8))
                optimizer.step()
                undo.if_spoiled(self.found_inf)
            keep(optimizer, stepped[0], self._kept)
        self.is_torn = False


class Waiting:
    """An optimizer whose step waits for the device anyhow, and which is not asked to step where it is spoiled.

    Args:
        kept: names of its group's values that steps change.
        complete: adds states that are made of others, where they came from a checkpoint.
    """

    def __init__(
        self, inner: Any, kept: Sequence[str], complete: Callable[[nn.Parameter, dict[str, Any]], None]
    ) -> None:
        self._inner, self._kept, self._complete = inner, kept, complete
        self.found_inf: Tensor | None = None
        self.is_torn = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._inner.param_groups
        return groups

    @property
    def state(self) -> Any:
        return self._inner.state

    def estimates(self) -> Mapping[str, Tensor]:
        """Returns the estimate d of the step size, by that name."""
        return {"d": torch.tensor(self.param_groups[0]["d"], dtype=torch.float64)}

    @torch.no_grad()
    def step(self) -> None:
        stepped = stepped_by(self._inner)
        if not stepped or (self.found_inf is not None and self.found_inf.item()):
            return
        recall(self._inner, stepped[0], self._kept)
        for parameter in stepped:
            self._complete(parameter, self.state[parameter])
        self.is_torn = True
        self._inner.step()
        keep(self._inner, stepped[0], self._kept)
        self.is_torn = False


def stepped_by(optimizer: Any) -> list[nn.Parameter]:
    """Returns the parameters that the next step changes."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def recall(optimizer: Any, first: nn.Parameter, kept: Sequence[str]) -> None:
    """Puts values that are kept with a parameter back into their group."""
    state = optimizer.state[first]
    for group in optimizer.param_groups:
        group.update({name: state[name] for name in kept if name in state})


def keep(optimizer: Any, first: nn.Parameter, kept: Sequence[str]) -> None:
    """Keeps values of a group with a parameter that has states."""
    if optimizer.state[first]:
        optimizer.state[first].update({name: optimizer.param_groups[0][name] for name in kept})


def _changed(optimizer: Any, parameter: nn.Parameter) -> list[Tensor]:
    """Returns everything on the device that a step of this parameter changes in place."""
    states = optimizer.state[parameter].values()
    on_device = [each for each in states if isinstance(each, Tensor) and each.device == parameter.device]
    return [parameter.data, *on_device]
