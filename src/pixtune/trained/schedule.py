"""Learning rates as pure functions of the step, and whether they are what a run needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from pixtune.config.optimizing import FINDS_RATE
from pixtune.config.schema import TrainConfig
from pixtune.errors import ConfigError
from pixtune.trained.optim import OptimizerState

SCHEDULE_KEYS = (
    "learning_rate", "lr_scheduler", "lr_warmup_steps", "lr_warmup_share", "lr_floor", "lr_num_cycles", "lr_power",
    "lr_step_rules",
)  # fmt: skip
"""Keys of the config that `build_schedule` reads."""


def build_schedule(config: TrainConfig, num_steps: int) -> Callable[[int], float]:
    """Builds the learning rate as a function of the step (0 for the first).

    It has no state, so there is nothing to resume. The schedules are those of diffusers' `get_scheduler`; that of
    "rex" falls as (1 - z) / (1 - z / 2) over the share z of the steps after the warm-up (Chen et al. 2021, "REX:
    Revisiting Budgeted Training with an Improved Schedule", arXiv 2107.04197).
    """
    from diffusers.optimization import get_scheduler

    warm_up = num_warmup_steps(config, num_steps)
    if config.lr_scheduler == "rex":
        factor = partial(_rex, warm_up, num_steps)
    else:
        placeholder = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
        # diffusers' "constant" ignores a warm-up, but a key that is set must have an effect.
        warm_constant = config.lr_scheduler == "constant" and warm_up > 0
        schedule = get_scheduler(
            "constant_with_warmup" if warm_constant else config.lr_scheduler,
            placeholder,
            step_rules=config.lr_step_rules,
            num_warmup_steps=warm_up,
            num_training_steps=num_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        factor = schedule.lr_lambdas[0]
    floor = config.lr_floor
    if not floor:
        return lambda step: config.learning_rate * float(factor(step))

    def above_the_floor(step: int) -> float:
        share = float(factor(step))
        return config.learning_rate * (share if step < warm_up else floor + (1 - floor) * share)

    return above_the_floor


def num_warmup_steps(config: TrainConfig, num_steps: int) -> int:
    """Returns the steps of the warm-up, from whichever key it was given by."""
    return config.lr_warmup_steps or round(config.lr_warmup_share * num_steps)


def _rex(warm_up: int, num_steps: int, step: int) -> float:
    if step < warm_up:
        return step / warm_up
    done = min((step - warm_up) / max(num_steps - warm_up, 1), 1.0)
    return (1 - done) / (1 - done / 2)


def rate_in(config: TrainConfig, recorded: Mapping[str, Any], num_steps: int, step: int) -> float:
    """Returns the learning rate of a step (0 for the first) by the schedule that a checkpoint's config describes.

    Args:
        recorded: that config, as `to_dict` gives it. Keys that it lacks have the values of `config`.
    """
    then = config.model_copy(update={key: recorded[key] for key in SCHEDULE_KEYS if key in recorded})
    return build_schedule(then, num_steps)(step)


STEPS_COMPARED = 100_000
"""Steps that `check_schedule` looks at, at most: a moment's work in a run of any length."""


def check_schedule(config: TrainConfig, num_steps: int) -> str | None:
    """Compares a run's rates with the one that was asked for, and that with what is usual. Returns a warning, or None.

    Raises:
        ConfigError: the rate is 0 at every step, so that nothing would be learned.
    """
    rate_at, warm_up = build_schedule(config, num_steps), num_warmup_steps(config, num_steps)
    highest = max(map(rate_at, range(0, num_steps, max(num_steps // STEPS_COMPARED, 1))))
    key = f"lr_warmup_share {config.lr_warmup_share}" if config.lr_warmup_share else f"lr_warmup_steps {warm_up}"
    if highest == 0:
        raise ConfigError(
            f"the learning rate is 0 at each of the run's {num_steps} steps",
            [
                f"lr_scheduler {config.lr_scheduler}, {key}: nothing would be learned. Make the run longer, or the "
                "warm-up shorter."
            ],
        )
    if warm_up >= num_steps and config.lr_scheduler != "piecewise_constant":  # which has no warm-up
        return (
            f"the warm-up of {warm_up} steps ({key.split()[0]}) is as long as the run of {num_steps}, or "
            f"longer: its rate reaches {highest:.3g}, {highest / config.learning_rate:.0%} of learning_rate"
        )
    return unusual_rate(config)


def unusual_rate(config: TrainConfig) -> str | None:
    """Returns a warning where a learning rate is one of another kind of optimizer, with what is usual; else None."""
    rate, name = config.learning_rate, config.optimizer
    if name in FINDS_RATE and rate < LEAST_FACTOR:
        return (
            f'learning_rate is {rate:g} and optimizer is "{name}", which estimates the step size itself and takes '
            f"learning_rate as a factor of it: steps will be {1 / rate:.3g} times smaller than it finds right. Leave "
            "learning_rate out, or set 1; prodigy.d_coef makes it more careful"
        )
    return None


LEAST_FACTOR = 0.1
"""Factor of an estimated step size below which a learning rate was most likely meant for another optimizer."""


def set_learning_rate(optimizer: OptimizerState, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
