"""Names a base model in files that others receive, without a path of the machine that wrote them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PureWindowsPath
from typing import Any

from pixtune.errors import WeightsError
from pixtune.storage.loading.transformer import TransformerTensors, open_transformer
from pixtune.storage.model_folder import ModelFolder
from pixtune.storage.shipped import shipped_names

SAMPLED_PLACES = 4
"""Number of places at which each tensor is read."""
SAMPLED_BYTES = 4096
"""Bytes that are read at each place."""
PATH_ENTRY = re.compile(rb'(?P<key>"\w*(?:path|file|dir)"\s*:\s*)(?P<text>"(?:[^"\\]|\\.)*")')
"""An entry of a JSON file whose key says that its text may be a path: `_name_or_path`, `tokenizer_file`."""


@dataclass(frozen=True)
class BaseReference:
    """The base model that weights were trained on, as exported files state it."""

    name: str
    """Hub name, or the last part of a local folder's path."""
    fingerprint: str | None
    """`sampled_fingerprint` of the base's transformer; None in exports of LoRA files that were written without one."""

    def entries(self, prefix: str = "") -> dict[str, str]:
        """Returns the entries of an exported file's metadata, each key with the prefix."""
        entries = {"base_model": self.name, "base_model_hash": self.fingerprint}
        return {f"{prefix}{key}": value for key, value in entries.items() if value is not None}


def refer_to_base(name_or_path: str, folder: ModelFolder) -> BaseReference:
    """Describes the base model that the config calls `name_or_path` and that was opened as `folder`."""
    is_local = Path(name_or_path).expanduser().exists()  # as `open_model_folder` decides
    name = folder.path.expanduser().absolute().name if is_local else name_or_path
    if folder.file is not None:
        name = folder.file.path.expanduser().absolute().name
    elif "transformer" in folder.parts:
        name = folder.parts["transformer"].expanduser().absolute().name
    return BaseReference(name, sampled_fingerprint(folder))


def without_path(name_or_path: str) -> str:
    r"""Returns the hub name of a published model, and of everything else the last part of its path.

    A name of two parts may be a hub name or a relative folder, and its text does not show which; losing the first part
    of a hub name is the lesser evil. Slashes of either kind separate parts; nothing is left of `.`, `/` and `C:\`.
    """
    return name_or_path if name_or_path in shipped_names() else PureWindowsPath(name_or_path).name


def sampled_fingerprint(folder: ModelFolder) -> str:
    """Returns 16 hex digits that identify a base model's transformer, from a few megabytes of its files.

    They cover its config, and of each tensor its name, format and shape, and its bytes at evenly spaced places (of a
    small tensor all). Models that differ in any layer therefore differ in them, and copies of one model agree wherever
    they lie and however their tensors are divided among files. They are no checksum: a change between the sampled
    places goes unnoticed.
    """
    digest = hashlib.sha256(_without_origin(folder.component_config("transformer")))
    samples: dict[str, bytes] = {}
    try:
        stored = open_transformer(folder)
    except WeightsError:  # runs with random weights need no files
        stored = TransformerTensors(folder.path, ())
    for file, entries in groupby(stored.entries, key=lambda entry: entry.file):
        with file.open("rb") as stream:
            for entry in entries:
                of_tensor = hashlib.sha256(f"{entry.name}\0{entry.dtype}\0{entry.shape}\0".encode())
                last = max(entry.num_bytes - SAMPLED_BYTES, 0)
                for place in sorted({number * last // (SAMPLED_PLACES - 1) for number in range(SAMPLED_PLACES)}):
                    for begin, count in stored.bytes_at(entry, place, min(SAMPLED_BYTES, entry.num_bytes)):
                        stream.seek(begin)
                        of_tensor.update(stream.read(count))
                of_tensor.update(stored.scaling_of(entry.name))
                samples[entry.name] = of_tensor.digest()
    for _, sample in sorted(samples.items()):
        digest.update(sample)
    return digest.hexdigest()[:16]


def steps_fingerprint(folder: ModelFolder) -> str:
    """Returns 16 hex digits that identify what a training step takes from a model folder, encodings aside.

    That is the transformer, the kind of pipeline, and the scheduler's config, which shifts the noise levels.
    """
    digest = hashlib.sha256(f"{sampled_fingerprint(folder)} {folder.pipeline_class}".encode())
    if "scheduler" in folder.components:
        digest.update(_without_origin(folder.component_config("scheduler")))
    return digest.hexdigest()[:16]


def _without_origin(config: Mapping[str, Any]) -> bytes:
    """Writes a component's config without the entries that say where and with which version it was saved."""
    return json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, sort_keys=True).encode()


def copy_without_paths(source: str, target: str) -> None:
    """Copies a file of a model folder; in JSON files, paths of the machine that saved them shrink to their last part.

    diffusers and transformers note in `_name_or_path` and `tokenizer_file` where a part was loaded from, and do not
    read it from there again.
    """
    if Path(source).suffix != ".json":
        shutil.copyfile(source, target)
        return
    Path(target).write_bytes(PATH_ENTRY.sub(_shrink_entry, Path(source).read_bytes()))


def _shrink_entry(match: re.Match[bytes]) -> bytes:
    try:
        return match["key"] + json.dumps(without_path(json.loads(match["text"]))).encode()
    except (ValueError, RecursionError):  # not valid JSON or UTF-8: left as it is, for the file's readers to judge
        return match[0]
