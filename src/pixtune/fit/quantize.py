"""Frozen linear layers in 8 or 4 bits that compute on 8-bit tensor cores, forward and backward.

A row of the weight and a row of the input each get one scale, so a product of 8-bit codes only needs to be multiplied
by the two. The backward pass is a product of the same kind: the weight's row scales are folded into the gradient, which
is then quantised by row itself. No 16-bit copy of a weight outlives the layer's own computation, and no input is kept
for the backward pass: a frozen weight needs no gradient.

`nf4` stores 4-bit codes (NormalFloat, Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E) with a scale
for 64 neighbours, and expands them to 8 bits when they are used.

Shapes in names: M rows of the input (tokens), K input features, N output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pixtune.fit.kernels import NF4_BLOCK, expand_nf4, nf4_levels, transpose_bytes

FP8, INT8, NF4 = "fp8", "int8", "nf4"
FORMATS = (FP8, INT8, NF4)

OLDEST_CAPABILITY = {torch.float8_e4m3fn: (8, 9), torch.int8: (8, 0)}
"""Of the GPUs whose tensor cores multiply these codes (int8: sm_75 does, too, but has no bf16 for the rest)."""
LARGEST_CODE = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
SMALLEST_PEAK = 1e-12
"""Keeps a row of zeros from a division by zero."""
SIDE_MULTIPLE = {FP8: 16, INT8: 16, NF4: NF4_BLOCK}
"""Both sides of a weight must be a multiple of this, as the kernels and the packing ask."""
FEWEST_INT8_ROWS = 17
"""`torch._int_mm` takes no fewer."""


def can_quantize(linear: nn.Linear, linear_format: str) -> bool:
    """Whether a layer's sides fit the format."""
    multiple = SIDE_MULTIPLE[linear_format]
    return linear.in_features % multiple == 0 and linear.out_features % multiple == 0


def bytes_per_weight(linear_format: str, in_features: int) -> float:
    """Device memory of one weight in a format, its share of the scales included."""
    if linear_format == NF4:
        return 0.5 + 2 / NF4_BLOCK
    return 1 + 4 / in_features


# ---- rows of 8-bit codes


