"""What the guard makes of losses: rows of skipped steps, and levels that rise, against sequences made by hand."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig, GuardConfig
from pixtune.errors import CheckpointError, LossError
from pixtune.tracking.guard import ExampleLoss, LossGuard, SkippedStep, held_out_excess, ways_on

GOOD, BAD = 0.4, math.nan


def guard(spoiled: Sequence[str] = (), **settings: Any) -> LossGuard:
    return LossGuard(GuardConfig(**settings), lambda: spoiled)


def skipped(step: int, losses: Sequence[float] = (BAD, GOOD), loss: float = BAD, norm: float = BAD) -> SkippedStep:
    return SkippedStep(step, loss, norm, [ExampleLoss(f"{n}.png", 0.25, each) for n, each in enumerate(losses)])


def ending(watched: LossGuard) -> LossError:
    with pytest.raises(LossError) as caught:
        watched.check()
    return caught.value


# ---- skipped steps


BOTH = "0.png (sigma 0.25), 1.png (sigma 0.25)"


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (skipped(7), "its loss was nan, because of: 0.png (sigma 0.25)"),
        (skipped(7, (BAD, math.inf)), f"its loss was nan, for each of its examples: {BOTH}"),
        (
            skipped(7, (GOOD, GOOD), 0.4, math.inf),
            f"the norm of its gradients was inf, with a loss of 0.4. Its examples: {BOTH}",
        ),
    ],
)
def test_a_skipped_step_is_told_with_whose_loss_was_no_number(step: SkippedStep, told: str) -> None:
    assert step.message == f"step 7 was skipped: {told}"


def test_a_row_is_told_once_and_the_next_one_again() -> None:
    watched = guard()
    told = [watched.see_skipped(skipped(1)), watched.see_skipped(skipped(2)), watched.see(3, 0.4, 2.0)]
    told += [watched.see_skipped(skipped(4)), watched.see_skipped(skipped(5, (BAD, BAD)))]
    watched.check()
    assert [message and message[:6] for message in told] == ["step 1", None, None, "step 4", "step 5"]
    assert watched.summary() == "skipped steps: 4, with the examples 0.png (4 times), 1.png"
    assert guard().summary() is None


@pytest.mark.parametrize("split", [None, 3])
@pytest.mark.parametrize(("losses", "sound"), [((BAD, GOOD), True), ((BAD, BAD), False)])
def test_the_run_ends_after_the_row_that_is_allowed_also_across_a_resume(
    split: int | None, losses: Sequence[float], sound: bool
) -> None:
    watched = guard(max_skipped_steps=4)
    watched.see(1, 0.4, 2.0)
    for step in range(2, 6):
        watched.check()
        if step == split:
            resumed = guard(max_skipped_steps=4)
            resumed.restore(json.loads(json.dumps(watched.to_dict())))
            watched = resumed
        watched.see_skipped(skipped(step, losses))
    error = ending(watched)
    assert error.weights_are_sound == sound and error.culprits == (("0.png",) if sound else ())
    assert "4 steps in a row were skipped" in str(error) and "step 5 was skipped" in str(error)
    watched.check()
    assert watched.to_dict()["in_a_row"] == 0, "a run that goes on may skip as many again"


def test_one_good_step_begins_a_new_row() -> None:
    watched = guard(max_skipped_steps=2)
    for step in range(1, 9, 2):
        watched.see_skipped(skipped(step))
        watched.see(step + 1, 0.4, 2.0)
    watched.check()


def test_weights_that_are_no_numbers_end_the_run_at_once() -> None:
    watched = guard(spoiled=["blocks.0.to_q.lora_A", "blocks.1"])
    watched.see_skipped(skipped(3))
    watched.check()  # an example of that step had a number, so the weights were not looked at
    watched.see_skipped(skipped(4, (BAD, BAD)))
    error = ending(watched)
    assert "themselves are no numbers any more, in 2 tensors (blocks.0.to_q.lora_A, blocks.1)" in str(error)
    assert not error.weights_are_sound


def test_what_is_saved_is_proven_by_any_later_number_and_doubtful_until_then() -> None:
    watched = guard()
    watched.see(10, 0.4, 2.0)
    assert not watched.proves(10) and watched.proves(9) and not watched.is_in_doubt(10)
    watched.see_skipped(skipped(11, (BAD, BAD)))
    assert not watched.proves(10) and watched.is_in_doubt(11)
    watched.see_skipped(skipped(12, (BAD, GOOD)))
    assert watched.proves(10) and not watched.is_in_doubt(12)


# ---- losses that explode


def levels(shares: Sequence[float], watched: LossGuard | None = None, resumed_at: int = -1) -> list[int]:
    """Steps of warnings, 1 for the first."""
    watched, told = watched or guard(), []
    for step, share in enumerate(shares, 1):
        if step == resumed_at:
            state = json.loads(json.dumps(watched.to_dict()))
            watched = guard()
            watched.restore(state)
        if watched.see(step, 2 * share, 2.0) is not None:
            told.append(step)
    return told


def noisy(level: float, count: int, seed: int, deviation: float = 0.6) -> list[float]:
    draws = random.Random(seed)
    return [level * math.exp(draws.gauss(0, deviation)) for _ in range(count)]


def test_steady_falling_and_warming_losses_are_no_explosion() -> None:
    """Single losses have a spread of 0.6 in their logarithms: more than a batch of one has on the small models."""
    for seed in range(20):
        falling = [share * (0.3 + 0.7 / (1 + step / 50)) for step, share in enumerate(noisy(0.35, 400, seed))]
        mixed = [share * (0.6, 1.5)[seed % 2 ^ (step // 7) % 2] for step, share in enumerate(noisy(0.25, 400, seed))]
        assert levels(noisy(0.3, 1000, seed)) == levels(falling) == levels(mixed) == []


@pytest.mark.parametrize("resumed_at", [-1, 105])
def test_a_level_three_times_as_high_is_told_once_until_it_has_come_down(resumed_at: int) -> None:
    """From the step on at which half of the window, 16 steps, are high."""
    steady, high = [0.2] * 100, [0.61] * 50
    assert levels([*steady, *high, *steady, *high], resumed_at=resumed_at) == [117, 267]
    assert levels([*steady, *[0.59] * 50]) == []
    assert levels([*steady, *high, *[0.59] * 50, *high]) == [117], "around the limit it is one event"


def test_a_model_worse_than_none_is_seen_without_any_level_before() -> None:
    assert levels([0.6, 0.9, 3.0, 4.0, 8.0, 1.2, 1.0, 1.2]) == [8], "the first steps at a rate of 0.1"
    assert levels(noisy(1.0, 60, 0, 0.2)) == [], "a poor model"
    assert levels([4.0] * 31) == [], "random weights"
    assert levels([0.5, 60.0, *[0.5] * 60]) == [], "one odd step"


def test_the_held_out_loss_has_exploded_at_twice_its_lowest() -> None:
    assert held_out_excess({}) is held_out_excess({0: 5.0}) is held_out_excess({0: 0.8, 10: 0.5, 20: 0.99}) is None
    assert held_out_excess({20: 1.01, 0: 0.8, 10: 0.5}) == "1.0100 is 2.0 times its lowest, 0.5000"
    watched = guard()
    told = [watched.see_held_out(step, loss) for step, loss in enumerate([0.8, 2.0, 3.0, 0.7, 1.5])]
    watched.check()
    assert [bool(warning) for warning in told] == [False, True, False, False, True]
    assert not watched.proves(0) and "held-out loss has exploded" in str(told[1])


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_held_out_loss_that_is_no_number_ends_the_run(loss: float) -> None:
    watched = guard()
    assert watched.see_held_out(4, loss) is None
    assert f"step 4: held-out loss {loss}" in str(ending(watched))


def test_an_explosion_ends_the_run_where_the_config_says_so() -> None:
    watched = guard(exploded_loss="stop")
    assert levels([0.5, *[5.0] * 7], watched) == []
    assert "training loss has exploded" in str(ending(watched)) and not watched.proves(0)


# ---- ways on


def test_the_ways_on_are_those_that_there_are() -> None:
    data = DataConfig(img_dir=Path("pictures"))
    config = TrainConfig(
        pretrained_model_name_or_path="x", output_dir=Path("out"), max_train_steps=1, data_config=data,
        learning_rate=3e-4,
    )  # fmt: skip
    pictures = LossError("too many", True, tuple(f"{number}.png" for number in range(14)))
    told = ways_on(pictures, ["checkpoint-000020", "checkpoint-000010"], config)
    assert told.startswith("too many. resume_from_checkpoint=latest goes on from checkpoint-000020. Ways on:\n")
    assert "take 0.png, 1.png, " in told and "11.png and 2 more out of pictures, and then: " in told
    assert "learning_rate=3e-05 resume_with_changes_in='[learning_rate]'" in told
    assert "in place of latest: resume_from_checkpoint=checkpoint-000010" in told
    told = ways_on(LossError("too high"), [], config)
    assert "no earlier checkpoint in out: start anew" in told and "resume_" not in told and "without" not in told


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"recent": ["0.3"]}, "guard.recent.0 is '0.3'"),
        ({"in_a_row": 1.5}, "guard.in_a_row is 1.5"),
        ({"culprits": [1]}, "guard.culprits is"),
    ],
)
def test_a_state_of_another_form_is_refused_by_name(values: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"the checkpoint's {words}")):
        guard().restore(values)
