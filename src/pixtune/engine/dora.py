"""Gains of DoRA (Liu et al. 2024, arXiv 2402.09353): rows of `W + scale * up @ down` get trained lengths.

The output is `gain * (x @ W.T + scale * x @ down.T @ up.T) + bias`, where the gain of a row is its trained length over
the one that it has. As in section 4.3 of the paper, and in PEFT, no gradient goes through the length that it has.

PEFT writes `up @ down` out and adds it to a copy of the whole weight in every pass. Here lengths follow from the
frozen weight's, which never change, and from products with `down`'s few rows:
`|w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T` for a row w of W and b of `up`. So a weight may be in any
format, or come from host memory.

Shapes in names: M rows of the input (tokens), K input features, N output features, r the rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.quantize import QuantizedLinear


class Magnitude(nn.Module):
    """The trained lengths of a layer's rows, which begin as those of the frozen weight.

    Args:
        square_N: `row_squares` of that weight.
    """

    square_N: Tensor

    def __init__(self, square_N: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(square_N.sqrt())
        self.register_buffer("square_N", square_N, persistent=False)

    @property
    def start_N(self) -> Tensor:
        """The lengths of the frozen weight's rows."""
        return self.square_N.sqrt()


def row_squares(linear: nn.Linear) -> Tensor:
    """Returns the squared length of each row of a linear layer's weight, as its format holds it; fp32 of shape (N,)."""
    weight_NK = linear.dequantized() if isinstance(linear, QuantizedLinear) else linear.weight.detach()
    return weight_NK.float().square().sum(dim=1)


def row_lengths(
    linear: nn.Linear, square_N: Tensor, down_rK: Tensor, up_Nr: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """Returns the length of each row of `W + scale * up @ down`, without a gradient; fp32 of shape (N,).

    Args:
        square_N: `row_squares` of the layer.
        dtype: number format of the product with W.
    """
    down_rK, up_Nr = down_rK.detach().float(), up_Nr.detach().float()
    rows_rK = down_rK.to(dtype)
    if isinstance(linear, QuantizedLinear):
        product_rN = linear.product(rows_rK)
    else:
        product_rN = nn.functional.linear(rows_rK, linear.weight.detach())
    cross_N = (up_Nr * product_rN.float().t()).sum(dim=1)
    own_N = (up_Nr @ (down_rK @ down_rK.t()) * up_Nr).sum(dim=1)
    # A row may be shorter than rounding shows, and its gain must stay a number.
    return (square_N + 2 * scale * cross_N + scale**2 * own_N).clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def with_gain(
    sum_MN: Tensor, magnitude: Magnitude, linear: Any, down_rK: Tensor, up_Nr: Tensor, scale: float
) -> Tensor:
    """Returns `gain * (sum - bias) + bias` of a layer's output with its LoRA."""
    length_N = row_lengths(linear, magnitude.square_N, down_rK, up_Nr, scale, sum_MN.dtype)
    return Gained.apply(sum_MN, magnitude.weight / length_N, linear.bias)


class Gained(torch.autograd.Function):
    """`gain * (sum - bias) + bias`, computed in fp32. It keeps the sum alone, in its own format."""

    @staticmethod
    def forward(ctx: Any, sum_MN: Tensor, gain_N: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(sum_MN, gain_N, bias_N)
        result_MN = sum_MN.float() * gain_N
        if bias_N is not None:
            result_MN = result_MN + bias_N.float() * (1 - gain_N)
        return result_MN.to(sum_MN.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_MN: Tensor) -> tuple[Tensor, Tensor, None]:
        sum_MN, gain_N, bias_N = ctx.saved_tensors
        product_MN = sum_MN.float() if bias_N is None else sum_MN.float() - bias_N.float()
        gain_gradient_N = (gradient_MN.float() * product_MN).sum(dim=0)
        return (gradient_MN.float() * gain_N).to(sum_MN.dtype), gain_gradient_N, None
