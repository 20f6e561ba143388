"""Linear layers that read the same input, with the LoRA products of all of them computed together.

PEFT computes each layer by itself, so queries, keys and values read one input three times for their down-projections
and three more times for the gradients of these, and write three input gradients to be added. Here each is one product
with the joined down-projections, forward and backward. Only the arithmetic differs: the parameters, their names and the
files stay PEFT's. A DoRA is a LoRA whose sum gets a gain (`dora.py`), a LoKr has its own arithmetic (`lokr.py`), and
whatever else is not a plain LoRA is left to PEFT.

A layer may have several LoRAs, some of them frozen. Their matrices are joined along the rank, so that a second one
costs no pass over the output, and a frozen one no product for gradients.

The whole group is one autograd function and not composed of torch's operators, for three reasons: one kernel converts
all weights from fp32 to the input's format, a backward pass that is not compiled keeps no rounded copies of them, and
gradients of weights come out of their products in fp32, without a conversion each.

Shapes in names: M rows of the input (tokens), K input features, N output features, R ranks of all layers together, r
the rank of one LoRA or, of a layer with several, of all of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.dora import Magnitude, with_gain
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

    @property
    def is_trained(self) -> bool:
        return self.down_rK.requires_grad or self.up_Nr.requires_grad


Adds = tuple[tuple[tuple[float, bool], ...], ...]
"""The LoRAs of several layers: for each layer the scale of each of its own, and whether that is trained."""


def project(states: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Returns each layer's output for one input: `layer(states)`, within rounding.

    Args:
        states: features on the last axis.
        layers: linear ones of any kind, each with or without a LoRA of any rank.
    """
    loras = [plain_loras(layer) for layer in layers]
    present: list[Any] = [layer for layer, pairs in zip(layers, loras, strict=True) if pairs]
    if not present:
        return tuple(layer(states) for layer in layers)
    magnitudes = [magnitude_of(layer) for layer in present]
    # What stands beside a DoRA is added after its gain.
    first = [
        pairs if magnitude is None else pairs[:1]
        for magnitude, pairs in zip(magnitudes, filter(None, loras), strict=True)
    ]
    sums = list(with_low_rank(states, [layer.base_layer for layer in present], first))
    for number, (layer, magnitude, pairs) in enumerate(zip(present, magnitudes, filter(None, loras), strict=True)):
        if magnitude is not None:
            sums[number] = gained(states, sums[number], layer.base_layer, magnitude, pairs)
    return tuple(sums.pop(0) if pairs else layer(states) for layer, pairs in zip(layers, loras, strict=True))


def magnitude_of(layer: Any) -> Magnitude | None:
    """Returns the trained lengths of a DoRA's rows; None: the layer's LoRA is a plain one."""
    for name in layer.active_adapters:
        if name in layer.lora_magnitude_vector:
            found: Magnitude = layer.lora_magnitude_vector[name]
            return found
    return None


def gained(states: Tensor, sum_BLN: Tensor, base: Any, magnitude: Magnitude, pairs: Sequence[LowRankPair]) -> Tensor:
    """Returns the output of a DoRA, its own pair the first, and of the plain LoRAs beside it."""
    own, *beside = pairs
    result_MN = with_gain(sum_BLN.reshape(-1, sum_BLN.shape[-1]), magnitude, base, own.down_rK, own.up_Nr, own.scale)
    if beside:
        rows_MK = states.reshape(-1, states.shape[-1])
        (result_MN,) = added(rows_MK, [result_MN], [None], [beside])
    return result_MN.view(sum_BLN.shape)


def compute_by_ours(layer: Any) -> None:
    """Has a LoRA layer of PEFT's compute its sum by `project` wherever it is called, as a DoRA needs."""
    layer.forward = MethodType(_projected, layer)


def _projected(layer: Any, states: Tensor) -> Tensor:
    output: Tensor = project(states, (layer,))[0] if plain_loras(layer) else layer.base_layer(states)
    return output


def plain_loras(layer: nn.Module) -> tuple[LowRankPair, ...]:
    """Returns the LoRAs that a layer adds to its base. Empty if it adds none, or one in a way that only PEFT knows."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
        return ()
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in names:
        if name in layer.lora_variant or layer.lora_bias[name] or not isinstance(layer.lora_dropout[name], nn.Identity):
            return ()
    return tuple(
        LowRankPair(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in names
    )


def with_low_rank(
    states: Tensor, bases: Sequence[nn.Module], loras: Sequence[Sequence[LowRankPair]]
) -> tuple[Tensor, ...]:
    """Returns each base layer's output plus what its pairs add; the shape of `states` apart from the last axis."""
    rows_MK = states.reshape(-1, states.shape[-1])
    products, biases = zip(*(product_and_bias(base, rows_MK) for base in bases), strict=True)
    sums = added(rows_MK, products, biases, loras)
    return tuple(sum_MN.view(*states.shape[:-1], -1) for sum_MN in sums)


