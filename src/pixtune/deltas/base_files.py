"""The weights of a base model on the disk, tensor by tensor: a pipeline's folder, a transformer's, or a single file.

A single file may name layers as the model's authors do, where one tensor can hold several of diffusers' layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pixtune.errors import WeightsError
from pixtune.families import FAMILIES
from pixtune.families.file_names import prefix_of, tensors_in
from pixtune.families.other_files import kind_of_tensors
from pixtune.family import ModelFamily
from pixtune.storage.architecture import find_cached
from pixtune.storage.loading.entries import TensorEntry, read_entries
from pixtune.storage.loading.shards import shard_files
from pixtune.storage.loading.threads import read_exactly
from pixtune.storage.model_folder import MODEL_INDEX, ModelFolder

PLAIN = (torch.bfloat16, torch.float16, torch.float32)
"""Number formats of weights that a delta can be added to."""


@dataclass(frozen=True)
class Rows:
    """The place of a layer's weight in a tensor of a file."""

    tensor: str
    first: int
    count: int
    is_swapped: bool = False
    """Whether the second half of the rows stands first."""

    def of(self, weight_OI: Tensor) -> Tensor:
        """Returns the layer's own rows in its own order: a view, unless they are swapped."""
        rows = weight_OI[self.first : self.first + self.count]
        return torch.cat([*reversed(rows.chunk(2))]) if self.is_swapped else rows

    def put(self, weight_OI: Tensor, rows: Tensor) -> None:
        """Writes the layer's rows back."""
        weight_OI[self.first : self.first + self.count] = (
            torch.cat([*reversed(rows.chunk(2))]) if self.is_swapped else rows
        )


@dataclass(frozen=True)
class BaseFiles:
    """A base model's files, of which the headers are read."""

    name: str
    """Path or hub name by which it was asked for."""
    path: Path
    """Folder or file."""
    transformer: Path
    """Folder of the transformer's files; for a single file that file."""
    entries: Mapping[str, TensorEntry]
    """Tensors by their names in the files."""
    places: Mapping[str, Rows]
    """Places of the linear layers' weights, by the layers' paths in diffusers."""
    families: tuple[ModelFamily, ...]
    """Families whose transformer this is."""

    @property
    def is_file(self) -> bool:
        return not self.transformer.is_dir()

    @property
    def is_pipeline(self) -> bool:
        return self.path != self.transformer

    @property
    def files(self) -> list[Path]:
        """Files with weights."""
        return list(dict.fromkeys(entry.file for entry in self.entries.values()))

    def shape(self, layer: str) -> tuple[int, int]:
        """Returns the numbers of outputs and inputs of a layer."""
        place = self.places[layer]
        return place.count, self.entries[place.tensor].shape[1]


def read_tensor(entry: TensorEntry) -> Tensor:
    """Reads one tensor into memory of its own, without mapping its file: mapped pages count as the process's memory.

    Raises:
        WeightsError: the file became shorter, or cannot be read.
    """
    data_B = torch.empty(entry.num_bytes, dtype=torch.uint8)
    read_exactly(entry.file, entry.offset_bytes, data_B.numpy().data)
    return data_B.view(entry.dtype).view(entry.shape)


def open_base(name_or_path: str) -> BaseFiles:
    """Opens a base model: a folder, a file, or a model of the hub that is in its cache. It downloads nothing.

    Raises:
        WeightsError: there is none, it is incomplete, or no family here has such a transformer; says what it is.
    """
    path = Path(name_or_path).expanduser()
    if not path.exists():
        cached = find_cached(name_or_path)
        if cached is None:
            raise WeightsError(
                f"there is no {path.absolute()}, and the hub's cache has no model of that name. Give a folder in "
                "diffusers' layout, a transformer's folder, or a .safetensors file."
            )
        path = cached.path
    if not path.is_dir():
        entries, transformer = read_entries([path]), path
    else:
        transformer = path / "transformer" if (path / MODEL_INDEX).is_file() else path
        if not transformer.is_dir():
            kind = ModelFolder(path).pipeline_class
            raise WeightsError(f"{path} is a {kind} without a transformer, which is what pixtune's LoRAs are for.")
        entries = read_entries(shard_files(transformer))
    by_name = {entry.name: entry for entry in entries}
    found = [(family, locate_layers(by_name, family)) for family in FAMILIES.values()]
    most = max(len(places) for _, places in found)
    if most == 0:
        raise WeightsError(
            f"{path} holds no transformer of {', '.join(FAMILIES)}: it is {kind_of_tensors(by_name).split('. ')[0]}."
        )
    families = tuple(family for family, places in found if len(places) == most)
    return BaseFiles(name_or_path, path, transformer, by_name, locate_layers(by_name, families[0]), families)


def locate_layers(entries: Mapping[str, TensorEntry], family: ModelFamily) -> dict[str, Rows]:
    """Finds the weights of a family's linear layers, as diffusers or the model's authors name them."""
    prefix = prefix_of(entries)
    bare = {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}
    shapes = {name: entry.shape for name, entry in bare.items()}
    paths = [re.escape(part).replace(re.escape("{}"), r"\d+") for each in family.original_layers for part in each.parts]
    is_layer = re.compile("|".join(paths)).fullmatch
    places = {}
    for name, entry in bare.items():
        if len(entry.shape) != 2 or not name.endswith(".weight"):
            continue
        for own, place in tensors_in(name, shapes):
            layer = own.removesuffix(".weight")
            first, end = place.rows or (0, entry.shape[0])
            if is_layer(layer):
                places[layer] = Rows(entry.name, first, end - first, place.halves_swapped)
    return places
