"""The Triton kernels against plain torch on a CPU, by Triton's interpreter: for those who change one without a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/unit/engine/test_kernels.py

`tests/gpu/test_quantized_products.py` compares what a GPU really runs.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pixtune.engine
from pixtune.engine import heads, kernels, mlp
from pixtune.engine.lora import plus_product
from pixtune.engine.quantize import quantize_rows

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
    from pixtune.engine import triton_kernels

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
    from pixtune.engine import triton_kernels

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


@interpreted
@pytest.mark.parametrize("shape", [(2, 3, 5, 3, 32), (1, 0, 6, 24, 128), (1, 4, 7, 9, 16)])
def test_heads_are_the_plain_ones(shape: tuple[int, int, int, int, int]) -> None:
    samples, num_first, num_last, num_heads, head_size = shape
    parts = []
    for length in (num_first, num_last):
        norm = nn.RMSNorm(head_size, eps=1e-6).requires_grad_(False)
        norm.weight.normal_()
        angles = torch.randn(length, head_size // 2)
        states = torch.randn(samples, length, num_heads * head_size, requires_grad=True)
        parts.append((states, norm, torch.stack([angles.cos(), angles.sin()], dim=-1)))
    parts = parts if num_first else parts[1:]
    plain = heads.rotated(parts, head_size)
    gradient = torch.randn(samples, num_heads, num_first + num_last, head_size).transpose(1, 2)
    inputs = [states for states, _, _ in parts]
    wanted = torch.autograd.grad(plain, inputs, gradient)

    first = (parts[0][0], parts[0][1].weight, parts[0][2]) if num_first else (None, None, None)
    last = (parts[-1][0], parts[-1][1].weight, parts[-1][2])
    found = heads.rotate_heads(*first, *last, 1e-6)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, gradient), wanted)


@pytest.mark.parametrize("shape", [(2, 3, 5, 3, 32), (1, 0, 6, 24, 128), (1, 4, 7, 9, 16)])
def test_kernels_of_heads_are_launched_with_the_sizes_that_they_are_given(
    shape: tuple[int, int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the names of the kernels' own arguments, and as many programs as have all heads of all tokens once."""
    samples, num_first, num_last, num_heads, head_size = shape
    launched: dict[str, tuple[tuple[int, int], tuple[Any, ...]]] = {}

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, programs: tuple[int, int]) -> Callable[..., None]:
            return lambda *given: launched.update({self.name: (programs, given)})

    names = ("rotate_heads", "rotate_heads_backward")
    fake = SimpleNamespace(**{name: Kernel(name) for name in names})
    monkeypatch.setitem(sys.modules, "pixtune.engine.triton_kernels", fake)
    monkeypatch.setattr(pixtune.engine, "triton_kernels", fake, raising=False)
    width, weight = num_heads * head_size, torch.ones(head_size)
    streams = [
        (torch.ones(samples, length, width), weight, torch.ones(length, head_size // 2, 2)) if length else (None,) * 3
        for length in (num_first, num_last)
    ]
    # The functions themselves: another test of the process may have registered the operators for a CPU.
    forward, backward = (vars(getattr(heads, name))["_init_fn"] for name in names)
    joined = forward(*streams[0], *streams[1], 1e-6)
    backward(joined, *streams[0], *streams[1], 1e-6)
    assert joined.shape == (samples, num_first + num_last, num_heads, head_size)
    source = ast.parse((Path(heads.__file__).parent / "triton_kernels.py").read_text(encoding="utf-8"))
    arguments = {
        each.name: [arg.arg for arg in each.args.args] for each in source.body if isinstance(each, ast.FunctionDef)
    }
    for name in names:
        programs, given = launched[name]
        values = dict(zip(arguments[name], given, strict=True))
        sizes = [values[key] for key in ("num_first", "num_last", "num_heads", "epsilon", "D")]
        assert sizes == [num_first, num_last, num_heads, 1e-6, head_size]
        assert programs[0] == samples * (num_first + num_last)
        assert (programs[1] - 1) * values["HEADS"] < num_heads <= programs[1] * values["HEADS"]
        assert values["HEADS"] & (values["HEADS"] - 1) == 0, "Triton's ranges have powers of two"
        assert values["last"].equal(streams[1][0])


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [64, 144, 3072])
def test_rows_are_quantized_as_plainly(width: int, dtype: torch.dtype) -> None:
    """Numbers of few bits are often next to the middle between two codes, where the last bit of a scale decides."""
    from pixtune.engine import triton_kernels

    values = torch.randn(70, 3 * width)[:, width : 2 * width] * torch.logspace(-6, 6, 70)[:, None]
    values[3] = 0
    values = values.to(dtype)
    plain, plain_scale = quantize_rows(values, torch.float8_e4m3fn)
    codes, scale = torch.empty(70, width, dtype=torch.uint8), torch.empty(70, 1)
    triton_kernels.quantize_row[70,](
        values, values.stride(0), codes, scale, width, 448.0, 1 << (width - 1).bit_length()
    )  # fmt: skip
    assert scale.equal(plain_scale)
    wanted = plain.view(torch.uint8)
    # Nor are those in the middle between two codes, which it rounds up and a GPU to even, or below all normal codes.
    scaled = values.float() * (448.0 / values.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12))
    compared = (wanted & 7 != 0) & (scaled.view(torch.int32) & 0xFFFFF != 0x80000) & (scaled.abs() >= 2**-6)
    assert compared.float().mean() > 0.6
    assert codes[compared].equal(wanted[compared])


