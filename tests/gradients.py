"""Gradients of tensors that must have one."""

from __future__ import annotations

from torch import Tensor


def gradient_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None, "no gradient has reached it"
    return tensor.grad
