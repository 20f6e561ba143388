"""Steps each weight within the backward pass, so that gradients of all weights never exist at once.

A weight is stepped as soon as its gradient is there, and the gradient is freed.

Clipping by the global norm needs the norm of all gradients before the first weight changes. So the backward pass runs
twice over the same graph: once to measure, every gradient freed as soon as its norm is known, and once to step. Both
passes give the same gradients, so the result is that of clipping them together.

Where the loss or that norm is no number, no weight changes. Without clipping the norm is not known in time: then a loss
that is no number changes no weight, and a gradient that is none, under a loss that is one, does not change its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from pixtune.trained import optim
from pixtune.trained.skipped_step import is_spoiled
from pixtune.trained.weight_update import WeightUpdate


class FusedStep:
    """Takes every gradient of the weights as soon as it is there, so nothing else may wait for gradients.

    Args:
        max_norm: largest norm of all gradients together; 0: they are not clipped, and one backward pass is enough.
    """

    def __init__(self, update: WeightUpdate, max_norm: float) -> None:
        self._update, self._max_norm = update, max_norm
        self._norms: dict[str, Tensor] = {}
        self._take: Callable[[str, Tensor], None] = self._measure
        for name, weight in update.weights.items():
            weight.register_post_accumulate_grad_hook(partial(self._arrived, name))

    def backward(self, loss: Tensor) -> None:
        """Steps every weight that the loss depends on."""
        self._update.begin_step()
        self._norms = {}
        value = loss.detach()
        self._take = partial(self._step_alone, loss=value)
        if self._max_norm:
            self._take = self._measure
            loss.backward(retain_graph=True)
            norm = self.norm()
            factor = optim.clipping_factor(norm, self._max_norm)
            self._take = partial(self._update.step_weight, factor=factor, spoiled=is_spoiled(value, norm))
        loss.backward()
        self._update.end_step()

    def norm(self) -> Tensor:
        """Returns the norm of all gradients of the last step, before they were clipped."""
        names = [name for name in self._update.weights if name in self._norms]  # in the order of a plain step
        return optim.global_norm([self._norms[name] for name in names])

    def _arrived(self, name: str, weight: nn.Parameter) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None, "the hook runs once a gradient is there"
        self._take(name, gradient)

    def _measure(self, name: str, gradient: Tensor) -> None:
        self._norms[name] = optim.norm_of(gradient)

    def _step_alone(self, name: str, gradient: Tensor, loss: Tensor) -> None:
        self._measure(name, gradient)
        self._update.step_weight(name, gradient, None, is_spoiled(loss, self._norms[name]))
