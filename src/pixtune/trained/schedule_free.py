"""Puts what a schedule-free optimizer averages in the place of what it trains (Defazio et al. 2024, arXiv 2405.15682).

Such an optimizer steps z, and takes gradients at y, between z and the average x: y = (1 - beta) z + beta x. The
parameters hold y, and x is the result. It follows from y and z; the libraries' own way there and back, in place,
rounds, so that a look between steps would change training: here y is kept meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pixtune.trained.optim import OptimizerState


class AverageOfOptimizer:
    """The average x of a schedule-free optimizer, as `average.WeightAverage`."""

    def __init__(self, weights: Mapping[str, nn.Parameter], optimizer: OptimizerState) -> None:
        self._weights, self._optimizer = weights, optimizer
        self._is_in_place = False

    def update(self, spoiled: Tensor) -> None:
        """Does nothing: the optimizer's step is all."""

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """Returns the average by the names of the weights, in memory of its own."""
        assert not self._is_in_place, "the average is in the weights' place"
        state, beta = self._optimizer.state, self._optimizer.param_groups[0]["betas"][0]
        kept = {name: state.get(weight, {}).get("z") for name, weight in self._weights.items()}
        return {
            name: weight.detach().clone() if (z := kept[name]) is None else weight.lerp(z, 1 - 1 / beta)
            for name, weight in self._weights.items()
        }

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Has the average in the weights' place until the block ends. No bit of what is trained changes."""
        if self._is_in_place:
            yield
            return
        average = self.tensors()
        self._exchange(average)
        self._is_in_place = True
        try:
            yield
        finally:
            self._exchange(average)
            self._is_in_place = False

    @torch.no_grad()
    def _exchange(self, other: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            now = weight.clone()
            weight.copy_(other[name])
            other[name].copy_(now)
