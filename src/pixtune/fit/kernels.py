"""Operators on frozen weights that torch has no fast form of: Triton kernels on a GPU, plain torch elsewhere.

They are operators of their own so that the compiler cannot take a weight's expanded form in the forward pass for the
one that the backward pass needs, and keep it in between: that would cost more than it was compressed by.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

NF4_BLOCK = 64
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a standard normal, scaled to [-1, 1] (Dettmers et al. 2023, arXiv 2305.14314, appendix E)."""
TILE = 64


@functools.cache
def nf4_levels(device: torch.device) -> Tensor:
    """`NF4_LEVELS` on a device, brought there once: each time anew would wait for the device."""
    return torch.tensor(NF4_LEVELS, device=device)


def _has_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and find_spec("triton") is not None


@torch.library.custom_op("pixtune::transpose_bytes", mutates_args=())
def transpose_bytes(matrix_NK: Tensor) -> Tensor:
    """A contiguous uint8 matrix (N, K) as a contiguous one of shape (K, N).

    torch copies bytes to another order at a tenth of the memory's speed, which is a third of the product that follows.
    """
    if not _has_triton(matrix_NK):
        return matrix_NK.t().contiguous()
    from pixtune.fit import triton_kernels

    rows, columns = matrix_NK.shape
    target_KN = matrix_NK.new_empty(columns, rows)
    tiles = (-(-rows // TILE), -(-columns // TILE))
    triton_kernels.transpose_bytes[tiles](matrix_NK, target_KN, rows, columns, TILE)
    return target_KN


@transpose_bytes.register_fake
def _(matrix_NK: Tensor) -> Tensor:
    return matrix_NK.new_empty(matrix_NK.shape[1], matrix_NK.shape[0])


@torch.library.custom_op("pixtune::expand_nf4", mutates_args=())
def expand_nf4(packed: Tensor, block_scale_NB: Tensor, row_scale_N: Tensor, float8: bool, transposed: bool) -> Tensor:
    """4-bit codes as 8-bit codes with one scale a row.

    Args:
        packed: two codes in a byte, the left neighbour in the upper half; uint8 of shape (N, K / 2).
        block_scale_NB: bf16, of 64 neighbours each, shape (N, K / 64).
        row_scale_N: fp32; the result times it is the weight.
        float8: codes in float8_e4m3fn, else in int8; in any case returned as uint8 bytes.
        transposed: (K, N) instead of (N, K).
    """
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    if not _has_triton(packed):
        values_NK = unpack_nf4(packed, block_scale_NB) / row_scale_N.unsqueeze(1)
        codes_NK = values_NK.to(torch.float8_e4m3fn) if float8 else values_NK.round().to(torch.int8)
        bytes_NK = codes_NK.view(torch.uint8)
        return bytes_NK.t().contiguous() if transposed else bytes_NK
    from pixtune.fit import triton_kernels

    target = packed.new_empty((columns, rows) if transposed else (rows, columns))
    tiles = (-(-rows // TILE), -(-columns // TILE))
    triton_kernels.expand_nf4[tiles](
        packed, block_scale_NB, row_scale_N, nf4_levels(packed.device), target, rows, columns, transposed, float8, TILE
    )
    return target


@expand_nf4.register_fake
def _(packed: Tensor, block_scale_NB: Tensor, row_scale_N: Tensor, float8: bool, transposed: bool) -> Tensor:
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    return packed.new_empty((columns, rows) if transposed else (rows, columns))


def unpack_nf4(packed: Tensor, block_scale_NB: Tensor) -> Tensor:
    """fp32 weights of shape (N, K) from their 4-bit codes."""
    codes_NK = torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1).int()
    blocks_NB64 = nf4_levels(packed.device)[codes_NK].view(*block_scale_NB.shape, NF4_BLOCK)
    return (blocks_NB64 * block_scale_NB.float().unsqueeze(-1)).flatten(1)
