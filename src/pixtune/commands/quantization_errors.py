"""Measures the cost of quantizing a model, block by block and layer by layer, with the inputs that they really get.

Each block runs with the inputs of the unquantized model, so an error is the block's own and not left by earlier ones.
Its output gets a random gradient of fixed seed, and the gradient of its inputs is compared, too.

A product's relative error alone is blind to the worst case: one input channel of huge weights fills every row's scale
and the product as well, so the error looks small beside it while all other channels are rounded to nothing. So the
error of the codes is also taken channel by channel, each relative to its own size, and the median of the channels
counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pixtune import randomness
from pixtune.engine.load import quantized_like
from pixtune.engine.quantize import QuantizedLinear, can_quantize, quantize_rows


@dataclass(frozen=True)
class LayerErrors:
    """Errors of one linear layer in one format. They are relative: 0.01 is one per cent of the exact value."""

    path: str
    linear_format: str
    product: float
    """Error of the product with the real activations, without the bias."""
    gradient: float
    """Error of the input's gradient."""
    weight_channel: float
    """Error of the weights of the median input channel."""
    input_channel: float
    """Error of the activations of the median input channel."""
    weight_outlier: float
    """Ratio of the largest weight to the root of the mean square."""
    input_outlier: float
    """Ratio of the largest activation to the root of the mean square."""

    @property
    def kind(self) -> str:
        """Path without the block's number, by which layers are compared."""
        return re.sub(r"\.\d+\.", ".*.", self.path, count=1)

    @property
    def worst(self) -> float:
        return max(self.product, self.gradient, self.weight_channel, self.input_channel)


@dataclass(frozen=True)
class BlockErrors:
    """Errors of one block with all its layers in one format."""

    path: str
    linear_format: str
    output: float
    output_cosine: float
    gradient: float
    """Error of the gradient of its inputs."""
    gradient_cosine: float


@dataclass(frozen=True)
class LinearPass:
    """Values that passed through a linear layer of the unquantized block."""

    linear: nn.Linear
    input_MK: Tensor
    gradient_MN: Tensor
    """Gradient of its output; zeros where nothing depends on it."""


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Returns the length of the difference over that of the exact value; infinite where either is not finite."""
    ours, exact = ours.float(), exact.float()
    error = float((ours - exact).norm() / exact.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def cosine(ours: Tensor, exact: Tensor) -> float:
    """Returns the cosine of the angle between two tensors; 0 where either is not finite."""
    value = float(torch.cosine_similarity(ours.flatten().double(), exact.flatten().double(), dim=0))
    return value if value == value else 0.0


def median_channel_error(ours_MK: Tensor, exact_MK: Tensor) -> float:
    """Returns the relative error of the median column; columns of zeros are left out."""
    size_K = exact_MK.float().norm(dim=0)
    error_K = (ours_MK.float() - exact_MK.float()).norm(dim=0)
    nonzero_K = size_K > 0
    if not bool(nonzero_K.any()):
        return 0.0
    median = float((error_K[nonzero_K] / size_K[nonzero_K]).median())
    return median if median == median else float("inf")


def outlier_ratio(values: Tensor) -> float:
    """Returns the ratio of the largest magnitude to the root of the mean square."""
    values = values.float()
    return float(values.abs().max() / values.square().mean().sqrt().clamp_min(1e-30))


class Measurement:
    """Collects errors while an unquantized transformer runs; `engine.on_demand` calls `visit` before each block.

    Args:
        formats: formats of `quantize.FORMATS`, measured one after the other.
        modulation_layers: endings of paths of layers that are never quantized.
    """

    def __init__(self, formats: Sequence[str], modulation_layers: tuple[str, ...]) -> None:
        self._formats, self._modulation_layers = formats, modulation_layers
        self.layers: list[LayerErrors] = []
        self.blocks: list[BlockErrors] = []
        self.not_finite: list[str] = []
        """Paths of blocks whose unquantized output or gradient has infinite or undefined values."""

    def visit(self, path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        linears = {
            f"{path}.{name}": module
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear) and not name.endswith(self._modulation_layers)
        }
        forward = type(block).forward
        with torch.enable_grad(), watched(linears) as passes:
            outputs, gradients = run_with_gradients(lambda *a, **k: forward(block, *a, **k), args, kwargs)
        if not all(bool(tensor.isfinite().all()) for tensor in (*outputs, *gradients)):
            self.not_finite.append(path)
        for linear_format in self._formats:
            quantized = {
                name: quantize(linear, linear_format)
                for name, linear in linears.items()
                if can_quantize(linear, linear_format)
            }
            self.layers += [
                layer_errors(name, layer, passes[name]) for name, layer in quantized.items() if name in passes
            ]
            with torch.enable_grad(), replaced(block, path, quantized):
                own = run_with_gradients(lambda *a, **k: forward(block, *a, **k), args, kwargs)
            self.blocks.append(block_errors(path, linear_format, own, (outputs, gradients)))


def quantize(linear: nn.Linear, linear_format: str) -> QuantizedLinear:
    """Returns a layer in a format, as `engine.load` makes it."""
    quantized = quantized_like(linear, linear_format, linear.weight.device)
    quantized.set_weight(linear.weight)
    return quantized


def run_with_gradients(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Computes a block's outputs, and its token inputs' gradients from random gradients of the outputs.

    Inputs with three axes are tokens; embeddings of time and place are the same for all blocks and get no gradient.
    """
    inputs: list[Tensor] = []

    def as_leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
            inputs.append(value.detach().clone().requires_grad_())
            return inputs[-1]
        return value

    result = forward(*map(as_leaf, args), **{name: as_leaf(value) for name, value in kwargs.items()})
    outputs = [result] if isinstance(result, Tensor) else list(result)
    given = [randomness.normal(o.shape, 0, "random weights", "gradient", i).to(o) for i, o in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, inputs, given, allow_unused=True)
    return [output.detach() for output in outputs], [gradient for gradient in gradients if gradient is not None]


