"""Writes an imported config: YAML, each line with where it came from, and at its foot what is left over."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from pixtune.config.yaml_tree import ConfigDumper
from pixtune.inputs.printing import one_line
from pixtune.migration.engine import Imported
from pixtune.migration.tables import KINDS, Kind, Leftover, Line

HEADINGS: dict[Kind, str] = {
    "to fill in": "To fill in before the first run",
    "changes the result": "Has no counterpart here, and changes the result",
    "not known": "Not known to this import: look up whether it changes the result",
    "no effect": "Left out without effect on the result",
}
WIDEST = 116
COMMENT_COLUMN = 44


def config_text(imported: Imported) -> str:
    """Returns the text of the config file."""
    name = one_line(PurePath(imported.source).name)
    parts = [
        f"# Made by pixtune import from {name} ({imported.peer}).",
        "# The end of a line says where it came from, and what has no counterpart stands at the foot.",
        "",
        *_body(imported),
        "",
        *_foot(imported.leftovers),
    ]
    return "\n".join(parts).rstrip() + "\n"


def summary(imported: Imported) -> list[str]:
    """Returns what is left over, as lines for a terminal."""
    found = []
    for kind in KINDS:
        of_kind = [each for each in imported.leftovers if each.kind == kind]
        if of_kind:
            found.append(f"{HEADINGS[kind]}:")
            found += [f"  {text}" for text in _grouped(of_kind)]
    return found


def _body(imported: Imported) -> Iterator[str]:
    section = ""
    for line in imported.lines:
        of, _, name = line.key.rpartition(".")
        if of != section:
            yield from ["", f"{of}:"] if of else []
            section = of
            yield from _folders(imported.folders) if of == "data_config" else ()
        yield from _entry(name, line, 2 if of else 0)
    if imported.folders and not any(line.key.startswith("data_config.") for line in imported.lines):
        yield from ["", "data_config:"]
        yield from _folders(imported.folders)


def _folders(folders: Sequence[Sequence[Line]]) -> Iterator[str]:
    if folders:
        yield "  folders:"
    for lines in folders:
        for number, line in enumerate(lines):
            first, *rest = _entry(line.key, line, 6)
            yield first if number else f"    - {first.lstrip()}"
            yield from rest


def _entry(name: str, line: Line, indent: int) -> Iterator[str]:
    """Yields a key with its value, on one line, or one item of a long list a line."""
    space = " " * indent
    written = f"{space}{name}: {_scalar(line.value)}"
    if not isinstance(line.value, list) or len(written) <= 80:
        yield _commented(written, line.origin)
        return
    yield _commented(f"{space}{name}:", line.origin)
    yield from (f"{space}  - {_scalar(item)}" for item in line.value)


def _scalar(value: Any) -> str:
    text: str = yaml.dump(value, Dumper=ConfigDumper, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _commented(written: str, origin: str) -> str:
    return f"{written:<{COMMENT_COLUMN}}  # {one_line(origin)}"


def _foot(leftovers: Sequence[Leftover]) -> Iterator[str]:
    if not leftovers:
        yield "# Nothing is left over: everything in that config has its line above."
    wrap = textwrap.TextWrapper(
        WIDEST, initial_indent="# ", subsequent_indent="#     ", break_on_hyphens=False, break_long_words=False
    )
    for kind in KINDS:
        of_kind = [each for each in leftovers if each.kind == kind]
        if not of_kind:
            continue
        yield f"# ---- {HEADINGS[kind]}"
        for text in _grouped(of_kind):
            yield from wrap.wrap(one_line(text))
        yield ""


def _grouped(leftovers: Sequence[Leftover]) -> list[str]:
    """Returns what is left over as texts, of which each names all that have one reason."""
    by_why: dict[str, list[str]] = {}
    for each in leftovers:
        by_why.setdefault(each.why, []).append(each.origin)
    return [f"{', '.join(dict.fromkeys(origins))}: {why}" for why, origins in by_why.items()]
