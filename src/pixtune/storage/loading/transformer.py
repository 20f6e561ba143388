"""Reads a transformer's tensors by the model's own names, whether its files have them or a single file has others.

Weights in 8 bits come as their codes with their scales, for whoever can keep them so: nothing here makes a 16-bit copy
of more than one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pixtune.errors import WeightsError
from pixtune.storage.loading.entries import DTYPES, TensorEntry, read_entries
from pixtune.storage.loading.gguf import entries_of_gguf, iterate_gguf
from pixtune.storage.loading.read import NUM_THREADS, iterate_entries
from pixtune.storage.loading.shards import shard_files
from pixtune.storage.model_folder import ModelFolder
from pixtune.storage.transformer_file import Place, TransformerFile

CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
"""Number formats of weights in 8 bits."""


@dataclass(frozen=True)
class ScaledWeight:
    """A weight in 8 bits as its file has it."""

    codes_NK: Tensor
    """One of `CODES`."""
    scale_N1: Tensor
    """Factor of each row's codes; fp32."""
    group: int = 0
    """Neighbours of a row that were rotated together before they were rounded; 0: none were."""

    @property
    def shape(self) -> torch.Size:
        return self.codes_NK.shape

    def dequantized(self) -> Tensor:
        """Returns the weight that the codes stand for; fp32 of shape (N, K)."""
        weight_NK = self.codes_NK.float() * self.scale_N1
        return turned_back(weight_NK, self.group) if self.group else weight_NK


def turned_back(rotated_NK: Tensor, group: int) -> Tensor:
    """Undoes ConvRot's rotation of each group of neighbours of a row; shape (N, K).

    The rotation is a regular Hadamard matrix over its root (arXiv 2512.03673): the Kronecker power of the matrix of
    order 4 that is all ones but for minus ones from the upper right to the lower left, as ComfyUI's files have it. Each
    of the power's factors works on one base-4 digit of the place in the group: it replaces a number by the sum of the
    four that differ in that digit alone, less twice the one at the opposite place. So no matrix product is needed,
    whose precision the machine's settings decide.

    Args:
        group: a power of 4.
    """
    num_digits = (group.bit_length() - 1) // 2
    turned = rotated_NK.reshape(-1, *[4] * num_digits)
    for digit in range(1, num_digits + 1):
        turned = turned.sum(digit, keepdim=True) - 2 * turned.flip(digit)
    return turned.view(rotated_NK.shape) / 2**num_digits


