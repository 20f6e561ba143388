"""Applies a trainer's table to one part of a config: from its keys to our lines, and what is left over."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from pixtune.inputs.printing import one_line
from pixtune.migration.peer import Part, Peer
from pixtune.migration.rules import ABSENT, Look, Lost, Outcome, Rule, WrongValue

Kind = Literal["to fill in", "changes the result", "not known", "no effect"]
KINDS: tuple[Kind, ...] = ("to fill in", "changes the result", "not known", "no effect")
SECRET = re.compile(r"(token|api_?key|password|secret|access_?key(_id)?|credentials?)$|(^|\.)secrets\.", re.IGNORECASE)
"""Ends of the names of keys whose values nobody wants in a file that is passed on."""


ELSEWHERE = "it is in what other lines say"
"""Text on a key that no line comes from and that is not lost."""


@dataclass(frozen=True)
class Line:
    """A line of our config."""

    key: str
    """Ours, dotted."""
    value: Any
    origin: str
    """Key and value there that it comes from."""
    by_default: bool = False
    """Whether nobody wrote it, and it is what the trainer there takes where its key is left out."""


@dataclass(frozen=True)
class Leftover:
    """Something that a config says and ours does not."""

    kind: Kind
    origin: str
    """Key and value there."""
    why: str
    key: str = ""
    """Key there alone."""
    beside_line: bool = False
    """Whether a line of ours comes from it too, and this is what that line does not have."""


def apply(
    peer: Peer, part: Part, rules: Sequence[Rule], look: Look, faults: list[str]
) -> tuple[dict[str, Line], list[Leftover]]:
    """Applies a table to one part of a config."""
    lines: dict[str, Line] = {}
    leftovers: list[Leftover] = []
    known: set[str] = set()
    taken: set[str] = set()
    for rule in rules:
        keys = _matching(rule.theirs, part.written, known)
        known |= set(keys)
        for key in keys or ([rule.theirs] if rule.default is not ABSENT else []):
            value = part.written.get(key)
            value = rule.null if value is None else value
            by_default = value is None
            if by_default and rule.default is ABSENT:
                continue
            value = rule.default if by_default else value
            origin = _origin(peer, part, key, value, by_default)
            look.taken.clear()
            try:
                result = rule.convert(value, look)
            except WrongValue as wrong:
                faults.append(f"{part.label}{key} is {shown(key, value)}: {wrong}")
                continue
            if not isinstance(result, Outcome):
                result = (
                    Outcome(lost=(result,))
                    if isinstance(result, Lost)
                    else Outcome({rule.ours.partition(" ")[0]: result})
                )
            others = sorted(look.taken - {key}) if result.values else []
            taken |= set(others)
            origin = ", ".join([origin, *(f"{each} = {shown(each, part.written[each])}" for each in others)])
            for ours, ours_value in result.values.items():
                _add(lines, Line(ours, ours_value, origin, by_default and not others))
            problems = result.lost if result.values or result.lost else (Lost(rule.remark or ELSEWHERE, False),)
            leftovers += [
                Leftover(kind_of(what), origin, what.why, key, bool(result.values))
                for what in problems
                if what.changes_result or what.to_fill_in or not by_default
            ]
    for key, value in part.written.items():
        if key not in known and value is not None:
            why = f"this import does not know the key: look up in {peer.name} what it does"
            leftovers.append(Leftover("not known", f"{part.label}{key} = {shown(key, value)}", why, key))
    return lines, [each for each in leftovers if each.kind != "no effect" or each.beside_line or each.key not in taken]


def _origin(peer: Peer, part: Part, key: str, value: Any, by_default: bool) -> str:
    """Returns where a value comes from. What a trainer does always has a text in brackets for a key."""
    if key.startswith("("):
        return f"{peer.name}: {key.strip('()')}"
    said = f"{key} = {shown(key, value)}"
    return f"default of {peer.name}: {said}" if by_default else f"{part.label}{said}"


def _matching(pattern: str, written: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Returns the keys that a rule is for: its own, or those of a section that no rule before it has."""
    if "*" not in pattern:
        return [pattern] if pattern in written else []
    return [key for key in written if key not in known and fnmatchcase(key, pattern)]


def _add(lines: dict[str, Line], line: Line) -> None:
    """Adds a line. A later rule wins, and the comment names both; a default never wins over what is written."""
    earlier = lines.get(line.key)
    if earlier is None:
        lines[line.key] = line
    elif earlier.by_default or line.by_default:
        lines[line.key] = earlier if line.by_default and not earlier.by_default else line
    elif earlier.value == line.value:
        lines[line.key] = replace(earlier, origin=f"{earlier.origin}, {line.origin}")
    else:
        lines[line.key] = replace(line, origin=f"{line.origin}, in place of {earlier.origin}")


def kind_of(what: Lost) -> Kind:
    return "to fill in" if what.to_fill_in else "changes the result" if what.changes_result else "no effect"


def shown(key: str, value: Any) -> str:
    """Returns a value as a comment shows it: on one line, shortened, and without secrets."""
    if SECRET.search(key) and value not in (None, "", False):
        return "(not shown)"
    if isinstance(value, str):
        text = value
    else:
        try:
            text = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError):
            text = str(value)
    text = one_line(text)
    return text if len(text) <= 60 else f"{text[:56]} ..."
