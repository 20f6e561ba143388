"""Schedules are diffusers', with a floor transformers', and rates that were meant for another optimizer are told."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from pixtune.config.schema import LR_SCHEDULERS, TrainConfig
from pixtune.errors import ConfigError
from pixtune.trained.schedule import build_schedule, check_schedule, rate_in, set_learning_rate
from tests.unit.trained.configs import config


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", [name for name in get_args(LR_SCHEDULERS) if name != "rex"])
def test_each_schedule_is_what_diffusers_gives_a_real_optimizer(name: str, warmup: int) -> None:
    rules = "1:5,0.5:12,0.1" if name == "piecewise_constant" else None
    settings = config(
        lr_scheduler=name, lr_warmup_steps=warmup, lr_num_cycles=3, lr_power=2.0, lr_step_rules=rules
    )  # fmt: skip
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=2e-3)
    # diffusers' "constant" has no warm-up; ours takes the one it is told.
    theirs = "constant_with_warmup" if name == "constant" and warmup else name
    stepped = get_scheduler(
        theirs, optimizer, step_rules=rules, num_warmup_steps=warmup, num_training_steps=30, num_cycles=3, power=2.0
    )
    rate_at = build_schedule(settings, 30)
    expected = []
    for _ in range(30):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        stepped.step()
    assert [rate_at(step) for step in range(30)] == expected
    assert rate_at(11) == expected[11], "asked again, out of order"
    assert len(set(expected)) >= (2 if warmup or not name.startswith("constant") else 1)


@pytest.mark.parametrize("name", [name for name in get_args(LR_SCHEDULERS) if name != "piecewise_constant"])
@pytest.mark.parametrize(("warmup", "num_steps", "share"), [(100, 6, "5%"), (30, 30, "97%"), (50, 2, "2%")])
def test_a_warm_up_as_long_as_the_run_is_a_warning_with_the_share_that_is_reached(
    name: str, warmup: int, num_steps: int, share: str
) -> None:
    warning = check_schedule(config(lr_scheduler=name, lr_warmup_steps=warmup), num_steps)
    assert warning is not None and f"warm-up of {warmup} steps" in warning and f", {share} of learning_rate" in warning
    assert check_schedule(config(lr_scheduler=name, lr_warmup_steps=num_steps - 1), num_steps) is None


@pytest.mark.parametrize(
    ("settings", "num_steps"),
    [
        ({"lr_warmup_steps": 1}, 1),
        ({"lr_warmup_steps": 500, "lr_scheduler": "cosine"}, 1),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "0:5,1"}, 5),
    ],
)
def test_a_rate_of_zero_at_every_step_is_refused(settings: dict[str, Any], num_steps: int) -> None:
    with pytest.raises(ConfigError, match=f"is 0 at each of the run's {num_steps} steps"):
        check_schedule(config(**settings), num_steps)


def test_the_rate_of_a_recorded_schedule_is_its_own() -> None:
    """A cosine over 10 steps has 4.9e-5 left at step 9; over 20 it stands near its middle."""
    recorded = {"lr_scheduler": "cosine", "learning_rate": 2e-3, "lr_warmup_steps": 0, "rank": 3}
    assert rate_in(config(), recorded, 10, 9) == pytest.approx(2e-3 * (1 + math.cos(math.pi * 0.9)) / 2)
    assert rate_in(config(), {**recorded, "learning_rate": 1e-3}, 20, 9) == pytest.approx(
        1e-3 * (1 + math.cos(math.pi * 9 / 20)) / 2
    )
    assert rate_in(config(learning_rate=5e-4), {}, 10, 9) == 5e-4, "keys that an older version did not have"


def test_the_rate_reaches_every_group() -> None:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.ones(1))]}])
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


# ---- what diffusers has not


def rates(num_steps: int, **changes: Any) -> list[float]:
    return list(map(build_schedule(config(**changes), num_steps), range(num_steps)))


@pytest.mark.parametrize("warm_up", [0, 6])
def test_a_cosine_with_a_floor_is_that_of_transformers(warm_up: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-3)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warm_up, 30, min_lr_rate=0.1).lr_lambdas[0]
    ours = rates(30, lr_scheduler="cosine", lr_warmup_steps=warm_up, lr_floor=0.1)
    assert ours == pytest.approx([2e-3 * theirs(step) for step in range(30)], rel=1e-12)
    assert min(ours[warm_up:]) >= 2e-4


@pytest.mark.parametrize("name", ["linear", "cosine_with_restarts", "polynomial", "rex"])
def test_each_schedule_that_falls_ends_at_its_floor_and_begins_where_it_did(name: str) -> None:
    plain, floored = (rates(1000, lr_scheduler=name, lr_floor=floor) for floor in (0.0, 0.25))
    assert floored[0] == plain[0] == 2e-3
    assert floored[-1] == pytest.approx(5e-4, rel=0.01) and plain[-1] < 1e-5
    assert all(high == pytest.approx(5e-4 + 0.75 * low) for high, low in zip(floored, plain, strict=True))


def test_rex_is_the_formula_of_its_paper() -> None:
    """By hand: at the start 1; at half 0.5 / 0.75; at three quarters 0.25 / 0.625; the warm-up is not part of it."""
    ours = rates(40, lr_scheduler="rex", lr_warmup_steps=20)
    assert ours[:20] == pytest.approx([2e-3 * step / 20 for step in range(20)])
    assert [ours[20] / 2e-3, ours[30] / 2e-3, ours[35] / 2e-3] == pytest.approx([1, 2 / 3, 0.4])
    assert ours[39] > 0


@pytest.mark.parametrize("name", ["constant", "cosine", "rex"])
def test_a_share_of_the_steps_is_as_many_steps(name: str) -> None:
    assert rates(40, lr_scheduler=name, lr_warmup_share=0.25) == rates(40, lr_scheduler=name, lr_warmup_steps=10)
    assert rates(80, lr_scheduler=name, lr_warmup_share=0.25)[20] == 2e-3


def test_a_warm_up_by_share_that_leaves_nothing_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"lr_warmup_share 0\.99"):
        check_schedule(config(lr_warmup_share=0.99), 1)


# ---- rates of another optimizer


@pytest.mark.parametrize("name", ["prodigy", "prodigy_schedule_free"])
def test_a_small_rate_with_prodigy_is_told_with_what_it_does(name: str) -> None:
    warning = check_schedule(config(optimizer=name, learning_rate=1e-4), 30)
    assert warning is not None and "1e+04 times smaller" in warning and "prodigy.d_coef" in warning
    assert check_schedule(config(optimizer=name, learning_rate=0.5), 30) is None
    assert check_schedule(config(optimizer="adamw", learning_rate=1e-4), 30) is None


def test_without_a_rate_prodigy_has_1() -> None:
    values = config(optimizer="prodigy").model_dump(exclude={"learning_rate"})
    assert TrainConfig.model_validate(values).learning_rate == 1.0
    assert TrainConfig.model_validate({**values, "optimizer": "adamw"}).learning_rate == 1e-4
