"""Attaches a LoRA, DoRA or LoKr to a frozen transformer with PEFT, and reports the layers that it attached to."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine import lokr, lora
from pixtune.engine.dora import Magnitude, row_lengths, row_squares
from pixtune.engine.quantize import QuantizedLinear
from pixtune.engine.streaming import BlockStream
from pixtune.trained.scheme import Scheme
from pixtune.trained.targets import resolve_targets

ADAPTER_NAME = "default"
STRENGTH = (".lora_B.", ".lokr_w1.", ".lokr_w1_a.")
"""Parts of the names of weights by whose factor an adapter's addition grows: one matrix of each product."""
FROM_ZERO = (".lora_B.", ".lokr_w2.", ".lokr_w2_b.")
"""Parts of the names of weights that start at zero, so that an adapter does nothing until they move."""
MAGNITUDE = "lora_magnitude_vector"
"""PEFT's name for the trained lengths of a DoRA."""


class RoundedLinear(nn.Linear):
    """A linear layer without bias whose fp32 weight is rounded to its input's format for the product.

    PEFT casts the input up to fp32 instead, and the backward pass then keeps an fp32 copy of it for every layer: 10 GiB
    and a tenth of the step's time for Qwen-Image at 1024x1024.
    """

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


@dataclass(frozen=True)
class AttachedLora:
    """The layers of a transformer that carry a LoRA, or another adapter."""

    modules: tuple[str, ...]
    """Paths of the linear layers."""
    targets: tuple[str, ...]
    """Endings of their paths, or whole paths, as PEFT's `target_modules` takes them."""
    num_parameters: int
    scheme: Scheme


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
    resolved = resolve_targets(list(linear_shapes(transformer)), targets, presets or {})
    return attach_adapter(transformer, resolved, Scheme(rank, alpha), generator_seed)


