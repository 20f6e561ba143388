"""Merges adapters into a base model's weights, one tensor at a time, so that a model of any size takes a few gigabytes.

The result is a base like the one that was given: a folder in diffusers' layout, a transformer's, or a single file.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pixtune.deltas.adapter_file import AdapterFile, check_base
from pixtune.deltas.base_files import PLAIN, BaseFiles, Rows, read_tensor
from pixtune.deltas.delta import Change, Dora, changed_weight, times
from pixtune.errors import WeightsError, WriteError
from pixtune.hardware.facts import package_versions
from pixtune.storage.base_reference import copy_without_paths, refer_to_base, without_path
from pixtune.storage.files import sync_folder, write_atomically
from pixtune.storage.loading.entries import TensorEntry
from pixtune.storage.model_folder import READ_SUFFIXES, ModelFolder, read_header, weight_index
from pixtune.storage.safetensors_writer import save_one_by_one
from pixtune.trained.full_weights import ABOUT_FILE

FREE_SHARE = 1.01
"""Room on the disk over the size of the files: file systems keep books, too."""


@dataclass
class Merged:
    """Figures of a merge, which are summed tensor by tensor."""

    path: Path
    num_tensors: int = 0
    """Tensors that were changed."""
    added: float = 0.0
    """Sum of the squares of what was to be added."""
    lost: float = 0.0
    """Sum of the squares of the difference between that and what was added after rounding to the weights' format."""
    layers: tuple[str, ...] = ()

    @property
    def lost_share(self) -> float:
        """Length of what rounding changed, in parts of the length of what was to be added."""
        return (self.lost / self.added) ** 0.5 if self.added else 0.0

    def as_json(self) -> dict[str, object]:
        """Returns the figures, for programs."""
        return {
            "output": str(self.path),
            "layers": len(self.layers),
            "tensors": self.num_tensors,
            "added_norm": self.added**0.5,
            "lost_share": self.lost_share,
        }


def changes_by_layer(adapters: Sequence[tuple[AdapterFile, float]]) -> dict[str, list[Change]]:
    """Returns what some adapters, each with its weight, do to each layer.

    Raises:
        WeightsError: a DoRA is not alone on a layer or has another weight than 1, for which programs differ.
    """
    found: dict[str, list[Change]] = {}
    for adapter, weight in adapters:
        adapter.refuse_other_lengths()
        for layer, change in adapter.changes.items():
            if isinstance(change, Dora):
                if weight != 1:
                    raise WeightsError(
                        f"{adapter.path} is a DoRA, which is merged with the weight 1 alone: for {weight:g}, programs "
                        "differ in what they scale."
                    )
                found.setdefault(layer, []).append(change)
            else:
                found.setdefault(layer, []).append(times(change, weight))
    for layer, changes in found.items():
        if len(changes) > 1 and any(isinstance(change, Dora) for change in changes):
            raise WeightsError(
                f"a DoRA and another adapter are both for {layer}, and the result depends on which comes first. Merge "
                "one, and then the other into the result."
            )
    return found


