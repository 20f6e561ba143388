"""Schedules are diffusers', and an optimizer put back from a checkpoint goes on bit for bit."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file
from torch import nn

from pixtune.config.schema import LR_SCHEDULERS, TrainConfig
from pixtune.errors import ConfigError
from pixtune.plan.optimizers import OPTIMIZERS
from pixtune.storage.safetensors_writer import save_safetensors
from pixtune.trained.optim import (
    BUILDERS,
    Optimizer,
    build_optimizer,
    build_schedule,
    check_optimizer,
    check_schedule,
    clipped_step,
    clipping_factor,
    optimizer_state,
    rate_in,
    restore_optimizer_state,
    set_learning_rate,
)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "pretrained_model_name_or_path": "x",
            "output_dir": "x",
            "data_config": {"img_dir": "x"},
            "max_train_steps": 30,
            "learning_rate": 2e-3,
            **changes,
        }
    )


# ---- schedules


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", get_args(LR_SCHEDULERS))
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


# ---- optimizers


def parameters() -> dict[str, nn.Parameter]:
    """8-bit Adam keeps states below 4096 numbers in fp32, so two are larger: they share a code book."""
    generator = torch.Generator().manual_seed(0)
    return {
        "block.0.lora_A": nn.Parameter(torch.randn(64, 96, generator=generator)),
        "block.0.lora_B": nn.Parameter(torch.randn(4, 3, generator=generator)),
        "block.1.lora_A": nn.Parameter(torch.randn(64, 96, generator=generator)),
    }


def train(optimizer: Optimizer, named: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        set_learning_rate(optimizer, 1e-2 / (1 + step))
        for number, parameter in enumerate(named.values()):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        for parameter in named.values():
            parameter.grad = None


def built(name: str, named: dict[str, nn.Parameter], **changes: Any) -> Optimizer:
    settings = config(adam_beta1=0.8, adam_beta2=0.95, adam_weight_decay=0.1, adam_epsilon=1e-6, **changes)
    return build_optimizer(settings, name, named.values())


@pytest.fixture(params=sorted(BUILDERS))
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
        named = parameters()
        try:
            train(built(request.param, named), named, range(1))
        except (RuntimeError, NotImplementedError) as error:
            pytest.skip(f"this bitsandbytes has no 8-bit AdamW for the CPU: {error}")
    return str(request.param)


def test_settings_of_the_config_reach_the_optimizer(name: str) -> None:
    (group,) = built(name, parameters()).param_groups
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"], group["eps"]) == (2e-3, (0.8, 0.95), 0.1, 1e-6)


def test_adamw_steps_as_its_definition(name: str) -> None:
    """Loshchilov and Hutter 2017, algorithm 2, the first two steps of one number."""
    if name == "adamw_8bit":
        pytest.skip("its states are rounded")
    parameter = nn.Parameter(torch.tensor([0.5]))
    optimizer = built(name, {"p": parameter})
    value, first, second = 0.5, 0.0, 0.0
    for step, gradient in enumerate((0.3, -0.1), start=1):
        set_learning_rate(optimizer, 0.01)
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
        first, second = 0.8 * first + 0.2 * gradient, 0.95 * second + 0.05 * gradient**2
        value -= 0.01 * (0.1 * value + first / (1 - 0.8**step) / ((second / (1 - 0.95**step)) ** 0.5 + 1e-6))
        assert parameter.item() == pytest.approx(value, rel=1e-5)


def test_a_restored_optimizer_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    straight = parameters()
    optimizer = built(name, straight)
    train(optimizer, straight, range(6))

    first = parameters()
    optimizer = built(name, first)
    train(optimizer, first, range(3))
    tensors, plain = optimizer_state(optimizer, first)
    save_safetensors(tmp_path / "optimizer.safetensors", tensors)
    plain = copy.deepcopy(plain)

    resumed = {key: nn.Parameter(parameter.detach().clone()) for key, parameter in first.items()}
    optimizer = built(name, resumed)
    restore_optimizer_state(optimizer.state, resumed, load_file(tmp_path / "optimizer.safetensors"), plain)
    train(optimizer, resumed, range(3, 6))
    for key in straight:
        assert torch.equal(resumed[key], straight[key]), key

    cold = {key: nn.Parameter(parameter.detach().clone()) for key, parameter in first.items()}
    train(built(name, cold), cold, range(3, 6))
    assert not torch.equal(cold["block.0.lora_A"], straight["block.0.lora_A"]), "without its state it must differ"


def test_state_is_flat_under_the_parameters_names_and_keeps_its_formats(name: str) -> None:
    named = parameters()
    optimizer = built(name, named)
    assert optimizer_state(optimizer, named) == ({}, {})
    train(optimizer, named, range(2))
    tensors, plain = optimizer_state(optimizer, named)
    for key in named:
        assert any(path.rsplit("/", 1)[0] == key for path in tensors)
    if name == "adamw":
        assert {path.rsplit("/", 1)[1] for path in tensors} == {"step", "exp_avg", "exp_avg_sq"} and not plain
        assert tensors["block.0.lora_A/step"] == 2
    else:
        assert tensors["block.0.lora_A/state1"].dtype == torch.uint8, "codes, not what they stand for"
        assert plain["block.0.lora_A"]["step"] == 2
    other = parameters()
    fresh = built(name, other)
    restore_optimizer_state(fresh.state, other, tensors, plain)
    again, again_plain = optimizer_state(fresh, other)
    assert again_plain == plain and again.keys() == tensors.keys()
    assert all(again[path].dtype == tensors[path].dtype and again[path].equal(tensors[path]) for path in tensors)


def test_8bit_steps_are_those_of_bitsandbytes_and_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    ours, theirs = parameters(), parameters()
    settings = {"lr": 2e-3, "betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-6}
    train(bitsandbytes.optim.AdamW8bit(theirs.values(), **settings), theirs, range(4))

    def wait(tensor: torch.Tensor) -> None:
        raise AssertionError("waited for the device")

    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", wait)
    train(built("adamw_8bit", ours), ours, range(4))
    for key, parameter in ours.items():
        assert torch.equal(parameter, theirs[key])


@pytest.mark.parametrize("use", [lambda: built("adamw_8bit", parameters()), lambda: check_optimizer("adamw_8bit")])
def test_8bit_without_bitsandbytes_says_what_to_install(
    use: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"8 bits(.|\n)*pip install bitsandbytes(.|\n)*adam8bit: false"):
        use()


def test_planning_knows_every_optimizer_that_can_be_built_and_its_bytes() -> None:
    assert BUILDERS.keys() == OPTIMIZERS.keys()
    for name, needs in OPTIMIZERS.items():
        weight = {"weight": torch.nn.Parameter(torch.zeros(256, 256))}
        optimizer = built(name, weight)
        weight["weight"].grad = torch.ones(256, 256)
        optimizer.step()
        state = optimizer.state[weight["weight"]].items()
        tables = {"qmap1", "qmap2"}  # of 8-bit states: the same 256 numbers for all of a run's weights
        made = sum(value.nbytes for key, value in state if isinstance(value, torch.Tensor) and key not in tables)
        assert made / 256**2 == pytest.approx(needs.state_bytes, rel=0.01), name


@pytest.mark.parametrize(("max_norm", "expected"), [(0.0, [3.0, 4.0]), (10.0, [3.0, 4.0]), (1.0, [0.6, 0.8])])
def test_gradients_are_scaled_down_to_a_norm_and_never_up(max_norm: float, expected: list[float]) -> None:
    named = {name: torch.nn.Parameter(torch.zeros(1)) for name in "ab"} | {"none": torch.nn.Parameter(torch.zeros(1))}
    named["a"].grad, named["b"].grad = torch.tensor([3.0]), torch.tensor([4.0])
    norm = clipped_step(torch.optim.SGD(named.values(), lr=1.0, fused=True), named, max_norm, torch.ones(()))
    assert norm.item() == 5.0
    assert [-named[name].item() for name in "ab"] == pytest.approx(expected)
    factor = clipping_factor(norm, max_norm)
    assert (1.0 if factor is None else factor.item()) == pytest.approx(expected[0] / 3)


def test_a_step_without_any_gradient_is_refused() -> None:
    named = {"a": torch.nn.Parameter(torch.zeros(1))}
    with pytest.raises(RuntimeError, match="no gradient reached"):
        clipped_step(torch.optim.SGD(named.values(), lr=1.0), named, 1.0, torch.ones(()))


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(("loss", "scale"), [(math.nan, 1.0), (-math.inf, 1.0), (0.5, math.nan), (0.5, math.inf)])
def test_a_loss_or_a_gradient_that_is_no_number_changes_neither_weights_nor_states(
    name: str, loss: float, scale: float
) -> None:
    """A weight with 8-bit states, one with 32-bit states whatever the optimizer, and one of an odd size."""
    named = {str(size): nn.Parameter(torch.linspace(-1, 1, size)) for size in (5000, 64, 33)}
    optimizer = BUILDERS[name](named.values(), lr=1e-2, weight_decay=0.1)
    kept: dict[str, torch.Tensor] = {}
    for step, (own_loss, own_scale) in enumerate([(0.5, 1.0), (loss, scale), (0.5, 1.0)]):
        for parameter in named.values():
            parameter.grad = torch.linspace(1, -2, parameter.numel())
        named["64"].grad = torch.ones(64) * own_scale
        clipped_step(optimizer, named, 1.0, torch.tensor(own_loss))
        states, _ = optimizer_state(optimizer, named)
        now = {**{key: value.detach() for key, value in named.items()}, **states}
        if step:
            same = {key for key, value in now.items() if value.equal(kept[key])}
            assert same == now.keys() if step == 1 else not same & named.keys()
        kept = {key: value.clone() for key, value in now.items()}
