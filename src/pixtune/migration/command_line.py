"""Reads the command that starts a training from a shell script: its variables, its script and its flags.

Nothing is executed, and no variable of this machine's environment is taken: it would put what it holds into a config.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pixtune.errors import MigrationError

MOST_WORDS = 20_000
"""Number of words that no script of a person has."""
MOST_CHARACTERS = 20_000
"""Length of a word, with its variables filled in, that no script has; variables can double one another."""
MOST_QUOTED_LINES = 100
"""Number of lines that one quoted text has at most."""

ABOUT_FILES = (
    "test", "[", "[[", "ls", "cat", "cp", "mv", "rm", "ln", "chmod", "echo", "find", "grep", "sed", "wget",
    "curl", "git", "pytest", "which", "command", "stat", "head", "tail", "touch", "vim", "nano",
)  # fmt: skip
"""Commands that name a script and do not start it."""

_ASSIGNMENT = re.compile(r"^(?:export\s+|set\s+|\$env:|local\s+)?\"?([A-Za-z_]\w*)\s?=\s?(.*)$", re.DOTALL)
_VARIABLE = re.compile(r"\$\{(\w+)(?::?-((?:[^{}]|\$\{\w+\})*))?\}|\$(\w+)|%(\w+)%")
_LAUNCH = re.compile(
    r"(?:^|[\s/\\\"'&|(])[\w.-]*\.py[\"']?\s+(?:[\\^`]\s+)*(?:--?\w|\"?[^\s\"]+\.(?:ya?ml|toml|json)\b)"
)
_WINDOWS = re.compile(r"(?:^|[\s=\"'])[A-Za-z]:\\\w|^\s*(?:@?echo off|REM\b|::)", re.MULTILINE | re.IGNORECASE)
"""Marks of a script of Windows' shells."""
_SCRIPT_IN_VARIABLE = re.compile(r"([A-Za-z_]\w*)\s?=\s?[\"']?[^\n\"']*\.py[\"']?\s*;?\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A call of a Python script."""

    script: str
    """Name of the script's file without its folder."""
    arguments: Mapping[str, Any]
    """Flags by name, without dashes and with underscores: a text, a list of texts, or True where no value follows."""
    launcher: Mapping[str, Any] = field(default_factory=dict)
    """Flags of the launcher before the script, such as mixed_precision of `accelerate launch`."""
    unknown_variables: tuple[str, ...] = ()
    """Variables that the script does not set."""
    file: str = ""
    """First word behind the script, where it is no flag."""


def looks_like_commands(text: str) -> bool:
    """Returns whether a text holds the call of a Python script with flags; a variable may hold the script's path."""
    lines = _without_comments(text)
    if _LAUNCH.search(lines) is not None:
        return True
    scripts = dict.fromkeys(found[1] for found in _SCRIPT_IN_VARIABLE.finditer(lines))
    return any(re.search(rf"[$%]\{{?{name}[}}%]?\"?\s+(?:[\\^`]\s+)*--?\w", lines) for name in scripts)


def find_commands(text: str, name: str) -> tuple[Command, ...]:
    """Finds the calls of Python scripts in a shell script, bash or Windows, with its own variables filled in.

    Raises:
        MigrationError: a quote is not closed, or it is too long.
    """
    variables: dict[str, str] = {}
    commands = []
    of_windows = _WINDOWS.search(text) is not None
    for number, line in _logical_lines(_without_comments(text)):
        line = line.replace("\\", "\\\\") if of_windows else line  # a backslash there is a part of a path
        try:
            words = shlex.split(line, comments=False, posix=True)
        except ValueError as error:
            raise MigrationError(f"{name}:{number}: this command cannot be read: {str(error).lower()}") from error
        if len(words) > MOST_WORDS:
            raise MigrationError(f"{name}:{number}: this command has more than {MOST_WORDS:,} words")
        for part in _parts(words):
            try:
                while part and (found := _assignment(part)):
                    key, value, part = found
                    if re.search(r"\$\(|`", value):  # what a command prints, and none is run
                        variables.pop(key, None)
                    else:
                        variables[key] = _filled(value, variables)[0]
                command = _command(part, variables)
            except ValueError as error:
                raise MigrationError(f"{name}:{number}: this command cannot be read: {error}") from error
            commands += [] if command is None else [command]
    return tuple(commands)


def _parts(words: list[str]) -> list[list[str]]:
    """Divides a line into its commands: `cd here && python train.py`."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", ";", "||", "|", "&"):
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _without_comments(text: str) -> str:
    return "\n".join("" if re.match(r"\s*(#|REM\b|::)", line, re.IGNORECASE) else line for line in text.split("\n"))


def _logical_lines(text: str) -> list[tuple[int, str]]:
    """Joins lines that end with a mark of continuation, of whichever shell."""
    found: list[tuple[int, str]] = []
    waiting, first = "", 0
    for number, line in enumerate(text.split("\n"), 1):
        first = first if waiting else number
        ended = re.sub(r"(\\|\^|`)\s*$", " ", line)
        waiting += ended
        if ended == line and (number - first >= MOST_QUOTED_LINES or _quotes_are_closed(waiting)):
            found.append((first, waiting))
            waiting = ""
        elif ended == line:
            waiting += "\n"
    if waiting:
        found.append((first, waiting))
    return found


def _quotes_are_closed(line: str) -> bool:
    try:
        shlex.split(line)
    except ValueError:
        return False
    return True


def _assignment(words: list[str]) -> tuple[str, str, list[str]] | None:
    """Returns a variable's name and value, and the words behind it, where words begin with an assignment."""
    first, rest = words[0], words[1:]
    if first in ("export", "set", "local") and rest:
        first, rest = rest[0], rest[1:]
    match = _ASSIGNMENT.match(first)
    if match is None or first.startswith("-"):
        return None
    return match[1], match[2].rstrip(";"), rest


def _filled(word: str, variables: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Returns a word with variables filled in, and the names of those that nothing sets, which stay.

    Raises:
        ValueError: it is too long.
    """
    unknown: list[str] = []
    room = MOST_CHARACTERS - len(word)

    def fill(found: re.Match[str]) -> str:
        nonlocal room
        name = found[1] or found[3] or found[4]
        room -= len(variables.get(name, ""))
        if room < 0:
            raise ValueError(f"a word has more than {MOST_CHARACTERS:,} characters with its variables filled in")
        if name in variables:
            return variables[name]
        if found[2] is not None:
            inner, missing = _filled(found[2], variables)
            unknown.extend(missing)
            return inner
        unknown.append(name)
        return found[0]

    filled = _VARIABLE.sub(fill, word)
    unknown += [found[1] or found[3] or found[4] for found in _VARIABLE.finditer(filled)]  # in values of variables
    return filled, tuple(dict.fromkeys(unknown))


def _command(words: list[str], variables: Mapping[str, str]) -> Command | None:
    filled: list[str] = []
    unknown: list[str] = []
    for word in words:
        text, missing = _filled(word, variables)
        filled.append(text)
        unknown += missing
    place = next((at for at, word in enumerate(filled) if word.endswith(".py")), None)
    first = next((word for word in filled[:place] if word not in ("if", "while", "!", "sudo")), "")
    if place is None or first in ABOUT_FILES:
        return None
    script = re.split(r"[/\\]", filled[place])[-1]
    words = filled[place + 1 :]
    file = words[0] if words and not words[0].startswith("-") else ""
    return Command(script, _flags(words), _flags(filled[:place]), tuple(dict.fromkeys(unknown)), file)


def _flags(words: list[str]) -> dict[str, Any]:
    """Returns flags with their values: `--key=value`, `--key value`, `--key a b c`, `--key`."""
    found: dict[str, list[str]] = {}
    key = ""
    for word in words:
        if word in (">", ">>", "2>&1", "2>"):
            break
        if re.match(r"--?[A-Za-z]", word) and not re.match(r"-\d", word):
            name, equals, value = word.lstrip("-").partition("=")
            key = name.replace("-", "_")
            found[key] = [value] if equals else []
        elif key:
            found[key].append(word)
    return {name: True if not values else values[0] if len(values) == 1 else values for name, values in found.items()}
