"""Names of others on a terminal: nothing steers it, nothing forges a line, and good letters stay as they are."""

from __future__ import annotations

import pytest

from pixtune.errors import DataError, PlanError, WeightsError
from pixtune.inputs.printing import lines, one_line


@pytest.mark.parametrize(
    "text",
    [
        "plain.png",
        "größe é ß",
        "e\u0301",
        "漢字 かな",
        "فارسی",
        "क्षि",
        "👩\u200d👩\u200d👧 ✈️",
        "non\u00a0breaking",
        "a\u200cb",
    ],
)
def test_letters_of_any_language_stay(text):
    assert one_line(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("a\nThe data set is fine.", r"a\nThe data set is fine."),
        ("a\rb", r"a\rb"),
        ("a\u2028b\u2029c\x85d", r"a\u2028b\u2029c\x85d"),
        ("photo\u202egnp.exe", r"photo\u202egnp.exe"),
        ("\u2066a\u2069", r"\u2066a\u2069"),
        ("\udcff", r"\udcff"),
        ("\x00\x08\x7f", r"\x00\x08\x7f"),
    ],
)
def test_what_steers_a_terminal_is_shown_by_its_escape(text, shown):
    assert one_line(text) == shown
    shown.encode("ascii")


def test_every_character_that_python_calls_a_control_is_escaped():
    for number in (*range(32), *range(127, 160)):
        assert one_line(chr(number)).isascii() and one_line(chr(number)).isprintable()


def test_own_line_ends_stay_and_those_of_a_name_do_not():
    assert lines("first\n  - \x1b[2Jsecond") == "first\n  - \\x1b[2Jsecond"
    error = DataError("x\n\x1b[1m", ["a\nb\x1b[0m", "c"])
    assert str(error) == "x\\n\\x1b[1m:\n  - a\\nb\\x1b[0m\n  - c"
    assert str(WeightsError("no tensor a\nerror: \x1b[2J")) == "no tensor a\\nerror: \\x1b[2J"
    assert str(PlanError("one\ntwo")) == "one\ntwo"
