"""Quantized products against fp64, their gradient against a plain layer's, and what a LoRA sees of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pixtune.engine import quantize
from pixtune.engine.kernels import nf4_levels
from pixtune.engine.quantize import FP8, INT8, NF4, QuantizedLinear, _nearest_levels
from pixtune.trained import adapters
from tests.gradients import gradient_of

E4M3, INT = torch.float8_e4m3fn, torch.int8
KINDS = [(FP8, E4M3), (INT8, INT), (NF4, E4M3), (NF4, INT)]
# Half a step of rounding, relative to the largest code of a row, and what it makes of Gaussian rows.
WEIGHT_ERROR = {FP8: 0.03, INT8: 0.01, NF4: 0.07}
PRODUCT_ERROR = {FP8: 0.045, INT8: 0.015, NF4: 0.085}


def error(ours: Tensor, exact: Tensor) -> float:
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / exact.norm())


def layers(linear_format: str, codes: torch.dtype, bias: bool = True) -> tuple[nn.Linear, QuantizedLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(192, 128, bias=bias).requires_grad_(False)
    quantized = QuantizedLinear(192, 128, linear_format, codes, tensor_cores=False)
    quantized.set_weight(plain.weight)
    quantized.bias = plain.bias
    return plain, quantized


@pytest.mark.parametrize(("linear_format", "codes"), [kind for kind in KINDS if kind[0] != NF4])
def test_a_kept_transpose_changes_no_bit(linear_format: str, codes: torch.dtype) -> None:
    plain, quantized = layers(linear_format, codes)
    keeping = QuantizedLinear(192, 128, linear_format, codes, tensor_cores=False, keeps_transpose=True)
    keeping.set_weight(plain.weight)
    keeping.bias = plain.bias
    assert keeping.transpose is not None and keeping.transpose.equal(quantized.weight.t())
    assert quantized.transpose is None
    found = []
    for layer in (keeping, quantized):
        inputs = torch.randn(5, 192, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = layer(inputs)
        if layer is keeping:
            layer.weight.data.zero_()  # the backward pass reads the other one
        output.backward(torch.randn(5, 128, generator=torch.Generator().manual_seed(2)))
        found.append((output.detach(), gradient_of(inputs)))
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


def test_4_bit_codes_keep_no_transpose() -> None:
    with pytest.raises(ValueError, match="4-bit codes"):
        QuantizedLinear(192, 128, NF4, torch.int8, tensor_cores=False, keeps_transpose=True)


@pytest.mark.parametrize(("linear_format", "codes"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient_are_those_of_the_plain_layer(
    linear_format: str, codes: torch.dtype, dtype: torch.dtype
) -> None:
    plain, quantized = layers(linear_format, codes)
    inputs = torch.randn(2, 7, 192, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(2))
    exact_input = inputs.clone().requires_grad_()
    exact = plain(exact_input)
    exact.backward(upstream)
    ours_input = inputs.to(dtype).requires_grad_()
    quantized.bias = nn.Parameter(plain.bias.to(dtype), requires_grad=False)
    ours = quantized(ours_input)
    ours.backward(upstream.to(dtype))
    assert ours.dtype == dtype and ours.shape == exact.shape
    assert error(ours, exact) < PRODUCT_ERROR[linear_format]
    assert error(gradient_of(ours_input), gradient_of(exact_input)) < PRODUCT_ERROR[linear_format]


@pytest.mark.parametrize(("linear_format", "codes"), KINDS)
def test_the_product_is_exactly_that_of_the_codes(linear_format: str, codes: torch.dtype) -> None:
    """The error against fp64 is fp32's own rounding: no scale and no row is misplaced."""
    _, quantized = layers(linear_format, codes, bias=False)
    inputs = torch.randn(5, 192)
    input_codes, scale = quantize.quantize_rows(inputs, codes)
    exact = (input_codes.double() * scale) @ quantized.dequantized().double().t()
    assert error(quantized(inputs), exact) < 1e-6


@pytest.mark.parametrize(("linear_format", "codes"), KINDS)
def test_what_is_stored_stands_for_the_weight(linear_format: str, codes: torch.dtype) -> None:
    plain, quantized = layers(linear_format, codes)
    assert error(quantized.dequantized(), plain.weight) < WEIGHT_ERROR[linear_format]
    stored = sum(buffer.numel() * buffer.element_size() for buffer in quantized.buffers())
    bytes_per_weight = 0.5 + 1 / 16 + 4 / 192 if linear_format == "nf4" else 1 + 4 / 192
    assert stored == pytest.approx(plain.weight.numel() * bytes_per_weight)
    assert not any(buffer.is_floating_point() and buffer.numel() > 500 for buffer in quantized.buffers()), "a copy"


