"""LoRA products done together, on a GPU: compiled and not, against each layer by itself, over bases of every format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from pixtune.engine.lora import project, summed_outer
from pixtune.engine.quantize import FP8, INT8, QuantizedLinear, codes_for, tensor_cores_multiply
from pixtune.trained.adapters import RoundedLinear

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
NAMES, WIDTH, NUM_ROWS = ("to_q", "to_k", "to_v"), 512, 300


class Projections(nn.Module):
    """Three layers over one input, turned into something that needs their gradients."""

    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module

    def forward(self, states: Tensor, together: bool) -> Tensor:
        layers = (self.to_q, self.to_k, self.to_v)
        query, key, value = project(states, layers) if together else tuple(layer(states) for layer in layers)
        return nn.functional.layer_norm(query, (WIDTH,)) * key.sigmoid() + value


def projections(linear_format: str | None, ranks: tuple[int, int, int]) -> Projections:
    torch.manual_seed(0)
    model = Projections()
    for name in NAMES:
        linear = nn.Linear(WIDTH, WIDTH, device=CUDA, dtype=torch.bfloat16).requires_grad_(False)
        if linear_format is not None:
            codes = codes_for(linear_format, CUDA)
            quantized = QuantizedLinear(WIDTH, WIDTH, linear_format, codes, tensor_cores=True)
            quantized.set_weight(linear.weight)
            quantized.bias = linear.bias
            linear = quantized
        model.add_module(name, linear)
    config = LoraConfig(target_modules=list(NAMES), lora_alpha=24, rank_pattern=dict(zip(NAMES, ranks, strict=True)))
    inject_adapter_in_model(config, model)
    for name in NAMES:
        layer: Any = model.get_submodule(name)
        layer.cast_input_dtype_enabled = False
        for matrices in (layer.lora_A, layer.lora_B):
            plain = matrices["default"]
            rounded = RoundedLinear(plain.in_features, plain.out_features, bias=False, device=CUDA)
            nn.init.normal_(rounded.weight, std=0.1)
            matrices["default"] = rounded
    return model


def outcome(model: Projections, together: bool, compiled: bool) -> dict[str, Tensor]:
    torch._dynamo.reset()
    model.zero_grad(set_to_none=True)
    generator = torch.Generator(CUDA).manual_seed(1)
    states = torch.randn(1, NUM_ROWS, WIDTH, device=CUDA, generator=generator).bfloat16().requires_grad_()
    output = (torch.compile(model, fullgraph=True) if compiled else model)(states, together)
    output.backward(torch.randn(output.shape, device=CUDA, generator=generator).bfloat16())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert states.grad is not None and len(gradients) == 2 * len(NAMES)
    return {"output": output.detach().float(), "input": states.grad.float(), **gradients}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("ranks", [(16, 16, 16), (5, 32, 8)])
@pytest.mark.parametrize("linear_format", [None, FP8, INT8])
def test_together_is_each_by_itself(linear_format: str | None, ranks: tuple[int, int, int], compiled: bool) -> None:
    if linear_format and not tensor_cores_multiply(codes_for(linear_format, CUDA), CUDA):
        pytest.skip(f"this GPU has no {linear_format} tensor cores")
    model = projections(linear_format, ranks)
    expected = outcome(model, together=False, compiled=False)
    found = outcome(model, together=True, compiled=compiled)
    for name, tensor in expected.items():
        error = float((found[name] - tensor).norm() / tensor.norm())
        assert error < (0.02 if linear_format is None else 0.05), (
            f"{name}: {error:.3f}"
        )  # bf16 rounds at 0.004 a product


def test_gradients_are_summed_up_in_fp32() -> None:
    a_MN, b_MK = (torch.randn(4352, width, device=CUDA).bfloat16() for width in (48, 3072))
    exact = a_MN.double().T @ b_MK.double()
    found = summed_outer(a_MN, b_MK)
    assert found.dtype == torch.float32 and float((found - exact).norm() / exact.norm()) < 1e-4
