"""A transformer straight into its planned form, tensor by tensor: it never stands anywhere whole in full precision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.kernels import try_triton
from pixtune.engine.modulation import attach_table, read_from_files
from pixtune.engine.modulation_filling import ModulationRows
from pixtune.engine.quantize import QuantizedLinear, can_quantize, codes_for, tensor_cores_multiply
from pixtune.errors import WeightsError
from pixtune.family import ModelFamily, Placement
from pixtune.storage.loading import iterate_tensors, shard_files
from pixtune.storage.model_folder import ModelFolder


@dataclass(frozen=True)
class Layout:
    """The form of a transformer's repeated blocks; what is outside them always has the placement's own format."""

    linear_format: str | None = None
    """"fp8", "int8" or "nf4"; None: the placement's own."""
    modulation_rows: int = 0
    """Modulation layers stay in their files, and a table of so many rows is computed ahead; 0: they are loaded."""
    on_host: tuple[int, ...] = ()
    """Blocks, by number in the order in which they run, whose weights wait in host memory once they have their form."""
    keeps_transposes: bool = False
    """8-bit weights are kept a second time, as the backward pass reads them."""
    plain_layers: tuple[str, ...] = ()
    """Paths of linear layers that have the placement's format whatever `linear_format` is."""


PLAIN = Layout()


@dataclass(frozen=True)
class Reading:
    """How weight files are read; see `loading.iterate_tensors`."""

    num_threads: int = 8
    fast: bool = False
    """By fastsafetensors, where it is installed and the device is a GPU."""


def load_transformer(
    family: ModelFamily,
    folder: ModelFolder,
    placement: Placement,
    layout: Layout = PLAIN,
    reading: Reading = Reading(),
) -> nn.Module:
    """A frozen transformer from a model folder.

    Raises:
        WeightsError: the files' tensors are not those of the architecture that the config describes; names some.
    """
    model = family.build_transformer(folder.component_config("transformer"))
    awaited = set(model.state_dict())
    absent = lay_out(model, family, placement, layout)
    files = shard_files(folder.path / "transformer")
    tensors = iterate_tensors(
        files, placement.device, reading.num_threads, None if reading.fast else False,
        wanted=lambda name: parent(name) not in absent,
    )  # fmt: skip
    expected = {name for name in awaited if parent(name) not in absent}
    fill(model, tensors, expected, placement, str(folder.path), paths_of_blocks(model, family, layout.on_host))
    if absent:
        attach_table(model, family, absent, read_from_files(files), layout.modulation_rows)
    return model.requires_grad_(False).eval()


def random_transformer(
    family: ModelFamily, config: Mapping[str, Any], placement: Placement, layout: Layout = PLAIN
) -> nn.Module:
    """A transformer of the given architecture (empty: the full-size default) with random weights, for measuring.

    Modulation layers that are not loaded share one weight for each shape: making them all takes host memory and time,
    and what streams through the device is as much either way.
    """
    model = family.build_transformer(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    absent = lay_out(model, family, placement, layout)
    loaded = {name: shape for name, shape in shapes.items() if parent(name) not in absent}
    tensors = random_tensors(loaded, placement)
    fill(model, tensors, set(loaded), placement, "random weights", paths_of_blocks(model, family, layout.on_host))
    if absent:
        of_shape = {shapes[name]: name for name in shapes if name not in loaded}
        kept = {shape: random_tensor(name, shape, placement).cpu() for shape, name in of_shape.items()}
        attach_table(model, family, absent, lambda name: kept[shapes[name]], layout.modulation_rows)
    return model.requires_grad_(False).eval()


def random_tensors(shapes: Mapping[str, torch.Size], placement: Placement) -> Iterator[tuple[str, Tensor]]:
    """One after the other."""
    for name, shape in shapes.items():
        yield name, random_tensor(name, shape, placement)


def random_tensor(name: str, shape: torch.Size, placement: Placement) -> Tensor:
    """Values of about the size that trained ones have."""
    tensor = torch.empty(shape, device=placement.device, dtype=placement.dtype)
    if len(shape) >= 2:
        return tensor.normal_(0, 0.5 / math.sqrt(shape[-1]))
    return tensor.fill_(1.0 if name.endswith("weight") else 0.0)


def lay_out(model: nn.Module, family: ModelFamily, placement: Placement, layout: Layout) -> dict[str, ModulationRows]:
    """Replaces the linear layers of the repeated blocks by those of the layout, still without values.

    A modulation layer is never quantized: it sees one row per example, so it costs memory and no time, and its error
    would reach every token.

    Returns:
        What stands in for modulation layers that are not loaded, by path.
    """
    try_triton(placement.device)
    absent: dict[str, ModulationRows] = {}
    blocks = tuple(f"{path}." for path in family.block_paths)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(blocks)}
    for path, linear in linears.items():
        if path.endswith(family.modulation_layers):
            if layout.modulation_rows:
                absent[path] = ModulationRows(linear.in_features, linear.out_features)
                model.set_submodule(path, absent[path])
        elif layout.linear_format is None or path in layout.plain_layers:
            continue
        elif can_quantize(linear, layout.linear_format):
            quantized = quantized_like(linear, layout.linear_format, placement.device, layout.keeps_transposes)
            model.set_submodule(path, quantized)
    return absent


