"""Loads parts of a model by their libraries, from files that were checked before, and names the part in every error.

The libraries' errors for a damaged file name neither the file nor what to do, and tensors that a file lacks they fill
with random numbers, after a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pixtune.errors import PixtuneError, WeightsError
from pixtune.storage.loading.shards import shard_files
from pixtune.storage.model_folder import ModelFolder, variant_of


def check_parts(folder: ModelFolder, parts: Sequence[str]) -> None:
    """Checks the weight files of a model's parts by their headers, so that damage shows before anything is loaded.

    Args:
        parts: names of components; those without weights, such as tokenizers, are skipped.

    Raises:
        WeightsError: files are missing, cut off or of another format; names one.
    """
    for part in parts:
        if (folder.path / part / "config.json").is_file():
            shard_files(folder.path / part)


def load_part(kind: Any, folder: Path, unread: tuple[str, ...] = (), **settings: Any) -> Any:
    """Loads a model by the `from_pretrained` of its class in diffusers or transformers.

    Args:
        unread: beginnings of names of tensors that may be missing, since nothing reads them.
        settings: further arguments of `from_pretrained`.

    Raises:
        WeightsError: the files are damaged, or their tensors are not those that the config describes.
    """
    files = shard_files(folder)
    with naming_part(folder):
        model, report = kind.from_pretrained(
            folder, use_safetensors=True, variant=variant_of(files), output_loading_info=True, **settings
        )
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(unread))
    if missing:
        raise WeightsError(
            f"{folder} lacks {len(missing)} tensors of the architecture in its config.json, {missing[0]} among them. "
            "Was the download interrupted? Fetch the model again."
        )
    if mismatched := report.get("mismatched_keys"):
        raise WeightsError(
            f"{folder} holds {next(iter(mismatched))} in another shape than its config.json describes. Fetch the model "
            "again."
        )
    return model


@contextmanager
def naming_part(folder: Path) -> Iterator[None]:
    """Turns whatever a library raises while it reads a part of a model into an error that names the part.

    Raises:
        WeightsError: the library could not read the part; says why.
    """
    try:
        yield
    except (PixtuneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise WeightsError(
            f"{folder} cannot be loaded ({type(error).__name__}: {reason}). Was the download interrupted? Fetch the "
            "model again."
        ) from error
