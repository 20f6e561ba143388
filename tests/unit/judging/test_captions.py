"""Which captions are suspicious, by hand-made gains."""

from __future__ import annotations

import math

import pytest

from pixtune.judging.captions import (
    LEAST_AGAIN,
    MOST_AGAIN,
    MOST_NAMED,
    beyond_others,
    gain_of,
    rank,
    suspects,
    to_look_at_again,
    understands,
)

CLEAR = {f"right {number}": 0.5 + 0.01 * number for number in range(20)}


def test_a_gain_is_by_how_much_others_are_worse_on_average() -> None:
    assert gain_of([math.log(0.1), math.log(0.2), math.log(0.4)]) == pytest.approx(math.log(8) / 2)


def test_the_worst_are_looked_at_again_a_few_at_least_and_a_quarter_at_most() -> None:
    assert to_look_at_again(CLEAR) == rank(CLEAR)[:LEAST_AGAIN]
    odd = {f"odd {number}": 0.01 * number for number in range(6)}
    assert to_look_at_again({**CLEAR, **odd}) == list(odd)
    assert to_look_at_again({**CLEAR, **odd, "worse": math.nan}) == list(odd)
    many = {f"odd {number:03d}": -0.001 * number for number in range(20)}
    assert to_look_at_again({**CLEAR, **many}) == [f"odd {number:03d}" for number in range(19, 9, -1)]
    assert len(to_look_at_again({f"{number:03d}": 0.1 * (number > 90) for number in range(200)})) == MOST_AGAIN
    assert to_look_at_again({}) == [] and to_look_at_again({"a": 1.0}) == []


def test_what_a_caption_does_on_other_pictures_is_taken_off() -> None:
    own = {"swapped": 0.3, "odd words": -0.2, "right": 0.3}
    on_others = {
        "one": {"swapped": -1.3, "odd words": -0.6, "right": -1.1},
        "two": {"swapped": -2.1, "odd words": -1.7, "right": -2.2},
    }
    found = beyond_others(own, on_others)
    assert found["swapped"] == pytest.approx(0.3 - (0.3 + 0.1) / 2)
    assert found["odd words"] == pytest.approx(-0.2 + (0.4 + 0.3) / 2)
    assert found["right"] == pytest.approx(0.3 - (0.1 + 0.2) / 2)


def test_pictures_that_are_judges_themselves_count_with_others_captions_alone() -> None:
    own = {"a": 0.5, "b": 0.1, "c": 0.0}
    found = beyond_others(own, {"a": {"a": -9.0, "b": -1.0, "c": -2.0}})
    assert found == {"a": 0.5, "b": pytest.approx(0.6), "c": pytest.approx(-0.5)}
    assert beyond_others(own, {}) == own
    assert beyond_others({"a": 0.5}, {"b": {"a": -1.0}}) == {"a": 0.5}, "nothing to compare it with"


def test_captions_that_fit_no_better_than_others_are_named_the_worst_first() -> None:
    assert suspects(CLEAR, {}) == []
    again = {"misleading": -0.3, "swapped": 0.02, "weak": 0.1, "odd": math.nan}
    assert suspects({**CLEAR, **dict.fromkeys(again, 0.0)}, again) == ["misleading", "swapped"]


def test_nothing_is_named_where_the_base_does_not_understand_captions_or_pictures_are_few() -> None:
    assert not understands({name: gain / 100 for name, gain in CLEAR.items()})
    assert suspects({name: gain / 100 for name, gain in CLEAR.items()}, {"swapped": -0.1}) == []
    assert suspects({"a": 1.0, "b": 1.0, "swapped": -1.0}, {"swapped": -1.0}) == [] and suspects({}, {}) == []


def test_at_most_a_few_are_named() -> None:
    many = {f"swapped {number:02d}": -0.01 * number for number in range(15)}
    named = suspects({**CLEAR, **many}, many)
    assert named[0] == "swapped 14" and len(named) == MOST_NAMED
