"""The Triton side of `kernels.py`. Imported at first use: Triton comes with CUDA builds of torch only.

Both kernels work on tiles of rows and columns of a weight, N by K, and write whole bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def transpose_bytes(source, target, num_rows, num_columns, TILE: tl.constexpr):
    """(N, K) -> (K, N)."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    tile = tl.load(source + row[:, None] * num_columns + column[None, :], mask=inside)
    tl.store(target + column[:, None] * num_rows + row[None, :], tl.trans(tile), mask=tl.trans(inside))


@triton.jit
def expand_nf4(
    packed,
    block_scale,
    levels,
    target,
    num_rows,
    num_columns,
    TRANSPOSED: tl.constexpr,
    FLOAT8: tl.constexpr,
    TILE: tl.constexpr,
):
    """4-bit codes (N, K / 2) with scales (N, K / 16) to 8-bit codes, as (N, K) or (K, N)."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    half = tl.program_id(1) * (TILE // 2) + tl.arange(0, TILE // 2)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    pair = tl.load(
        packed + row[:, None] * (num_columns // 2) + half[None, :],
        mask=(row < num_rows)[:, None] & (half < num_columns // 2)[None, :],
        other=0,
    )
    code = tl.interleave(pair >> 4, pair & 15).to(tl.int32)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    byte = tl.load(block_scale + row[:, None] * (num_columns // 16) + (column // 16)[None, :], mask=inside, other=0).to(
        tl.int32
    )
    # Sign, exponent and mantissa of `kernels.NF4_SCALES` in the places that fp32 has for them. The exponent gets fp32's
    # bias, less the scales' own, plus that of `kernels.UNIT_CODE`.
    if FLOAT8:
        exponent_shift: tl.constexpr = 127 - 7 + 7
    else:
        exponent_shift: tl.constexpr = 127 - 7 + 6
    bits = ((byte & 128) << 24) | (((byte & 127) << 19) + (exponent_shift << 23))
    value = tl.load(levels + code) * bits.to(tl.float32, bitcast=True)
    if FLOAT8:
        stored = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        # Adding 1.5 * 2^23 leaves no place for a fraction: rounded as torch rounds, halves to even.
        stored = ((value + 12582912.0) - 12582912.0).to(tl.int8).to(tl.uint8, bitcast=True)
    if TRANSPOSED:
        tl.store(target + column[:, None] * num_rows + row[None, :], tl.trans(stored), mask=tl.trans(inside))
    else:
        tl.store(target + row[:, None] * num_columns + column[None, :], stored, mask=inside)
