"""Operators on frozen weights that torch has no fast form of: Triton kernels on a GPU, plain torch elsewhere.

They are custom operators so that the compiler cannot keep a weight's expanded form from the forward pass for the
backward pass: that would cost more memory than the compression saves.
"""

from __future__ import annotations

import functools
import subprocess
import warnings
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

NF4_BLOCK = 16
"""Number of neighbours in a row that share a scale."""
NF4_LEVELS = (
    -0.9836, -0.7338, -0.5726, -0.4397, -0.3226, -0.2138, -0.1080, 0.0,
    0.0788, 0.1703, 0.2710, 0.3808, 0.5027, 0.6432, 0.8142, 0.9916,
)  # fmt: skip
"""Value of each 4-bit code in units of its block's scale: the fixed point of Lloyd's algorithm on Gaussian weights
whose blocks have the scales that `quantize.pack_nf4` finds. Zero is one of the values, so pruned weights stay zero."""
NF4_SCALES = tuple(
    sign * (1 + mantissa / 16) * 2.0 ** (exponent - 7)
    for sign in (1, -1) for exponent in range(8) for mantissa in range(16)
)  # fmt: skip
"""Value of each byte of a block's scale in units of its row's scale. The byte is a sign, since the levels are not
symmetrical and some blocks fit better mirrored, three bits of exponent and four of mantissa."""
UNIT_CODE = {torch.float8_e4m3fn: 128.0, torch.int8: 64.0}
"""8-bit code of one unit: the largest power of two at which the largest scale stays below the largest code."""
TILE = 64


@dataclass
class Triton:
    """State of Triton in this process."""

    works: bool
    """Whether its kernels run; until `try_triton` has been called, whether it is installed."""


TRITON = Triton(works=find_spec("triton") is not None)


@functools.cache
def nf4_levels(device: torch.device) -> Tensor:
    """Returns `NF4_LEVELS` on a device, copied there once: each copy waits for the device."""
    return torch.tensor(NF4_LEVELS, device=device)


@functools.cache
def nf4_scales(device: torch.device) -> Tensor:
    """Returns `NF4_SCALES` on a device, copied there once."""
    return torch.tensor(NF4_SCALES, device=device)


def power_of_two(number: int) -> int:
    """Returns the least power of two that is no smaller, as kernels need for their tiles; for 0 it is 1."""
    return 1 << max(number - 1, 0).bit_length()


def has_triton(tensor: Tensor) -> bool:
    """Returns whether Triton's kernels run on a tensor's device."""
    return tensor.is_cuda and TRITON.works


def try_triton(device: torch.device) -> None:
    """Tries Triton before its first use: the C compiler or the Python headers that it needs may be missing.

    Where it does not work, this process uses torch's operators, and a warning reports why.
    """
    if device.type != "cuda" or not TRITON.works:
        return
    if (obstacle := triton_obstacle(device)) is not None:
        TRITON.works = False
        warnings.warn(f"pixtune's own kernels do not run here, slower ones of PyTorch do: {obstacle}", stacklevel=2)


def triton_obstacle(device: torch.device) -> str | None:
    """Returns why the smallest of the kernels does not work on a device; None: it runs, and is correct."""
    square = torch.arange(4, dtype=torch.uint8, device=device).view(2, 2)
    try:
        return None if transpose_bytes(square).equal(square.t()) else "it transposed a matrix wrongly"
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


@torch.library.custom_op("pixtune::transpose_bytes", mutates_args=())
def transpose_bytes(matrix_NK: Tensor) -> Tensor:
    """Copies a contiguous uint8 matrix (N, K) to a contiguous one of shape (K, N).

    torch copies bytes into another order at a tenth of the memory's speed, which takes a third of the time of the
    product that follows.
    """
    if not has_triton(matrix_NK):
        return matrix_NK.t().contiguous()
    from pixtune.engine import triton_kernels

    rows, columns = matrix_NK.shape
    target_KN = matrix_NK.new_empty(columns, rows)
    tiles = (-(-rows // TILE), -(-columns // TILE))
    triton_kernels.transpose_bytes[tiles](matrix_NK, target_KN, rows, columns, TILE)
    return target_KN


@transpose_bytes.register_fake
def _(matrix_NK: Tensor) -> Tensor:
    return matrix_NK.new_empty(matrix_NK.shape[1], matrix_NK.shape[0])


@torch.library.custom_op("pixtune::expand_nf4", mutates_args=())
def expand_nf4(packed: Tensor, block_scale: Tensor, float8: bool, transposed: bool) -> Tensor:
    """Expands 4-bit codes to 8-bit codes of the weight in units of its row's scale, `UNIT_CODE` per unit.

    Args:
        packed: two codes per byte, the left neighbour in the upper half; uint8 of shape (N, K / 2).
        block_scale: one index of `NF4_SCALES` per 16 neighbours; uint8 of shape (N, K / 16).
        float8: codes in float8_e4m3fn, otherwise in int8; either way returned as uint8 bytes.
        transposed: the result has shape (K, N) instead of (N, K).
    """
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    codes = torch.float8_e4m3fn if float8 else torch.int8
    if not has_triton(packed):
        bytes_NK = round_to_codes(unpack_nf4(packed, block_scale), codes).view(torch.uint8)
        return bytes_NK.t().contiguous() if transposed else bytes_NK
    from pixtune.engine import triton_kernels

    target = packed.new_empty((columns, rows) if transposed else (rows, columns))
    tiles = (-(-rows // TILE), -(-columns // TILE))
    triton_kernels.expand_nf4[tiles](
        packed, block_scale, nf4_levels(packed.device), target, rows, columns, transposed, float8, TILE
    )
    return target


@expand_nf4.register_fake
def _(packed: Tensor, block_scale: Tensor, float8: bool, transposed: bool) -> Tensor:
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    return packed.new_empty((columns, rows) if transposed else (rows, columns))


def unpack_nf4(packed: Tensor, block_scale: Tensor) -> Tensor:
    """Returns the weights of 4-bit codes in units of their row's scale; fp32 of shape (N, K)."""
    codes_NK = torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1).int()
    blocks_NB16 = nf4_levels(packed.device)[codes_NK].view(*block_scale.shape, NF4_BLOCK)
    return (blocks_NB16 * nf4_scales(packed.device)[block_scale.int()].unsqueeze(-1)).flatten(1)


def round_to_codes(units: Tensor, codes: torch.dtype) -> Tensor:
    """Rounds weights in units of their row's scale to the nearest 8-bit codes, halves to even."""
    scaled = units * UNIT_CODE[codes]
    return scaled.to(codes) if codes.is_floating_point else scaled.round().to(codes)