def quantized_like(
    linear: nn.Linear, linear_format: str, device: torch.device, keeps_transpose: bool = False
) -> QuantizedLinear:
    """A layer of the same sides and with the same bias, its weight still to be set."""
    codes = codes_for(linear_format, device)
    tensor_cores = tensor_cores_multiply(codes, device)
    quantized = QuantizedLinear(
        linear.in_features, linear.out_features, linear_format, codes, tensor_cores, keeps_transpose
    )
    quantized.bias = linear.bias
    return quantized


def paths_of_blocks(model: nn.Module, family: ModelFamily, numbers: Sequence[int]) -> tuple[str, ...]:
    """How the names of some blocks' tensors begin."""
    names = [f"{path}.{name}." for path in family.block_paths for name, _ in model.get_submodule(path).named_children()]
    return tuple(names[number] for number in numbers)


def parent(name: str) -> str:
    """The module path of a parameter's name."""
    return name.rpartition(".")[0]


def fill(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    awaited: set[str],
    placement: Placement,
    source: str,
    on_host: tuple[str, ...] = (),
) -> None:
    """Gives a model on the meta device its values, each in its planned form as soon as it is there.

    Args:
        awaited: names of the tensors that must come.
        source: what an error calls their origin.
        on_host: beginnings of the names of those that wait in host memory.
    """
    missing = set(awaited)
    for name, tensor in tensors:
        if name not in awaited:
            raise WeightsError(f"{source} holds {name}, which the architecture in the transformer's config lacks.")
        missing.discard(name)
        put(model, name, tensor, placement)
        if name.startswith(on_host):
            send_to_host(model.get_submodule(parent(name)))
        del tensor  # one that was quantized is gone before the next one comes
    if missing:
        raise WeightsError(
            f"{source} lacks {len(missing)} tensors of the architecture in the transformer's config, {min(missing)} "
            "among them. Was the download interrupted? Fetch it again."
        )


def put(model: nn.Module, name: str, tensor: Tensor, placement: Placement) -> None:
    """One tensor into its place, in that place's form."""
    put_into(model.get_submodule(parent(name)), name, tensor, placement)


def put_into(module: nn.Module, name: str, tensor: Tensor, placement: Placement) -> None:
    """As `put`, into the module that `name` is a tensor of."""
    leaf = name.rpartition(".")[2]
    # On a CPU tensors come as views of their mapped file; what is kept must outlive it.
    format = placement.dtype if tensor.is_floating_point() else tensor.dtype
    value = tensor.to(format, copy=placement.device.type == "cpu")
    if isinstance(module, QuantizedLinear) and leaf == "weight":
        expected = torch.Size((module.out_features, module.in_features))
    else:
        expected = getattr(module, leaf).shape
    if expected != value.shape:
        raise WeightsError(f"{name} has shape {tuple(value.shape)}; the config says {tuple(expected)}.")
    if isinstance(module, QuantizedLinear) and leaf == "weight":
        module.set_weight(tensor)
    elif leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def send_to_host(module: nn.Module) -> None:
    """A module's own tensors, those that have values, to host memory."""
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.detach().cpu(), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None and not buffer.is_meta:
            module._buffers[name] = buffer.cpu()
