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
    row_scale,
    levels,
    target,
    num_rows,
    num_columns,
    TRANSPOSED: tl.constexpr,
    FLOAT8: tl.constexpr,
    TILE: tl.constexpr,
):
    """4-bit codes (N, K / 2) with scales (N, K / 64) to 8-bit codes by row scale (N), as (N, K) or (K, N)."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    half = tl.program_id(1) * (TILE // 2) + tl.arange(0, TILE // 2)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    rows_inside = row < num_rows
    pair = tl.load(
        packed + row[:, None] * (num_columns // 2) + half[None, :],
        mask=rows_inside[:, None] & (half < num_columns // 2)[None, :],
        other=0,
    )
    code = tl.interleave(pair >> 4, pair & 15).to(tl.int32)
    inside = rows_inside[:, None] & (column < num_columns)[None, :]
    scale = tl.load(
        block_scale + row[:, None] * (num_columns // 64) + (column // 64)[None, :], mask=inside, other=0
    ).to(tl.float32)
    divisor = tl.load(row_scale + row, mask=rows_inside, other=1.0)
    value = tl.load(levels + code) * scale / divisor[:, None]
    if FLOAT8:
        stored = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        # Half away from zero; torch rounds halves to even, and no level meets a half but by chance.
        stored = tl.where(value < 0, value - 0.5, value + 0.5).to(tl.int8).to(tl.uint8, bitcast=True)
    if TRANSPOSED:
        tl.store(target + column[:, None] * num_rows + row[None, :], tl.trans(stored), mask=tl.trans(inside))
    else:
        tl.store(target + row[:, None] * num_columns + column[None, :], stored, mask=inside)
