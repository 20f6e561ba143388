"""Which captions are suspicious, by hand-made gains."""

from __future__ import annotations

import math

import pytest

from pixtune.judging.captions import MOST_NAMED, gain_of, rank, suspects, understands

CLEAR = {f"right {number}": 0.5 + 0.01 * number for number in range(20)}


def test_a_gain_is_by_how_much_others_are_worse_on_average() -> None:
    assert gain_of([math.log(0.1), math.log(0.2), math.log(0.4)]) == pytest.approx(math.log(8) / 2)


def test_captions_that_fit_no_better_than_others_are_named_the_worst_first() -> None:
    assert suspects(CLEAR) == []
    assert suspects({**CLEAR, "swapped": 0.02, "misleading": -0.3, "weak": 0.3}) == ["misleading", "swapped"]


def test_nothing_is_named_where_the_base_does_not_understand_captions_or_pictures_are_few() -> None:
    assert not understands({name: gain / 100 for name, gain in CLEAR.items()})
    assert suspects({**{name: gain / 100 for name, gain in CLEAR.items()}, "swapped": -0.1}) == []
    assert suspects({"a": 1.0, "b": 1.0, "swapped": -1.0}) == [] and suspects({}) == []


def test_at_most_a_few_are_named_and_what_is_no_number_is_left_out() -> None:
    many = {**CLEAR, **{f"swapped {number:02d}": -0.01 * number for number in range(15)}, "odd": math.nan}
    assert suspects(many)[0] == "swapped 14" and len(suspects(many)) == MOST_NAMED
    assert "odd" not in rank(many)
