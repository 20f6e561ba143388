"""A sample of the hostile files and models of `tests/hostile`: no hang, no traceback, memory bounded, each named."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest

from tests.hostile.case import EITHER, REFUSED, Attack, Case
from tests.hostile.catalogue import SAMPLE
from tests.hostile.running import FINE, NAMED, judge
from tests.runs import python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own bounds and figures are used")


def test_hostile_files_and_models_end_in_words_within_bounds() -> None:
    outcome = python("-m", "tests.hostile", "--sample")
    assert outcome.returncode == 0, outcome.stdout
    counts = re.search(r"^all +(\d+) +(\d+) +(\d+) +0 ", outcome.stdout, re.MULTILINE)
    assert counts is not None and int(counts[1]) == sum(map(len, SAMPLE.values())), outcome.stdout


def nothing(folder: Path, draw: random.Random) -> Attack:
    return ATTACK


ATTACK = Attack(("validate",), ("a.png",))
TRACE = "Traceback (most recent call last):\n  ..."


@pytest.mark.parametrize(
    ("expected", "code", "text", "verdict"),
    [
        (EITHER, 0, "The data set is fine.", FINE),
        (REFUSED, 1, "error: /x/a.png is empty", NAMED),
        (REFUSED, 1, "error: /x/a.p\nng is empty", "refused without naming it"),
        (REFUSED, 0, "The data set is fine.", "taken as fine, and should be refused"),
        (EITHER, 1, TRACE, "traceback"),
        (EITHER, 0, "a.png \x1b[31m", "printed ['\\x1b'] raw"),
        (EITHER, 1, " \n", "refused without a word"),
        (EITHER, -9, "", "killed by signal 9"),
    ],
)
def test_the_judge_sees_what_is_wrong(expected: str, code: int, text: str, verdict: str) -> None:
    assert judge(Case("x", "y", nothing, expected), ATTACK, code, text) == verdict
