"""Which tests execute a line of pixtune, by the maps that `line_map.py` wrote, and in which order they are tried."""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import coverage
from mutations import Mutation

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "pixtune"
JUDGES_NOTHING = ("tests/gpu/", "tests/unit/test_layout.py")
"""Tests that need a GPU, and those that read the code as text."""

FILE_SECONDS = 4.0
"""Seconds that the tests of a file are taken to need where no map knows them."""


@dataclass(frozen=True)
class LineMap:
    """What one run of tests wrote down."""

    folder: Path
    seconds: dict[str, float]
    """Of every test that passed."""
    users: dict[str, set[str]]
    """The tests that use a fixture which several tests share."""

    @staticmethod
    def load(folder: Path) -> LineMap:
        """Reads a map, and puts the files of its processes together where that is not done yet."""
        whole = coverage.CoverageData(str(folder / "lines"))
        for path in folder.glob("lines.*"):
            part = coverage.CoverageData(str(path))
            with contextlib.suppress(coverage.exceptions.DataError):  # its process was killed, or had no room on a disk
                part.read()
                whole.update(part)
            path.unlink()
        whole.write()
        known: dict[str, dict[str, Any]] = {}
        for path in folder.glob("tests-*.json"):
            known |= json.loads(path.read_text())
        users: dict[str, set[str]] = {}
        for test, told in known.items():
            for fixture in told["fixtures"]:
                users.setdefault(fixture, set()).add(test)
        passed = {test: told["seconds"] for test, told in known.items() if told.get("outcome") == "passed"}
        return LineMap(folder, passed, users)

    def tests_at(self, file: str) -> dict[int, set[str]]:
        """Returns the tests that execute each line of a file, by the lines' numbers of today."""
        then = self.folder / "source" / file
        data = self.data.contexts_by_lineno(self.measured.get(file, "")) if then.exists() else {}
        matcher = difflib.SequenceMatcher(None, _rows(then), _rows(SOURCE / file), autojunk=False)
        moved = {a + i + 1: b + i + 1 for a, b, size in matcher.get_matching_blocks() for i in range(size)}
        return {
            moved[line]: {test for context in contexts for test in self.users.get(context, {context})}
            for line, contexts in data.items()
            if line in moved
        }

    @cached_property
    def data(self) -> coverage.CoverageData:
        data = coverage.CoverageData(str(self.folder / "lines"))
        data.read()
        return data

    @cached_property
    def measured(self) -> dict[str, str]:
        """Names of the files as they were measured, by their path below `src/pixtune`."""
        return {path.rpartition("/src/pixtune/")[2]: path for path in self.data.measured_files()}


def _rows(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


class ExecutingTests:
    """The tests of several maps together: of the whole suite, and of tests that were added since."""

    def __init__(self, maps: Iterable[LineMap]) -> None:
        self.maps = [*maps]
        self.seconds = {
            test: seconds
            for lines in self.maps
            for test, seconds in lines.seconds.items()
            if is_there(test) and not test.startswith(JUDGES_NOTHING)
        }
        self.at = cache(self._at)

    def _at(self, file: str) -> dict[int, set[str]]:
        found: dict[int, set[str]] = {}
        for lines in self.maps:
            for line, tests in lines.tests_at(file).items():
                found.setdefault(line, set()).update(tests & self.seconds.keys())
        return found

    def of_lines(self, file: str, lines: Iterable[int]) -> set[str]:
        """Returns the tests that execute one of a file's lines."""
        return set().union(*(self.at(file).get(line, set()) for line in lines))

    def of_name(self, name: str) -> set[str]:
        """Returns the tests that execute a function in which a name stands, and those of files in which it stands."""
        word = re.compile(rf"\b{re.escape(name)}\b")
        files = {str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py") if word.search(p.read_text())}
        found = {test for test in self.seconds if test.partition("::")[0] in files}
        for path in SOURCE.rglob("*.py"):
            if lines := lines_with(name, path):
                found |= self.of_lines(str(path.relative_to(SOURCE)), lines)
        return found

    def of_file(self, file: str) -> list[str]:
        """Returns the test files that speak of a source file, for lines of which no map knows a test."""
        module = re.compile(rf"\bpixtune\.{re.escape(file.removesuffix('.py').replace('/', '.'))}\b")
        files = {str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py") if module.search(_text(p))}
        files = {path for path in files if not path.startswith(JUDGES_NOTHING)}
        self.seconds |= dict.fromkeys(files, FILE_SECONDS)
        return in_turn(files, self.seconds, own_tests(file))

    def of(self, file: str, mutation: Mutation) -> list[str]:
        """Returns the tests that may notice a mutation, those to be tried first at the beginning."""
        if mutation.lines:
            direct = self.of_lines(file, mutation.lines)
        else:
            direct = set().union(*map(self.of_name, built_from(mutation.names))) or self.of_lines(file, self.at(file))
        direct &= self.seconds.keys()
        if not direct:
            return self.of_file(file)
        # What a test file keeps for several tests is executed by the first of them alone, so the others come last.
        homes = {home_of(test) for test in direct} if mutation.lines else set()
        beside = {test for test in self.seconds if home_of(test) in homes} - direct
        return in_turn(direct, self.seconds, own_tests(file)) + in_turn(beside, self.seconds, own_tests(file))


def in_turn(tests: Iterable[str], seconds: dict[str, float], own: str) -> list[str]:
    """Orders tests: those of `own` first, then one of each file before the second of any; the fastest of each first."""
    numbers: Counter[str] = Counter()
    keys: dict[str, tuple[bool, int, float]] = {}
    for test in sorted(tests, key=lambda test: (seconds[test], test)):
        keys[test] = (not test.startswith(own), numbers[home_of(test)], seconds[test])
        numbers[home_of(test)] += 1
    return sorted(keys, key=keys.__getitem__)


def own_tests(file: str) -> str:
    """Returns how the path of a source file's own tests begins: `plan/choice.py` has `tests/unit/plan/test_choice`."""
    room, _, name = file.rpartition("/")
    return "/".join(filter(None, ("tests/unit", room, f"test_{name.removesuffix('.py')}")))


def home_of(test: str) -> str:
    """Returns the file of a test."""
    return test.partition("::")[0]


def is_there(test: str) -> bool:
    """Returns whether the tree still has a test."""
    path, _, name = test.partition("::")
    return f"def {name.partition('[')[0].rpartition('::')[2]}(" in _text(ROOT / path)


@cache
def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@cache
def _uses(path: Path) -> dict[str, set[int]]:
    """Returns the lines of a file's functions at which each name stands."""
    found: dict[str, set[int]] = {}
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef | ast.Lambda):
            for node in ast.walk(function):
                name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
                if name is not None:
                    found.setdefault(name, set()).add(node.lineno)  # type: ignore[attr-defined]
    return found


@cache
def _statements_outside_functions() -> list[tuple[set[str], set[str]]]:
    """Returns of each assignment outside of functions the names that it sets, and those that stand in its value."""
    found = []
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for body in (tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))):
            for node in body:
                if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    set_here = {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
                    found.append((set_here, {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}))
    return found


def built_from(names: Iterable[str]) -> set[str]:
    """Returns names, with those of all constants that are built from them when modules are imported."""
    reached = set(names)
    while more := {name for new, used in _statements_outside_functions() if used & reached for name in new} - reached:
        reached |= more
    return reached


def lines_with(name: str, path: Path) -> set[int]:
    """Returns the lines of a file's functions at which a name stands."""
    return _uses(path).get(name, set())
