"""Prodigy, which estimates the step size of Adam from the gradients (Mishchenko and Defazio 2023, arXiv 2306.06101).

The numbers are those of the package prodigyopt, which the tests compare; its own step waits for the device twice for
each tensor, and a LoRA on 60 blocks has 960. Here the estimate stays on the device, the step of some neighbouring
tensors is a few kernels together, and nothing waits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.storage.grouping import group_neighbours
from pixtune.trained.skipped_step import UNDO_BYTES

ESTIMATE = "estimate"
"""Name of the state of the run as a whole, which is kept with the first tensor: d, the highest estimate of it so far,
the numerator of the estimate (equation 4 and algorithm 4 of the paper), and the number of steps; in fp64."""


class Prodigy:
    """Adam whose step size is d times the learning rate; d begins at `d0` and grows with the distance that is found.

    Args:
        lr: factor of d; 1 is usual.
        slice_p: the estimate is made of every n-th number of each tensor.
        safeguard_warmup: the estimate's denominator leaves the learning rate out.
        use_bias_correction: Adam's moments are corrected for having begun at zero.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        slice_p: int = 1,
        safeguard_warmup: bool = False,
        use_bias_correction: bool = True,
    ) -> None:
        self.param_groups: list[dict[str, Any]] = [
            {"params": list(parameters), "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        ]
        self.state: defaultdict[nn.Parameter, dict[str, Any]] = defaultdict(dict)
        self.found_inf: Tensor | None = None
        self.is_torn = False
        """Whether a step was begun, has changed some tensors and has not ended."""
        self._d0, self._d_coef, self._growth_rate, self._slice = d0, d_coef, growth_rate, slice_p
        self._safeguard_warmup, self._use_bias_correction = safeguard_warmup, use_bias_correction

    def estimates(self) -> Mapping[str, Tensor]:
        """Returns d, by that name, on the device; nothing before the first step."""
        first = next((self.state[p] for p in self.param_groups[0]["params"] if ESTIMATE in self.state.get(p, ())), None)
        return {} if first is None else {"d": first[ESTIMATE][0]}

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not stepped:
            return
        for parameter in stepped:
            if "exp_avg" not in self.state[parameter]:
                self._begin(parameter)
        first = self.state[stepped[0]]
        if ESTIMATE not in first:
            first[ESTIMATE] = stepped[0].new_tensor([self._d0, self._d0, 0.0, 0.0], dtype=torch.float64)
        if group["lr"] == 0:
            return  # as in the package: such a step is none
        before = first[ESTIMATE]
        d, d_max, numerator, num_steps = before.unbind()
        sound = torch.ones_like(d) if self.found_inf is None else 1 - self.found_inf.to(d)
        rate = d * group["lr"]
        if self._use_bias_correction:
            beta1, beta2 = group["betas"]
            rate = rate * (1 - beta2 ** (num_steps + 1)).sqrt() / (1 - beta1 ** (num_steps + 1))
        self.is_torn = True
        groups = group_neighbours(stepped, lambda parameter: 4 * parameter.numel(), UNDO_BYTES)
        sums_2 = torch.stack([self._gather(each, d, rate, sound) for each in groups]).sum(0)
        beta3 = math.sqrt(group["betas"][1])
        numerator = beta3 * numerator + d / self._d0 * rate * sums_2[0]
        found = self._d_coef * numerator / sums_2[1]
        grown = torch.where(d == self._d0, torch.maximum(d, found), d)
        d_max = torch.maximum(d_max, found)
        new = torch.stack([torch.minimum(d_max, grown * self._growth_rate), d_max, numerator, num_steps + 1])
        moves = (sums_2[1] > 0) & (sound > 0)
        first[ESTIMATE] = torch.where(moves, new, before)
        for each in groups:
            self._move(each, first[ESTIMATE][0], rate * moves)
        self.is_torn = False

    # ---- inside

    def _begin(self, parameter: nn.Parameter) -> None:
        sliced = parameter.detach().flatten()[:: self._slice]
        self.state[parameter].update(
            exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter),
            s=torch.zeros_like(sliced), p0=sliced.clone(),
        )  # fmt: skip

    def _gather(self, parameters: Sequence[nn.Parameter], d: Tensor, rate: Tensor, sound: Tensor) -> Tensor:
        """Takes gradients into the states; returns their product with the way so far, and the sum of |s|, shape (2,).

        Where `sound` is 0, states stay as they are.
        """
        states = [self.state[parameter] for parameter in parameters]
        firsts, seconds, sums, starts = ([state[name] for state in states] for name in _STATES)
        beta1, beta2 = self.param_groups[0]["betas"]
        gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])  # type: ignore[union-attr]
        gradient.masked_fill_(sound == 0, 0.0)
        kept_1, kept_2, kept_3 = (torch.where(sound > 0, beta, 1.0) for beta in (beta1, beta2, math.sqrt(beta2)))

        def as_parts(flat: Tensor) -> list[Tensor]:
            parts = flat.split([parameter.numel() for parameter in parameters])
            return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]

        def as_slices(flat: Tensor) -> list[Tensor]:
            return [part.flatten()[:: self._slice] for part in as_parts(flat)]

        _decay_and_add(firsts, kept_1, as_parts(gradient * (d * (1 - beta1)).float()))
        _decay_and_add(seconds, kept_2, as_parts(gradient.square() * (d * d * (1 - beta2)).float()))
        unit = d / self._d0 * (d if self._safeguard_warmup else rate)
        _decay_and_add(sums, kept_3, as_slices(gradient * unit.float()))
        ways = torch._foreach_sub(starts, [parameter.flatten()[:: self._slice] for parameter in parameters])
        product = torch.cat(as_slices(gradient)) * torch.cat(ways)
        absolute = torch.stack(torch._foreach_norm(sums, 1))
        return torch.stack([product.sum(dtype=torch.float64), absolute.sum(dtype=torch.float64)])

    def _move(self, parameters: Sequence[nn.Parameter], d: Tensor, rate: Tensor) -> None:
        group = self.param_groups[0]
        firsts, seconds = ([self.state[parameter][name] for parameter in parameters] for name in _STATES[:2])
        steps = torch._foreach_sqrt(seconds)
        # Without alpha this would be the form for numbers of the host, which reads the tensor.
        torch._foreach_add_(steps, (d * group["eps"]).float(), alpha=1)
        torch._foreach_reciprocal_(steps)
        torch._foreach_mul_(steps, firsts)
        torch._foreach_mul_(steps, (-rate).float())
        if group["weight_decay"]:
            torch._foreach_add_(steps, torch._foreach_mul(list(parameters), (-group["weight_decay"] * rate).float()))
        torch._foreach_add_(list(parameters), steps)


_STATES = ("exp_avg", "exp_avg_sq", "s", "p0")


def _decay_and_add(states: list[Tensor], kept: Tensor, added: list[Tensor]) -> None:
    torch._foreach_mul_(states, kept.float())
    torch._foreach_add_(states, added)
