"""Linear layers that read the same input, with the LoRA products of all of them done together.

PEFT computes each layer by itself, so queries, keys and values read one input three times for their down-projections,
and three times again for the gradients of these, and write three input gradients to be added. Here each is one product
of the joined down-projections, forward and backward. Only the arithmetic differs: the parameters, their names and the
files stay PEFT's, and what is not a plain LoRA is left to PEFT.

The whole group is one autograd function and not composed of torch's operators, for three reasons: weights that are kept
in fp32 become the input's format in one kernel and not in one each, a backward pass that is not compiled keeps no
rounded copies of them, and gradients of weights come out of their products in fp32, without a conversion each.

Shapes in names: M rows of the input (tokens), K input features, N output features, R ranks of all layers together, r
of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LowRankPair:
    """What a plain LoRA adds to its layer: `scale * x @ down.T @ up.T`."""

    down_rK: Tensor
    up_Nr: Tensor
    scale: float


def project(states: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """What each of some layers makes of one input, as `layer(states)` does, within rounding.

    Args:
        states: features on the last axis.
        layers: linear ones of any kind, each with or without a LoRA of any rank.
    """
    pairs = [plain_lora(layer) for layer in layers]
    present = [pair for pair in pairs if pair is not None]
    if not present:
        return tuple(layer(states) for layer in layers)
    updates = list(low_rank_updates(states, present))
    results = []
    for layer, pair in zip(layers, pairs, strict=True):
        if pair is None:
            results.append(layer(states))
        else:
            results.append(layer.base_layer(states) + updates.pop(0))  # type: ignore[operator]
    return tuple(results)


def plain_lora(layer: nn.Module) -> LowRankPair | None:
    """The one LoRA that a layer adds to its base. None if it adds none, or does it in a way that only PEFT knows."""
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


def low_rank_updates(states: Tensor, pairs: Sequence[LowRankPair]) -> tuple[Tensor, ...]:
    """What each pair adds; the shape of `states` but for the last axis."""
    rows_MK = states.reshape(-1, states.shape[-1])
    scales = tuple(pair.scale for pair in pairs)
    updates = LowRankProducts.apply(rows_MK, scales, *(pair.down_rK for pair in pairs), *(pair.up_Nr for pair in pairs))
    return tuple(update_MN.view(*states.shape[:-1], -1) for update_MN in updates)


class LowRankProducts(torch.autograd.Function):
    """`scale * x @ down.T @ up.T` of several pairs.

    `matrices` are all downs, then all ups, in fp32 or the input's format. Their gradients are summed up in fp32.
    """

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, scales: tuple[float, ...], *matrices: Tensor) -> tuple[Tensor, ...]:
        down_RK, ups_Nr = join_rounded(matrices, scales, x_MK.dtype)
        low_MR = x_MK @ down_RK.t()
        ctx.save_for_backward(x_MK, low_MR, *matrices)
        ctx.scales = scales
        lows_Mr = low_MR.split([up_Nr.shape[1] for up_Nr in ups_Nr], dim=1)
        return tuple(low_Mr @ up_Nr.t() for low_Mr, up_Nr in zip(lows_Mr, ups_Nr, strict=True))

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
        return x_gradient_MK, None, *down_gradients_rK, *up_gradients_Nr


def join_rounded(
    matrices: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All downs as one matrix (R, K), and each up times its scale, in a format.

    All are written one behind the other, in one kernel.
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
    """`a.T @ b` in fp32, from any format; shape (N, K).

    An operator of its own, since a GPU multiplies 16 bits into fp32 directly and a CPU does not.
    """
    if a_MN.is_cuda and a_MN.dtype != torch.float32:
        return torch.mm(a_MN.t(), b_MK, out_dtype=torch.float32)
    return torch.mm(a_MN.t().float(), b_MK.float())


@summed_outer.register_fake
def _(a_MN: Tensor, b_MK: Tensor) -> Tensor:
    return a_MN.new_empty((a_MN.shape[1], b_MK.shape[1]), dtype=torch.float32)
