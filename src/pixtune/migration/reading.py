"""Reads a config of another trainer as plain values: YAML, TOML, JSON, or the command that starts it.

What a file is, its content decides: people rename files. All of it is read within bounds, and nothing is executed.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pixtune.config.yaml_tree import ABOUT_BACKSLASHES, BoundsError, ConfigLoader, compose
from pixtune.errors import MigrationError
from pixtune.inputs.printing import one_line
from pixtune.inputs.reading import MEBIBYTE, each_once, read_bounded
from pixtune.migration.command_line import Command, find_commands, looks_like_commands

LARGEST_FILE_BYTES = MEBIBYTE
"""Size that no config reaches; OneTrainer's, which hold every key, have a tenth of it."""
MOST_LEVELS = 40
"""Number of levels that values may be nested in; OneTrainer's have five."""

MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG", "a PNG picture; a ComfyUI workflow inside it draws pictures and trains nothing"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"RIFF", "a WebP picture, or a sound"),
    (b"GGUF", "a GGUF file of weights"),
    (b"PK\x03\x04", "a ZIP archive, or weights that PyTorch saved"),
    (b"\x1f\x8b", "a compressed file"),
    (b"%PDF", "a PDF"),
    (b"\x7fELF", "a program"),
    (b"SQLite format", "a database"),
)
EXPECTED = (
    "A config of ai-toolkit, musubi-tuner, diffusion-pipe, sd-scripts, SimpleTuner, OneTrainer or the command of \
one of diffusers' scripts is expected"
)


@dataclass(frozen=True)
class Source:
    """A config as its file has it."""

    name: str
    """Name of the file, as a message gives it."""
    folder: Path
    """Folder that the file is in, where others that it names are looked for."""
    tree: Any
    """Plain values: mappings, lists, texts, numbers, truths."""
    commands: tuple[Command, ...] = ()
    """Commands, where it is a script."""
    form: str = "YAML"
    arguments: Mapping[str, Any] = field(default_factory=dict)


def read_source(path: Path) -> Source:
    """Reads a file.

    Raises:
        MigrationError: it cannot be read, or is neither YAML, TOML, JSON nor a command.
    """
    try:
        data = read_bounded(path, LARGEST_FILE_BYTES)
    except FileNotFoundError:
        raise MigrationError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        if os.path.isfile(path) and (kind := _kind_of(_beginning(path))) is not None:
            raise MigrationError(f"{path} is {kind}. {EXPECTED}") from error
        hint = ". Give the config file in it" if os.path.isdir(path) else ""
        shown = one_line(str(path))[:200]
        raise MigrationError(f"{shown} cannot be read: {_said(error)}{hint}. {EXPECTED}") from error
    return parse_source(_decode(data, str(path)), str(path), path.parent)


