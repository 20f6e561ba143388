"""Loads a transformer straight into its planned form, tensor by tensor: all of it in full precision exists nowhere."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.kernels import try_triton
from pixtune.engine.modulation import ModulationTable
from pixtune.engine.modulation_filling import ModulationRows
from pixtune.engine.quantize import QuantizedLinear, can_quantize, codes_for, tensor_cores_multiply
from pixtune.engine.streaming import BlockStream
from pixtune.engine.together import Together
from pixtune.errors import WeightsError
from pixtune.family import ModelFamily, Placement
from pixtune.storage.loading import ScaledWeight, naming_part, open_transformer
from pixtune.storage.model_folder import ModelFolder


@dataclass(frozen=True)
class Layout:
    """Form of a transformer's repeated blocks; what is outside them always has the placement's own format."""

    linear_format: str | None = None
    """"fp8", "int8" or "nf4"; None: the placement's own."""
    modulation_rows: int = 0
    """Rows of the table that is computed ahead while modulation layers stay in their files; 0: they are loaded."""
    streamed: tuple[int, ...] = ()
    """Numbers of the blocks, in the order in which they run, whose weights lie elsewhere: in host memory, or in parts
    on the GPUs of several processes."""
    keeps_transposes: bool = False
    """Whether 8-bit weights are kept a second time, as the backward pass reads them."""
    plain_layers: tuple[str, ...] = ()
    """Paths of linear layers that have the placement's format whatever `linear_format` is."""
    gapless: bool = False
    """Whether the other blocks' weights are moved together, so that no memory is left unused between them."""


PLAIN = Layout()

Put = Callable[[nn.Module, str, Tensor | ScaledWeight, Placement], None]
"""Function that stores a tensor in the form that its module has for it, as `put_into` does."""


@dataclass(frozen=True)
class Reading:
    """Settings of `loading.iterate_tensors`, which reads the weight files."""

    num_threads: int = 8
    fast: bool = False
    """Whether fastsafetensors reads them, where it is installed and the device is a GPU."""


DEFAULT_READING = Reading()


@dataclass(frozen=True)
class LoadedTransformer:
    """A transformer, and what supplies the weights that it does not hold itself."""

    module: nn.Module
    stream: BlockStream | None = None
    """Supplier of streamed blocks' weights (`apply.apply_to_weights`); None: no block is streamed."""
    table: ModulationTable | None = None
    """Supplier of the modulation layers' outputs; None: these layers are in place."""
    together: Together = field(default_factory=Together)
    """Processes that hold the weights together, and that a forward pass takes; by default this one alone."""

    @property
    def outside_bytes(self) -> int:
        """Device memory of weights that lie outside of torch's allocator, where other processes read them."""
        return 0 if self.stream is None else self.stream.outside_bytes

    def apart(self) -> AbstractContextManager[None]:
        """Lets the first process of a run compute alone until a `with` block ends; all processes enter it.

        Those that hold a part of its weights supply these meanwhile, and begin with their own block when it is done.
        """
        return self.together.apart() if self.stream is None else self.stream.apart()


TakeBlock = Callable[[int, nn.Module], None]
"""Function that gets a block's number and the block as soon as all its weights are there, and may move them."""


class Arrivals:
    """Finds out which of some blocks have all their tensors.

    Args:
        prefixes: beginnings of the names of each block's tensors.
        names: names of all tensors that come.
    """

    def __init__(self, model: nn.Module, prefixes: Mapping[int, str], names: Iterable[str], take: TakeBlock) -> None:
        self._model, self._take, self._prefixes = model, take, prefixes
        self._missing = {
            number: {name for name in names if name.startswith(prefix)} for number, prefix in prefixes.items()
        }
        self._block_of = {name: number for number, missing in self._missing.items() for name in missing}

    def arrived(self, name: str) -> None:
        """Notes a tensor that is in its place."""
        if (number := self._block_of.get(name)) is None:
            return
        self._missing[number].discard(name)
        if not self._missing[number]:
            self._take(number, self._model.get_submodule(self._prefixes[number].removesuffix(".")))