@interpreted
@pytest.mark.parametrize(("rank", "tile_ranks"), [(16, 16), (100, 64), (4, 16)])
def test_a_low_rank_product_is_added_as_plainly(rank: int, tile_ranks: int) -> None:
    from pixtune.engine import triton_kernels

    product_MN, bias_N, up_Nr = torch.randn(70, 200), torch.randn(200), torch.randn(200, rank)
    low_Mr = torch.randn(70, rank + 32)[:, 16 : 16 + rank]
    for bias in (bias_N, None):
        found = torch.empty_like(product_MN)
        triton_kernels.plus_product[2, 2](
            product_MN, product_MN if bias is None else bias, low_Mr, up_Nr, found, 70, 200, low_Mr.stride(0),
            bias is not None, rank, 64, 128, tile_ranks,
        )  # fmt: skip
        torch.testing.assert_close(found, plus_product(product_MN, bias, low_Mr, up_Nr), rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize(("width", "num_beside"), [(192, 0), (3072, 100), (100, 48)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_an_mlps_codes_are_the_plain_ones(width: int, num_beside: int, with_bias: bool) -> None:
    hidden = torch.randn(5, width)
    bias = torch.randn(width) if with_bias else None
    beside = torch.randn(5, num_beside) if num_beside else None
    inputs = hidden if bias is None else hidden + bias
    activated = nn.functional.gelu(inputs, approximate="tanh")
    joined = activated if beside is None else torch.cat([beside, activated], dim=1)
    codes, scale, kept, kept_scale = mlp.gelu_codes(hidden, bias, beside, True)
    assert_same_codes(codes, scale, joined)
    assert_same_codes(kept, kept_scale, inputs)
    assert mlp.gelu_codes(hidden, bias, beside, False)[2].numel() == 0

    gradient, column_scale = torch.randn(5, num_beside + width)[:, num_beside:], torch.rand(width) + 0.1
    for kept_inputs, kept_scales in ((kept, kept_scale), (hidden, None)):
        read = inputs if kept_scales is None else kept.view(torch.float8_e4m3fn).float() * kept_scales
        wanted = torch.ops.aten.gelu_backward(gradient, read, approximate="tanh") * column_scale
        found, found_scale = mlp.gelu_gradient_codes(gradient, kept_inputs, kept_scales, bias, column_scale)
        assert_same_codes(found, found_scale, wanted)


def assert_same_codes(codes: Tensor, scale: Tensor, values: Tensor) -> None:
    """Compares with `quantize_rows`, except values within a rounding of a border, and those that the interpreter halves
    (see above)."""
    wanted, wanted_scale = quantize_rows(values, torch.float8_e4m3fn)
    torch.testing.assert_close(scale, wanted_scale)
    bytes_wanted = wanted.view(torch.uint8)
    compared = codes & 7 != 0
    assert compared.float().mean() > 0.7
    assert (codes[compared] != bytes_wanted[compared]).float().mean() < 0.01


def test_where_triton_does_not_run_torch_serves_and_a_warning_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda = True

    on_gpu: Any = OnGpu()

    monkeypatch.setattr(kernels, "TRITON", kernels.Triton(works=True))
    tried: list[object] = []
    monkeypatch.setattr(kernels, "triton_obstacle", lambda device: tried.append(device))
    kernels.try_triton(torch.device("cuda"))
    assert kernels.has_triton(on_gpu) and not kernels.has_triton(torch.ones(1))

    monkeypatch.setattr(kernels, "triton_obstacle", lambda device: "RuntimeError: Failed to find C compiler")
    kernels.try_triton(torch.device("cpu"))
    assert kernels.has_triton(on_gpu)
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        kernels.try_triton(torch.device("cuda"))
    assert not kernels.has_triton(on_gpu)
    kernels.try_triton(torch.device("cuda"))  # is known, and said once


def test_an_obstacle_is_an_error_or_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert kernels.triton_obstacle(cpu) is None
    monkeypatch.setattr(kernels, "transpose_bytes", lambda matrix: matrix)
    assert "wrongly" in (kernels.triton_obstacle(cpu) or "")
    for error in (RuntimeError("no C compiler"), subprocess.CalledProcessError(1, "gcc")):
        monkeypatch.setattr(kernels, "transpose_bytes", lambda matrix, error=error: raise_it(error))
        assert type(error).__name__ in (kernels.triton_obstacle(cpu) or "")


def raise_it(error: Exception) -> None:
    raise error


def test_kernels_of_heads_serve_frozen_root_mean_squares_of_one_epsilon_alone() -> None:
    def norm(epsilon: float | None = 1e-6, trained: bool = False, size: int = 16) -> nn.RMSNorm:
        return nn.RMSNorm(size, eps=epsilon).requires_grad_(trained)

    assert heads.have_kernel([norm()]) and heads.have_kernel([norm(), norm()])
    others: list[nn.Module] = [
        norm(trained=True),
        norm(None),
        norm(size=24),
        nn.RMSNorm(16, 1e-6, elementwise_affine=False),
    ]
    others += [nn.LayerNorm(16, eps=1e-6, bias=False).requires_grad_(False), norm(1e-5)]
    assert not any(heads.have_kernel([norm(), other]) for other in others)