def merge_into_base(
    base: BaseFiles,
    adapters: Sequence[tuple[AdapterFile, float]],
    target: Path,
    count: Callable[[], object] = lambda: None,
) -> Merged:
    """Writes a base model with adapters merged into its weights.

    Args:
        adapters: adapters, each with the weight at which it is merged.
        target: folder or file for the result, which must not exist.
        count: is called after each tensor of the base.

    Raises:
        WeightsError: an adapter does not fit the base, or the base's weights cannot be added to.
        WriteError: it could not be written; nothing half-written is left.
    """
    shapes = {layer: base.shape(layer) for layer in base.places}
    for layer in {layer for adapter, _ in adapters for layer in adapter.changes if layer in base.places}:
        _refuse_quantized(base, base.places[layer].tensor)
    for adapter, _ in adapters:
        check_base(adapter, shapes, base.path)
    changes = changes_by_layer(adapters)
    by_tensor: dict[str, list[tuple[Rows, list[Change]]]] = {}
    for layer, of_layer in changes.items():
        by_tensor.setdefault(base.places[layer].tensor, []).append((base.places[layer], of_layer))
    _check_room(base, target)
    merged = Merged(target, layers=tuple(sorted(changes)))
    write = _Writer(base, by_tensor, merged, count)
    if base.is_file:
        write.file(base.transformer, target)
        return merged
    temporary = target.with_name(f".{target.name}.writing")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except FileExistsError as error:
        raise WriteError(
            f"{temporary} is left from a merge that was killed, or another one is writing it. Delete it if none is."
        ) from error
    except OSError as error:
        raise WriteError(f"{target} could not be written ({error.strerror or error}).") from error
    try:
        _copy_other_files(base, temporary)
        folder = temporary / "transformer" if base.is_pipeline else temporary
        for file in base.files:
            write.file(file, folder / file.name)
        write_atomically(temporary / ABOUT_FILE, json.dumps(_about(base, adapters), indent=1).encode())
        temporary.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        if isinstance(error, WeightsError | WriteError):
            raise
        raise WriteError(f"{target} could not be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # renamed already, unless something failed
    return merged


@dataclass
class _Writer:
    """Writes the files of a merged base, one tensor at a time."""

    base: BaseFiles
    by_tensor: Mapping[str, list[tuple[Rows, list[Change]]]]
    merged: Merged
    count: Callable[[], object]

    def file(self, source: Path, target: Path) -> None:
        entries = {name: entry for name, entry in self.base.entries.items() if entry.file == source}
        outline = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
        metadata = read_header(source).get("__metadata__") or {}
        save_one_by_one(target, outline, lambda name: self._tensor(entries[name]), metadata)

    def _tensor(self, entry: TensorEntry) -> Tensor:
        weight = read_tensor(entry)
        for place, changes in self.by_tensor.get(entry.name, ()):
            self._change(entry, weight, place, changes)
        self.merged.num_tensors += entry.name in self.by_tensor
        self.count()
        return weight

    def _change(self, entry: TensorEntry, weight: Tensor, place: Rows, changes: Sequence[Change]) -> None:
        before_OI = place.of(weight)
        exact_OI, added = changed_weight(before_OI, changes)
        after_OI = exact_OI.to(weight.dtype)
        lost = float(torch.linalg.vector_norm(exact_OI - after_OI))
        if not math.isfinite(lost):  # as it is where any number is not
            raise WeightsError(
                f"{entry.name} of {entry.file} would hold NaN or infinity: its own numbers are, or the sum is beyond "
                f"{str(weight.dtype).removeprefix('torch.')}. Is the base whole, and are the weights right?"
            )
        place.put(weight, after_OI)
        self.merged.lost += lost**2
        self.merged.added += added**2


def _refuse_quantized(base: BaseFiles, tensor: str) -> None:
    """Checks that a weight is in 16 or 32 bits.

    Raises:
        WeightsError: it is not.
    """
    if (dtype := base.entries[tensor].dtype) not in PLAIN:
        raise WeightsError(
            f"{base.path} holds {tensor} as {str(dtype).removeprefix('torch.')}: a LoRA's small numbers would be lost "
            "in it. Merge into the model in 16 bits, and quantize the result."
        )


def _check_room(base: BaseFiles, target: Path) -> None:
    """Checks that the disk has room for the whole result.

    Raises:
        WriteError: it has not, or the target's folder cannot be found.
    """
    folder = next(each for each in target.absolute().parents if each.exists())
    needed = sum(file.stat().st_size for file in base.files)
    if base.is_pipeline:
        needed += sum(file.stat().st_size for file in _other_files(base))
    free = shutil.disk_usage(folder).free
    if free < needed * FREE_SHARE:
        raise WriteError(
            f"{target} needs {needed / 2**30:,.1f} GiB, and its disk has {free / 2**30:,.1f} GiB free. Give a path on "
            "another disk."
        )


def _other_files(base: BaseFiles) -> list[Path]:
    """Lists the files of a base folder that are copied as they are: all that a model folder needs, no other weights."""
    root = base.path
    parts = {*ModelFolder(root).components} if base.is_pipeline else set()
    found = []
    for file in sorted(root.rglob("*")):
        relative = file.relative_to(root)
        in_transformer = file.parent == base.transformer
        if not file.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if base.is_pipeline and not in_transformer and len(relative.parts) > 1 and relative.parts[0] not in parts:
            continue
        if file.suffix not in READ_SUFFIXES or (
            file.suffix == ".safetensors" and file.parent in (root, base.transformer)
        ):
            continue
        if in_transformer and ".safetensors.index" in file.name and file != weight_index(base.transformer):
            continue
        found.append(file)
    return found


def _copy_other_files(base: BaseFiles, target: Path) -> None:
    """Copies them; they are not linked, so that a tool that writes into the result does not reach the base."""
    for file in _other_files(base):
        copy = target / file.relative_to(base.path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy_without_paths(str(file), str(copy))
    (target / "transformer" if base.is_pipeline else target).mkdir(exist_ok=True)


def _about(base: BaseFiles, adapters: Sequence[tuple[AdapterFile, float]]) -> dict[str, object]:
    """Builds what the result's `pixtune.json` says of where it comes from, without a path."""
    if base.is_pipeline:
        origin = refer_to_base(base.name, ModelFolder(base.path)).entries()
    else:
        origin = {"base_model": without_path(base.name)}
    loras = [{"file": adapter.path.name, "weight": weight} for adapter, weight in adapters]
    return {**origin, "merged": loras, "versions": dict(package_versions())}
