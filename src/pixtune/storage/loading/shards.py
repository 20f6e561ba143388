"""Writes safetensors, and reads and writes models whose weights are in several files with an index beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from pixtune.errors import WeightsError, WriteError
from pixtune.storage import files, safetensors_writer
from pixtune.storage.grouping import group_neighbours
from pixtune.storage.loading.entries import read_entries
from pixtune.storage.loading.read import NUM_THREADS, iterate_tensors
from pixtune.storage.model_folder import INDEX_SUFFIX, SHARD_NAME, read_json, weight_files, weight_index

MAX_SHARD_BYTES = 2 * 2**30
"""Bytes of a shard at most: a large model is a handful of files, so that a damaged one can be fetched again alone."""
WRITING_THREADS = 4
FORMAT = {"format": "pt"}
"""Metadata without which transformers and diffusers refuse a file."""


def save_safetensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors as one file, which is there whole or not at all.

    Raises:
        WriteError: it could not be written. An older file in its place is kept.
    """
    safetensors_writer.save_without_digest(Path(path), tensors, {**FORMAT, **(metadata or {})})


def save_safetensors_sharded(
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    stem: str = "model",
    num_threads: int = WRITING_THREADS,
) -> list[Path]:
    """Writes tensors as files of at most `max_shard_bytes`, or of one larger tensor, with their index.

    The index is the one that transformers and diffusers read; one file that holds everything has none.

    Weights of the same stem that stand in the folder are replaced. A crash leaves the old ones, the new ones, or a
    folder that `shard_files` refuses; never a mixture that loads.

    Args:
        stem: how the files' names begin: "model" for transformers, "diffusion_pytorch_model" for diffusers.
        num_threads: how many files are written at a time.

    Returns:
        The files with weights.

    Raises:
        WriteError: they could not be written.
    """
    folder = Path(folder)
    shards = group_neighbours(tensors, lambda name: tensors[name].nbytes, max_shard_bytes) or [[]]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    index_file = folder / f"{stem}{INDEX_SUFFIX}"
    _remove([index_file])  # first: shards of two saves must never stand under one index
    with ThreadPoolExecutor(num_threads, thread_name_prefix="write-weights") as pool:
        parts = [{key: tensors[key] for key in shard} for shard in shards]
        list(pool.map(save_safetensors, parts, [folder / name for name in names]))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        files.write_atomically(index_file, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
    ours = re.compile(re.escape(stem) + rf"(\.safetensors|{SHARD_NAME.pattern})")
    _remove([file for file in folder.iterdir() if ours.fullmatch(file.name) and file.name not in names])
    return [folder / name for name in names]


def shard_files(folder: str | Path) -> list[Path]:
    """Returns the files with a model's weights, as `weight_files` finds them, and checks that each holds its tensors.

    Raises:
        WeightsError: files are missing, cut off, or of different models; names all of them.
    """
    folder = Path(folder)
    paths = weight_files(folder)
    entries = {entry.name: entry.file for entry in read_entries(paths)}
    if (index := weight_index(folder)) is not None:
        places = read_json(index)["weight_map"]
        wrong = [name for name, file in places.items() if entries.get(name) != folder / file]
        if wrong:
            raise WeightsError(
                f"{len(wrong)} tensors, {wrong[0]} among them, are not in the files of {folder} that {index.name} "
                "names for them. Do the files come from different models? Fetch the model again."
            )
    return paths


def load_safetensors_sharded(
    folder: str | Path, num_threads: int = NUM_THREADS, device: torch.device | str = "cpu", use_fast: bool = True
) -> dict[str, Tensor]:
    """Reads all tensors of a model in one file or several, by `shard_files` and `iterate_tensors`."""
    return dict(iterate_tensors(shard_files(folder), device, num_threads, use_fast))


def _remove(paths: Sequence[Path]) -> None:
    """Deletes files durably: what is written next must not reach the disk before."""
    present = [path for path in paths if path.exists()]
    try:
        for path in present:
            path.unlink()
        if present:
            files.sync_folder(present[0].parent)
    except OSError as error:
        raise WriteError(f"{present[0].parent} could not be changed ({error.strerror or error}).") from error
