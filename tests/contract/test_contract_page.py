"""docs/contract.md cannot rot: every row and key stands in it, and what it names exists."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.contract.key_effects import EFFECTS
from tests.runs import ROOT

PAGE = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
CELLS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
NAMED_TESTS = sorted(set(re.findall(r"`((?:[\w/]+/)?test_\w+\.py)(?:::(test_\w+))?`", PAGE)))

ROWS = (
    *(f"C{number}" for number in range(1, 14)), "configs", "configs-keys", "no-training",
    "common-keys", "defaults", "three-state", "disable-quantization", "batch-size", "caption-type", "random-ratio",
    "precompute", "text-encoder", "faults",
    "spark", "80-gb", "24-gb", "less",
    "utils.unified_memory", "utils.cuda_utils", "utils.memory_monitor", "utils.fast_loading", "utils.validate_dataset",
    "text-to-image", "edit", "image_datasets",
    *(f"pattern-{number}" for number in range(1, 6)),
    "documents",
)  # fmt: skip
"""What the user's document asks for, section by section."""


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_has_its_tests() -> None:
    tests_of = {cells[0]: cells[2] for cells in CELLS if len(cells) == 3}
    assert not [row for row in ROWS if "test_" not in tests_of.get(row, "")]


def test_every_key_stands_with_what_it_shows_in() -> None:
    shown = {cells[0].strip("`"): cells[1] for cells in CELLS if cells[0].startswith("`")}
    assert shown == {key: effect.part for key, effect in EFFECTS.items()}


@pytest.mark.parametrize(("file", "name"), NAMED_TESTS)
def test_a_test_that_is_named_exists(file: str, name: str) -> None:
    assert not name or name in functions_of(file)


def test_many_tests_are_named() -> None:
    """The pattern that finds them still does."""
    assert len(NAMED_TESTS) > 80
