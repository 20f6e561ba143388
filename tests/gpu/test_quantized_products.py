"""Quantized products on the tensor cores: against fp32, compiled against not, and the kernels against plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pixtune.engine import kernels, quantize
from pixtune.engine.quantize import FP8, INT8, NF4, QuantizedLinear, codes_for, tensor_cores_multiply

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
PRODUCT_ERROR = {FP8: 0.06, INT8: 0.02, NF4: 0.2}
"""Through two layers, and for the gradient through both outputs as well."""


def available(linear_format: str) -> bool:
    return tensor_cores_multiply(codes_for(linear_format, CUDA), CUDA)


def two_layers(linear_format: str | None) -> nn.Sequential:
    """Up and down again, so that the upper one's input gradient has passed through both."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for sides in ((512, 1024), (1024, 512)):
        plain = nn.Linear(*sides, device=CUDA, dtype=torch.bfloat16).requires_grad_(False)
        if linear_format is None:
            layers.append(plain)
            continue
        codes = codes_for(linear_format, CUDA)
        quantized = QuantizedLinear(*sides, linear_format, codes, tensor_cores=True)
        quantized.set_weight(plain.weight)
        quantized.bias = plain.bias
        layers.append(quantized)
    return nn.Sequential(layers[0], nn.GELU(approximate="tanh"), layers[1])


def output_and_gradient(function: Callable[[Tensor], Tensor], num_rows: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    inputs = torch.randn(num_rows, 512, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    output = function(inputs)
    output.float().square().sum().backward()
    assert inputs.grad is not None
    return output.detach().float(), inputs.grad.float()


def error(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


@pytest.mark.parametrize("num_rows", [3, 300])
@pytest.mark.parametrize("linear_format", [FP8, INT8, NF4])
def test_products_and_gradients(linear_format: str, num_rows: int) -> None:
    if not available(linear_format):
        pytest.skip(f"this GPU has no {linear_format} tensor cores")
    expected = output_and_gradient(two_layers(None), num_rows)
    ours = output_and_gradient(two_layers(linear_format), num_rows)
    assert all(error(*pair) < PRODUCT_ERROR[linear_format] for pair in zip(ours, expected, strict=True))


@pytest.mark.parametrize("linear_format", [FP8, INT8, NF4])
def test_compiling_keeps_the_gradient(linear_format: str) -> None:
    """The compiler has dropped it silently before (`quantize.multiply_rows`)."""
    if not available(linear_format):
        pytest.skip(f"this GPU has no {linear_format} tensor cores")
    layers = two_layers(linear_format)
    expected = output_and_gradient(layers, 300)
    compiled = output_and_gradient(torch.compile(layers, fullgraph=True), 300)
    # Fused arithmetic rounds elsewhere, and a rounded input falls on another code now and then.
    assert all(error(*pair) < PRODUCT_ERROR[linear_format] for pair in zip(compiled, expected, strict=True))


@pytest.mark.parametrize("linear_format", [FP8, INT8, NF4])
def test_no_expanded_weight_is_kept_for_the_backward_pass(linear_format: str) -> None:
    if not available(linear_format):
        pytest.skip(f"this GPU has no {linear_format} tensor cores")
    compiled = torch.compile(two_layers(linear_format), fullgraph=True)
    output_and_gradient(compiled, 32)
    inputs = torch.randn(32, 512, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    before = torch.cuda.memory_allocated()
    output = compiled(inputs)
    assert torch.cuda.memory_allocated() - before < 512 * 1024 / 2, "half of one weight in 8 bits"
    del output


@pytest.mark.parametrize("linear_format", [FP8, INT8])
def test_a_kept_transpose_changes_no_bit(linear_format: str) -> None:
    if not available(linear_format):
        pytest.skip(f"this GPU has no {linear_format} tensor cores")
    layers = two_layers(linear_format)
    expected = output_and_gradient(layers, 300)
    for layer in layers:
        if isinstance(layer, quantize.QuantizedLinear):
            layer.transpose = kernels.transpose_bytes(layer.weight)
    assert all(one.equal(other) for one, other in zip(output_and_gradient(layers, 300), expected, strict=True))


def test_transposed_bytes_are_the_plain_ones() -> None:
    matrix = torch.randint(0, 256, (200, 330), device=CUDA, dtype=torch.uint8)
    assert kernels.transpose_bytes(matrix).equal(matrix.t().contiguous())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [144, 3072, 15360])
def test_rows_are_quantized_at_once_as_by_torch(width: int, dtype: torch.dtype) -> None:
    """Bit for bit, also of rows of zeros and of rows that are parts of longer ones."""
    if not available(FP8):
        pytest.skip("this GPU has no fp8 tensor cores")
    longer = torch.randn(70, width + 16, device=CUDA) * torch.logspace(-6, 6, 70, device=CUDA)[:, None]
    values = longer.to(dtype)[:, :width]
    values[3] = 0
    assert quantize.quantizes_at_once(values, torch.float8_e4m3fn)
    codes, scale = quantize.quantize_rows_at_once(values)
    plain, plain_scale = quantize.quantize_rows(values.cpu(), torch.float8_e4m3fn)
    assert scale.cpu().equal(plain_scale)
    assert codes.cpu().view(torch.uint8).equal(plain.view(torch.uint8))


@pytest.mark.parametrize("float8", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_expanded_codes_are_the_plain_ones(float8: bool, transposed: bool) -> None:
    """Bit for bit, for every scale that a byte can stand for, on sides that fill no tile."""
    packed = torch.randint(0, 256, (200, 168), device=CUDA, dtype=torch.uint8)
    block_scale = torch.arange(200 * 21, device=CUDA).view(200, 21).to(torch.uint8)
    ours = kernels.expand_nf4(packed, block_scale, float8, transposed)
    assert ours.cpu().equal(kernels.expand_nf4(packed.cpu(), block_scale.cpu(), float8, transposed))


def test_a_weight_packs_on_the_gpu_as_on_the_cpu() -> None:
    """But for blocks that two scales fit equally well within the rounding of sums, which add up in another order."""
    weight = torch.randn(200, 320)
    codes = codes_for(NF4, CUDA)
    packed_gpu, packed_cpu = quantize.pack_nf4(weight.to(CUDA), codes), quantize.pack_nf4(weight, codes)
    assert (packed_gpu[1].cpu() != packed_cpu[1]).float().mean() < 0.02
    errors = []
    for packed, block_scale, scale in (packed_gpu, packed_cpu):
        found = kernels.round_to_codes(kernels.unpack_nf4(packed.cpu(), block_scale.cpu()), codes).float()
        errors.append((found / kernels.UNIT_CODE[codes] * scale.cpu() - weight).square().sum())
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-4, atol=0)
