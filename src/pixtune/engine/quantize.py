"""Frozen linear layers in 8 or 4 bits that multiply on 8-bit tensor cores, forward and backward.

Each row of the weight and each row of the input gets one scale, so a product of 8-bit codes only needs to be multiplied
by the two. The backward pass is a product of the same kind: the weight's row scales are folded into the gradient, which
is then quantized by row. No 16-bit copy of a weight outlives the layer's own computation, and no input is kept for the
backward pass: a frozen weight needs no gradient.

`nf4` stores 4-bit codes of unevenly spaced levels (after NormalFloat, Dettmers et al. 2023, arXiv 2305.14314,
section 3) and expands them to 8 bits when they are used. Unlike there, 16 neighbours and not 64 share a scale, which
has 8 bits, may be negative, and is fitted to the least squared error, as are the levels: docs/experiments.md has the
figures of each.

Shapes in names: M rows of the input (tokens), K input features, N output features, B blocks of 16 neighbours of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.kernels import (
    NF4_BLOCK,
    NF4_SCALES,
    UNIT_CODE,
    expand_nf4,
    has_triton,
    nf4_levels,
    nf4_scales,
    power_of_two,
    round_to_codes,
    transpose_bytes,
)
from pixtune.storage.loading import ScaledWeight

FP8, INT8, NF4 = "fp8", "int8", "nf4"
FORMATS = (FP8, INT8, NF4)

MIN_CAPABILITY = {torch.float8_e4m3fn: (8, 9), torch.int8: (8, 0)}
"""Lowest compute capability whose tensor cores multiply these codes (int8: sm_75 does too, but it has no bf16)."""
LARGEST_CODE = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
SMALLEST_PEAK = 1e-12
"""Lower bound of a row's peak, which keeps a row of zeros from a division by zero."""
SIDE_MULTIPLE = {FP8: 16, INT8: 16, NF4: NF4_BLOCK}
"""Number that both sides of a weight must be a multiple of, for the kernels and the packing."""
MIN_INT8_ROWS = 17
"""Number of rows that `torch._int_mm` needs at least."""
MAX_ROW_WIDTH = 1 << 14
"""Number of values that one program of a kernel reads at most."""
MAX_WEIGHTS_AT_ONCE = 1 << 22
"""Number of weights that become 4-bit codes together, which takes some 100 MiB."""


def can_quantize(linear: nn.Linear, linear_format: str) -> bool:
    """Returns whether a layer's sides fit the format."""
    multiple = SIDE_MULTIPLE[linear_format]
    return linear.in_features % multiple == 0 and linear.out_features % multiple == 0


# ---- rows of 8-bit codes


