"""Attaches a LoRA to a frozen transformer with PEFT, and reports the layers that it attached to."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pixtune.trained.targets import resolve_targets

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

ADAPTER_NAME = "default"


class RoundedLinear(nn.Linear):
    """A linear layer without bias whose fp32 weight is rounded to its input's format for the product.

    PEFT casts the input up to fp32 instead, and the backward pass then keeps an fp32 copy of it for every layer: 10 GiB
    and a tenth of the step's time for Qwen-Image at 1024x1024.
    """

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


@dataclass(frozen=True)
class AttachedLora:
    """The layers of a transformer that carry a LoRA."""

    modules: tuple[str, ...]
    """Paths of the linear layers."""
    targets: tuple[str, ...]
    """Endings of their paths, or whole paths, as PEFT's `target_modules` takes them."""
    num_parameters: int


def attach_lora(
    transformer: nn.Module,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    generator_seed: int,
    presets: Mapping[str, Sequence[str]] | None = None,
) -> AttachedLora:
    """Adds a LoRA (Hu et al. 2021, arXiv 2106.09685) to every linear layer that `resolve_targets` finds.

    The down-projection starts Gaussian with deviation 1 / rank, the up-projection zero, both fp32 whatever the base is:
    in bf16 an update of a few thousandths of a weight would be rounded away.

    Args:
        generator_seed: seed of the down-projections; the global generators are left as they were.
        presets: the family's `lora_presets`.

    Raises:
        ConfigError: a target matches nothing; names it and lists the layers that there are.
    """
    from peft import LoraConfig

    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    resolved = resolve_targets(linears, targets, presets or {})
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(resolved))
    with torch.random.fork_rng():
        torch.manual_seed(generator_seed)
        layers = attach_config(transformer, config)
    return AttachedLora(tuple(layers), resolved, sum(p.numel() for p in trainable_parameters(transformer).values()))


def attach_config(
    transformer: nn.Module, config: LoraConfig, name: str = ADAPTER_NAME, dtype: torch.dtype = torch.float32
) -> dict[str, LoraLayer]:
    """Adds the LoRA that a config of PEFT's describes, and returns its layers by their paths.

    Args:
        name: PEFT's name for it. One of another name than the first stands beside that, frozen.
        dtype: number format of its weights.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second LoRA is meant to be there
        transformer.add_adapter(config, adapter_name=name)  # type: ignore[operator]
    layers = lora_layers(transformer, name)
    for layer in layers.values():
        layer.cast_input_dtype_enabled = False
        for matrices in (layer.lora_A, layer.lora_B):
            matrices[name] = _rounded(matrices[name], dtype)
    if name != ADAPTER_NAME:
        transformer.set_adapter([ADAPTER_NAME, name])  # type: ignore[operator]
        for weight in weights_of(layers, name).values():
            weight.requires_grad_(False)
    return layers


def lora_layers(transformer: nn.Module, name: str = ADAPTER_NAME) -> dict[str, LoraLayer]:
    """Returns the layers of a transformer that have the LoRA of this name, by their paths."""
    from peft.tuners.lora import LoraLayer

    return {
        path: module
        for path, module in transformer.named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A
    }


def _rounded(linear: nn.Linear, dtype: torch.dtype) -> RoundedLinear:
    with torch.device("meta"):
        rounded = RoundedLinear(linear.in_features, linear.out_features, bias=False)
    rounded.weight = nn.Parameter(linear.weight.detach().to(dtype))
    return rounded


def weights_of(layers: Mapping[str, LoraLayer], name: str) -> dict[str, Tensor]:
    """Returns the weights of one LoRA as `MODULE.lora_A.weight` and `MODULE.lora_B.weight`."""
    return {
        f"{path}.lora_{matrix}.weight": matrices[name].weight
        for path, layer in layers.items()
        for matrix, matrices in (("A", layer.lora_A), ("B", layer.lora_B))
    }


def trainable_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trained parameters by name, in a stable order."""
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def lora_weights(transformer: nn.Module) -> dict[str, Tensor]:
    """Returns the LoRA as `MODULE.lora_A.weight` and `MODULE.lora_B.weight`, detached."""
    return named_by_layer({name: parameter.detach() for name, parameter in trainable_parameters(transformer).items()})


def named_by_layer(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Takes PEFT's name of the adapter out of the names of a LoRA's weights."""
    return {name.replace(f".{ADAPTER_NAME}.weight", ".weight"): weight for name, weight in weights.items()}


def up_projections(transformer: nn.Module) -> list[Tensor]:
    """Returns the up-projections of all LoRAs on a transformer."""
    return [parameter.detach() for name, parameter in transformer.named_parameters() if ".lora_B." in name]


@contextmanager
def scaled(weights: Sequence[Tensor], factor: float) -> Iterator[None]:
    """Multiplies weights until the block ends, up-projections for one, to change how much a LoRA adds.

    They lie where they did, so that compiled and captured passes stay as they are, and get back every bit.
    """
    if factor == 1:
        yield
        return
    weights = [weight.detach() for weight in weights]
    kept = [weight.to("cpu", copy=True) for weight in weights]
    try:
        torch._foreach_mul_(weights, factor)
        yield
    finally:
        for weight, values in zip(weights, kept, strict=True):
            weight.copy_(values)


def load_lora_weights(transformer: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights named as by `lora_weights` into an attached LoRA.

    Raises:
        KeyError: names or shapes are not those of the attached LoRA.
    """
    copy_weights(lora_weights(transformer), weights)


def copy_weights(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copies weights into others of the same names.

    Raises:
        KeyError: names or shapes are others.
    """
    if own.keys() != weights.keys():
        raise KeyError(f"LoRA layers differ: {sorted(own.keys() ^ weights.keys())[:4]} and perhaps more")
    if other := [name for name, tensor in own.items() if tensor.shape != weights[name].shape]:
        shapes = f"{list(weights[other[0]].shape)}, not {list(own[other[0]].shape)}"
        raise KeyError(f"{len(other)} tensors have other shapes, {other[0]} among them: {shapes}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
