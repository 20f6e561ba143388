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
from collections.abc import Sequence
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


TURNS = 16
"""Times `ROWS` blocks that one program steps of one weight, where all weights are stepped at once."""


@dataclass(frozen=True)
class Prepared:
    """A weight's step as the kernels take it."""

    tensors: tuple[Tensor, ...]
    """Weight, copy, gradient, two moments, their two scales and the count of steps. What a weight does not have is
    another tensor, which is not read."""
    places: tuple[int, int, int, int]
    """Count of its numbers, the place of the first one, and the key of its draw."""
    numbers: tuple[float, ...]
    """Rate, share that decay keeps; beta, 1 - beta, bias and log of beta of each moment; epsilon."""
    has_master: bool
    rounds: bool
    is_8bit: bool
    is_counted: bool
    """Whether the count of steps is on the device, and biases follow from it."""

    @property
    def kind(self) -> Kind:
        """Everything that the kernel is compiled for."""
        weight, _, gradient = self.tensors[:3]
        even = weight.numel() % 16 == 0 and not any(tensor.data_ptr() % 16 for tensor in self.tensors[:5])
        return self.has_master, self.rounds, self.is_8bit, self.is_counted, weight.dtype, gradient.dtype, even


Kind = tuple[bool, bool, bool, bool, torch.dtype, torch.dtype, bool]


def prepare(
    optimizer: Any, parameter: nn.Parameter, stepped: WeightMemory, gradient: Tensor, spoiled: Tensor
) -> Prepared:
    """Prepares the step of one weight, as `optimizer` would step its only parameter, which stands in for the weight.

    Counts the step where the host does. On the device the caller has to: 1 more, less `spoiled`.

    Args:
        gradient: of any format, as the backward pass left it.
    """
    (group,) = optimizer.param_groups
    beta_1, beta_2 = group["betas"]
    weight, master, draw = stepped.weight, stepped.master, stepped.draw
    state = _states(optimizer, parameter, weight)
    if is_counted := "exp_avg" in state:
        num_steps, moments = state["step"], (state["exp_avg"], state["exp_avg_sq"])
        biases = (1.0, 1.0)
    else:
        state["step"] += 1
        num_steps, moments = spoiled, (state["state1"], state["state2"])
        biases = (1 - beta_1 ** state["step"], 1 - beta_2 ** state["step"])
    is_8bit = moments[0].dtype == torch.uint8
    scales = (state["absmax1"], state["absmax2"]) if is_8bit else (spoiled, spoiled)
    first, *words = (0, 0, 0) if draw is None else (draw.first_word, *draw.words)
    return Prepared(
        (weight, weight if master is None else master, gradient.contiguous(), *moments, *scales, num_steps),
        (weight.numel(), first, words[0], words[1]),
        (
            group["lr"], 1 - group["lr"] * group["weight_decay"], beta_1, 1 - beta_1, biases[0], _log(beta_1),
            beta_2, 1 - beta_2, biases[1], _log(beta_2), group["eps"],
        ),
        master is not None, draw is not None, is_8bit, is_counted,
    )  # fmt: skip


@torch.no_grad()
def step_adamw(prepared: Prepared, factor: Tensor | None, spoiled: Tensor) -> None:
    """Steps one weight.

    Args:
        factor: number on the device by which the gradient is multiplied; None: it is not.
        spoiled: fp32 on the device; where it is not 0, nothing changes but bitsandbytes' number of steps.
    """
    from pixtune.engine import step_kernels

    *tensors, num_steps = prepared.tensors
    if prepared.is_counted:
        num_steps.add_(1).sub_(spoiled)
    count = prepared.places[0]
    step_kernels.step_adamw[(-(-count // (ROWS * BLOCK)),)](
        *tensors, num_steps, spoiled if factor is None else factor, spoiled, *prepared.numbers, *prepared.places,
        factor is not None, prepared.has_master, prepared.rounds, prepared.is_8bit, prepared.is_counted, ROWS,
        num_warps=WARPS,
    )  # fmt: skip


class StepOfAll:
    """Steps all weights by one launch for each kind of them: thousands of launches take longer than the steps."""

    def __init__(self) -> None:
        self._programs: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        """Weight and chunk of each program, by the counts of numbers of the weights."""

    @torch.no_grad()
    def step(self, prepared: Sequence[Prepared], factor: Tensor | None, spoiled: Tensor) -> None:
        """Steps weights; see `step_adamw`. Their gradients have to stay until then."""
        from pixtune.engine import step_kernels

        if counts := [each.tensors[-1] for each in prepared if each.is_counted]:
            torch._foreach_add_(counts, 1.0)
            torch._foreach_sub_(counts, [spoiled] * len(counts))
        for kind, own in _by_kind(prepared).items():
            has_master, rounds, is_8bit, is_counted, weight_type, gradient_type, even = kind
            addresses = [[*(tensor.data_ptr() for tensor in each.tensors), *each.places] for each in own]
            weight_of, chunk_of = self._programs_of(tuple(each.places[0] for each in own), spoiled.device)
            step_kernels.step_adamw_of_all[(len(weight_of),)](
                _to_device(addresses, torch.int64, spoiled.device),
                _to_device([each.numbers for each in own], torch.float32, spoiled.device),
                weight_of, chunk_of, spoiled if factor is None else factor, spoiled,
                factor is not None, has_master, rounds, is_8bit, is_counted,
                step_kernels.TYPES[weight_type], step_kernels.TYPES[gradient_type], even, ROWS, TURNS, num_warps=WARPS,
            )  # fmt: skip

    def _programs_of(self, counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        if counts not in self._programs:
            chunks = -(-torch.tensor(counts) // (TURNS * ROWS * BLOCK))
            weight_of = torch.repeat_interleave(torch.arange(len(counts)), chunks)
            chunk_of = torch.arange(len(weight_of)) - (chunks.cumsum(0) - chunks)[weight_of]
            self._programs[counts] = weight_of.int().to(device), chunk_of.int().to(device)
        return self._programs[counts]


def _by_kind(prepared: Sequence[Prepared]) -> dict[Kind, list[Prepared]]:
    found: dict[Kind, list[Prepared]] = {}
    for each in prepared:
        found.setdefault(each.kind, []).append(each)
    return found


def _to_device(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sends numbers without waiting for what the device does."""
    table = torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


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