def _said(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def parse_source(text: str, name: str, folder: Path) -> Source:
    """Parses the text of a config.

    Raises:
        MigrationError: it is neither YAML, TOML, JSON nor a command.
    """
    if not text.strip():
        raise MigrationError(f"{name} is empty. {EXPECTED}")
    begins = text.lstrip()[0]
    problems: dict[str, str] = {}
    if begins in "{[":
        try:
            return Source(name, folder, _bounded(_parse_json(text), name), form="JSON")
        except (ValueError, RecursionError) as error:
            problems["JSON"] = _json_problem(error, text)
    if looks_like_commands(text):
        return Source(name, folder, None, find_commands(text, name), form="command")
    if begins != "{":
        try:
            return Source(name, folder, _bounded(tomllib.loads(text), name), form="TOML")
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            problems["TOML"] = _toml_problem(error, text)
        try:
            root = compose(text)
            if root is not None:
                _check_keys(root, set())
            tree = None if root is None else ConfigLoader("").construct_document(root)
            if isinstance(tree, dict | list):
                return Source(name, folder, _bounded(tree, name), form="YAML")
            problems["YAML"] = "it holds no keys"
        except BoundsError as error:
            raise MigrationError(f"{name}:{error.line}: this YAML {error.sentence}") from error
        except (yaml.YAMLError, ValueError, KeyError, RecursionError) as error:
            problems["YAML"] = _yaml_problem(error)
    raise MigrationError(f"{name} cannot be read: {_worst(problems, text, name)}. {EXPECTED}")


def read_second(path: Path, main: str) -> Any:
    """Reads the values of a file that a config names.

    Raises:
        MigrationError: it cannot be used; `main` is the config that names it.
    """
    try:
        return read_source(path).tree
    except MigrationError as error:
        raise MigrationError(f"{main} names a file that cannot be used: {str(error).rstrip('.')}") from error


def find_second(named: str, folder: Path) -> Path | None:
    """Finds a file that a config names: as it is written, from the config's folder, or under its name beside it."""
    last = re.split(r"[/\\]", named)[-1]
    for place in (Path(named).expanduser(), folder / named, folder / last):
        try:
            if place.is_file():
                return place
        except (OSError, ValueError):
            continue
    return None


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError:
        return b""


def _kind_of(data: bytes) -> str | None:
    """Returns what a file that is no text is, by its first bytes."""
    for magic, kind in MAGIC:
        if data.startswith(magic):
            return kind
    if data[8:9] == b"{" and 0 < int.from_bytes(data[:8], "little") < 100 * MEBIBYTE:
        return "a safetensors file of weights"
    return None


def _decode(data: bytes, name: str) -> str:
    if (kind := _kind_of(data)) is not None:
        raise MigrationError(f"{name} is {kind}. {EXPECTED}")
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # PowerShell writes it
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise MigrationError(f"{name} is not UTF-8 text (byte {error.start}): save it as UTF-8. {EXPECTED}") from error
    if "\0" in text:
        raise MigrationError(f"{name} is no text: it holds a zero byte. {EXPECTED}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


_JSON_TEXT_OR_COMMENT = re.compile(r'("(?:\\.|[^"\\\n])*"?)|//[^\n]*|,(?=\s*[}\]])')
"""Texts, comments, and commas too many. A text need not end, so that none is looked through twice."""


def _parse_json(text: str) -> Any:
    """Parses JSON; comments and commas before a closing bracket are passed over: SimpleTuner's examples have them."""
    return json.loads(_JSON_TEXT_OR_COMMENT.sub(lambda found: found[1] or "", text), object_pairs_hook=each_once)


def _check_keys(node: yaml.Node, seen: set[int]) -> None:
    """Checks that no mapping has a key twice.

    Raises:
        ValueError: one has.
    """
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    for child in node.value:
        if isinstance(child, tuple):
            key, line = str(child[0].value), child[0].start_mark.line + 1
            if isinstance(child[0], yaml.ScalarNode) and key in lines and key != "<<":
                raise ValueError(f"{key} is given twice, in lines {lines[key]} and {line}: keep one")
            lines[key] = line
        _check_keys(child[1] if isinstance(child, tuple) else child, seen)


def _bounded(tree: Any, name: str) -> Any:
    """Returns a tree of plain values that is not nested too deeply."""
    waiting = [(tree, 0)]
    while waiting:
        value, level = waiting.pop()
        if level > MOST_LEVELS:
            raise MigrationError(f"{name} is nested more than {MOST_LEVELS} levels deep, which no config is")
        if isinstance(value, dict):
            waiting += [(inner, level + 1) for inner in value.values()]
        elif isinstance(value, list):
            waiting += [(inner, level + 1) for inner in value]
    return tree


def _json_problem(error: Exception, text: str) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}: {error.msg}{_backslash(error.lineno, text)}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


def _toml_problem(error: Exception, text: str) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    line = re.search(r"at line (\d+)", str(error))
    return f"{str(error)[:200]}{_backslash(int(line[1]), text) if line else ''}"


def _backslash(line: int, text: str) -> str:
    lines = text.split("\n")
    return f". {ABOUT_BACKSLASHES}" if line <= len(lines) and "\\" in lines[line - 1] else ""


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        return f"line {mark.line + 1 if mark else '?'}: {error.problem or error.context}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]


def _worst(problems: dict[str, str], text: str, name: str) -> str:
    """Returns what is wrong with a file in the language that it is most likely written in."""
    by_name = {".json": "JSON", ".toml": "TOML", ".yaml": "YAML", ".yml": "YAML"}.get(Path(name).suffix.casefold())
    if by_name in problems:
        return f"as {by_name}: {problems[by_name]}"
    if re.search(r"^\s*[\w\"'.-]+\s*=\s*\S", text, re.MULTILINE) and "TOML" in problems:
        return f"as TOML: {problems['TOML']}"
    return "; ".join(f"as {language}: {problem}" for language, problem in problems.items())