@dataclass(frozen=True)
class TransformerTensors:
    """The tensors of a transformer, by the model's own names."""

    source: Path
    """The folder or file that they are in."""
    entries: tuple[TensorEntry, ...]
    file: TransformerFile | None = None
    """The single file that they are in; None: the model's own names stand in its files."""
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    """Scales of weights in 8 bits, by the names that the file has for them; fp32, on the host."""

    def iterate(
        self,
        device: torch.device | str,
        num_threads: int = NUM_THREADS,
        use_fast: bool | None = None,
        wanted: Callable[[str], bool] = lambda name: True,
        narrow: Callable[[TensorEntry], TensorEntry] = lambda entry: entry,
    ) -> Iterator[tuple[str, Tensor | ScaledWeight]]:
        """Yields name and tensor as `loading.iterate_tensors` does, matrices in 8 bits as `ScaledWeight`.

        Args:
            narrow: returns the entry of those rows of a tensor that are to be read (`rows_of_entry`).
        """
        entries = [narrow(entry) for entry in self.entries if wanted(entry.name)]
        if self.file is not None and self.file.is_gguf:
            read = iterate_gguf(entries, self.file.header, device)
        else:
            read = iterate_entries(entries, device, num_threads, use_fast)
        for name, tensor in read:
            yield name, self._as_it_is(name, tensor)

    def read(self, name: str) -> Tensor:
        """Reads one tensor to host memory, as plain numbers."""
        ((_, tensor),) = self.iterate("cpu", wanted=name.__eq__)
        return tensor.dequantized() if isinstance(tensor, ScaledWeight) else tensor

    def scaling_of(self, name: str) -> bytes:
        """Returns what makes numbers of a weight's codes, as bytes; none where they are the numbers."""
        place = Place(name) if self.file is None else self.file.places[name]
        if self.file is not None and self.file.is_gguf:
            return str(self.file.header[place.name]["dtype"]).encode()
        scaling = None if self.file is None else self.file.scalings.get(place.name)
        if scaling is None or scaling.scale is None:
            return b""
        return f"{scaling.group}\0".encode() + self._rows_of_scale(self.scales[scaling.scale], place).numpy().tobytes()

    def bytes_at(self, entry: TensorEntry, place: int, count: int) -> list[tuple[int, int]]:
        """Returns where the file has some bytes of a tensor of the model: first byte and number of each stretch.

        Args:
            place: first of the bytes, from the tensor's beginning.
        """
        if self.file is None or not self.file.places[entry.name].halves_swapped:
            return [(entry.offset_bytes + place, count)]
        half = entry.num_bytes // 2
        before = max(min(half - place, count), 0)
        stretches = [(place + half, before), (max(place - half, 0), count - before)]
        return [(entry.offset_bytes + begin, length) for begin, length in stretches if length]

    def _as_it_is(self, name: str, tensor: Tensor) -> Tensor | ScaledWeight:
        place = Place(name) if self.file is None else self.file.places[name]
        scaling = None if self.file is None else self.file.scalings.get(place.name)
        if place.halves_swapped:
            tensor = tensor.roll(len(tensor) // 2, 0)
        if tensor.dtype not in CODES:
            return tensor
        if tensor.ndim != 2:
            return tensor.float()
        if scaling is None or scaling.scale is None:
            return ScaledWeight(tensor, torch.ones(len(tensor), 1, device=tensor.device))
        scale_N1 = self._rows_of_scale(self.scales[scaling.scale], place)
        return ScaledWeight(tensor, scale_N1.to(tensor.device), scaling.group)

    def _rows_of_scale(self, scale: Tensor, place: Place) -> Tensor:
        """Returns the scale of each row of a tensor of the model."""
        assert self.file is not None
        num_rows = self.file.header[place.name]["shape"][0]
        scale_N1 = scale.reshape(-1, 1).expand(num_rows, 1)
        scale_N1 = scale_N1 if place.rows is None else scale_N1[slice(*place.rows)]
        return (scale_N1.roll(num_rows // 2, 0) if place.halves_swapped else scale_N1).contiguous()


def rows_of_entry(entry: TensorEntry, start: int, end: int) -> TensorEntry:
    """Returns the entry of some rows of a tensor that stands in its file by its own name and whole."""
    row_bytes = entry.num_bytes // max(entry.shape[0], 1)
    return TensorEntry(
        entry.name, entry.file, entry.dtype, (end - start, *entry.shape[1:]),
        entry.offset_bytes + start * row_bytes, (end - start) * row_bytes, entry.name, start,
    )  # fmt: skip


def open_transformer(folder: ModelFolder) -> TransformerTensors:
    """Finds a transformer's tensors, and checks their files by the headers.

    Raises:
        WeightsError: a file is missing, cut off or of another format, or a weight's scale cannot be one.
    """
    if folder.file is None:
        files = shard_files(folder.part("transformer"))
        return TransformerTensors(folder.part("transformer"), tuple(read_entries(files)))
    file = folder.file
    listed = entries_of_gguf(file.path, file.header) if file.is_gguf else read_entries([file.path])
    stored = {entry.name: entry for entry in listed}
    entries = [_part_of(stored[place.name], name, place, file) for name, place in file.places.items()]
    entries.sort(key=lambda entry: entry.offset_bytes)
    wanted = {scaling.scale for scaling in file.scalings.values() if scaling.scale is not None}
    scales = {
        name: tensor.float().clone()
        for name, tensor in iterate_entries([stored[name] for name in sorted(wanted)], "cpu")
    }
    for name, scale in scales.items():
        if not scale.isfinite().all() or scale.min() < 0:
            raise WeightsError(
                f"{file.path}: {name} holds {scale.min().item():g} to {scale.max().item():g}, which are no scales of a "
                "weight. Fetch the model again."
            )
    return TransformerTensors(file.path, tuple(entries), file, scales)


def _part_of(stored: TensorEntry, name: str, place: Place, file: TransformerFile) -> TensorEntry:
    """Returns the entry of a tensor of the model that is some rows of a file's tensor."""
    scaling = file.scalings.get(place.name)
    dtype = stored.dtype if scaling is None else DTYPES[scaling.codes]
    first, end = place.rows or (0, stored.shape[0] if stored.shape else 1)
    row_bytes = stored.num_bytes // max(stored.shape[0], 1) if stored.shape else stored.num_bytes
    return TensorEntry(
        name,
        stored.file,
        dtype,
        (end - first, *stored.shape[1:]) if stored.shape else (),
        stored.offset_bytes + first * row_bytes,
        (end - first) * row_bytes,
        stored.name,
        first,
    )
