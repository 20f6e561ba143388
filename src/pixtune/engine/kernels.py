"""Operators on frozen weights that torch has no fast form of: Triton kernels on a GPU, plain torch elsewhere.

They are operators of their own so that the compiler cannot take a weight's expanded form in the forward pass for the
one that the backward pass needs, and keep it in between: that would cost more than it was compressed by.
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
"""Neighbours of a row that share a scale."""
NF4_LEVELS = (
    -0.9836, -0.7338, -0.5726, -0.4397, -0.3226, -0.2138, -0.1080, 0.0,
    0.0788, 0.1703, 0.2710, 0.3808, 0.5027, 0.6432, 0.8142, 0.9916,
)  # fmt: skip
"""What a 4-bit code stands for, in units of its block's scale: the fixed point of Lloyd's algorithm on Gaussian
weights whose blocks have the scales that `quantize.pack_nf4` finds. Zero is one of them: pruned weights stay so."""
NF4_SCALES = tuple(
    sign * (1 + mantissa / 16) * 2.0 ** (exponent - 7)
    for sign in (1, -1) for exponent in range(8) for mantissa in range(16)
)  # fmt: skip
"""What the byte of a block's scale stands for, in units of its row's: a sign, since the levels are not symmetrical and
some blocks fit better mirrored, three bits of exponent and four of mantissa."""
UNIT_CODE = {torch.float8_e4m3fn: 128.0, torch.int8: 64.0}
"""The 8-bit code of one unit: the largest power of two by which the largest scale stays below the largest code."""
TILE = 64


@dataclass
class Triton:
    """What is known of it in this process."""

    works: bool
    """Its kernels run; until `try_triton` has found out, that it is installed."""


TRITON = Triton(works=find_spec("triton") is not None)


@functools.cache
def nf4_levels(device: torch.device) -> Tensor:
    """`NF4_LEVELS` on a device, brought there once: each time anew would wait for the device."""
    return torch.tensor(NF4_LEVELS, device=device)


@functools.cache
def nf4_scales(device: torch.device) -> Tensor:
    """`NF4_SCALES` on a device, likewise."""
    return torch.tensor(NF4_SCALES, device=device)


def power_of_two(number: int) -> int:
    """The least that is no smaller, as kernels want their tiles; of 0, one that is masked out."""
    return 1 << max(number - 1, 0).bit_length()


def has_triton(tensor: Tensor) -> bool:
    """Whether a tensor's device gets Triton's kernels."""
    return tensor.is_cuda and TRITON.works


def try_triton(device: torch.device) -> None:
    """Before the first kernel is wanted: Triton may be there without the C compiler that it needs, or Python's headers.

    Where it does not work, torch's operators serve all of this process, and a warning says why.
    """
    if device.type != "cuda" or not TRITON.works:
        return
    if (obstacle := triton_obstacle(device)) is not None:
        TRITON.works = False
        warnings.warn(f"kernels of our own do not run here, slower ones of PyTorch do: {obstacle}", stacklevel=2)


def triton_obstacle(device: torch.device) -> str | None:
    """Why the smallest of the kernels does not run on a device; None: it does, and is right."""
    square = torch.arange(4, dtype=torch.uint8, device=device).view(2, 2)
    try:
        return None if transpose_bytes(square).equal(square.t()) else "a matrix came out transposed wrongly"
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


@torch.library.custom_op("pixtune::transpose_bytes", mutates_args=())
def transpose_bytes(matrix_NK: Tensor) -> Tensor:
    """A contiguous uint8 matrix (N, K) as a contiguous one of shape (K, N).

    torch copies bytes to another order at a tenth of the memory's speed, which is a third of the product that follows.
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
    """4-bit codes as 8-bit codes: those of the weight in units of its row's scale, `UNIT_CODE` to a unit.

    Args:
        packed: two codes in a byte, the left neighbour in the upper half; uint8 of shape (N, K / 2).
        block_scale: of 16 neighbours each, an index of `NF4_SCALES`; uint8 of shape (N, K / 16).
        float8: codes in float8_e4m3fn, else in int8; in any case returned as uint8 bytes.
        transposed: (K, N) instead of (N, K).
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
    """Weights in units of their row's scale, fp32 of shape (N, K), from their 4-bit codes."""
    codes_NK = torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1).int()
    blocks_NB16 = nf4_levels(packed.device)[codes_NK].view(*block_scale.shape, NF4_BLOCK)
    return (blocks_NB16 * nf4_scales(packed.device)[block_scale.int()].unsqueeze(-1)).flatten(1)


def round_to_codes(units: Tensor, codes: torch.dtype) -> Tensor:
    """Weights in units of their row's scale as the nearest 8-bit codes, halves to even."""
    scaled = units * UNIT_CODE[codes]
    return scaled.to(codes) if codes.is_floating_point else scaled.round().to(codes)