def load_transformer(
    family: ModelFamily,
    folder: ModelFolder,
    placement: Placement,
    layout: Layout = PLAIN,
    reading: Reading = DEFAULT_READING,
    take: TakeBlock | None = None,
) -> LoadedTransformer:
    """Loads a frozen transformer from a model folder.

    Args:
        take: gets each streamed block; None: its weights go to host memory.

    Raises:
        WeightsError: the files' tensors are not those of the architecture that the config describes; names some.
    """
    with naming_part(folder.place("transformer")):
        module = family.build_transformer(folder.component_config("transformer"))
    in_config = set(module.state_dict())
    absent = lay_out(module, family, placement, layout)
    stored = open_transformer(folder)
    tensors = stored.iterate(
        placement.device, reading.num_threads, None if reading.fast else False,
        wanted=lambda name: parent(name) not in absent,
    )  # fmt: skip
    expected = {name for name in in_config if parent(name) not in absent}
    prefixes = prefixes_of_blocks(module, family, layout.streamed)
    fill(module, tensors, expected, placement, str(stored.source), arriving(module, prefixes, expected, take))
    module.requires_grad_(False).eval()
    if not absent:
        return LoadedTransformer(module)
    embedder = module.get_submodule(family.time_embedder)
    return LoadedTransformer(module, table=ModulationTable(embedder, absent, stored.read, layout.modulation_rows))


def random_transformer(
    family: ModelFamily,
    config: Mapping[str, Any],
    placement: Placement,
    layout: Layout = PLAIN,
    draws_each: bool = False,
    take: TakeBlock | None = None,
) -> LoadedTransformer:
    """Builds a transformer of the given architecture (empty: the full-size default) with random weights, for measuring.

    Modulation layers that are not loaded share one weight for each shape: making them all takes host memory and time,
    and what streams through the device is as much either way. Of quantized layers one of each shape is drawn, since 4
    bits take seconds to choose; the others have its rows in another order.

    Args:
        draws_each: every quantized layer is drawn by itself, so that all formats have the same weights.
        take: see `load_transformer`.
    """
    module = family.build_transformer(config)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    absent = lay_out(module, family, placement, layout)
    loaded = {name: shape for name, shape in shapes.items() if parent(name) not in absent}
    quantized = {name: layer for name in loaded if (layer := quantized_weight(module, name)) is not None}
    drawn = {} if draws_each else {shapes[name]: name for name in reversed(quantized)}
    of_others = [name for name in quantized if drawn.get(shapes[name], name) != name]
    tensors = {name: shape for name, shape in loaded.items() if name not in of_others}
    arrived = arriving(module, prefixes_of_blocks(module, family, layout.streamed), loaded, take)
    fill(
        module, ((name, random_tensor(name, shape, placement)) for name, shape in tensors.items()), set(tensors),
        placement, "random weights", lambda name: None if name in drawn.values() else arrived(name),
    )  # fmt: skip
    for number, name in enumerate(of_others):
        quantized[name].set_like(quantized[drawn[shapes[name]]], number + 1, placement.device)
        arrived(name)
    for name in drawn.values():  # after all that are made of them: a block that is taken has its weights no longer
        arrived(name)
    module.requires_grad_(False).eval()
    if not absent:
        return LoadedTransformer(module)
    of_shape = {shapes[name]: name for name in shapes if name not in loaded}
    kept = {shape: random_tensor(name, shape, placement).cpu() for shape, name in of_shape.items()}
    embedder = module.get_submodule(family.time_embedder)
    table = ModulationTable(embedder, absent, lambda name: kept[shapes[name]], layout.modulation_rows)
    return LoadedTransformer(module, table=table)


def quantized_weight(model: nn.Module, name: str) -> QuantizedLinear | None:
    """Returns the quantized layer whose weight a tensor of this name is; None: it is something else."""
    layer = model.get_submodule(parent(name))
    return layer if isinstance(layer, QuantizedLinear) and name.endswith(".weight") else None


def random_tensor(name: str, shape: torch.Size, placement: Placement) -> Tensor:
    """Returns values of about the size that trained ones have, each time the same on the same kind of device."""
    tensor = torch.empty(shape, device=placement.device, dtype=placement.dtype)
    if len(shape) >= 2:
        generator = torch.Generator(placement.device).manual_seed(zlib.crc32(name.encode()))
        return tensor.normal_(0, 0.5 / math.sqrt(shape[-1]), generator=generator)
    return tensor.fill_(1.0 if name.endswith("weight") else 0.0)


