"""The optimizer's step within the backward pass: each weight is stepped when its gradient is there, and the gradient
freed, so that gradients of all weights never exist at once.

Clipping by the global norm needs the norm of all gradients before the first weight moves. So the backward pass runs
twice over the same graph: once to measure, every gradient freed as soon as its norm is known, and once to step. Both
give the same gradients, so the result is that of clipping gradients that are all there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from pixtune.trained import optim
from pixtune.trained.weight_update import WeightUpdate


class FusedStep:
    """Takes every gradient of the weights from the moment it is made; so nothing else may wait for them.

    Args:
        max_norm: of all gradients together; 0: they are not scaled down, and one backward pass is enough.
    """

    def __init__(self, update: WeightUpdate, max_norm: float) -> None:
        self._update, self._max_norm = update, max_norm
        self._norms: dict[str, Tensor] = {}
        self._take: Callable[[str, Tensor], None] = self._measure
        for name, weight in update.weights.items():
            weight.register_post_accumulate_grad_hook(partial(self._arrived, name))

    def backward(self, loss: Tensor) -> None:
        """One step of every weight that the loss depends on."""
        self._update.begin_step()
        self._norms = {}
        factor = None
        if self._max_norm:
            self._take = self._measure
            loss.backward(retain_graph=True)
            factor = optim.clipping_factor(self.norm(), self._max_norm)
        self._take = partial(self._step, factor=factor)
        loss.backward()
        self._update.end_step()

    def norm(self) -> Tensor:
        """Of all gradients of the last step, before they were scaled down."""
        names = [name for name in self._update.weights if name in self._norms]  # in the order of a step that waits
        return optim.global_norm([self._norms[name] for name in names])

    def _arrived(self, name: str, weight: nn.Parameter) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None, "the hook runs once a gradient is there"
        self._take(name, gradient)

    def _measure(self, name: str, gradient: Tensor) -> None:
        self._norms[name] = optim.norm_of(gradient)

    def _step(self, name: str, gradient: Tensor, factor: Tensor | None) -> None:
        if name not in self._norms:
            self._measure(name, gradient)
        self._update.step_weight(name, gradient, factor)
