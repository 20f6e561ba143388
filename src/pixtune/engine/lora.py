"""Linear layers that read the same input, with the LoRA products of all of them computed together.

PEFT computes each layer by itself, so queries, keys and values read one input three times for their down-projections
and three more times for the gradients of these, and write three input gradients to be added. Here each is one product
with the joined down-projections, forward and backward. Only the arithmetic differs: the parameters, their names and the
files stay PEFT's, and whatever is not a plain LoRA is left to PEFT.

The whole group is one autograd function and not composed of torch's operators, for three reasons: one kernel converts
all weights from fp32 to the input's format, a backward pass that is not compiled keeps no rounded copies of them, and
gradients of weights come out of their products in fp32, without a conversion each.

Shapes in names: M rows of the input (tokens), K input features, N output features, R ranks of all layers together, r
the rank of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.kernels import has_triton, power_of_two
from pixtune.engine.quantize import QuantizedLinear

TILE_ROWS, TILE_COLUMNS, MIN_TILE = 64, 128, 16
"""Tiles of the kernel that adds; the tensor cores of GPUs take no fewer than `MIN_TILE` rows or columns."""


@dataclass(frozen=True)
class LowRankPair:
    """A plain LoRA, which adds `scale * x @ down.T @ up.T` to its layer."""

    down_rK: Tensor
    up_Nr: Tensor
    scale: float


def project(states: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Returns each layer's output for one input: `layer(states)`, within rounding.

    Args:
        states: features on the last axis.
        layers: linear ones of any kind, each with or without a LoRA of any rank.
    """
    pairs = [plain_lora(layer) for layer in layers]
    present = [pair for pair in pairs if pair is not None]
    if not present:
        return tuple(layer(states) for layer in layers)
    bases: list[Any] = [layer.base_layer for layer, pair in zip(layers, pairs, strict=True) if pair is not None]
    sums = list(with_low_rank(states, bases, present))
    return tuple(layer(states) if pair is None else sums.pop(0) for layer, pair in zip(layers, pairs, strict=True))


def plain_lora(layer: nn.Module) -> LowRankPair | None:
    """Returns the one LoRA that a layer adds to its base. None if it adds none, or in a way that only PEFT knows."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1:
        return None
    name = names[0]
    if name in layer.lora_variant or layer.lora_bias[name] or not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    return LowRankPair(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def with_low_rank(states: Tensor, bases: Sequence[nn.Module], pairs: Sequence[LowRankPair]) -> tuple[Tensor, ...]:
    """Returns each base layer's output plus what its pair adds; the shape of `states` apart from the last axis."""
    rows_MK = states.reshape(-1, states.shape[-1])
    products, biases = zip(*(product_and_bias(base, rows_MK) for base in bases), strict=True)
    scales = tuple(pair.scale for pair in pairs)
    downs_rK, ups_Nr = [pair.down_rK for pair in pairs], [pair.up_Nr for pair in pairs]
    sums = WithLowRank.apply(rows_MK, scales, *products, *biases, *downs_rK, *ups_Nr)
    return tuple(sum_MN.view(*states.shape[:-1], -1) for sum_MN in sums)