def lay_out(model: nn.Module, family: ModelFamily, placement: Placement, layout: Layout) -> dict[str, ModulationRows]:
    """Replaces the linear layers of the repeated blocks by those of the layout, still without values.

    A modulation layer is never quantized: it sees one row per example, so it costs memory and no time, and its error
    would reach every token.

    Returns:
        The stand-ins for modulation layers that are not loaded, by path.
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
    """Returns a quantized layer of the same sides and with the same bias, its weight still to be set."""
    codes = codes_for(linear_format, device)
    tensor_cores = tensor_cores_multiply(codes, device)
    quantized = QuantizedLinear(
        linear.in_features, linear.out_features, linear_format, codes, tensor_cores, keeps_transpose
    )
    quantized.bias = linear.bias
    return quantized


def prefixes_of_blocks(model: nn.Module, family: ModelFamily, numbers: Sequence[int]) -> dict[int, str]:
    """Returns how the names of these blocks' tensors begin, by the blocks' numbers."""
    names = [f"{path}.{name}." for path in family.block_paths for name, _ in model.get_submodule(path).named_children()]
    return {number: names[number] for number in numbers}


def arriving(
    model: nn.Module, prefixes: Mapping[int, str], names: Iterable[str], take: TakeBlock | None
) -> Callable[[str], None]:
    """Returns what is done with each tensor of some blocks that is in its place, by its name.

    Args:
        prefixes: beginnings of the names of each block's tensors.
        names: names of all tensors that come.
        take: gets each block once it is whole; None: its tensors go to host memory, one after the other.
    """
    if take is not None:
        return Arrivals(model, prefixes, names, take).arrived
    on_host = tuple(prefixes.values())

    def arrived(name: str) -> None:
        if name.startswith(on_host):
            send_to_host(model.get_submodule(parent(name)))

    return arrived


def parent(name: str) -> str:
    """Returns the path of the module that a tensor of this name belongs to."""
    return name.rpartition(".")[0]


def fill(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor | ScaledWeight]],
    expected: set[str],
    placement: Placement,
    source: str,
    arrived: Callable[[str], None] = lambda name: None,
    put: Put | None = None,
) -> None:
    """Gives a model on the meta device its values, each in its planned form as soon as it has been read.

    Args:
        expected: names of the tensors that must come.
        source: what an error calls their origin.
        arrived: is called for each tensor that is in its place.
        put: stores a tensor; None: `put_into`.

    Raises:
        WeightsError: a tensor is missing, is not expected, or has another shape.
    """
    missing = set(expected)
    for name, tensor in tensors:
        if name not in expected:
            raise WeightsError(f"{source} holds {name}, which the architecture in the transformer's config lacks.")
        missing.discard(name)
        (put or put_into)(model.get_submodule(parent(name)), name, tensor, placement)
        arrived(name)
        del tensor  # the unquantized form is freed before the next tensor is read
    if missing:
        raise WeightsError(
            f"{source} lacks {len(missing)} tensors of the architecture in the transformer's config, {min(missing)} "
            "among them. Was the download interrupted? Fetch it again."
        )


def put_into(module: nn.Module, name: str, tensor: Tensor | ScaledWeight, placement: Placement) -> None:
    """Stores a tensor in the form that its module has for it.

    Args:
        module: the one that `name`, a path in the whole model, is a tensor of.

    Raises:
        WeightsError: the module has another shape.
    """
    leaf = name.rpartition(".")[2]
    quantized = module if isinstance(module, QuantizedLinear) and leaf == "weight" else None
    sides = None if quantized is None else (quantized.out_features, quantized.in_features)
    expected = getattr(module, leaf).shape if sides is None else torch.Size(sides)
    if expected != tensor.shape:
        raise WeightsError(f"{name} has shape {tuple(tensor.shape)}; the config has {tuple(expected)}.")
    if quantized is not None:
        quantized.set_weight(tensor)
        return
    plain = tensor.dequantized() if isinstance(tensor, ScaledWeight) else tensor
    # On a CPU tensors are views of their mapped file; what is kept must outlive it.
    format = placement.dtype if plain.is_floating_point() else plain.dtype
    value = plain.to(format, copy=placement.device.type == "cpu")
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def send_to_host(module: nn.Module) -> None:
    """Moves a module's own tensors to host memory, apart from those that have no values yet."""
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.detach().cpu(), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None and not buffer.is_meta:
            module._buffers[name] = buffer.cpu()
