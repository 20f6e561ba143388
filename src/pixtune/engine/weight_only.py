"""Frozen linear layers of encoders: weights stored in 8 or 4 bits, multiplied in the input's own format.

Unlike in `quantize.py`, inputs are not quantized: in a language model some of their features are hundreds of times
larger than the rest, which one scale per row cannot hold. That makes encoding slower, which happens once, and no step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pixtune.engine.kernels import NF4_BLOCK, unpack_nf4
from pixtune.engine.quantize import INT8, NF4, pack_nf4, quantize_rows

FORMATS = (INT8, NF4)
PIECE_WEIGHTS = 1 << 24
"""Number of weights in full precision at once while a layer is quantized or multiplies. The output layer of a language
model has half a billion, as many as a small model."""


class WeightOnlyLinear(nn.Module):
    """Replacement of a frozen `nn.Linear`. `store` gives it its values.

    Args:
        linear_format: one of `FORMATS`; 4 bits become 8 where the number of inputs is not a multiple of 16.
        dtype: format of the layer that it replaces.
    """

    codes: Tensor
    """8-bit codes, int8 of shape (N, K), or two 4-bit codes per byte, uint8 of shape (N, K / 2)."""
    block_scale: Tensor | None
    """Scale of every 16 neighbouring 4-bit codes; uint8 of shape (N, K / 16)."""
    bias: Tensor | None
    scale: Tensor
    """Scale of each row; fp32 of shape (N, 1)."""

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
        # Models read the dtype of a layer's weight and cast their hidden states to it. A weight without values serves
        # for that, and fails in any computation.
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
        """Returns the weight's rows from `start` to before `end`; shape (end - start, K)."""
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
        """Returns first and last (exclusive) row of each piece of the weight that is in full precision at once."""
        step = max(PIECE_WEIGHTS // self.in_features, 1)
        return [(start, min(start + step, self.out_features)) for start in range(0, self.out_features, step)]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.linear_format}"


def quantize_encoder(
    model: nn.Module, linear_format: str, device: torch.device, formats: Mapping[str, str | None] | None = None
) -> nn.Module:
    """Moves a frozen model to a device, its linear layers in 8 or 4 bits and the rest unchanged; works in place.

    It works layer by layer: the device never holds more than the result and a piece of one layer, and the source's
    layers are freed on the way.

    Args:
        formats: formats of modules that differ, by the beginnings of their paths; None among them: unchanged.
    """
    tied = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    # Subclasses of Linear are left alone: their owners compute with the weight themselves. So is an output layer that
    # shares its weight with the embedding: that weight stays, and codes would be added to it.
    paths = [path for path, module in model.named_modules() if type(module) is nn.Linear and module.weight not in tied]
    for path in paths:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        of_path = next((own for start, own in (formats or {}).items() if path.startswith(start)), linear_format)
        if of_path is None:
            continue
        stored = WeightOnlyLinear(linear.in_features, linear.out_features, of_path, device, dtype=linear.weight.dtype)
        stored.store(linear.weight.detach())
        stored.bias = linear.bias
        model.set_submodule(path, stored)
    return model.to(device).eval()
