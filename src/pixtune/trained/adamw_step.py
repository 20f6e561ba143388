"""Steps one weight by AdamW in one kernel: clipping, moments of 32 or 8 bits, weight decay and rounding in one pass.

By separate kernels a step of a bf16 weight with 8-bit moments reads and writes some 160 bytes of each number; this way
it is 10. States are those of the optimizer whose step is replaced, torch's or bitsandbytes', so that a run may go on
with either.

Differences from those steps, all within rounding: weights decay before they are stepped (bitsandbytes: after), and an
8-bit moment becomes the nearest level, within a millionth of its block's peak (bitsandbytes: the same, but the sign of
a first moment that is nearly zero is kept; on a CPU a neighbour where levels lie close).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.kernels import has_triton
from pixtune.engine.rounding import Draw
from pixtune.plan.optimizers import BLOCK
from pixtune.trained.adamw_8bit import WithoutWaiting

ROWS, WARPS = 4, 4
"""Blocks of 256 numbers that one program steps, and its warps."""


@dataclass(frozen=True)
class WeightMemory:
    """Memory that a step of one weight changes beside its states; contiguous, and of this process's rows alone."""

    weight: Tensor
    master: Tensor | None
    """fp32 copy; None: it has none."""
    draw: Draw | None
    """Draw by which it is rounded, if it is bf16 and has no copy."""


def can_step(optimizer: Any, weight: Tensor) -> bool:
    """Returns whether the kernel can do an optimizer's step of a weight."""
    is_adamw = isinstance(optimizer, torch.optim.AdamW | WithoutWaiting)
    return is_adamw and has_triton(weight) and weight.is_contiguous()


@torch.no_grad()
def step_adamw(
    optimizer: Any,
    parameter: nn.Parameter,
    stepped: WeightMemory,
    gradient: Tensor,
    factor: Tensor | None,
    spoiled: Tensor,
) -> None:
    """Steps one weight, as `optimizer` would step its only parameter, which stands in for the weight.

    Args:
        gradient: of any format, as the backward pass left it.
        factor: number on the device by which it is multiplied; None: it is not.
        spoiled: fp32 on the device; where it is not 0, nothing changes but bitsandbytes' number of steps.
    """
    from pixtune.engine import step_kernels

    (group,) = optimizer.param_groups
    beta_1, beta_2 = group["betas"]
    weight, master, draw = stepped.weight, stepped.master, stepped.draw
    state = _states(optimizer, parameter, weight)
    if is_counted := "exp_avg" in state:
        num_steps, moments = state["step"], (state["exp_avg"], state["exp_avg_sq"])
        num_steps.add_(1).sub_(spoiled)
        biases = (1.0, 1.0)
    else:
        state["step"] += 1
        num_steps, moments = spoiled, (state["state1"], state["state2"])
        biases = (1 - beta_1 ** state["step"], 1 - beta_2 ** state["step"])
    is_8bit = moments[0].dtype == torch.uint8
    scales = [state[name] if is_8bit else spoiled for name in ("absmax1", "absmax2")]
    first, *words = (0, 0, 0) if draw is None else (draw.first_word, *draw.words)
    count = weight.numel()
    step_kernels.step_adamw[(-(-count // (ROWS * BLOCK)),)](
        weight, weight if master is None else master, gradient.contiguous(), *moments, *scales, num_steps,
        spoiled if factor is None else factor, spoiled,
        group["lr"], 1 - group["lr"] * group["weight_decay"],
        beta_1, 1 - beta_1, biases[0], _log(beta_1), beta_2, 1 - beta_2, biases[1], _log(beta_2), group["eps"],
        count, first, *words,
        factor is not None, master is not None, draw is not None, is_8bit, is_counted, ROWS, num_warps=WARPS,
    )  # fmt: skip


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -1e30


def _states(optimizer: Any, parameter: nn.Parameter, weight: Tensor) -> dict[str, Any]:
    """Returns the states of a weight's stand-in; before the first step they are made, as the optimizer would."""
    state: dict[str, Any] = optimizer.state[parameter]
    if not state and isinstance(optimizer, WithoutWaiting):
        optimizer.begin(parameter, weight)
        return optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(weight, dtype=torch.float32)
    return state