def test_rows_of_zeros_and_of_very_different_size_survive() -> None:
    rows = torch.tensor([[0.0] * 64, [1e-4] * 64, [1e4] * 64])
    for codes in (E4M3, INT):
        stored, scale = quantize.quantize_rows(rows, codes)
        torch.testing.assert_close(stored.float() * scale, rows, rtol=1e-2, atol=0)


@pytest.mark.parametrize(("linear_format", "codes"), KINDS)
def test_no_number_stays_no_number(linear_format: str, codes: torch.dtype) -> None:
    """A NaN must reach the loss, where the run stops, and not become a code."""
    plain, quantized = layers(linear_format, codes)
    inputs = torch.randn(3, 192)
    inputs[1, 5] = float("nan")
    outputs = quantized(inputs)
    assert outputs[1].isnan().all() and outputs[[0, 2]].isfinite().all()
    plain.weight[7, 9] = float("nan")
    quantized.set_weight(plain.weight)
    outputs = quantized(torch.randn(3, 192))
    assert outputs[:, 7].isnan().all() and outputs[:, 8].isfinite().all()


@pytest.mark.parametrize(("sides", "fits"), [((64, 128), True), ((64, 100), False), ((70, 64), False)])
def test_odd_sides_stay_plain(sides: tuple[int, int], fits: bool) -> None:
    assert quantize.can_quantize(nn.Linear(*sides), NF4) is fits


@pytest.mark.parametrize(("linear_format", "codes"), KINDS)
def test_a_lora_on_top_learns_as_on_the_plain_layer(linear_format: str, codes: torch.dtype) -> None:
    """Two layers deep, so that the first LoRA's gradient has come back through a quantized product."""
    gradients = []
    for part in (0, 1):
        first = layers(linear_format, codes)[part]
        second = nn.Linear(128, 64).requires_grad_(False)
        torch.manual_seed(5)
        second.weight.copy_(torch.randn(64, 128) / 8)
        if part:
            quantized = QuantizedLinear(128, 64, linear_format, codes, tensor_cores=False)
            quantized.set_weight(second.weight)
            quantized.bias = second.bias
            second = quantized
        model = Adaptable(first, second)
        adapters.attach_lora(model, ["first", "second"], 4, 8.0, 7)
        for number, parameter in enumerate(adapters.trainable_parameters(model).values()):
            torch.manual_seed(number)
            parameter.data = torch.randn_like(parameter) / 8
        torch.manual_seed(11)
        model(torch.randn(64, 192)).square().mean().backward()
        gradients.append(torch.cat([gradient_of(p).flatten() for p in adapters.trainable_parameters(model).values()]))
    one, other = gradients
    assert torch.cosine_similarity(one, other, dim=0) > (0.97 if linear_format == NF4 else 0.995)


class Adaptable(nn.Module):
    """Two layers and the one method of diffusers' models that attaching a LoRA needs."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(nn.functional.gelu(self.first(inputs)))

    def add_adapter(self, config: object, adapter_name: str) -> None:
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, self, adapter_name)


@pytest.mark.parametrize(("linear_format", "codes"), KINDS)
def test_compiling_changes_no_gradient(linear_format: str, codes: torch.dtype) -> None:
    """torch.compile has dropped gradients of such functions without a word: see `multiply_rows`."""
    _, quantized = layers(linear_format, codes)
    inputs = torch.randn(20, 192)
    found = []
    for function in (quantized, torch.compile(quantized, fullgraph=True)):
        leaf = inputs.clone().requires_grad_()
        function(leaf).square().sum().backward()
        found.append(gradient_of(leaf))
    assert error(found[1], found[0]) < 1e-5


def test_the_nearest_level_is_found_as_by_a_search() -> None:
    """Also on the borders between two, and of what is no number."""
    levels = nf4_levels(torch.device("cpu"))
    borders = (levels[1:] + levels[:-1]) / 2
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, *borders, *borders.nextafter(levels[1:])])
    values = torch.cat([odd, torch.randn(1000, generator=torch.Generator().manual_seed(0))])
    found = _nearest_levels(values[:, None], torch.ones(len(values)))
    assert torch.equal(found[:, 0], torch.bucketize(values, borders, out_int32=True))
