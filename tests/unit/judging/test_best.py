"""Which step was best, and whether more steps help: hand-made curves."""

from __future__ import annotations

import math

import pytest

from pixtune.config.sections import ValidationConfig
from pixtune.judging.best import best_step, end_words, num_since_lowest
from pixtune.judging.validation import pace_of


@pytest.mark.parametrize(
    ("losses", "best", "since"),
    [
        ({}, None, 0),
        ({0: 1.0}, None, 0),
        ({0: 1.0, 10: 0.5, 20: 0.4, 30: 0.6, 40: 0.7}, 20, 2),
        ({0: 1.0, 10: 0.5, 20: 0.5}, 10, 1),
        ({0: 0.1, 10: 0.5, 20: 0.4}, 20, 2),
        ({0: 1.0, 10: math.nan, 20: math.inf}, None, 2),
        ({0: math.nan, 10: 0.5, 20: math.nan}, 10, 1),
    ],
    ids=["nothing", "base alone", "over-fitted", "equals", "worse than the base", "no numbers", "some numbers"],
)
def test_the_best_step_and_the_validations_since(losses: dict[int, float], best: int | None, since: int) -> None:
    assert best_step(losses) == best
    assert num_since_lowest(losses) == since


def test_the_end_names_the_best_step_only_where_it_is_not_the_last() -> None:
    over_fitted = {0: 1.0, 10: 0.5, 20: 0.75}
    assert end_words(over_fitted, 20, "out/best") == (
        "best on held-out pictures: step 10, with 0.5000 (last step 0.7500); those weights are in out/best"
    )
    assert end_words({0: 1.0, 10: 0.5}, 10, "out/best") is None
    assert end_words({}, 10, None) is None
    assert "than the base model itself (0.4000" in str(end_words({0: 0.4, 10: 0.5, 20: 0.6}, 20, None))


@pytest.mark.parametrize(
    ("pictures", "held_out"), [(0, 0), (39, 0), (40, 4), (48, 4), (100, 5), (200, 10), (320, 16), (5000, 16)]
)
def test_pictures_are_held_out_from_forty_on(pictures: int, held_out: int) -> None:
    assert ValidationConfig().num_held_out(pictures) == held_out


def test_measuring_what_was_held_out_automatically_stays_below_a_twentieth_of_the_time() -> None:
    for num_pictures in (8, 13, 24):
        for examples in (1, 2, 4, 16):
            pace = pace_of(num_pictures, 2, examples)
            seconds_of_steps, seconds_of_passes = pace * examples * 3, num_pictures * 8
            assert pace >= 100 and pace % 50 == 0
            assert seconds_of_passes <= 0.05 * seconds_of_steps
            assert pace == 100 or seconds_of_passes > 0.05 * (pace - 50) * examples * 3, "and no rarer than that needs"