def product_and_bias(layer: nn.Module, rows_MK: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns a layer's output, and a bias if that is still to be added to it.

    Unlike a product of 16-bit numbers, one of 8-bit codes comes without the bias, whose addition would be a pass of its
    own.
    """
    if isinstance(layer, QuantizedLinear) and is_fused(rows_MK):
        return layer.product(rows_MK), layer.bias
    return layer(rows_MK), None


class WithLowRank(torch.autograd.Function):
    """`product + bias + scale * x @ down.T @ up.T` of several layers that read the same x.

    `tensors` are all products, all biases, all downs, then all ups. Downs and ups are in fp32 or in the input's format,
    and their gradients are accumulated in fp32. Biases are frozen.
    """

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, scales: tuple[float, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(scales)
        products_MN, biases_N, matrices = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        down_RK, ups_Nr = join_rounded(matrices, scales, x_MK.dtype)
        low_MR = x_MK @ down_RK.t()
        ctx.save_for_backward(x_MK, low_MR, *matrices)
        ctx.scales = scales
        lows_Mr = low_MR.split([up_Nr.shape[1] for up_Nr in ups_Nr], dim=1)
        parts = zip(products_MN, biases_N, lows_Mr, ups_Nr, strict=True)
        return tuple(plus_product(*part) for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients_MN: Tensor) -> tuple[Tensor | None, ...]:
        x_MK, low_MR, *matrices = ctx.saved_tensors
        down_RK, ups_Nr = join_rounded(matrices, ctx.scales, x_MK.dtype)
        ranks = [up_Nr.shape[1] for up_Nr in ups_Nr]
        low_gradient_MR = torch.cat(
            [gradient_MN @ up_Nr for gradient_MN, up_Nr in zip(gradients_MN, ups_Nr, strict=True)], dim=1
        )
        x_gradient_MK = low_gradient_MR @ down_RK if ctx.needs_input_grad[0] else None
        up_gradients_Nr = [
            scaled(summed_outer(gradient_MN, low_Mr), scale)
            for gradient_MN, low_Mr, scale in zip(gradients_MN, low_MR.split(ranks, dim=1), ctx.scales, strict=True)
        ]
        down_gradients_rK = summed_outer(low_gradient_MR, x_MK).split(ranks)
        # Views, since the compiler of torch 2.11 loses a gradient that such a function returns unchanged.
        products = [gradient_MN.view_as(gradient_MN) for gradient_MN in gradients_MN]
        return x_gradient_MK, None, *products, *(None for _ in products), *down_gradients_rK, *up_gradients_Nr


def is_fused(x_MK: Tensor) -> bool:
    """Returns whether one kernel computes what a LoRA adds and adds it."""
    return has_triton(x_MK) and x_MK.dtype in (torch.bfloat16, torch.float16)


def plus_product(product_MN: Tensor, bias_N: Tensor | None, low_Mr: Tensor, up_Nr: Tensor) -> Tensor:
    """Returns `product + bias + low @ up.T`."""
    return (add_low_rank if is_fused(product_MN) else plainly_added)(product_MN, bias_N, low_Mr, up_Nr)


def plainly_added(product_MN: Tensor, bias_N: Tensor | None, low_Mr: Tensor, up_Nr: Tensor) -> Tensor:
    """Computes `plus_product` by torch's operators."""
    base_MN = product_MN if bias_N is None else product_MN + bias_N
    return base_MN + low_Mr @ up_Nr.t()


@torch.library.custom_op("pixtune::add_low_rank", mutates_args=())
def add_low_rank(product_MN: Tensor, bias_N: Tensor | None, low_Mr: Tensor, up_Nr: Tensor) -> Tensor:
    """Computes `plus_product` in one kernel, on a GPU. Rows of `low_Mr` may be parts of longer ones."""
    from pixtune.engine import triton_kernels

    product_MN, up_Nr = product_MN.contiguous(), up_Nr.contiguous()
    low_Mr = low_Mr if low_Mr.stride(1) == 1 else low_Mr.contiguous()
    result_MN = torch.empty_like(product_MN)
    (rows, columns), rank = product_MN.shape, up_Nr.shape[1]
    tiles = (-(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS))
    ranks = min(max(power_of_two(rank), MIN_TILE), TILE_ROWS)
    triton_kernels.plus_product[tiles](
        product_MN, product_MN if bias_N is None else bias_N, low_Mr, up_Nr, result_MN, rows, columns,
        low_Mr.stride(0), bias_N is not None, rank, TILE_ROWS, TILE_COLUMNS, ranks,
    )  # fmt: skip
    return result_MN


@add_low_rank.register_fake
def _(product_MN: Tensor, bias_N: Tensor | None, low_Mr: Tensor, up_Nr: Tensor) -> Tensor:
    return product_MN.new_empty(product_MN.shape)


def join_rounded(
    matrices: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns all downs as one matrix (R, K), and each up times its scale, in the given format.

    One kernel writes them all, one after the other.
    """
    downs_rK, ups_Nr = matrices[: len(scales)], matrices[len(scales) :]
    parts = [*downs_rK, *(scaled(up_Nr, scale) for up_Nr, scale in zip(ups_Nr, scales, strict=True))]
    flat = torch.cat([part.flatten() for part in parts]).to(dtype)
    num_down = sum(down_rK.numel() for down_rK in downs_rK)
    flat_down, *flat_ups = flat.split([num_down, *(up_Nr.numel() for up_Nr in ups_Nr)])
    ups = tuple(flat_up.view(up_Nr.shape) for flat_up, up_Nr in zip(flat_ups, ups_Nr, strict=True))
    return flat_down.view(-1, downs_rK[0].shape[1]), ups


def scaled(matrix: Tensor, scale: float) -> Tensor:
    return matrix if scale == 1 else matrix * scale


@torch.library.custom_op("pixtune::summed_outer", mutates_args=())
def summed_outer(a_MN: Tensor, b_MK: Tensor) -> Tensor:
    """Computes `a.T @ b` in fp32, from any format; shape (N, K).

    A custom operator, since a GPU multiplies 16-bit numbers into fp32 directly and a CPU does not.
    """
    if a_MN.is_cuda and a_MN.dtype != torch.float32:
        return torch.mm(a_MN.t(), b_MK, out_dtype=torch.float32)
    return torch.mm(a_MN.t().float(), b_MK.float())


@summed_outer.register_fake
def _(a_MN: Tensor, b_MK: Tensor) -> Tensor:
    return a_MN.new_empty((a_MN.shape[1], b_MK.shape[1]), dtype=torch.float32)
