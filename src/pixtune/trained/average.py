"""Keeps an exponential moving average (EMA) of trained weights, and puts it in their place for a while.

The weights of the last step carry the noise of the last few batches; their average over some hundred steps carries less
of it (Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging"). It is a result and not a part
of training: no step reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pixtune.plan.footprint import AVERAGE_PIECE_BYTES
from pixtune.storage.grouping import group_neighbours


def decay_at(step: int, decay: float, warms_up: bool) -> float:
    """Returns the decay of a step (0 for the first).

    While it warms up it is at most (1 + step) / (10 + step), as in TensorFlow's `ExponentialMovingAverage` with
    `num_updates`: an average that has seen few steps must forget where they began.
    """
    return min(decay, (1 + step) / (10 + step)) if warms_up else decay


def average_of_sums(increments: Iterable[float], decay: float, warms_up: bool) -> float:
    """Returns the moving average of what some increments, one a step, add up to: 0 before the first step."""
    total = average = 0.0
    for step, increment in enumerate(increments):
        total += increment
        average += (1 - decay_at(step, decay, warms_up)) * (total - average)
    return average


class WeightAverage:
    """The average of some fp32 weights over the steps, which begins with them as they are.

    All memory is taken at once and nothing waits for the device, so that an update cannot fail after a step.

    Args:
        weights: all on one device.
        decay: share of the average that a step keeps, above 0 and below 1.
        warms_up: see `decay_at`.
        on_host: it stays in host memory and passes through the device in pieces.
        first_step: number of steps already done.
    """

    def __init__(
        self, weights: Mapping[str, nn.Parameter], decay: float, warms_up: bool, on_host: bool, first_step: int
    ) -> None:
        self._decay, self._warms_up, self._steps_done = decay, warms_up, first_step
        self._is_in_place = False
        device = next(iter(weights.values())).device
        groups = group_neighbours(weights.items(), lambda item: 4 * item[1].numel(), AVERAGE_PIECE_BYTES)
        self._pieces = [Piece(dict(group), on_host and device.type == "cuda") for group in groups]
        largest = max(piece.memory.numel() for piece in self._pieces)
        self._scratch, self._staging = (torch.empty(largest, device=device) for _ in range(2))
        if not (on_host and device.type == "cuda"):
            self._staging = torch.empty(0, device=device)
        self.begin_anew()

    @torch.no_grad()
    def begin_anew(self) -> None:
        """Makes the weights as they are the average."""
        for piece in self._pieces:
            piece.memory.copy_(piece.read_weights(self._scratch))

    @torch.no_grad()
    def update(self, spoiled: Tensor) -> None:
        """Takes the weights of one more step into the average.

        Args:
            spoiled: `skipped_step.is_spoiled` of that step. Where it is 1, the average stays as it is.
        """
        share = (1 - decay_at(self._steps_done, self._decay, self._warms_up)) * (1 - spoiled)
        for piece in self._pieces:
            average = piece.fetch(self._staging)
            average.lerp_(piece.read_weights(self._scratch), share)
            piece.store(average)
        self._steps_done += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchanges weights and average until the block ends. No bit of either changes."""
        if self._is_in_place:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for piece in self._pieces:
            weights = piece.read_weights(self._scratch)
            piece.write_weights(piece.fetch(self._staging))
            piece.store(weights)
        self._is_in_place = not self._is_in_place

    def tensors(self) -> dict[str, Tensor]:
        """Returns the average by the names of the weights, not copied."""
        assert not self._is_in_place, "the average is in the weights' place"
        if self._staging.numel():
            torch.cuda.synchronize(self._staging.device)  # copies to the host may still be on their way
        return {name: tensor for piece in self._pieces for name, tensor in piece.tensors().items()}


class Piece:
    """The average of some weights as one run of memory, so that each operation on it is one kernel.

    Args:
        waits_on_host: the memory is page-locked memory of the host.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], waits_on_host: bool) -> None:
        self._weights = {name: weight.detach() for name, weight in weights.items()}
        self._waits_on_host = waits_on_host
        size, device = sum(weight.numel() for weight in weights.values()), next(iter(weights.values())).device
        self.memory = torch.empty(size, pin_memory=True) if waits_on_host else torch.empty(size, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """Returns views of the memory by the weights' names, in their shapes."""
        return dict(zip(self._weights, self._shaped(self.memory), strict=True))

    def read_weights(self, scratch: Tensor) -> Tensor:
        """Returns a copy of the weights within `scratch`."""
        flat = scratch[: self.memory.numel()]
        return torch.cat([weight.view(-1) for weight in self._weights.values()], out=flat)

    def write_weights(self, values: Tensor) -> None:
        torch._foreach_copy_(list(self._weights.values()), self._shaped(values))

    def fetch(self, staging: Tensor) -> Tensor:
        """Returns the memory itself, or a copy on the device within `staging`."""
        if not self._waits_on_host:
            return self.memory
        return staging[: self.memory.numel()].copy_(self.memory, non_blocking=True)

    def store(self, values: Tensor) -> None:
        """Makes these values those of the memory. Work on the device that is launched later finds them there."""
        if values is not self.memory:
            self.memory.copy_(values, non_blocking=True)

    def _shaped(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([weight.numel() for weight in self._weights.values()])
        return [part.view(weight.shape) for part, weight in zip(parts, self._weights.values(), strict=True)]
