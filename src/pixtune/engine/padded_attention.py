"""Attention over padded sequences, by kernels that do not know about padding.

Captions differ in length, and a step that is captured has one shape. A mask would force the slowest kernel. Instead
padded keys and values are zero: each adds exp(0) = 1 to the denominator of a softmax and nothing to its numerator. With
L the log-sum-exp of a row that the kernel returns, and n padded keys, the true one is L' = log(exp(L) - n), and the
true output is exp(L - L') times the kernel's. That holds for any query, including those of padded tokens.

The backward kernels compute probabilities as exp(S - L), and take from the output only D = sum(dO * O) (Dao 2023, arXiv
2307.08691, algorithm 2). Given L' and the true output, they compute the true gradients of queries and of real keys and
values; padded keys add to dQ a multiple of a key that is zero.

The difference exp(L) - n must not cancel, and a model's keys may share an offset that makes all of a row's scores very
negative, which a softmax does not change with. So the mean of the real keys is subtracted from each of them first. That
adds one number to all scores of a row, which changes neither the output nor a gradient, and by Jensen's inequality N
real keys then make up at least N of the denominator: the padded ones never more than n / (N + n) of it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixtune.plan.kernel_choice import CUDNN, FLASH, LARGEST_ERROR

ON_CPU = "cpu"
"""Kernel of CPUs. Like cuDNN's and flash attention, which compute in bf16 and fp16 only, it returns the log-sum-exp."""


@dataclass
class PaddingKernel:
    """Kernel that the process uses for attention to padded captions."""

    on_gpus: str = CUDNN
    """The plan's kernel, set by `attention.use_attention`; by default that of plans which name none."""


PADDING_KERNEL = PaddingKernel()


def padding_kernel(device: torch.device) -> str:
    """Returns the kernel of the run's plan, unless results must be the same bits each time."""
    if device.type == "cpu":
        return ON_CPU
    return FLASH if torch.are_deterministic_algorithms_enabled() else PADDING_KERNEL.on_gpus


def padding_obstacle(device: torch.device, head_size: int) -> str | None:
    """Returns why `attend_padded` cannot be used forward, in bf16 and on a GPU; None: it is right.

    Runs have tried both directions before (`attention_trial.py`); samples alone need no process for it.
    """
    return None if device.type == "cpu" else _try_padding(device, head_size, padding_kernel(device))


@functools.cache
def _try_padding(device: torch.device, head_size: int, kernel: str) -> str | None:
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = torch.randn(3, 2, 96, 2, head_size, device=device, generator=generator).bfloat16()
    real_BL = torch.arange(96, device=device) >= torch.tensor([[0], [48]], device=device)
    try:
        with torch.no_grad():
            found = attend_padded(query, key, value, real_BL, kernel).float()
            with sdpa_kernel(SDPBackend.MATH):
                expected = torch.nn.functional.scaled_dot_product_attention(
                    query.transpose(1, 2).float(),
                    key.transpose(1, 2).float(),
                    value.transpose(1, 2).float(),
                    real_BL[:, None, None],
                ).transpose(1, 2)
        error = float((found - expected).norm() / expected.norm())
    except RuntimeError as fault:
        return f"{type(fault).__name__}: {fault}".splitlines()[0]
    return None if error < LARGEST_ERROR else f"its results are wrong by {error:.2g} times their size"


def attend_padded(query_BLHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor, real_BL: Tensor, kernel: str) -> Tensor:
    """Attends from all tokens, padded ones included, to the real ones, as with a mask; shape (B, L, H, D).

    Args:
        real_BL: False where a token is padding; at least one of each example is real. Keys and values of padding may
            be anything, even NaN, and get a gradient of zero.
        kernel: cuDNN's, flash attention or `ON_CPU`.
    """
    padded_BL11 = ~real_BL[:, :, None, None]
    num_real_B = real_BL.sum(dim=1)
    total_B1HD = key_BLHD.detach().masked_fill(padded_BL11, 0).sum(dim=1, keepdim=True, dtype=torch.float32)
    mean_B1HD = (total_B1HD / num_real_B.view(-1, 1, 1, 1)).to(key_BLHD.dtype)
    key_BLHD = (key_BLHD - mean_B1HD).masked_fill(padded_BL11, 0)
    value_BLHD = value_BLHD.masked_fill(padded_BL11, 0)
    query, key, value = (states.transpose(1, 2) for states in (query_BLHD, key_BLHD, value_BLHD))
    return PaddedAttention.apply(query, key, value, real_BL.shape[1] - num_real_B, kernel).transpose(1, 2)


class PaddedAttention(torch.autograd.Function):
    """Attention of queries, keys and values of shape (B, H, L, D), the padded keys and values zero."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, num_padded_B: Tensor, kernel: str) -> Tensor:
        attended, logsumexp, seed, offset = run_forward(kernel, query, key, value)
        num_padded = num_padded_B.view(-1, *[1] * (logsumexp.ndim - 1))
        change = torch.log1p(-num_padded * torch.exp(-logsumexp))
        attended = (attended * torch.exp(-change).reshape(*attended.shape[:3], 1)).to(attended.dtype)
        ctx.kernel = kernel
        ctx.save_for_backward(query, key, value, attended, logsumexp + change, seed, offset)
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # torch 2.11 stores cuDNN's plan without the gradient's strides: see `attention.py`.
        dense = gradient.transpose(1, 2).contiguous().transpose(1, 2)
        return (*run_backward(ctx.kernel, dense, *ctx.saved_tensors), None, None)


def run_forward(
    kernel: str, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns output, log-sum-exp of each row, and the random state (for dropout) that `run_backward` takes.

    The log-sum-exp has shape (B, H, L), or (B, H, L, 1) from cuDNN's kernel.
    """
    operators = torch.ops.aten
    if kernel == ON_CPU:
        return (*operators._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False), None, None)
    if kernel == CUDNN:
        found = operators._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, False, False)
    else:
        found = operators._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False)
    attended, logsumexp, _, _, _, _, seed, offset, _ = found
    return attended, logsumexp, seed, offset


def run_backward(
    kernel: str,
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Tensor,
    logsumexp: Tensor,
    seed: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, ...]:
    """Returns the gradients of queries, keys and values."""
    operators, given = torch.ops.aten, (gradient, query, key, value, attended, logsumexp)
    # All sequences have one length: there is no table of where each begins, and the longest is as long as all.
    lengths = (None, None, query.shape[2], key.shape[2])
    if kernel == ON_CPU:
        found = operators._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, False)
    elif kernel == CUDNN:
        found = operators._scaled_dot_product_cudnn_attention_backward(*given, seed, offset, None, *lengths, 0.0, False)
    else:
        found = operators._scaled_dot_product_flash_attention_backward(*given, *lengths, 0.0, False, seed, offset)
    return tuple(found)
