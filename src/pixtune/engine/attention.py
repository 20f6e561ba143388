"""Makes PyTorch use the attention kernel that a run's plan has chosen, and makes its gradients dense.

cuDNN's kernel is twice as fast as flash attention on recent GPUs, and not correct everywhere: PyTorch 2.11 stores its
plan of a backward pass by the shapes and strides of queries, keys and values alone, and computes with the strides of
the first gradient that came for them. Where one kind of block passes it a dense gradient and another one a slice of a
wider tensor, gradients come out wrong, or the process dies of an illegal memory access. So families make every gradient
dense (`with_dense_gradient`), and each kernel is checked and timed before it is used (`attention_trial.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend

from pixtune.engine.padded_attention import PADDING_KERNEL
from pixtune.errors import ConfigError
from pixtune.plan.kernel_choice import CUDNN, EFFICIENT, FLASH, FLASH_3, PADDING

BACKENDS = {
    CUDNN: SDPBackend.CUDNN_ATTENTION,
    FLASH: SDPBackend.FLASH_ATTENTION,
    EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
    FLASH_3: SDPBackend.FLASH_ATTENTION,  # it replaces PyTorch's own
}
FLASH_ATTENTION_3 = "flash_attn_interface"
"""Module that torch looks for."""


class _DenseGradient(torch.autograd.Function):
    """The identity, whose gradient is contiguous."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Always a copy: the compiler of torch 2.11 loses a gradient that such a function returns unchanged.
        return gradient.clone(memory_format=torch.contiguous_format)


def with_dense_gradient(attended_BLC: Tensor) -> Tensor:
    """Returns the same tensor, through which attention gets a contiguous gradient."""
    return _DenseGradient.apply(attended_BLC) if attended_BLC.requires_grad else attended_BLC


def flash_attention_3_obstacle() -> str | None:
    """Returns why this installation cannot use FlashAttention 3; None: it can."""
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return f"torch {torch.__version__} accepts no flash attention but its own"
    if find_spec(FLASH_ATTENTION_3) is None:
        return f"its module {FLASH_ATTENTION_3} is not installed (the hopper folder of flash-attention builds it)"
    return None


def use_flash_attention_3() -> None:
    """Replaces PyTorch's flash attention by FlashAttention 3 for the rest of the process, in compiled blocks too.

    Raises:
        ConfigError: a resumed run's plan asks for it, and it is not installed.
    """
    if (obstacle := flash_attention_3_obstacle()) is not None:
        raise ConfigError("the plan of this run uses FlashAttention 3", [f"{obstacle}. Install it, or start anew."])
    torch.nn.attention.activate_flash_attention_impl("FA3")


def use_attention(kernel: str | None, off: Sequence[str]) -> None:
    """Makes the process attend by one kernel wherever it can, in blocks that are compiled later too.

    What the kernel does not take (masks, fp32, wide heads) goes to the next one that does; PyTorch's plain products are
    never switched off. Without a kernel, the order is PyTorch's.

    Args:
        kernel, off: a plan's `attention` and `attention_off`.

    Raises:
        ConfigError: see `use_flash_attention_3`.
    """
    if kernel == FLASH_3:
        use_flash_attention_3()
    first = BACKENDS[kernel] if kernel is not None else None
    for name in off:
        if BACKENDS[name] != first and name != FLASH_3:  # torch's own flash attention is not switched off by it
            switch(BACKENDS[name], on=False)
    PADDING_KERNEL.on_gpus = kernel if kernel in PADDING else CUDNN
    if first is not None:
        switch(first, on=True)
        put_first(first)


def switch(backend: SDPBackend, on: bool) -> None:
    """Allows PyTorch to use a kernel, or forbids it."""
    switches = {
        SDPBackend.CUDNN_ATTENTION: cuda.enable_cudnn_sdp,
        SDPBackend.FLASH_ATTENTION: cuda.enable_flash_sdp,
        SDPBackend.EFFICIENT_ATTENTION: cuda.enable_mem_efficient_sdp,
    }
    switches[backend](on)


def put_first(backend: SDPBackend) -> None:
    """Makes PyTorch take a kernel before all others.

    Its own order has cuDNN's first on Hopper and B200 (capabilities 9.0 and 10.0), and on all other GPUs behind plain
    products, where it is never reached.
    """
    if not hasattr(torch._C, "_set_sdp_priority_order"):  # in 2.6 to 2.13 there is
        # What PyTorch prefers is forbidden instead. Memory-efficient attention stays, for masks and fp32, and may keep
        # cuDNN's kernel from being reached.
        for other in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            if other != backend:
                switch(other, on=False)
        return
    if torch.cuda.is_available():
        settle_own_order()
    others = [number for number in torch._C._get_sdp_priority_order() if number != backend.value]
    torch._C._set_sdp_priority_order([backend.value, *others])


def settle_own_order() -> None:
    """Has PyTorch choose a kernel once, since on Hopper and B200 its first choice overwrites any order set before."""
    states = torch.empty(1, 1, 8, 8, dtype=torch.bfloat16, device="cuda")
    torch.ops.aten._fused_sdp_choice(states, states, states)


def in_force() -> tuple[object, ...]:
    """Returns everything that decides which kernel PyTorch takes."""
    order: list[int] = getattr(torch._C, "_get_sdp_priority_order", list)()
    replaced = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    enabled = (cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled())
    return (*enabled, replaced, tuple(order))
