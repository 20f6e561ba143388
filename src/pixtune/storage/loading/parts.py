"""Loads parts of a model by their libraries, from files that were checked before, and names the part in every error.

The libraries' errors for a damaged file name neither the file nor what to do, and tensors that a file lacks they fill
with random numbers, after a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pixtune.errors import PixtuneError, WeightsError
from pixtune.inputs.reading import MEBIBYTE, check_regular, check_size
from pixtune.storage.loading.entries import read_entries
from pixtune.storage.loading.shards import shard_files
from pixtune.storage.model_folder import READ_SUFFIXES, ModelFolder, variant_of

LARGEST_TEXT_BYTES = 64 * MEBIBYTE
"""Size that no tokenizer reaches: one of 150,000 words has 11 MiB."""
WORDS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "vocab.txt")
"""Files of which a tokenizer has at least one."""


def check_parts(folder: ModelFolder, parts: Sequence[str]) -> None:
    """Checks the weight files of a model's parts by their headers, so that damage shows before anything is loaded.

    Args:
        parts: names of components; those without weights, such as tokenizers, are skipped.

    Raises:
        WeightsError: files are missing, cut off or of another format, or a config describes none; names one.
    """
    for part in parts:
        if part == "transformer" and folder.file is not None:
            if not folder.file.is_gguf:  # whose header is checked where it is read
                read_entries([folder.file.path])
            continue
        place = folder.part(part)
        check_files(place)
        if (place / "config.json").exists():
            folder.component_config(part)
            shard_files(place)


def check_files(folder: Path) -> None:
    """Checks the kind and size of every file in a model's part that a library, or a fingerprint, may read.

    Raises:
        WeightsError: one is a pipe, a device or the like, or larger than such a file can be; names it.
    """
    if not folder.is_dir():
        return  # whoever needs it reports that
    try:
        for file in sorted(folder.iterdir()):
            if file.suffix == ".safetensors":
                check_regular(file)
            elif file.suffix in READ_SUFFIXES:
                check_size(file, LARGEST_TEXT_BYTES)
    except OSError as error:
        place = error.filename or folder
        raise WeightsError(f"{place} cannot be read: {error.strerror or error}. Fetch the model again.") from error


def load_tokenizer(kind: Any, folder: Path) -> Any:
    """Loads a tokenizer by the `from_pretrained` of its class in transformers, which runs no code of the folder.

    Raises:
        WeightsError: its files are damaged, or none of them has its words.
    """
    with naming_part(folder):
        if not any((folder / name).is_file() for name in WORDS):
            raise WeightsError(f"{folder} has no words: one of {', '.join(WORDS)} is needed. Fetch the model again.")
        return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def check_words(tokenizer: Any, encoder: Any, folder: Path) -> None:
    """Checks that a text encoder has features of all words of its tokenizer.

    Raises:
        WeightsError: there are words beyond them.
    """
    numbers, num_words = tokenizer.get_vocab().values(), encoder.get_input_embeddings().weight.shape[0]
    if min(numbers, default=0) < 0 or max(numbers, default=0) >= num_words:
        raise WeightsError(
            f"{folder} has words of numbers from {min(numbers)} to {max(numbers)}, and its text encoder knows "
            f"{num_words:,}. Are they of different models? Fetch the model again."
        )


def load_part(kind: Any, folder: Path, unread: tuple[str, ...] = (), **settings: Any) -> Any:
    """Loads a model by the `from_pretrained` of its class in diffusers or transformers.

    Args:
        unread: beginnings of names of tensors that may be missing, since nothing reads them.
        settings: further arguments of `from_pretrained`.

    Raises:
        WeightsError: the files are damaged, or their tensors are not those that the config describes.
    """
    files = shard_files(folder)
    with naming_part(folder), _without_report():
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
def _without_report() -> Iterator[None]:
    """Keeps back the table that transformers logs of a damaged part: `load_part` reports one tensor of it."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def naming_part(folder: Path) -> Iterator[None]:
    """Turns whatever a library raises while it reads a part of a model into an error that names the part.

    Raises:
        WeightsError: the library could not read the part; says why.
    """
    check_files(folder)
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
