"""Loads a transformer whose weights are trained and divided among processes: each reads its own rows from the files.

No process holds all weights at any time. The transformer is built without values, divided (`sharding.py`), and each
tensor's rows are read straight to where they stay. Tensors of single files in other layouts are read whole, one at a
time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pixtune.engine.load import (
    DEFAULT_READING,
    LoadedTransformer,
    Put,
    Reading,
    fill,
    parent,
    put_into,
    random_tensor,
)
from pixtune.engine.sharding import allocate_shards, local_of, rows_of
from pixtune.engine.together import Together
from pixtune.errors import WeightsError
from pixtune.family import ModelFamily, Placement
from pixtune.storage.loading import ScaledWeight, naming_part, open_transformer
from pixtune.storage.loading.entries import TensorEntry
from pixtune.storage.loading.transformer import rows_of_entry
from pixtune.storage.model_folder import ModelFolder


def load_sharded(
    family: ModelFamily,
    folder: ModelFolder,
    placement: Placement,
    together: Together,
    reading: Reading = DEFAULT_READING,
    random_weights: bool = False,
) -> LoadedTransformer:
    """Loads this process's rows of all weights of a transformer.

    Args:
        random_weights: the folder's config alone is read; weights are those of `load.random_transformer`.

    Raises:
        WeightsError: the files' tensors are not those of the architecture that the config describes; names some.
    """
    with naming_part(folder.place("transformer")):
        module = family.build_transformer(folder.component_config("transformer"))
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    blocks = [block for path in family.block_paths for block in module.get_submodule(path).children()]
    assert together.mesh is not None, "sharding takes several processes"
    allocate_shards(module, blocks, together.mesh, placement.device, placement.dtype)
    if random_weights:
        _draw(module, expected, placement, together)
    else:
        _read(module, expected, folder, placement, together, reading)
    together.follow_passes(module, placement.device)
    return LoadedTransformer(module.requires_grad_(False).eval(), together=together)


def _read(
    module: nn.Module,
    expected: Mapping[str, torch.Size],
    folder: ModelFolder,
    placement: Placement,
    together: Together,
    reading: Reading,
) -> None:
    stored = open_transformer(folder)
    narrowed: set[str] = set()

    def narrow(entry: TensorEntry) -> TensorEntry:
        if stored.file is not None or entry.shape != expected.get(entry.name) or not entry.shape:
            return entry
        parameter = _parameter(module, entry.name)
        if parameter is None:
            return entry
        rows = rows_of(parameter, together)
        narrowed.add(entry.name)
        return rows_of_entry(entry, rows.start, rows.end)

    tensors = stored.iterate(
        placement.device, reading.num_threads, None if reading.fast else False,
        wanted=lambda name: not _is_empty(module, name), narrow=narrow,
    )  # fmt: skip
    read = {name for name in expected if not _is_empty(module, name)}
    fill(module, tensors, read, placement, str(stored.source), put=_put_rows(together, narrowed))


def _draw(module: nn.Module, expected: Mapping[str, torch.Size], placement: Placement, together: Together) -> None:
    tensors = ((name, random_tensor(name, shape, placement)) for name, shape in expected.items())
    fill(module, tensors, set(expected), placement, "random weights", put=_put_rows(together, set()))


def _put_rows(together: Together, narrowed: set[str]) -> Put:
    """Returns the function that stores this process's rows of a tensor.

    Args:
        narrowed: names of tensors that come as these rows alone.
    """

    def put(module: nn.Module, name: str, tensor: Tensor | ScaledWeight, placement: Placement) -> None:
        parameter = module._parameters.get(name.rpartition(".")[2])
        if not isinstance(parameter, DTensor):
            put_into(module, name, tensor, placement)
            return
        rows = rows_of(parameter, together)
        if name not in narrowed and parameter.shape != tensor.shape:
            raise WeightsError(f"{name} has shape {tuple(tensor.shape)}; the config has {tuple(parameter.shape)}.")
        plain = tensor.dequantized() if isinstance(tensor, ScaledWeight) else tensor
        local_of(parameter).copy_(plain if name in narrowed else rows.of(plain))

    return put


def _parameter(module: nn.Module, name: str) -> DTensor | None:
    parameter = module.get_submodule(parent(name))._parameters.get(name.rpartition(".")[2])
    return parameter if isinstance(parameter, DTensor) else None


def _is_empty(module: nn.Module, name: str) -> bool:
    """Returns whether this process holds no row of a tensor, as of a bias shorter than there are processes."""
    try:
        parameter = _parameter(module, name)
    except AttributeError:  # a tensor that the model does not have, which `fill` reports
        return False
    return parameter is not None and not local_of(parameter).numel()
