"""A block's MLP of two frozen 8-bit layers as one function, in which everything between their products is one pass.

GELU, the codes of its output for the second product and, with selective recomputation, those of its input for the
backward pass are computed from one reading of the first product; so are the gradient's codes from the gradient and that
input. The compiler would read each of them twice: once to find a row's peak, once more to divide by it.

Shapes in names: M rows (tokens), K input features, H hidden features, P features that come beside them, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.kernels import has_triton, power_of_two
from pixtune.engine.quantize import LARGEST_CODE, QuantizedLinear, multiply_rows, quantize_rows, row_codes

CODES = torch.float8_e4m3fn
"""Format of the codes that the kernels write."""
WARPS = 16, 16
"""Warps per program of the kernels, forward and backward: the fastest of 4 to 32 on an H200 with 12,288 hidden
features."""


def mlp(
    states_BLK: Tensor, first: nn.Module, gelu: nn.Module, last: nn.Module, beside_BLP: Tensor | None = None
) -> Tensor:
    """Computes `last([beside, gelu(first(states))])`, within rounding; shape (B, L, N).

    Args:
        gelu: a module whose `approximate` names its form. With `keeps_codes` its input is kept in 8 bits.
        beside_BLP: features that the last layer reads before the hidden ones.
    """
    if not are_fused(states_BLK, first, gelu, last):
        hidden_BLH = gelu(first(states_BLK))
        return last(hidden_BLH if beside_BLP is None else torch.cat([beside_BLP, hidden_BLH], dim=2))
    assert isinstance(first, QuantizedLinear) and isinstance(last, QuantizedLinear)
    rows_MK = states_BLK.reshape(-1, states_BLK.shape[-1])
    beside_MP = None if beside_BLP is None else beside_BLP.reshape(-1, beside_BLP.shape[-1])
    product_MN = FrozenMlp.apply(
        rows_MK, beside_MP, first.bias, getattr(gelu, "keeps_codes", False),
        first.weight, first.block_scale, first.scale, first.transpose,
        last.weight, last.block_scale, last.scale, last.transpose,
    )  # fmt: skip
    product = product_MN.view(*states_BLK.shape[:-1], last.out_features)
    return product if last.bias is None else product + last.bias


def are_fused(states: Tensor, first: nn.Module, gelu: nn.Module, last: nn.Module) -> bool:
    """Returns whether one function computes two layers and their GELU: both frozen, in `CODES` and without a LoRA."""
    layers = all(
        type(layer) is QuantizedLinear and layer.codes == CODES and layer.tensor_cores for layer in (first, last)
    )
    return (
        layers and has_triton(states) and states.dtype == torch.bfloat16 and getattr(gelu, "approximate", "") == "tanh"
    )


def fuse_mlps(blocks: Iterable[nn.Module]) -> None:
    """Has `mlp` compute diffusers' MLPs in these blocks, wherever their layers fit."""
    from diffusers.models.activations import GELU
    from diffusers.models.attention import FeedForward

    for block in blocks:
        for module in block.modules():
            if isinstance(module, FeedForward) and len(module.net) == 3 and isinstance(module.net[0], GELU):
                module.forward = MethodType(feed_forward, module)


def feed_forward(module: Any, hidden_states: Tensor) -> Tensor:
    """Replaces diffusers' `FeedForward.forward` where the activation is a GELU. No model has a dropout there."""
    activation, dropout, last = module.net
    if not are_fused(hidden_states, activation.proj, activation, last) or (module.training and dropout.p):
        return last(dropout(activation(hidden_states)))
    return mlp(hidden_states, activation.proj, activation, last)


class FrozenMlp(torch.autograd.Function):
    """`[beside, gelu(x @ first.T + bias)] @ last.T` of quantized layers, without the last one's bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MK: Tensor,
        beside_MP: Tensor | None,
        bias_H: Tensor | None,
        keeps_codes: bool,
        *layers: Tensor | None,
    ) -> Tensor:
        first, last = layers[:4], layers[4:]
        codes, scale = quantize_rows(x_MK, CODES)
        hidden_MH = multiply_rows(codes, scale, *_read(first), x_MK.dtype, tensor_cores=True)
        codes, scale, kept, kept_scale = gelu_codes(hidden_MH, bias_H, beside_MP, keeps_codes)
        ctx.save_for_backward(bias_H, *((kept, kept_scale) if keeps_codes else (hidden_MH, None)), *layers)
        ctx.num_beside = 0 if beside_MP is None else beside_MP.shape[1]
        return multiply_rows(codes.view(CODES), scale, *_read(last), x_MK.dtype, tensor_cores=True)

    @staticmethod
    def backward(ctx: Any, gradient_MN: Tensor) -> tuple[Tensor | None, ...]:
        bias_H, kept, kept_scale, *layers = ctx.saved_tensors
        first, last = layers[:4], layers[4:]
        weight, scale_N1 = _read_transposed(last)
        codes, scale = quantize_rows(gradient_MN.float() * scale_N1.t(), CODES)
        inner = multiply_rows(codes, scale, weight, _ones(weight), gradient_MN.dtype, tensor_cores=True)
        weight, scale_H1 = _read_transposed(first)
        codes, scale = gelu_gradient_codes(inner[:, ctx.num_beside :], kept, kept_scale, bias_H, scale_H1.flatten())
        x_gradient = multiply_rows(
            codes.view(CODES), scale, weight, _ones(weight), gradient_MN.dtype, tensor_cores=True
        )
        beside_gradient = inner[:, : ctx.num_beside] if ctx.num_beside else None
        return x_gradient, beside_gradient, None, None, *(None for _ in layers)


def _read(layer: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Returns a layer's codes and its scale per row."""
    stored, block_scale, scale, _ = layer
    return row_codes(stored, block_scale, scale, CODES, transposed=False)


