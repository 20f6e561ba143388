"""Layers that share an input, their LoRAs computed together, against PEFT's own layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.utils import make_boxed_func

from pixtune.engine.activations import recompute_blocks, recompute_projections
from pixtune.engine.forwards import replace_computation
from pixtune.engine.lora import plain_loras, project, summed_outer
from pixtune.engine.quantize import QuantizedLinear
from pixtune.families import flux_blocks, joint_streams
from tests.gradients import gradient_of
from tests.unit.engine import tiny

NAMES = ("to_q", "to_k", "to_v")
WIDTH_IN, WIDTH_OUT = 64, 96
SUBSETS = [
    {"to_q": (4, 4), "to_k": (4, 4), "to_v": (4, 4)},
    {"to_q": (4, 8), "to_k": (2, 3), "to_v": (7, 1)},
    {"to_q": (3, 6), "to_v": (5, 5)},
    {"to_k": (1, 2)},
    {},
]
"""Rank and alpha of each layer that has a LoRA."""
Outcome = dict[str, Tensor]
Project = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_by_one(states: Tensor, layers: tuple[nn.Module, ...]) -> tuple[Tensor, ...]:
    """PEFT's own way."""
    return tuple(layer(states) for layer in layers)


class Projections(nn.Module):
    """Three layers over one input."""

    def __init__(self, linear_format: str | None, bias: bool) -> None:
        super().__init__()
        for name in NAMES:
            plain = nn.Linear(WIDTH_IN, WIDTH_OUT, bias=bias).requires_grad_(False)
            if linear_format is not None:
                quantized = QuantizedLinear(WIDTH_IN, WIDTH_OUT, linear_format, torch.int8, tensor_cores=False)
                quantized.set_weight(plain.weight)
                quantized.bias = plain.bias
                plain = quantized
            self.add_module(name, plain)

    @property
    def layers(self) -> tuple[Any, ...]:
        return tuple(self.get_submodule(name) for name in NAMES)

    def forward(self, states: Tensor, project: Project) -> tuple[Tensor, ...]:
        return project(states, (self.to_q, self.to_k, self.to_v))


def projections(
    loras: dict[str, tuple[int, int]], linear_format: str | None = None, bias: bool = True, **options: object
) -> Projections:
    torch.manual_seed(0)
    model = Projections(linear_format, bias)
    if loras:
        config = LoraConfig(
            target_modules=list(loras), rank_pattern={name: rank for name, (rank, _) in loras.items()},
            alpha_pattern={name: alpha for name, (_, alpha) in loras.items()}, **options,
        )  # fmt: skip
        inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
    return model


def outcome(model: Projections, project: Project, compiled: bool = False) -> Outcome:
    """Outputs and all gradients, by name, for an input whose gradient all three add to."""
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(2, 9, WIDTH_IN, generator=generator).requires_grad_()
    run = torch.compile(model, fullgraph=True) if compiled else model
    outputs = run(states, project)
    towards = torch.randn(len(NAMES), 2, 9, WIDTH_OUT, generator=generator)
    sum((output * weight).sum() for output, weight in zip(outputs, towards, strict=True)).backward()
    found = {f"output of {name}": output.detach() for name, output in zip(NAMES, outputs, strict=True)}
    found["input"] = states.grad
    return {**found, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def assert_equal_within_rounding(found: Outcome, expected: Outcome) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).norm() / tensor.norm()
        assert error < 1e-6, f"{name}: {error:.2g}"


# ---- the layers


@pytest.mark.parametrize("loras", SUBSETS, ids=lambda loras: "+".join(loras) or "none")
@pytest.mark.parametrize("linear_format", [None, "int8", "nf4"])
def test_outputs_and_gradients_are_pefts(loras: dict[str, tuple[int, int]], linear_format: str | None) -> None:
    model = projections(loras, linear_format)
    expected = outcome(model, one_by_one)
    assert len([name for name in expected if "lora_" in name]) == 2 * len(loras)
    assert_equal_within_rounding(outcome(model, project), expected)


