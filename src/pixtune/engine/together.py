"""Lets one process of a run lead work between steps that takes all of them, since each holds a part of the weights.

Samples, held-out losses, checkpoints and messages are the first process's business. Where processes hold the weights
together, what it does with them takes the others: a forward pass gathers each block from all. So the first one leads.
Set *apart*, it works as if it were alone; whatever takes all is an *action*, and is announced to the others, which
wait meanwhile for actions and do their part in each. The services know nothing of it: the transformer's
forward pass announces itself.

What the first process cannot do any more, such as writing a picture, ends its own work alone: the others go on waiting.
An action that fails in the middle of gathering has left the others inside of it, so nothing can be announced any more:
the process ends with its error, and `launch/peers.py` ends the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from pixtune.errors import PixtuneError, TrainingError

WORDS_TIMEOUT = timedelta(days=2)
"""Time that others wait for the next word: drawing many samples takes hours. A process that is gone is noticed
all the same (`launch/peers.py`)."""

Action = Callable[..., Any]
Value = TypeVar("Value")


@dataclass
class Outcome:
    """Value that an action returned in one process, or the error that it ended with there."""

    value: Any = None
    error: Exception | None = None


class Together:
    """The processes that hold one copy of the weights together, or several groups of them that hold one copy each.

    Args:
        mesh: all processes of the run. Its last dimension are those that hold one copy together. None: this process
            holds all weights, and every method works on what this process has.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self.mesh = mesh
        # Words go through the hosts: one group for all devices, and no kernel of a GPU waits for them.
        self._words = None if mesh is None else dist.new_group(timeout=WORDS_TIMEOUT, backend="gloo")
        self.news: Callable[[], str | None] = lambda: None
        """Function that returns a report of a process that is gone, once one is known to be."""
        self._actions: dict[str, Action] = {}
        self._depth = 0
        self._broken: BaseException | None = None
        self._passes: _ForwardPasses | None = None

    # ---- who holds what

    @property
    def is_alone(self) -> bool:
        """Whether this process holds all weights."""
        return self.mesh is None

    @property
    def leads(self) -> bool:
        """Whether this process leads."""
        return self.mesh is None or dist.get_rank() == 0

    @property
    def rank(self) -> int:
        """Number of this process in the run."""
        return 0 if self.mesh is None else dist.get_rank()

    @property
    def writes(self) -> bool:
        """Whether this process's part of the weights is its to write: groups beyond the first hold the same."""
        return self.mesh is None or self.mesh.ndim == 1 or self.mesh.get_local_rank(0) == 0

    @property
    def part(self) -> int:
        """Number of this process among those that hold one copy together."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(self.mesh.ndim - 1)

    @property
    def num_parts(self) -> int:
        """Number of processes that hold one copy together."""
        return 1 if self.mesh is None else self.mesh.size(self.mesh.ndim - 1)

    def sum(self, of_parts: Tensor) -> Tensor:
        """Returns the sum over the processes that hold one copy together. All of them must call it."""
        if self.mesh is not None:
            with self._naming_the_lost():
                dist.all_reduce(of_parts, group=self.mesh.get_group(self.mesh.ndim - 1))
        return of_parts

    def of_parts(self, value: Value) -> list[Value]:
        """Returns the value of each process that holds a part of this copy, by its number. All must call it."""
        if self.mesh is None:
            return [value]
        first = dist.get_rank() - self.part
        return self._gather(value)[first : first + self.num_parts]

    def union(self, names: Sequence[str]) -> list[str]:
        """Returns the names that any process gives, each once. All processes must call it."""
        if self.mesh is None:
            return list(names)
        return list(dict.fromkeys(name for given in self._gather(list(names)) for name in given))

    # ---- work that the first process leads

    def define(self, name: str, action: Action) -> None:
        """Defines what all processes do in an action of this name."""
        self._actions[name] = action

    def follow_passes(self, transformer: nn.Module, device: torch.device) -> None:
        """Lets forward passes that the leader runs while it is apart take the others along."""
        if self.mesh is None:
            return
        self._passes = _ForwardPasses(device)

        def run(args: Any, kwargs: Any) -> None:
            with torch.no_grad():
                transformer(*to_device(args, device), **to_device(kwargs, device))

        self.define("forward pass", run)
        transformer.register_forward_pre_hook(self._before_pass, prepend=True, with_kwargs=True)
        transformer.register_forward_hook(self._after_pass)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Lets the first process work alone until a `with` block ends, and the others follow it; all must enter it.

        What the others do within the block themselves must take nobody else. Within another such block it does nothing.

        Raises:
            TrainingError: an action broke off in the middle, and the others cannot be reached.
        """
        if self.mesh is None or self._depth:
            yield
            return
        self._depth += 1
        try:
            yield
            if not self.leads:
                with self._naming_the_lost():
                    self._follow()
        finally:
            self._depth -= 1
            if self.leads and not self._is_broken():
                self._broadcast([None])
        if self.leads and self._is_broken():
            why = (
                self.news() or f"an error in the first process: {str(self._broken or 'a forward pass').splitlines()[0]}"
            )
            raise TrainingError(
                f"what all processes do together broke off: {why.rstrip('.')}. The run ends, and goes on from its last "
                "checkpoint by resume_from_checkpoint=latest"
            ) from self._broken

    def call(self, name: str, *arguments: Any) -> list[Any]:
        """Has all processes do an action; called by the leader while it is apart. Alone, it is done here.

        Returns:
            What it returned in each process, by their numbers.

        Raises:
            Exception: an action failed in a process that could still say so; the first of these errors.
        """
        action = self._actions[name]
        if self.mesh is None:
            return [action(*arguments)]
        if self._is_broken():
            raise TrainingError("the other processes cannot be reached any more") from self._broken
        self._broadcast([(name, arguments)])
        try:
            outcomes = self._outcomes(action, arguments)
        except BaseException as error:
            self._broken = error
            raise
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        return [outcome.value for outcome in outcomes]

    # ---- inside

    def _is_broken(self) -> bool:
        return self._broken is not None or (self._passes is not None and self._passes.is_under_way)

    def _follow(self) -> None:
        while (announced := self._broadcast([None])[0]) is not None:
            name, arguments = announced
            if name == "forward pass":
                self._actions[name](*arguments)
            else:
                self._outcomes(self._actions[name], arguments)

    def _outcomes(self, action: Action, arguments: Sequence[Any]) -> list[Outcome]:
        """Does this process's part of an action, and returns the outcomes of all."""
        try:
            own = Outcome(action(*arguments))
        except (OSError, PixtuneError) as error:  # of this process alone, such as a full disk
            own = Outcome(error=error)
        return self._gather(own)

    def _broadcast(self, values: list[Any]) -> list[Any]:
        with self._naming_the_lost():
            dist.broadcast_object_list(values, src=0, group=self._words)
        return values

    def _gather(self, value: Value) -> list[Value]:
        values: list[Any] = [None] * dist.get_world_size()
        with self._naming_the_lost():
            dist.all_gather_object(values, value, group=self._words)
        return values

    @contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        """Replaces a library's error by a report of the process that is gone, where one is.

        Raises:
            TrainingError: one is.
        """
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, PixtuneError) and (lost := self.news()) is not None:
                raise TrainingError(lost) from error
            raise

    def _before_pass(self, transformer: nn.Module, args: Any, kwargs: Any) -> None:
        if not (self.leads and self._depth):
            return
        if self._is_broken():
            raise TrainingError("the other processes cannot be reached any more") from self._broken
        assert self._passes is not None
        self._broadcast([("forward pass", (to_device(args, CPU), to_device(kwargs, CPU)))])
        self._passes.is_under_way = True

    def _after_pass(self, transformer: nn.Module, args: Any, output: Any) -> None:
        if self._passes is not None:
            self._passes.is_under_way = False


CPU = torch.device("cpu")


@dataclass
class _ForwardPasses:
    """Forward passes that the leader runs while it is apart."""

    device: torch.device
    is_under_way: bool = False
    """Whether one was announced and has not come to its end."""


def to_device(value: Any, device: torch.device) -> Any:
    """Returns an argument of a forward pass with its tensors on a device, whatever collection they are in."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, Mapping):
        return {key: to_device(each, device) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(to_device(each, device) for each in value)
    return value