def _read_transposed(layer: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Returns a layer's transposed codes, and the scale per row of the weight."""
    stored, block_scale, scale, transpose = layer
    if transpose is not None:
        return transpose.view(CODES), scale
    return row_codes(stored, block_scale, scale, CODES, transposed=True)


def _ones(weight_KN: Tensor) -> Tensor:
    return torch.ones(weight_KN.shape[0], 1, device=weight_KN.device)


@torch.library.custom_op("pixtune::gelu_codes", mutates_args=())
def gelu_codes(
    hidden_MH: Tensor, bias_H: Tensor | None, beside_MP: Tensor | None, keeps_input: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes a GELU's output and, for the backward pass, its input.

    Returns:
        Codes of [beside, gelu(hidden + bias)] as bytes, (M, P + H), and their scale, (M, 1); codes and scale of
        hidden + bias, or two empty tensors.
    """
    from pixtune.engine import triton_kernels

    results = _new_codes(hidden_MH, beside_MP, keeps_input)
    hidden_MH, width = hidden_MH.contiguous(), hidden_MH.shape[1]
    beside_MP = None if beside_MP is None else beside_MP.contiguous()
    num_beside = 0 if beside_MP is None else beside_MP.shape[1]
    triton_kernels.gelu_codes[(len(hidden_MH),)](
        hidden_MH, hidden_MH if bias_H is None else bias_H, hidden_MH if beside_MP is None else beside_MP, *results,
        width, num_beside, LARGEST_CODE[CODES], bias_H is not None, keeps_input,
        power_of_two(width), power_of_two(num_beside), num_warps=WARPS[0],
    )  # fmt: skip
    return results


@gelu_codes.register_fake
def _(
    hidden_MH: Tensor, bias_H: Tensor | None, beside_MP: Tensor | None, keeps_input: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_codes(hidden_MH, beside_MP, keeps_input)


def _new_codes(hidden_MH: Tensor, beside_MP: Tensor | None, keeps_input: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = hidden_MH.shape
    num_beside = 0 if beside_MP is None else beside_MP.shape[1]
    kept = (rows, width) if keeps_input else (0, 0)
    return (
        hidden_MH.new_empty(rows, num_beside + width, dtype=torch.uint8),
        hidden_MH.new_empty(rows, 1, dtype=torch.float32),
        hidden_MH.new_empty(*kept, dtype=torch.uint8),
        hidden_MH.new_empty(kept[0], 1, dtype=torch.float32),
    )


@torch.library.custom_op("pixtune::gelu_gradient_codes", mutates_args=())
def gelu_gradient_codes(
    gradient_MH: Tensor, kept_MH: Tensor, kept_scale_M1: Tensor | None, bias_H: Tensor | None, column_scale_H: Tensor
) -> tuple[Tensor, Tensor]:
    """Quantizes the gradient of a GELU's input, times a scale per column.

    Args:
        gradient_MH: gradient of the GELU's output; its rows may be parts of longer ones.
        kept_MH: the GELU's input as bytes of codes with a scale; without a scale, unquantized and without the bias.

    Returns:
        Codes as bytes, (M, H), and their scale, (M, 1).
    """
    from pixtune.engine import triton_kernels

    results = _new_gradient_codes(gradient_MH)
    rows, width = gradient_MH.shape
    gradient_MH = gradient_MH if gradient_MH.stride(1) == 1 else gradient_MH.contiguous()
    triton_kernels.gelu_gradient_codes[(rows,)](
        gradient_MH, gradient_MH.stride(0), kept_MH.contiguous(), kept_MH if kept_scale_M1 is None else kept_scale_M1,
        kept_MH if bias_H is None else bias_H, column_scale_H.contiguous(), *results, width, LARGEST_CODE[CODES],
        bias_H is not None and kept_scale_M1 is None, kept_scale_M1 is not None, power_of_two(width),
        num_warps=WARPS[1],
    )  # fmt: skip
    return results


@gelu_gradient_codes.register_fake
def _(
    gradient_MH: Tensor, kept_MH: Tensor, kept_scale_M1: Tensor | None, bias_H: Tensor | None, column_scale_H: Tensor
) -> tuple[Tensor, Tensor]:
    return _new_gradient_codes(gradient_MH)


def _new_gradient_codes(gradient_MH: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = gradient_MH.shape
    codes_MH = gradient_MH.new_empty(rows, width, dtype=torch.uint8)
    return codes_MH, gradient_MH.new_empty(rows, 1, dtype=torch.float32)
