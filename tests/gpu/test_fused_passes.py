"""Passes that a GPU does in one kernel, forward and backward, against the same from torch's operators in fp32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pixtune.engine.gelu import CompactGelu
from pixtune.engine.heads import Stream, join_heads, rotate
from pixtune.engine.mlp import are_fused, mlp
from pixtune.engine.quantize import FP8, NF4, QuantizedLinear, codes_for

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
HEADS, HEAD_SIZE = 6, 64
WIDTH = HEADS * HEAD_SIZE
ROUNDING = 0.01
"""Relative, of results in bf16; one rounding makes 0.0017."""


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def outcome(work: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor, compiled: bool) -> list[Tensor]:
    """Result of a pass and the gradients of its inputs."""
    torch._dynamo.reset()
    result = (torch.compile(work, fullgraph=True) if compiled else work)(*inputs)
    return [result, *torch.autograd.grad(result, inputs, gradient)]


def norm() -> nn.RMSNorm:
    made = nn.RMSNorm(HEAD_SIZE, eps=1e-6, device=CUDA, dtype=torch.bfloat16).requires_grad_(False)
    made.weight.normal_(1, 0.2)
    return made


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lengths", [(40, 300), (300,)])
@pytest.mark.parametrize("num_examples", [1, 2])
def test_heads(lengths: tuple[int, ...], num_examples: int, compiled: bool) -> None:
    torch.manual_seed(0)
    norms = [(norm(), norm()) for _ in lengths]
    angles = [torch.randn(length, HEAD_SIZE // 2, device=CUDA) for length in lengths]
    rotary = [torch.stack([angle.cos(), angle.sin()], dim=-1) for angle in angles]
    inputs = [
        torch.randn(num_examples, length, WIDTH, device=CUDA).bfloat16().requires_grad_()
        for length in lengths for _ in range(3)
    ]  # fmt: skip
    # Attention hands gradients over with heads before tokens.
    gradient = torch.randn(3, num_examples, HEADS, sum(lengths), HEAD_SIZE, device=CUDA).transpose(2, 3)

    def fused(*projections: Tensor) -> Tensor:
        streams = [Stream(projections[3 * n :][:3], *norms[n], rotary[n]) for n in range(len(lengths))]
        return torch.stack(join_heads(tuple(streams), HEAD_SIZE))

    def plain(*projections: Tensor) -> Tensor:
        joined = []
        for kind in range(3):
            heads = [states.unflatten(-1, (HEADS, HEAD_SIZE)) for states in projections[kind::3]]
            if kind < 2:
                weights = [pair[kind].weight.float() for pair in norms]
                heads = [nn.functional.rms_norm(h, (HEAD_SIZE,), w, 1e-6) for h, w in zip(heads, weights, strict=True)]
                heads = [rotate(h, angle) for h, angle in zip(heads, rotary, strict=True)]
            joined.append(torch.cat(heads, dim=1))
        return torch.stack(joined)

    found = outcome(fused, inputs, gradient.bfloat16(), compiled)
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    wanted = outcome(plain, exact, gradient.bfloat16().float(), compiled=False)
    assert max(relative_error(a, b) for a, b in zip(found, wanted, strict=True)) < ROUNDING


class KeepingGelu(nn.GELU):
    """A GELU as `compact_gelus` leaves it."""

    keeps_codes = True

    def forward(self, input: Tensor) -> Tensor:
        return CompactGelu.apply(input, self.approximate)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("num_beside", [0, 128])
@pytest.mark.parametrize("gelu", [nn.GELU("tanh"), KeepingGelu("tanh")])
@pytest.mark.parametrize("linear_format", [FP8, NF4])
def test_mlps(linear_format: str, gelu: nn.GELU, num_beside: int, with_bias: bool, compiled: bool) -> None:
    if codes_for(linear_format, CUDA) != torch.float8_e4m3fn:
        pytest.skip("this GPU has no 8-bit floating point")
    torch.manual_seed(0)

    def layer(in_features: int, out_features: int) -> QuantizedLinear:
        made = QuantizedLinear(in_features, out_features, linear_format, torch.float8_e4m3fn, tensor_cores=True)
        made.set_weight(torch.randn(out_features, in_features, device=CUDA) / in_features**0.5)
        if with_bias:
            made.bias = nn.Parameter(torch.randn(out_features, device=CUDA).bfloat16(), False)
        return made

    first, last = layer(WIDTH, 4 * WIDTH), layer(num_beside + 4 * WIDTH, WIDTH)
    inputs = [
        torch.randn(1, 300, features, device=CUDA).bfloat16().requires_grad_()
        for features in (WIDTH, num_beside) if features
    ]  # fmt: skip
    gradient = torch.randn(1, 300, WIDTH, device=CUDA).bfloat16()
    assert are_fused(inputs[0], first, gelu, last)

    def fused(states: Tensor, beside: Tensor | None = None) -> Tensor:
        return mlp(states, first, gelu, last, beside)

    def exact(states: Tensor, beside: Tensor | None = None) -> Tensor:
        parts = [] if beside is None else [beside]
        biases = [None if layer.bias is None else layer.bias.float() for layer in (first, last)]
        hidden = nn.functional.linear(states, first.dequantized(), biases[0])
        joined = torch.cat([*parts, nn.functional.gelu(hidden, approximate="tanh")], dim=2)
        return nn.functional.linear(joined, last.dequantized(), biases[1])

    def layers(states: Tensor, beside: Tensor | None = None) -> Tensor:
        hidden = gelu(first(states))
        return last(hidden if beside is None else torch.cat([beside, hidden], dim=2))

    found = outcome(fused, inputs, gradient, compiled)
    one_by_one = outcome(layers, inputs, gradient, compiled=False)
    wanted = outcome(exact, [tensor.detach().float().requires_grad_() for tensor in inputs], gradient.float(), False)
    for fused_result, plain_result, right in zip(found, one_by_one, wanted, strict=True):
        error = relative_error(fused_result, right)
        # Eight bits err by 0.04 of a result either way; fused, there are fewer roundings.
        assert error < 0.08 and error < 1.1 * relative_error(plain_result, right)
