"""Applies a trainer's tables to one of its configs.

Everything that the config says becomes a line of ours, with where it came from, or stands in the list of what has no
counterpart: no key is dropped without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pixtune.config.load import load_config
from pixtune.config.schema import TrainConfig, leaf_keys, sections
from pixtune.errors import ConfigError, MigrationError
from pixtune.migration.agreement import agree
from pixtune.migration.folders import (
    also_held_out,
    from_folders,
    merged,
    place,
    take_regularization,
    translate,
    turns_of,
    without_top,
)
from pixtune.migration.models import Model, find_model
from pixtune.migration.peer import Options, Parts, Peer
from pixtune.migration.reading import Source
from pixtune.migration.rules import ABSENT, Look, WrongValue, defaults_of
from pixtune.migration.tables import KINDS, Leftover, Line, apply, kind_of


@dataclass(frozen=True)
class Imported:
    """A config in our terms."""

    peer: str
    source: str
    lines: tuple[Line, ...]
    folders: tuple[tuple[Line, ...], ...]
    """Lines of each item of `data_config.folders`; empty where `data_config.img_dir` is the one folder."""
    leftovers: tuple[Leftover, ...]
    prompts: tuple[Mapping[str, Any], ...] = ()
    """Rows of the file that `samples.prompts_file` names, where prompts have settings of their own."""

    def value_of(self, key: str) -> Any:
        """Returns the value of one of our keys; None: it has no line."""
        return next((line.value for line in self.lines if line.key == key), None)


def migrate(
    source: Source, peer: Peer, options: Options, model_name: str | None = None, prompts_file: str = ""
) -> Imported:
    """Translates a config.

    Args:
        model_name: model in place of the one that it names.
        prompts_file: file that may be written for prompts with settings of their own; empty: none may.

    Raises:
        MigrationError: it trains another model, or a value is wrong; reports all that are.
    """
    parts = peer.take_apart(source, options)
    model, name, named_by = peer.model(parts) if model_name is None else _given_model(peer, parts, model_name)
    faults: list[str] = []
    translated = [translate(peer, part, peer.folders, model, faults) for part in parts.folders]
    reserved = [translate(peer, part, peer.folders, model, faults) for part in parts.regularization]
    settings = {**defaults_of(peer.settings), **_given(parts.settings.written)}
    at_once, length, worries = _sizes(peer, settings, from_folders(translated))
    turns = turns_of([lines for lines, _ in translated])
    defaults = defaults_of(peer.settings)
    look = Look(parts.settings.written, defaults, model, turns, at_once, length, source.folder, prompts_file)
    lines, leftovers = apply(peer, parts.settings, peer.settings, look, faults)
    faults = faults or worries
    if faults:
        raise MigrationError(f"{source.name} has values that cannot be used: " + "; ".join(faults))
    lines = {
        "pretrained_model_name_or_path": Line("pretrained_model_name_or_path", name, named_by),
        **{key: Line(key, value, origin) for key, (value, origin) in parts.extra.items()},
        **lines,
    }
    leftovers += [Leftover(kind_of(what), key, what.why, key) for key, what in parts.lost]
    folders = merged(without_top(lines, found, left) for found, left in translated)
    leftovers += [each for _, left in translated for each in left]
    leftovers += take_regularization(lines, reserved)
    if parts.held_out and "validation.held_out_dir" not in lines:
        lines["validation.held_out_dir"] = Line(
            "validation.held_out_dir", parts.held_out[0], "its folder of held-out pictures"
        )
        leftovers += [also_held_out(folder) for folder in parts.held_out[1:]]
    elif "validation.held_out" not in lines:
        why = f"{peer.name} trains on all pictures; without this line a few measure how it goes"
        lines["validation.held_out"] = Line("validation.held_out", 0, why)
    leftovers += agree(lines)
    listed = place(lines, folders, leftovers)
    ordered = tuple(_in_order(lines))
    origins = [line.origin for each in (ordered, *listed) for line in each]
    prompts = tuple(look.prompts)
    imported = Imported(peer.name, source.name, ordered, listed, tuple(_once(leftovers, origins)), prompts)
    _check(imported)
    return imported


def _sizes(
    peer: Peer, settings: Mapping[str, Any], of_folders: Mapping[str, Any]
) -> tuple[int, tuple[int | None, float | None], list[str]]:
    """Returns the examples of a step, the run's length, and what is wrong with the values that say so."""
    at_once: int = 1
    length: tuple[int | None, float | None] = (None, None)
    worries = []
    try:
        at_once = max(1, peer.examples_per_step({**settings, **of_folders}))
    except WrongValue as wrong:
        worries.append(f"its batch size or accumulation: {wrong}")
    try:
        length = peer.length(settings)
    except WrongValue as wrong:
        worries.append(f"its number of steps or epochs: {wrong}")
    return at_once, length, worries


def _given(written: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in written.items() if value is not None}


def _given_model(peer: Peer, parts: Parts, name: str) -> tuple[Model, str, str]:
    found = find_model(name)
    if isinstance(found, str):
        raise MigrationError(f"--model is {name!r}, which is {found}: pixtune does not train it")
    if found is None:
        found = peer.model(parts)[0]
    return found, name, f"--model {name}"


def _in_order(lines: Mapping[str, Line]) -> list[Line]:
    """Returns lines in the schema's order, those of the top level first, without what is ours by default."""
    order = [*leaf_keys()]
    top = [key for key in order if "." not in key]
    order = [*top, *(key for key in order if "." in key)]
    kept = [line for line in lines.values() if not line.by_default or _default_of(line.key) != line.value]
    return sorted(kept, key=lambda line: order.index(line.key))


def _default_of(key: str) -> Any:
    section, _, name = key.rpartition(".")
    field = (sections()[section] if section else TrainConfig).model_fields[name]
    return ABSENT if field.is_required() else field.default


def _once(leftovers: Iterable[Leftover], origins: Iterable[str]) -> list[Leftover]:
    """Returns leftovers by kind, each once, without those of no effect that only name what lines come from."""
    said = set(", ".join(origins).split(", "))
    found = [
        each
        for each in dict.fromkeys(leftovers)
        if each.kind != "no effect" or each.beside_line or each.origin not in said
    ]
    return sorted(found, key=lambda each: KINDS.index(each.kind))


def _check(imported: Imported) -> None:
    """Checks the result as `pixtune plan` would; names what it came from where a value is out of bounds.

    Raises:
        MigrationError: a value is not possible here.
    """
    words = [f"{line.key}={json.dumps(line.value)}" for line in imported.lines]
    if imported.folders:
        items = [{line.key: line.value for line in lines} for lines in imported.folders]
        words.append(f"data_config.folders={json.dumps(items)}")
    try:
        load_config(None, words, folders_must_exist=False)
    except ConfigError as error:
        origins = {line.key: line.origin for line in imported.lines}
        origins |= {
            f"data_config.folders[{number}].{line.key}": line.origin
            for number, lines in enumerate(imported.folders)
            for line in lines
        }
        faults = []
        for fault in error.faults:
            sentence = fault.removeprefix("command line: ")
            origin = origins.get(sentence.partition(" ")[0])
            faults.append(f"{sentence} (from {origin})" if origin else sentence)
        raise MigrationError(
            f"{imported.source} cannot be imported as it is: " + "; ".join(fault.rstrip(".") for fault in faults)
        ) from error