def quantize_rows(values_MK: Tensor, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantizes each row to 8-bit codes and a scale: `codes * scale` is the row again, within rounding.

    Returns:
        Codes of shape (M, K) and fp32 scales of shape (M, 1).
    """
    if quantizes_at_once(values_MK, codes):
        return quantize_rows_at_once(values_MK)
    peak_M1 = values_MK.abs().amax(dim=-1, keepdim=True).float().clamp_min(SMALLEST_PEAK)
    scaled_MK = values_MK.float() * (LARGEST_CODE[codes] / peak_M1)
    if codes == torch.int8:
        scaled_MK = scaled_MK.round()
    return scaled_MK.to(codes), peak_M1 / LARGEST_CODE[codes]


def quantizes_at_once(values_MK: Tensor, codes: torch.dtype) -> bool:
    """Returns whether pixtune's own kernel does it: uncompiled, torch passes over the values seven times."""
    return (
        codes == torch.float8_e4m3fn
        and not torch.compiler.is_compiling()
        and has_triton(values_MK)
        and values_MK.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and values_MK.shape[1] <= MAX_ROW_WIDTH
        and torch.cuda.get_device_capability(values_MK.device) >= MIN_CAPABILITY[codes]
    )


def quantize_rows_at_once(values_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `quantize_rows` to float8_e4m3fn from one reading, with the same codes and scales."""
    from pixtune.engine import triton_kernels

    rows, width = values_MK.shape
    values_MK = values_MK if values_MK.stride(1) == 1 else values_MK.contiguous()
    codes_MK = values_MK.new_empty(rows, width, dtype=torch.uint8)
    scale_M1 = values_MK.new_empty(rows, 1, dtype=torch.float32)
    triton_kernels.quantize_row[(rows,)](
        values_MK, values_MK.stride(0), codes_MK, scale_M1, width, LARGEST_CODE[torch.float8_e4m3fn],
        power_of_two(width), num_warps=8,
    )  # fmt: skip
    return codes_MK.view(torch.float8_e4m3fn), scale_M1


def multiply_rows(
    a_MK: Tensor, a_scale_M1: Tensor, b_NK: Tensor, b_scale_N1: Tensor, dtype: torch.dtype, tensor_cores: bool
) -> Tensor:
    """Computes `(a * a_scale) @ (b * b_scale).T` from 8-bit codes; shape (M, N).

    Args:
        tensor_cores: multiplies the codes directly; otherwise in fp32, with the same result within rounding.
    """
    if tensor_cores and a_MK.dtype == torch.float8_e4m3fn:
        # Row-wise scales support bf16 output only. No `.to(dtype)` that changes nothing may follow: torch.compile
        # (2.11, seen on an H100) then drops the gradient silently.
        product_MN = torch._scaled_mm(
            a_MK, b_NK.t(), scale_a=a_scale_M1, scale_b=b_scale_N1.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return product_MN if dtype == torch.bfloat16 else product_MN.to(dtype)
    if tensor_cores:
        missing = max(MIN_INT8_ROWS - a_MK.shape[0], 0)
        rows_MK = nn.functional.pad(a_MK, (0, 0, 0, missing)) if missing else a_MK
        product_MN = torch._int_mm(rows_MK, b_NK.t())[: a_MK.shape[0]].float()
    else:
        product_MN = a_MK.float() @ b_NK.float().t()
    return (product_MN * a_scale_M1 * b_scale_N1.t()).to(dtype)


# ---- 4-bit storage


def pack_nf4(weight_NK: Tensor, codes: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes a weight to 4-bit codes, two per byte, with a scale per 16 neighbours of a row and one per row.

    Args:
        codes: format that the weight is expanded to in use, whose rounding counts in the choice of scales; None: it is
            not expanded.

    Returns:
        uint8 of shape (N, K / 2), uint8 of shape (N, K / 16), and fp32 of shape (N, 1); see `kernels.unpack_nf4`.
    """
    num_rows = max(MAX_WEIGHTS_AT_ONCE // weight_NK.shape[1], 1)
    packed, block_scale, scale = zip(*(_pack_rows(rows, codes) for rows in weight_NK.split(num_rows)), strict=True)
    return torch.cat(packed), torch.cat(block_scale), torch.cat(scale)


def _pack_rows(weight_NK: Tensor, codes: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    peak_N1 = weight_NK.abs().amax(dim=1, keepdim=True).float().clamp_min(SMALLEST_PEAK)
    scale_N1 = peak_N1 / max(NF4_SCALES)
    units_NB16 = (weight_NK.float() / scale_N1).view(weight_NK.shape[0], -1, NF4_BLOCK)
    block_scale = _fit_block_scales(units_NB16, codes)
    codes_NK = _nearest_levels(units_NB16, nf4_scales(weight_NK.device)[block_scale]).flatten(1).to(torch.uint8)
    return (codes_NK[:, 0::2] << 4) | codes_NK[:, 1::2], block_scale.to(torch.uint8), scale_N1


def _fit_block_scales(units_NB16: Tensor, codes: torch.dtype | None) -> Tensor:
    """Returns the index of `NF4_SCALES` with the least squared error of each block; int32 of shape (N, B).

    The scale nearest to the block's peak and its two neighbours are tried, with both signs. More neighbours gain
    nothing.
    """
    levels, scales = nf4_levels(units_NB16.device), nf4_scales(units_NB16.device)
    positive = scales[: len(scales) // 2]
    borders = (positive[1:] + positive[:-1]) / 2
    nearest_NB = torch.bucketize(units_NB16.abs().amax(dim=-1), borders, out_int32=True)
    best_NB = torch.zeros_like(nearest_NB)
    least_NB = torch.full_like(units_NB16[..., 0], torch.inf)
    for first in (0, len(positive)):
        for step in (-1, 0, 1):
            index_NB = (nearest_NB + step).clamp(0, len(positive) - 1) + first
            tried_NB = scales[index_NB]
            found_NB16 = levels[_nearest_levels(units_NB16, tried_NB)] * tried_NB.unsqueeze(-1)
            if codes is not None:
                found_NB16 = round_to_codes(found_NB16, codes).float() / UNIT_CODE[codes]
            error_NB = (found_NB16 - units_NB16).square().sum(dim=-1)
            better_NB = error_NB < least_NB
            best_NB = torch.where(better_NB, index_NB, best_NB)
            least_NB = torch.where(better_NB, error_NB, least_NB)
    return best_NB


def _nearest_levels(units_NB16: Tensor, scale_NB: Tensor) -> Tensor:
    """Returns the indices of the nearest `NF4_LEVELS`; int32."""
    levels = nf4_levels(units_NB16.device)
    values_NB16, borders = units_NB16 / scale_NB.unsqueeze(-1), (levels[1:] + levels[:-1]) / 2
    if values_NB16.device.type != "cpu":
        return torch.bucketize(values_NB16, borders, out_int32=True)
    # On a CPU torch searches value by value; counting the borders below all of them takes half as long.
    index_NB16 = torch.zeros(values_NB16.shape, dtype=torch.int8)
    for border in borders.tolist():
        index_NB16 += ~(values_NB16 <= border)
    return index_NB16.int()


# ---- the layer


class FrozenProduct(torch.autograd.Function):
    """`x @ W.T` of a quantized W, with a gradient for x only."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MK: Tensor,
        stored: Tensor,
        block_scale: Tensor | None,
        scale_N1: Tensor,
        transpose: Tensor | None,
        codes: torch.dtype,
        tensor_cores: bool,
    ) -> Tensor:
        ctx.save_for_backward(stored, block_scale, scale_N1, transpose)
        ctx.codes, ctx.tensor_cores = codes, tensor_cores
        weight_NK, weight_scale_N1 = row_codes(stored, block_scale, scale_N1, codes, transposed=False)
        x_codes_MK, x_scale_M1 = quantize_rows(x_MK, codes)
        return multiply_rows(x_codes_MK, x_scale_M1, weight_NK, weight_scale_N1, x_MK.dtype, tensor_cores)

    @staticmethod
    def backward(ctx: Any, gradient_MN: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        stored, block_scale, scale_N1, transpose = ctx.saved_tensors
        # 8-bit tensor cores need both matrices contiguous along the summed axis.
        if transpose is None:
            weight_KN, weight_scale_N1 = row_codes(stored, block_scale, scale_N1, ctx.codes, transposed=True)
        else:
            weight_KN, weight_scale_N1 = transpose.view(ctx.codes), scale_N1
        codes_MN, scale_M1 = quantize_rows(gradient_MN.float() * weight_scale_N1.t(), ctx.codes)
        ones_K1 = torch.ones(weight_KN.shape[0], 1, device=weight_KN.device)
        x_gradient_MK = multiply_rows(codes_MN, scale_M1, weight_KN, ones_K1, gradient_MN.dtype, ctx.tensor_cores)
        return x_gradient_MK, None, None, None, None, None, None


def row_codes(
    stored: Tensor, block_scale: Tensor | None, scale_N1: Tensor, codes: torch.dtype, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Returns a stored weight as 8-bit codes, (N, K) or transposed (K, N), and its scale per row (N, 1).

    Args:
        stored: bytes of 8-bit codes; with `block_scale`, packed 4-bit codes.
    """
    if block_scale is None:
        return (transpose_bytes(stored) if transposed else stored).view(codes), scale_N1
    expanded = expand_nf4(stored, block_scale, codes == torch.float8_e4m3fn, transposed)
    return expanded.view(codes), scale_N1 / UNIT_CODE[codes]


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that holds codes instead of weights. A subclass of `nn.Linear`, so a LoRA attaches to it.

    The codes are kept as bytes, so that nothing takes them for numbers and casts them.

    Args:
        linear_format: one of `FORMATS`.
        codes: format that the tensor cores multiply, float8_e4m3fn or int8.
        tensor_cores: see `multiply_rows`.
        keeps_transpose: 8-bit codes are kept a second time, as the backward pass reads them.

    Raises:
        ValueError: a transpose is to be kept of 4-bit codes, which are expanded either way.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        linear_format: str,
        codes: torch.dtype,
        tensor_cores: bool,
        keeps_transpose: bool = False,
    ) -> None:
        if keeps_transpose and linear_format == NF4:
            raise ValueError("4-bit codes are expanded to either order equally fast, so no transpose is kept")
        nn.Module.__init__(self)  # not Linear's own, which would allocate a full weight
        self.in_features, self.out_features = in_features, out_features
        self.linear_format, self.codes, self.tensor_cores = linear_format, codes, tensor_cores
        self.register_buffer("weight", None)
        self.register_buffer("block_scale", None)
        self.register_buffer("scale", None)
        self.register_buffer("transpose", None)
        self.keeps_transpose = keeps_transpose
        self.register_parameter("bias", None)

    @torch.no_grad()
    def set_weight(self, weight_NK: Tensor | ScaledWeight) -> None:
        """Quantizes on the weight's device and keeps the result there.

        A weight that is in the same 8 bits already is kept as it is, so that nothing is rounded twice.
        """
        if isinstance(weight_NK, ScaledWeight) and not self._keeps(weight_NK):
            weight_NK = weight_NK.dequantized()
        if self.linear_format == NF4:
            assert isinstance(weight_NK, Tensor)
            self.weight, self.block_scale, self.scale = pack_nf4(weight_NK, self.codes)
        else:
            if isinstance(weight_NK, ScaledWeight):
                codes_NK, self.scale = weight_NK.codes_NK, weight_NK.scale_N1
                codes_NK = codes_NK.clone() if codes_NK.device.type == "cpu" else codes_NK  # a view of its mapped file
            else:
                codes_NK, self.scale = quantize_rows(weight_NK, self.codes)
            self.weight = codes_NK.view(torch.uint8)
            self.transpose = transpose_bytes(self.weight) if self.keeps_transpose else None

    def _keeps(self, weight_NK: ScaledWeight) -> bool:
        """Returns whether a weight's codes are those of this layer's format."""
        return self.linear_format != NF4 and weight_NK.codes_NK.dtype == self.codes and not weight_NK.group

    def set_like(self, other: QuantizedLinear, first_row: int, device: torch.device) -> None:
        """Takes another layer's weight, of the same shape and format, with its rows from `first_row` on at the top."""
        for name, axis in (("weight", 0), ("block_scale", 0), ("scale", 0), ("transpose", 1)):
            stored = getattr(other, name)
            setattr(self, name, None if stored is None else stored.to(device).roll(-first_row, axis))

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        """Returns the weight that the codes stand for; fp32 of shape (N, K)."""
        codes_NK, scale_N1 = row_codes(self.weight, self.block_scale, self.scale, self.codes, transposed=False)
        return codes_NK.float() * scale_N1

    def product(self, rows_MK: Tensor) -> Tensor:
        """Returns `x @ W.T`, without the bias; shape (M, N)."""
        return FrozenProduct.apply(
            rows_MK, self.weight, self.block_scale, self.scale, self.transpose, self.codes, self.tensor_cores
        )

    def forward(self, input: Tensor) -> Tensor:
        product_MN = self.product(input.reshape(-1, self.in_features))
        product = product_MN.view(*input.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.linear_format}"


def codes_for(linear_format: str, device: torch.device) -> torch.dtype:
    """Returns the codes in which a format is multiplied: 4-bit weights are expanded to those of the tensor cores."""
    if linear_format == NF4:
        return torch.float8_e4m3fn if tensor_cores_multiply(torch.float8_e4m3fn, device) else torch.int8
    return torch.float8_e4m3fn if linear_format == FP8 else torch.int8


def tensor_cores_multiply(codes: torch.dtype, device: torch.device) -> bool:
    """Returns whether the device's tensor cores take these codes."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY[codes]