@pytest.mark.parametrize("loras", SUBSETS[:3], ids="+".join)
@pytest.mark.parametrize("linear_format", [None, "int8"])
def test_compiled_as_well(loras: dict[str, tuple[int, int]], linear_format: str | None) -> None:
    """A gradient that the compiler drops shows here: see docs/experiments.md."""
    model = projections(loras, linear_format)
    assert_equal_within_rounding(outcome(model, project, compiled=True), outcome(model, one_by_one))


def test_gradients_add_up() -> None:
    model = projections(SUBSETS[1])
    once = {name: tensor.clone() for name, tensor in outcome(model, project).items()}
    states = torch.randn(2, 9, WIDTH_IN, generator=torch.Generator().manual_seed(2))
    sum(output.square().sum() for output in model(states, project)).backward()
    both = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    sum(output.square().sum() for output in model(states, project)).backward()
    assert len(both) == 6
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, once[name] + gradient_of(model.get_parameter(name)))


def test_without_an_active_lora_the_layers_run_as_they_are() -> None:
    model = projections(SUBSETS[1], "int8")
    states = torch.randn(4, WIDTH_IN)
    expected = [layer.base_layer(states) for layer in model.layers]
    assert not torch.equal(model(states, project)[0], expected[0])
    for layer in model.layers:
        layer.enable_adapters(False)
    assert all(torch.equal(*pair) for pair in zip(model(states, project), expected, strict=True))


