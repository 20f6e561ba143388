"""Linear layers to which a LoKr adds `scale * kron(w1, w2)` (LyCORIS; Yeh et al. 2023, arXiv 2309.14859, section 3).

PEFT writes the Kronecker product out as a matrix of the layer's own size, in fp32, and multiplies by that: another pass
as costly as the layer's, and gradients of that matrix. Here neither is made. Input features are a grid (p, q), so that
`w2` is a product along q and `w1` one along p, both small. The parameters, their names and files stay PEFT's.

Plain kernels compute it, one layer after the other. The backward pass keeps the input alone, which is kept anyhow, and
computes the product along q again: it costs a sixteenth of the layer's own with factors of 16.

Shapes in names: M rows of the input (tokens), K = p * q input features, N = l * k output features; `w1` is (l, p) and
`w2` is (k, q).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from pixtune.engine.lora import summed_outer


def compute_by_ours(layer: Any) -> None:
    """Has a LoKr layer of PEFT's compute its sum by this module."""
    layer.forward = MethodType(with_kronecker, layer)


def with_kronecker(layer: Any, input: Tensor) -> Tensor:
    """Returns the base layer's output plus what each active LoKr adds."""
    output: Tensor = layer.base_layer(input)
    if layer.disable_adapters or layer.merged:
        return output
    rows_MK = input.reshape(-1, input.shape[-1])
    for name in layer.active_adapters:
        if name in layer.scaling:
            w1_lp, w2_kq = whole_factor(layer, "lokr_w1", name), whole_factor(layer, "lokr_w2", name)
            added_MN = KroneckerProduct.apply(rows_MK, w1_lp, w2_kq, layer.scaling[name])
            output = output + added_MN.view(output.shape)
    return output


def whole_factor(layer: Any, factor: str, name: str) -> Tensor:
    """Returns `lokr_w1` or `lokr_w2`, multiplied out where it is a product of two matrices of low rank; fp32."""
    whole = getattr(layer, factor)
    if name in whole:
        return whole[name]
    return getattr(layer, f"{factor}_a")[name] @ getattr(layer, f"{factor}_b")[name]


class KroneckerProduct(torch.autograd.Function):
    """`scale * x @ kron(w1, w2).T`. Factors are in fp32 and rounded to the input's format for the products; their
    gradients are summed in fp32."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, w1_lp: Tensor, w2_kq: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x_MK, w1_lp, w2_kq)
        ctx.scale = scale
        inner_Mpk = along_last(x_MK, w2_kq)
        return ((w1_lp * scale).to(x_MK.dtype) @ inner_Mpk).flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient_MN: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x_MK, w1_lp, w2_kq = ctx.saved_tensors
        num_l, (num_k, num_q) = w1_lp.shape[0], w2_kq.shape
        gradient_Mlk = gradient_MN.reshape(-1, num_l, num_k)
        inner_gradient_Mpk = (w1_lp * ctx.scale).to(x_MK.dtype).t() @ gradient_Mlk
        rows_gradient = inner_gradient_Mpk.reshape(-1, num_k)
        x_gradient_MK = None
        if ctx.needs_input_grad[0]:
            x_gradient_MK = (rows_gradient @ w2_kq.to(x_MK.dtype)).view(x_MK.shape)
        w2_gradient_kq = summed_outer(rows_gradient, x_MK.reshape(-1, num_q))
        inner_Mpk = along_last(x_MK, w2_kq)
        w1_gradient_lp = summed_outer(by_last(gradient_Mlk), by_last(inner_Mpk)) * ctx.scale
        return x_gradient_MK, w1_gradient_lp, w2_gradient_kq, None


def along_last(x_MK: Tensor, w2_kq: Tensor) -> Tensor:
    """Multiplies the features' grid by `w2` along its last axis; shape (M, p, k)."""
    inner = x_MK.reshape(-1, w2_kq.shape[1]) @ w2_kq.to(x_MK.dtype).t()
    return inner.view(x_MK.shape[0], -1, w2_kq.shape[0])


def by_last(grid_Mak: Tensor) -> Tensor:
    """Returns a grid with a row for each token and last feature; shape (M * k, a)."""
    return grid_Mak.transpose(1, 2).reshape(-1, grid_Mak.shape[1])
