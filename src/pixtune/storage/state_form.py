"""The form of a checkpoint's `state.json`, which anybody may have written: its own checksum keeps out damage alone."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LARGEST_STATE_BYTES = 16 * 2**20
"""Size that no state reaches: one of all weights of Qwen-Image, with a counter for each, has a third of a megabyte."""
MOST_LEVELS = 20
"""Levels of values within values that a record may have; one that pixtune writes has six."""
MOST_STEPS = 10**12
SHA_256 = re.compile(r"[0-9a-f]{64}")
FILE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors", re.ASCII)
Kinds = type | types.UnionType

RECORD: Mapping[str, Kinds] = {
    "config": dict,
    "data": str,
    "base": str | None,
    "adapter": str | None,
    "init_lora": str | None,
    "num_processes": int | None,
    "num_steps": int | None,
    "plan": dict,
    "encoders": dict,
    "versions": dict,
    "optimizer_plain": dict,
    "examples": dict | None,
    "doubtful": list,
    "guard": dict,
    "log": dict | None,
    "launch": str | None,
}
"""Kinds of a record's values, where they are there."""
NEEDED = ("config", "data", "plan", "optimizer_plain")
"""Values that a run cannot resume without."""
CONFIG: Mapping[str, Kinds] = {
    "pretrained_model_name_or_path": str,
    "train_batch_size": int | None,
    "data_config": dict,
    "data_config.train_batch_size": int | None,
    "data_config.folders": list,
    "trigger_words": list,
}
"""Kinds of those values of a record's config that are computed with, and not only compared."""


def fault_of_state(state: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the form of a state apart from its record, as the end of a sentence; None: nothing."""
    step, files = state.get("step"), state.get("files")
    if type(step) is not int or not 0 <= step < MOST_STEPS:
        return f"its step is {step!r:.60}"
    if not isinstance(files, dict):
        return f"its files are a {type(files).__name__}"
    for name, written in files.items():
        if not FILE_NAME.fullmatch(name) or PureWindowsPath(name).name != name:
            return f"it names the file {name[:60]!r}, and only .safetensors files beside it are read"
        if not _is_seal(written):
            return f"it has no size and SHA-256 of {name}"
    if not isinstance(state.get("record"), dict):
        return "it has no record"
    return None


def fault_of_record(record: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the record of a run that is to be resumed, as the end of a sentence; None: nothing."""
    missing = [key for key in NEEDED if key not in record]
    if missing:
        return f"its record has no {missing[0]}"
    if _is_deeper(record, MOST_LEVELS):
        return f"its record is nested more than {MOST_LEVELS} levels deep"
    config = record["config"] if isinstance(record["config"], dict) else {}
    section = config.get("data_config")
    inner = section if isinstance(section, dict) else {}
    values = {**config, **{f"data_config.{key}": value for key, value in inner.items()}}
    for kinds, found, where in ((RECORD, record, "record"), (CONFIG, values, "config")):
        for key, kind in kinds.items():
            if key in found and not _is_of(found[key], kind):
                return f"{key} of its {where} is {found[key]!r:.60}"
    if not all(isinstance(folder, dict) for folder in values.get("data_config.folders", ())):
        return "data_config.folders of its config are no sections"
    if not all(isinstance(version, str) for version in record.get("versions", {}).values()):
        return "versions of its record are no texts"
    states = record["optimizer_plain"].values()
    if not all(
        isinstance(each, dict) and not any(isinstance(v, dict | list) for v in each.values()) for each in states
    ):
        return "optimizer_plain of its record is of another form"
    if not all(isinstance(name, str) for name in record.get("doubtful", ())):
        return "doubtful of its record are no names"
    if not all(isinstance(each, str) and each.count("-") == 1 for each in (record.get("examples") or {}).values()):
        return "examples of its record are no pairs of digests"
    if record.get("log") is not None and not _is_seal(record["log"]):
        return "log of its record has no size and SHA-256"
    return None


def _is_seal(value: object) -> bool:
    """Returns whether a value is the size and SHA-256 of a file."""
    if not isinstance(value, dict):
        return False
    size = value.get("bytes")
    return type(size) is int and size >= 0 and SHA_256.fullmatch(str(value.get("sha256"))) is not None


def fault_of_decision(kind: type[DataclassInstance], values: Mapping[str, Any]) -> str | None:
    """Returns which field of a stored decision has a value that it cannot have; None: none has.

    A field of a fixed choice names it in its metadata, as `choices`.
    """
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name not in values:
            continue
        value, hint = values[field.name], hints[field.name]
        if typing.get_origin(hint) is tuple:
            fits = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
        else:
            fits = _is_of(value, hint) and (type(value) is not int or value >= 0)
        choices = field.metadata.get("choices")
        if not fits or (choices is not None and value is not None and value not in choices):
            return f"{field.name} is {value!r:.60}"
    return None


def _is_of(value: object, kind: Kinds) -> bool:
    """Returns whether a value is of a kind; a truth value is no number."""
    kinds = typing.get_args(kind) or (kind,)
    return any(type(value) is bool if each is bool else type(value) is each for each in kinds)


def _is_deeper(value: object, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (levels == 0 or any(_is_deeper(each, levels - 1) for each in inner))