def test_what_is_not_a_plain_lora_is_left_to_peft() -> None:
    states = torch.randn(4, WIDTH_IN)
    assert all(plain_loras(layer) for layer in projections(SUBSETS[0]).layers)
    for options in ({"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}):
        assert all(not plain_loras(layer) for layer in projections(SUBSETS[0], **options).layers), options
    merged = projections(SUBSETS[0])
    before = merged(states, one_by_one)
    for layer in merged.layers:
        layer.merge()
    assert all(not plain_loras(layer) for layer in merged.layers)
    for pair in zip(merged(states, project), before, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def with_a_frozen_one(
    loras: dict[str, tuple[int, int]], frozen: dict[str, tuple[int, int]], linear_format: str | None = None
) -> Projections:
    """Some layers have a trained LoRA, some a frozen one in another format, and `to_q` has both."""
    model = projections(loras, linear_format)
    config = LoraConfig(
        target_modules=list(frozen), rank_pattern={name: rank for name, (rank, _) in frozen.items()},
        alpha_pattern={name: alpha for name, (_, alpha) in frozen.items()}, init_lora_weights=False,
    )  # fmt: skip
    inject_adapter_in_model(config, model, adapter_name="frozen")
    for layer in (layer for layer in model.layers if isinstance(layer, LoraLayer)):
        layer.set_adapter(["default", "frozen"])
        layer.cast_input_dtype_enabled = False
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("default" in name)
    return model


@pytest.mark.parametrize("frozen", [{"to_q": (3, 5)}, {"to_q": (3, 5), "to_v": (2, 2)}], ids="+".join)
@pytest.mark.parametrize(("linear_format", "compiled"), [(None, False), ("int8", False), (None, True)])
def test_a_frozen_lora_beside_trained_ones(
    frozen: dict[str, tuple[int, int]], linear_format: str | None, compiled: bool
) -> None:
    model = with_a_frozen_one({"to_q": (4, 8), "to_k": (2, 3)}, frozen, linear_format)
    expected = outcome(model, one_by_one)
    assert len([name for name in expected if "lora_" in name]) == 4
    assert_equal_within_rounding(outcome(model, project, compiled), expected)


def test_layers_with_frozen_loras_alone_keep_no_input() -> None:
    model = with_a_frozen_one({"to_k": (2, 3)}, {"to_q": (3, 5), "to_v": (2, 2)})
    states, kept = torch.randn(50, WIDTH_IN).requires_grad_(), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        project(states, (model.layers[0], model.layers[2]))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert kept and all(tensor.data_ptr() in own for tensor in kept)


def test_the_input_is_kept_once_and_no_rounded_weight() -> None:
    model = projections(SUBSETS[0], bias=False).bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    kept: list[Tensor] = []
    states = torch.randn(50, WIDTH_IN).bfloat16().requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        project(states, model.layers)
    own = {tensor.data_ptr() for tensor in [states, *model.parameters()]}
    new = [tensor for tensor in kept if tensor.data_ptr() not in own]
    assert sum(tensor.data_ptr() == states.data_ptr() for tensor in kept) == 1, "a frozen base needs no input"
    assert [tuple(tensor.shape) for tensor in new] == [(50, 12)]


def test_gradients_of_16_bit_products_are_summed_up_in_fp32() -> None:
    a_MN, b_MK = torch.randn(300, 16).bfloat16(), torch.randn(300, 8).bfloat16()
    exact = a_MN.double().T @ b_MK.double()
    error = (summed_outer(a_MN, b_MK) - exact).norm() / exact.norm()
    assert error < 1e-6 and (exact.bfloat16() - exact).norm() / exact.norm() > 1e-3
    torch.library.opcheck(summed_outer, (a_MN, b_MK))


# ---- whole models


@pytest.fixture
def pefts_way(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets the models call each layer by itself from then on."""

    def switch() -> None:
        for module in (joint_streams, flux_blocks):
            monkeypatch.setattr(module, "project", one_by_one)

    return switch


def model_with_lora(name: str) -> nn.Module:
    model = tiny.load_model(name)
    tiny.attach(name, model)
    return model


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: float((found[name] - g).norm() / g.norm()) for name, g in expected.items() if g.norm() > 0}


WAYS = {  # each way of compiling takes seconds, so one family goes each of them
    "eager": tiny.MODELS,
    "recomputed": tiny.MODELS,
    "compiled": ("tiny-qwen-image",),
    "recomputed and compiled": ("tiny-flux",),
    "reprojected and compiled": ("tiny-flux",),
}


@pytest.mark.parametrize(("how", "name"), [(how, name) for how, names in WAYS.items() for name in names])
def test_a_step_is_pefts_within_rounding(name: str, how: str, pefts_way: Callable[[], None]) -> None:
    model = model_with_lora(name)
    blocks = tiny.blocks_of(name, model)
    if "reprojected" in how:
        recompute_projections(blocks)
    if "recomputed" in how:
        recompute_blocks(blocks, offload=False)
    if "compiled" in how:
        tiny.compile_in_one(blocks)
    counters.clear()
    loss, gradients = tiny.step(name, model)
    assert counters["graph_break"] == {} and (counters["stats"]["unique_graphs"] > 0) == ("compiled" in how)
    pefts_way()
    expected_loss, expected = tiny.step(name, model_with_lora(name))
    assert abs(loss - expected_loss) < 1e-6 * expected_loss
    assert max(differences(gradients, expected).values()) < 1e-4


@pytest.mark.parametrize("name", tiny.MODELS)
def test_in_bf16_a_step_is_as_near_to_fp32_as_pefts(name: str, pefts_way: Callable[[], None]) -> None:
    exact = tiny.step(name, model_with_lora(name))[1]

    def error() -> float:
        model = tiny.load_model(name).bfloat16()
        tiny.attach(name, model)
        found = tiny.step(name, model)[1]
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        return sum(differences(found, exact).values()) / len(exact)

    ours = error()
    pefts_way()
    assert 0 < ours < 1.1 * error() < 0.1


def count_products(name: str, kind: int) -> list[int]:
    """Products of one block's graphs, forward and backward; attention's own are not among them."""
    counts: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        operators = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.pixtune.summed_outer.default)
        counts.append(sum(node.target in operators for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    model = model_with_lora(name)
    block = tiny.blocks_of(name, model)[kind]
    replace_computation(block, functools.partial(torch.compile, backend=aot_autograd(fw_compiler=count)))
    tiny.step(name, model)
    return counts


@pytest.mark.parametrize(("name", "kind"), [("tiny-qwen-image", 1), ("tiny-flux", 1), ("tiny-flux", -1)])
def test_a_block_takes_fewer_products(name: str, kind: int, pefts_way: Callable[[], None]) -> None:
    """Three layers over one input take one instead of three down-projections, and in the backward pass one product
    instead of three for the input's gradient, and one instead of three for theirs."""
    together = count_products(name, kind)
    torch._dynamo.reset()
    pefts_way()
    alone = count_products(name, kind)
    assert [a - b for a, b in zip(alone, together, strict=True)] == [2, 4]