def added(
    rows_MK: Tensor,
    products: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    loras: Sequence[Sequence[LowRankPair]],
) -> tuple[Tensor, ...]:
    """Returns `product + bias` of each layer plus what its pairs add."""
    adds = tuple(tuple((pair.scale, pair.is_trained) for pair in pairs) for pairs in loras)
    downs_rK, ups_Nr = [pair.down_rK for pairs in loras for pair in pairs], [p.up_Nr for pairs in loras for p in pairs]
    sums: tuple[Tensor, ...] = WithLowRank.apply(rows_MK, adds, *products, *biases, *downs_rK, *ups_Nr)
    return sums


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
    def forward(ctx: Any, x_MK: Tensor, adds: Adds, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(adds)
        products_MN, biases_N, matrices = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        down_RK, ups_Nr = join_rounded(matrices, adds, x_MK.dtype)
        low_MR = x_MK @ down_RK.t()
        ctx.adds, ctx.trains, ctx.dtype = adds, any(trained for pairs in adds for _, trained in pairs), x_MK.dtype
        ctx.save_for_backward(*((x_MK, low_MR) if ctx.trains else ()), *matrices)
        lows_Mr = low_MR.split([up_Nr.shape[1] for up_Nr in ups_Nr], dim=1)
        parts = zip(products_MN, biases_N, lows_Mr, ups_Nr, strict=True)
        return tuple(plus_product(*part) for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients_MN: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.trains:
            x_MK, low_MR, *matrices = ctx.saved_tensors
        else:
            matrices = ctx.saved_tensors
        down_RK, ups_Nr = join_rounded(matrices, ctx.adds, ctx.dtype)
        low_gradient_MR = torch.cat(
            [gradient_MN @ up_Nr for gradient_MN, up_Nr in zip(gradients_MN, ups_Nr, strict=True)], dim=1
        )
        x_gradient_MK = low_gradient_MR @ down_RK if ctx.needs_input_grad[0] else None
        # Views, since the compiler of torch 2.11 loses a gradient that such a function returns unchanged.
        products = [gradient_MN.view_as(gradient_MN) for gradient_MN in gradients_MN]
        of_matrices: list[Tensor | None] = [None for _ in matrices]
        if ctx.trains:
            of_matrices = gradients_of_matrices(ctx.adds, matrices, x_MK, low_MR, low_gradient_MR, gradients_MN)
        return x_gradient_MK, None, *products, *(None for _ in products), *of_matrices


def gradients_of_matrices(
    adds: Adds,
    matrices: Sequence[Tensor],
    x_MK: Tensor,
    low_MR: Tensor,
    low_gradient_MR: Tensor,
    gradients_MN: Sequence[Tensor],
) -> list[Tensor | None]:
    """Returns the gradients of all downs and then of all ups; None for those of frozen LoRAs."""
    pairs = [(number, *each) for number, of_layer in enumerate(adds) for each in of_layer]
    ranks = [down_rK.shape[0] for down_rK in matrices[: len(pairs)]]
    ups: list[Tensor | None] = [
        scaled(summed_outer(gradients_MN[number], low_Mr), scale) if trained else None
        for (number, scale, trained), low_Mr in zip(pairs, low_MR.split(ranks, dim=1), strict=True)
    ]
    is_trained = [trained for _, _, trained in pairs]
    if not all(is_trained):
        parts = low_gradient_MR.split(ranks, dim=1)
        low_gradient_MR = torch.cat([part for part, trained in zip(parts, is_trained, strict=True) if trained], dim=1)
    of_trained = [rank for rank, trained in zip(ranks, is_trained, strict=True) if trained]
    found = list(summed_outer(low_gradient_MR, x_MK).split(of_trained))
    return [*(found.pop(0) if trained else None for trained in is_trained), *ups]


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


def join_rounded(matrices: Sequence[Tensor], adds: Adds, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns all downs as one matrix (R, K), and for each layer its ups times their scales, in the given format.

    One kernel writes them all, one after the other; one more joins the ups of a layer that has several.
    """
    scales = [scale for pairs in adds for scale, _ in pairs]
    downs_rK, ups_Nr = matrices[: len(scales)], matrices[len(scales) :]
    parts = [*downs_rK, *(scaled(up_Nr, scale) for up_Nr, scale in zip(ups_Nr, scales, strict=True))]
    flat = torch.cat([part.flatten() for part in parts]).to(dtype)
    num_down = sum(down_rK.numel() for down_rK in downs_rK)
    flat_down, *flat_ups = flat.split([num_down, *(up_Nr.numel() for up_Nr in ups_Nr)])
    ups = [flat_up.view(up_Nr.shape) for flat_up, up_Nr in zip(flat_ups, ups_Nr, strict=True)]
    of_layers = [[ups.pop(0) for _ in pairs] for pairs in adds]
    joined = tuple(own[0] if len(own) == 1 else torch.cat(own, dim=1) for own in of_layers)
    return flat_down.view(-1, downs_rK[0].shape[1]), joined


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