def quantize_rows(values_MK: Tensor, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    """8-bit codes of each row and its scale: `codes * scale` is the row again, within rounding.

    Returns:
        Codes of shape (M, K) and fp32 scales of shape (M, 1).
    """
    peak_M1 = values_MK.abs().amax(dim=-1, keepdim=True).float().clamp_min(SMALLEST_PEAK)
    scaled_MK = values_MK.float() * (LARGEST_CODE[codes] / peak_M1)
    if codes == torch.int8:
        scaled_MK = scaled_MK.round()
    return scaled_MK.to(codes), peak_M1 / LARGEST_CODE[codes]


def multiply_rows(
    a_MK: Tensor, a_scale_M1: Tensor, b_NK: Tensor, b_scale_N1: Tensor, dtype: torch.dtype, tensor_cores: bool
) -> Tensor:
    """`(a * a_scale) @ (b * b_scale).T` from 8-bit codes; shape (M, N).

    Args:
        tensor_cores: multiply the codes as they are; else in fp32, which gives the same within its rounding.
    """
    if tensor_cores and a_MK.dtype == torch.float8_e4m3fn:
        # Row-wise scales come with bf16 output only. No `.to(dtype)` that changes nothing may follow: torch.compile
        # (2.11, seen on an H100) then drops the gradient without a word.
        product_MN = torch._scaled_mm(
            a_MK, b_NK.t(), scale_a=a_scale_M1, scale_b=b_scale_N1.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return product_MN if dtype == torch.bfloat16 else product_MN.to(dtype)
    if tensor_cores:
        missing = max(FEWEST_INT8_ROWS - a_MK.shape[0], 0)
        rows_MK = nn.functional.pad(a_MK, (0, 0, 0, missing)) if missing else a_MK
        product_MN = torch._int_mm(rows_MK, b_NK.t())[: a_MK.shape[0]].float()
    else:
        product_MN = a_MK.float() @ b_NK.float().t()
    return (product_MN * a_scale_M1 * b_scale_N1.t()).to(dtype)


# ---- 4-bit storage


def pack_nf4(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit codes, two in a byte, and the scale of each 64 neighbours of a row.

    Returns:
        uint8 of shape (N, K / 2) and bf16 of shape (N, K / 64).
    """
    rows, columns = weight_NK.shape
    blocks_NB64 = weight_NK.float().view(rows, columns // NF4_BLOCK, NF4_BLOCK)
    scale_NB = blocks_NB64.abs().amax(dim=-1).clamp_min(SMALLEST_PEAK).to(torch.bfloat16)
    levels = nf4_levels(weight_NK.device)
    borders = (levels[1:] + levels[:-1]) / 2
    codes_NK = torch.bucketize(blocks_NB64 / scale_NB.float().unsqueeze(-1), borders).view(rows, columns)
    codes_NK = codes_NK.to(torch.uint8)
    return (codes_NK[:, 0::2] << 4) | codes_NK[:, 1::2], scale_NB


# ---- the layer


class FrozenProduct(torch.autograd.Function):
    """`x @ W.T` of a quantised W, whose only gradient is x's."""

    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, stored: Tensor, scale: Tensor, codes: torch.dtype, tensor_cores: bool
    ) -> Tensor:
        ctx.save_for_backward(stored, scale)
        ctx.codes, ctx.tensor_cores = codes, tensor_cores
        weight_NK, weight_scale_N1 = row_codes(stored, scale, codes, transposed=False)
        x_codes_MK, x_scale_M1 = quantize_rows(x_MK, codes)
        return multiply_rows(x_codes_MK, x_scale_M1, weight_NK, weight_scale_N1, x_MK.dtype, tensor_cores)

    @staticmethod
    def backward(ctx: Any, gradient_MN: Tensor) -> tuple[Tensor, None, None, None, None]:
        stored, scale = ctx.saved_tensors
        # Tensor cores of 8 bits want both sides along the summed axis.
        weight_KN, weight_scale_N1 = row_codes(stored, scale, ctx.codes, transposed=True)
        codes_MN, scale_M1 = quantize_rows(gradient_MN.float() * weight_scale_N1.t(), ctx.codes)
        ones_K1 = torch.ones(weight_KN.shape[0], 1, device=weight_KN.device)
        x_gradient_MK = multiply_rows(codes_MN, scale_M1, weight_KN, ones_K1, gradient_MN.dtype, ctx.tensor_cores)
        return x_gradient_MK, None, None, None, None


def row_codes(stored: Tensor, scale: Tensor, codes: torch.dtype, transposed: bool) -> tuple[Tensor, Tensor]:
    """A stored weight as 8-bit codes, (N, K) or transposed (K, N), and its scale a row (N, 1).

    Args:
        stored: bytes of 8-bit codes with fp32 `scale` (N, 1), or packed 4-bit codes with bf16 `scale` (N, K / 64).
    """
    if scale.dtype == torch.float32:
        return (transpose_bytes(stored) if transposed else stored).view(codes), scale
    row_scale_N = scale.float().amax(dim=1) / LARGEST_CODE[codes]  # the largest level is 1
    expanded = expand_nf4(stored, scale, row_scale_N, codes == torch.float8_e4m3fn, transposed)
    return expanded.view(codes), row_scale_N.unsqueeze(1)


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that holds codes instead of weights. A kind of `nn.Linear`, so a LoRA attaches to it.

    The codes are kept as bytes: nothing then takes them for numbers to cast.

    Args:
        linear_format: one of `FORMATS`.
        codes: what the tensor cores multiply, float8_e4m3fn or int8.
        tensor_cores: see `multiply_rows`.
    """

    def __init__(
        self, in_features: int, out_features: int, linear_format: str, codes: torch.dtype, tensor_cores: bool
    ) -> None:
        nn.Module.__init__(self)  # not Linear's own, which makes a full weight
        self.in_features, self.out_features = in_features, out_features
        self.linear_format, self.codes, self.tensor_cores = linear_format, codes, tensor_cores
        self.register_buffer("weight", None)
        self.register_buffer("scale", None)
        self.register_parameter("bias", None)

    @torch.no_grad()
    def set_weight(self, weight_NK: Tensor) -> None:
        """Quantises on the weight's device and keeps the result there."""
        if self.linear_format == NF4:
            self.weight, self.scale = pack_nf4(weight_NK)
        else:
            codes_NK, self.scale = quantize_rows(weight_NK, self.codes)
            self.weight = codes_NK.view(torch.uint8)

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        """The weight that the layer stands for, fp32 of shape (N, K)."""
        codes_NK, scale_N1 = row_codes(self.weight, self.scale, self.codes, transposed=False)
        return codes_NK.float() * scale_N1

    def product(self, rows_MK: Tensor) -> Tensor:
        """`x @ W.T`, without the bias; shape (M, N)."""
        return FrozenProduct.apply(rows_MK, self.weight, self.scale, self.codes, self.tensor_cores)

    def forward(self, input: Tensor) -> Tensor:
        product_MN = self.product(input.reshape(-1, self.in_features))
        product = product_MN.view(*input.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.linear_format}"


def codes_for(linear_format: str, device: torch.device) -> torch.dtype:
    """What a format's products run in on a device: 4-bit weights are expanded to what its tensor cores have."""
    if linear_format == NF4:
        return torch.float8_e4m3fn if tensor_cores_multiply(torch.float8_e4m3fn, device) else torch.int8
    return torch.float8_e4m3fn if linear_format == FP8 else torch.int8


def tensor_cores_multiply(codes: torch.dtype, device: torch.device) -> bool:
    """Whether the device's tensor cores take these codes."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY[codes]