def linear_shapes(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns output and input features of all linear layers, by their paths."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    }


def attach_adapter(
    transformer: nn.Module,
    targets: tuple[str, ...],
    scheme: Scheme,
    generator_seed: int,
    stream: BlockStream | None = None,
) -> AttachedLora:
    """Adds a new adapter to the layers that `targets` mean. All of its weights are fp32.

    Args:
        targets: endings of paths, or whole paths, as `resolve_targets` returns them.
        generator_seed: seed of what starts at random; the global generators are left as they were.
        stream: supplier of streamed blocks' weights.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(generator_seed)
        layers = attach_config(transformer, targets, scheme, stream=stream)
    count = sum(p.numel() for p in trainable_parameters(transformer).values())
    return AttachedLora(tuple(layers), targets, count, scheme)


def attach_config(
    transformer: nn.Module,
    targets: Sequence[str],
    scheme: Scheme,
    name: str = ADAPTER_NAME,
    dtype: torch.dtype = torch.float32,
    stream: BlockStream | None = None,
) -> dict[str, Any]:
    """Adds an adapter through PEFT, and returns its layers by their paths.

    Args:
        targets: as PEFT's `target_modules` takes them.
        name: PEFT's name for it. One of another name than the first stands beside that, frozen.
        dtype: number format of its weights.
        stream: supplier of streamed blocks' weights, whose rows a DoRA measures.
    """
    config = scheme.peft_config(targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second LoRA is meant to be there
        transformer.add_adapter(config, adapter_name=name)  # type: ignore[operator]
    layers = adapter_layers(transformer, scheme.kind, name)
    for layer in layers.values():
        layer.cast_input_dtype_enabled = False
        if scheme.kind == "lokr":
            for matrices in (getattr(layer, each) for each in layer.adapter_layer_names):
                if name in matrices:
                    matrices[name] = nn.Parameter(matrices[name].detach().to(dtype))
            lokr.compute_by_ours(layer)
            continue
        for matrices in (layer.lora_A, layer.lora_B):
            matrices[name] = _rounded(matrices[name], dtype)
        if scheme.kind == "dora":
            if stream is not None:
                stream.bring(layer.base_layer)
            layer.lora_magnitude_vector[name] = Magnitude(row_squares(layer.base_layer))
            layer.adapter_layer_names = (*layer.adapter_layer_names, MAGNITUDE)
            lora.compute_by_ours(layer)
    if name != ADAPTER_NAME:
        transformer.set_adapter([ADAPTER_NAME, name])  # type: ignore[operator]
        for weight in weights_of(layers, name).values():
            weight.requires_grad_(False)
    return layers


def adapter_layers(transformer: nn.Module, kind: str = "lora", name: str = ADAPTER_NAME) -> dict[str, Any]:
    """Returns PEFT's layers that have the adapter of this name, by their paths without its wrappers.

    Args:
        kind: one of `plan.adapter.KINDS`.
    """
    from peft.tuners.lokr import LoKrLayer
    from peft.tuners.lora import LoraLayer

    of_kind = LoKrLayer if kind == "lokr" else LoraLayer
    return {
        path.replace(".base_layer", ""): module
        for path, module in transformer.named_modules()
        if isinstance(module, of_kind) and name in module.scaling
    }


def _rounded(linear: nn.Linear, dtype: torch.dtype) -> RoundedLinear:
    with torch.device("meta"):
        rounded = RoundedLinear(linear.in_features, linear.out_features, bias=False)
    rounded.weight = nn.Parameter(linear.weight.detach().to(dtype))
    return rounded


def weights_of(layers: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Returns the weights of one adapter, named as by `lora_weights`."""
    own = {
        f"{path}.{parameter}": weight
        for path, layer in layers.items()
        for matrices in layer.adapter_layer_names
        for parameter, weight in _of_adapter(getattr(layer, matrices), matrices, name)
    }
    return named_by_layer(own, name)


def _of_adapter(matrices: nn.Module, kind: str, name: str) -> Iterator[tuple[str, Tensor]]:
    for parameter, weight in matrices.named_parameters():
        if parameter.split(".")[0] == name:
            yield f"{kind}.{parameter}", weight


def trainable_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trained parameters by name, in a stable order."""
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def lora_weights(transformer: nn.Module) -> dict[str, Tensor]:
    """Returns the trained adapter, detached, by the names that PEFT's files have.

    These are `MODULE.lora_A.weight`, `MODULE.lora_B.weight` and, of a DoRA, `MODULE.lora_magnitude_vector`; of a LoKr
    `MODULE.lokr_w1` and `MODULE.lokr_w2`, or `_a` and `_b` of each.
    """
    return named_by_layer({name: parameter.detach() for name, parameter in trainable_parameters(transformer).items()})


def named_by_layer(weights: Mapping[str, Tensor], adapter: str = ADAPTER_NAME) -> dict[str, Tensor]:
    """Takes out of the names of an adapter's weights what PEFT's files do not have: its own name, and wrappers'."""
    found = {}
    for name, weight in weights.items():
        name = name.replace(".base_layer", "").replace(f".{adapter}.weight", ".weight").removesuffix(f".{adapter}")
        found[name.removesuffix(".weight") if name.endswith(f".{MAGNITUDE}.weight") else name] = weight
    return found


def dora_scales(
    transformer: nn.Module, weights: Mapping[str, Tensor], stream: BlockStream | None = None
) -> dict[str, Tensor]:
    """Returns the lengths of a DoRA's rows as ComfyUI takes them, by layer; empty for other adapters.

    ComfyUI multiplies W + scale * up @ down by `dora_scale` over the length of W's rows, PEFT over that of the sum's.

    Args:
        weights: those that are exported, named as by `lora_weights`.
    """
    found = {}
    modules = dict(transformer.named_modules())
    for name, magnitude in modules.items():
        path, ending, _ = name.partition(f".{MAGNITUDE}.{ADAPTER_NAME}")
        if not (ending and isinstance(magnitude, Magnitude)):
            continue
        layer: Any = modules[path]
        base = layer.base_layer
        if stream is not None:
            stream.bring(base)
        down_rK, up_Nr, length_N = (
            weights[f"{path}.{part}"].to(magnitude.square_N.device)
            for part in ("lora_A.weight", "lora_B.weight", MAGNITUDE)
        )
        dtype = torch.float32 if isinstance(base, QuantizedLinear) else base.weight.dtype
        now_N = row_lengths(base, magnitude.square_N, down_rK, up_Nr, layer.scaling[ADAPTER_NAME], dtype)
        found[path] = length_N * magnitude.start_N / now_N
    return found


@contextmanager
def at_strength(transformer: nn.Module, names: Iterable[str], strength: float) -> Iterator[None]:
    """Has adapters add `strength` times as much until the block ends; 0: the frozen weights alone.

    A DoRA's lengths move as far from those of the frozen weights' rows. No address changes, and each bit comes back.

    Args:
        names: the adapters' weights, as `named_parameters` names them.
    """
    if strength == 1:
        yield
        return
    own = set(names)
    factors = [weight.detach() for name, weight in transformer.named_parameters() if name in own and is_factor(name)]
    lengths = {
        module.weight.detach(): module.start_N
        for path, module in transformer.named_modules()
        if isinstance(module, Magnitude) and f"{path}.weight" in own
    }
    kept = [length_N.to("cpu", copy=True) for length_N in lengths]
    with scaled(factors, strength):
        try:
            for length_N, start_N in lengths.items():
                length_N.copy_(start_N + strength * (length_N - start_N))
            yield
        finally:
            for length_N, values in zip(lengths, kept, strict=True):
                length_N.copy_(values)


def adapter_names(transformer: nn.Module) -> list[str]:
    """Returns the names of all adapters' weights."""
    parts = (".lora_A.", ".lora_B.", f".{MAGNITUDE}.", ".lokr_w")
    return [name for name, _ in transformer.named_parameters() if any(part in name for part in parts)]


def is_factor(name: str) -> bool:
    """Returns whether a weight is one by whose factor an adapter adds more."""
    return any(part in name for part in STRENGTH)


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
