"""Keeps a step whose loss or gradients are no numbers from changing anything, without waiting for the device.

Whether a step is spoiled is a number on the device, 1 or 0, which the kernels of an optimizer read there: torch's fused
ones change nothing where it is 1. Others step all the same, and what they changed is put back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

UNDO_BYTES = 1 << 25
"""Bytes of weights and states that are kept at once while an optimizer steps, unless one weight has more."""


def is_spoiled(loss: Tensor, norm: Tensor) -> Tensor:
    """Returns 1 where a step's loss or the norm of its gradients is no finite number, else 0: fp32, on the device.

    All processes of a run get the same answer, since both have been averaged over them.
    """
    return (0 * loss + 0 * norm).ne_(0)  # infinity times 0 is no number, and only that differs from 0


def step_unless(optimizer: Any, spoiled: Tensor) -> None:
    """Steps an optimizer of `optimizers.BUILDERS`; where `is_spoiled` returned 1, neither weights nor states change."""
    optimizer.found_inf = spoiled  # the name under which torch's optimizers take it from its gradient scaler
    optimizer.step()


class Undo:
    """A copy of tensors that are about to change, from which they are put back if the device decides so.

    Args:
        tensors: contiguous, of any formats, all on one device. No two share memory.
        memory: bytes for the copy, at least as many as the tensors have.
    """

    def __init__(self, tensors: Sequence[Tensor], memory: Tensor) -> None:
        words = torch.int32 if all(tensor.nbytes % 4 == 0 for tensor in tensors) else torch.uint8
        self._now = [tensor.detach().view(-1).view(words) for tensor in tensors]
        self._before = memory[: num_bytes(tensors)].view(words)
        torch.cat(self._now, out=self._before)

    def if_spoiled(self, spoiled: Tensor) -> None:
        """Puts the tensors back as they were where `spoiled` is 1. Must be called once at most."""
        # Sums of whole numbers wrap around, so this is exact whatever the bits stand for, NaN included. The plain
        # choice, torch.where, takes one tensor at a time, and a LoRA has thousands of small ones.
        differences = self._before.split([tensor.numel() for tensor in self._now])
        torch._foreach_sub_(differences, self._now)
        self._before.mul_(spoiled.to(self._before.dtype))
        torch._foreach_add_(self._now, differences)


def num_bytes(tensors: Sequence[Tensor]) -> int:
    """Counts the bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def spoiled_weights(weights: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of tensors that hold a value which is no finite number. Waits for the device."""
    return [name for name, weight in weights.items() if not weight.detach().isfinite().all()]
