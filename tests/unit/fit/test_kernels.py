"""The Triton kernels against plain torch on a CPU, by Triton's interpreter: for those who change one without a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/unit/fit/test_kernels.py

`tests/gpu/test_quantized_products.py` compares what a GPU really runs.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from pixtune.fit import kernels

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None,
    reason="needs Triton and TRITON_INTERPRET=1",
)
SHAPES = [(200, 336), (64, 64), (70, 144)]


@interpreted
@pytest.mark.parametrize("float8", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_expansion_is_the_plain_one(shape: tuple[int, int], transposed: bool, float8: bool) -> None:
    from pixtune.fit import triton_kernels

    rows, columns = shape
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    block_scale = torch.randint(0, 256, (rows, columns // 16), dtype=torch.uint8)
    plain = kernels.expand_nf4(packed, block_scale, float8, transposed)
    found = torch.empty_like(plain)
    tiles = (-(-rows // kernels.TILE), -(-columns // kernels.TILE))
    triton_kernels.expand_nf4[tiles](
        packed, block_scale, kernels.nf4_levels(packed.device), found, rows, columns, transposed, float8, kernels.TILE
    )
    # The interpreter (3.9) halves what it rounds up to a power of two in 8 bits: without a mantissa, not compared.
    compared = plain & 7 != 0 if float8 else torch.ones_like(plain, dtype=torch.bool)
    assert compared.float().mean() > 0.8
    assert found[compared].equal(plain[compared])


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
def test_the_transpose_is_the_plain_one(shape: tuple[int, int]) -> None:
    from pixtune.fit import triton_kernels

    rows, columns = shape
    matrix = torch.randint(0, 256, shape, dtype=torch.uint8)
    found = torch.empty(columns, rows, dtype=torch.uint8)
    tiles = (-(-rows // kernels.TILE), -(-columns // kernels.TILE))
    triton_kernels.transpose_bytes[tiles](matrix, found, rows, columns, kernels.TILE)
    assert found.equal(matrix.t())


@pytest.mark.parametrize("float8", [True, False])
def test_the_plain_expansion_is_level_times_scale(float8: bool) -> None:
    """Every byte of scale with every code, in fp64; transposed is the same, transposed."""
    packed = torch.arange(256).view(1, 256).repeat(256, 1).to(torch.uint8)
    block_scale = torch.arange(256).view(256, 1).repeat(1, 32).to(torch.uint8)
    bytes_NK = kernels.expand_nf4(packed, block_scale, float8, transposed=False)
    codes = torch.float8_e4m3fn if float8 else torch.int8
    unit = 128 if float8 else 64
    for scale, row in zip(kernels.NF4_SCALES, bytes_NK.view(codes).double(), strict=True):
        for number in (0, 1, 93, 510, 511):
            code = number // 2 >> 4 if number % 2 == 0 else number // 2 & 15
            exact = kernels.NF4_LEVELS[code] * scale * unit
            step = max(abs(exact) / 16, 2**-10) if float8 else 0.5
            assert abs(float(row[number]) - exact) <= step * (1 + 1e-6)
    assert kernels.expand_nf4(packed, block_scale, float8, transposed=True).equal(bytes_NK.t())
