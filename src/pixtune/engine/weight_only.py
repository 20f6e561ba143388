"""Frozen linear layers of encoders: weights stored in 8 or 4 bits, multiplied in the input's own format.

Inputs are not quantized, unlike in `quantize.py`: a language model's have features hundreds of times larger than the
rest, which one scale a row cannot hold. That costs speed where captions are encoded once, and nothing where a step is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pixtune.engine.kernels import NF4_BLOCK, unpack_nf4
from pixtune.engine.quantize import INT8, NF4, pack_nf4, quantize_rows

FORMATS = (INT8, NF4)
PIECE_WEIGHTS = 1 << 24
"""Weights that are in full precision at once, while a layer is quantized or multiplies. The output layer of a language
model holds half a billion, which would be a second small model."""


class WeightOnlyLinear(nn.Module):
    """Stands in for a frozen `nn.Linear`. `store` gives it its values.

    Args:
        linear_format: one of `FORMATS`; 4 bits become 8 where the inputs' number is no multiple of 16.
        dtype: of the layer it stands for.
    """

    codes: Tensor
    """int8 of shape (N, K), or two 4-bit codes in a byte, uint8 of shape (N, K / 2)."""
    block_scale: Tensor | None
    """Of 4-bit codes, 16 neighbours each: uint8 of shape (N, K / 16)."""
    bias: Tensor | None
    scale: Tensor
    """fp32 of shape (N, 1)."""

    def __init__(
        self, in_features: int, out_features: int, linear_format: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.linear_format = INT8 if in_features % NF4_BLOCK else linear_format
        packed = self.linear_format == NF4
        columns = in_features // 2 if packed else in_features
        codes = torch.empty(out_features, columns, dtype=torch.uint8 if packed else torch.int8, device=device)
        blocks = torch.empty(out_features, in_features // NF4_BLOCK, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("block_scale", blocks if packed else None)
        self.register_buffer("scale", torch.empty(out_features, 1, device=device))
        self.register_parameter("bias", None)
        # Models ask a layer's weight for its dtype, and cast their hidden states to it. One without values answers
        # that, and fails where anything would compute with it.
        self.weight = torch.empty(out_features, in_features, dtype=dtype, device="meta")

    @torch.no_grad()
    def store(self, weight_NK: Tensor) -> None:
        """Quantizes on the layer's device, from wherever the weight is, a piece at a time."""
        for start, end in self._pieces():
            piece = weight_NK[start:end].to(self.codes.device)
            if self.block_scale is None:
                self.codes[start:end], self.scale[start:end] = quantize_rows(piece, torch.int8)
            else:
                self.codes[start:end], self.block_scale[start:end], self.scale[start:end] = pack_nf4(piece)

    def dequantized(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """The weight's rows from `start` to before `end`; shape (end - start, K)."""
        codes, scale = self.codes[start:end], self.scale[start:end]
        if self.block_scale is not None:
            return (unpack_nf4(codes, self.block_scale[start:end]) * scale).to(dtype)
        return (codes.float() * scale).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        product = input.new_empty(*input.shape[:-1], self.out_features)
        for start, end in self._pieces():
            bias = None if self.bias is None else self.bias[start:end].to(input.dtype)
            product[..., start:end] = nn.functional.linear(input, self.dequantized(start, end, input.dtype), bias)
        return product

    def _pieces(self) -> list[tuple[int, int]]:
        """Rows of the weight that are handled together."""
        step = max(PIECE_WEIGHTS // self.in_features, 1)
        return [(start, min(start + step, self.out_features)) for start in range(0, self.out_features, step)]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.linear_format}"


def quantize_encoder(model: nn.Module, linear_format: str, device: torch.device) -> nn.Module:
    """Brings a frozen model to a device, linear layers in 8 or 4 bits and all else as it is; changes it in place.

    Layer by layer: the device never holds more than the result and a piece of one layer, and the source's layers are
    given up on the way.
    """
    tied = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    # Kinds of Linear are left alone: their owners compute with the weight themselves. So is an output layer that shares
    # its weight with the embedding: that stays, and codes would come on top.
    paths = [path for path, module in model.named_modules() if type(module) is nn.Linear and module.weight not in tied]
    for path in paths:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        stored = WeightOnlyLinear(
            linear.in_features, linear.out_features, linear_format, device, dtype=linear.weight.dtype
        )
        stored.store(linear.weight.detach())
        stored.bias = linear.bias
        model.set_submodule(path, stored)
    return model.to(device).eval()