@contextmanager
def watched(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, LinearPass]]:
    """Collects the values that pass through linear layers, by name; complete after a backward pass."""
    passes: dict[str, LinearPass] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def seen(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            linear = linears[name]
            input_MK = args[0].detach().reshape(-1, linear.in_features)
            passes[name] = LinearPass(linear, input_MK, torch.zeros_like(output.detach().flatten(0, -2)))
            if output.requires_grad:
                output.register_hook(lambda gradient: keep(name, gradient))

        return seen

    def keep(name: str, gradient: Tensor) -> None:
        before = passes[name]
        passes[name] = LinearPass(before.linear, before.input_MK, gradient.detach().flatten(0, -2))

    hooks = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replaced(block: nn.Module, path: str, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts other layers into a block for a while; names are whole paths, the block's own path in front."""
    names = [name.removeprefix(f"{path}.") for name in layers]
    before = [block.get_submodule(name) for name in names]
    for name, layer in zip(names, layers.values(), strict=True):
        block.set_submodule(name, layer)
    try:
        yield
    finally:
        for name, layer in zip(names, before, strict=True):
            block.set_submodule(name, layer)


@torch.no_grad()
def layer_errors(path: str, layer: QuantizedLinear, passed: LinearPass) -> LayerErrors:
    """Compares a quantized layer with what passed through the one that it replaces."""
    weight_NK, input_MK, gradient_MN = passed.linear.weight.detach(), passed.input_MK, passed.gradient_MN
    with torch.enable_grad():
        leaf_MK = input_MK.clone().requires_grad_()
        product_MN = layer.product(leaf_MK)
        (input_gradient_MK,) = torch.autograd.grad(product_MN, leaf_MK, gradient_MN)
    codes_MK, scale_M1 = quantize_rows(input_MK, layer.codes)
    return LayerErrors(
        path=path,
        linear_format=layer.linear_format,
        product=relative_error(product_MN, input_MK.float() @ weight_NK.float().t()),
        gradient=relative_error(input_gradient_MK, gradient_MN.float() @ weight_NK.float()),
        weight_channel=median_channel_error(layer.dequantized(), weight_NK),
        input_channel=median_channel_error(codes_MK.float() * scale_M1, input_MK),
        weight_outlier=outlier_ratio(weight_NK),
        input_outlier=outlier_ratio(input_MK),
    )


Passed = tuple[list[Tensor], list[Tensor]]


def block_errors(path: str, linear_format: str, ours: Passed, exact: Passed) -> BlockErrors:
    """Compares outputs and gradients of a quantized block with the unquantized one's."""
    output, gradient, exact_output, exact_gradient = (
        torch.cat([tensor.float().flatten() for tensor in tensors]) for tensors in (*ours, *exact)
    )
    return BlockErrors(
        path=path,
        linear_format=linear_format,
        output=relative_error(output, exact_output),
        output_cosine=cosine(output, exact_output),
        gradient=relative_error(gradient, exact_gradient),
        gradient_cosine=cosine(gradient, exact_gradient),
    )
