"""An optimizer put back from a checkpoint goes on bit for bit; the states that planning counts are those it has."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pixtune.config.optimizing import OPTIMIZER_NAMES
from pixtune.errors import ConfigError
from pixtune.plan.demands import state_options_of
from pixtune.plan.footprint import tensors_of
from pixtune.plan.optimizers import OPTIMIZERS, state_bytes
from pixtune.storage.safetensors_writer import save_safetensors
from pixtune.trained.optim import (
    Optimizer,
    check_states,
    clipped_step,
    clipping_factor,
    optimizer_state,
    restore_optimizer_state,
    saw_gradient,
)
from pixtune.trained.optimizers import BUILDERS, build_optimizer, check_optimizer
from pixtune.trained.schedule import set_learning_rate
from tests.unit.trained.configs import config

PACKAGES = {
    "adamw_8bit": ("bitsandbytes",),
    "adamw_schedule_free": ("schedulefree",),
    "prodigy_schedule_free": ("prodigyplus",),
}
"""Modules of the packages that optimizers need."""


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
    for package in PACKAGES.get(request.param, ()):
        pytest.importorskip(package)
    if request.param == "adamw_8bit":
        named = parameters()
        try:
            train(built(request.param, named), named, range(1))
        except (RuntimeError, NotImplementedError) as error:
            pytest.skip(f"this bitsandbytes has no 8-bit AdamW for the CPU: {error}")
    return str(request.param)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "prodigy", "adamw_schedule_free"])
def test_settings_of_the_config_reach_the_optimizer(name: str) -> None:
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package)
    (group,) = built(name, parameters()).param_groups
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"], group["eps"]) == (2e-3, (0.8, 0.95), 0.1, 1e-6)


def test_adamw_steps_as_its_definition() -> None:
    """Loshchilov and Hutter 2017, algorithm 2, the first two steps of one number."""
    parameter = nn.Parameter(torch.tensor([0.5]))
    optimizer = built("adamw", {"p": parameter})
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
    check_states(name, named, tensors, plain)
    if name == "adamw":
        assert {path.rsplit("/", 1)[1] for path in tensors} == {"step", "exp_avg", "exp_avg_sq"} and not plain
        assert tensors["block.0.lora_A/step"] == 2
    if name == "adamw_8bit":
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


SHAPES = ((4, 96), (64, 4), (64, 96), (16, 16), (33,), (5000,), (4095,), (4096,))
"""Factors of a LoRA, a matrix and vectors, small and large, and around the size from which states have 8 bits."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "prodigy", "prodigy": {"slice": 11}},
        {"optimizer": "adafactor", "adafactor": {"momentum": 0.9}},
    ],
)
def test_planning_counts_the_bytes_of_real_states_exactly(name: str, changes: dict[str, Any]) -> None:
    if changes and name != changes["optimizer"]:
        pytest.skip("keys of another optimizer")
    settings = config(method="full" if name == "muon" else "lora", **changes)
    named = {str(shape): nn.Parameter(torch.ones(shape)) for shape in SHAPES}
    # Each matrix of the blocks by itself where all weights are trained.
    groups = [[weight] for weight in named.values()] if name == "muon" else [list(named.values())]
    optimizers = [build_optimizer(settings, name, group) for group in groups]
    for weight in named.values():
        weight.grad = torch.linspace(-1, 1, weight.numel()).view(weight.shape)
    for optimizer in optimizers:
        optimizer.step()
    made = {id(s): s for o in optimizers for states in o.state.values() for s in states.values() if torch.is_tensor(s)}
    tensors = tensors_of((path, tuple(weight.shape)) for path, weight in named.items())
    assert sum(state.nbytes for state in made.values()) == state_bytes(name, tensors, state_options_of(settings))


def test_planning_knows_every_optimizer_that_can_be_built() -> None:
    assert BUILDERS.keys() == OPTIMIZERS.keys()
    assert {*get_args(OPTIMIZER_NAMES), "adamw_8bit"} == OPTIMIZERS.keys()


def test_states_tell_whether_a_gradient_was_ever_there(name: str) -> None:
    named = parameters()
    optimizer = built(name, named)
    for key, parameter in named.items():
        parameter.grad = torch.full_like(parameter, 1e-6 if key.endswith("A") else 0.0)
    optimizer.step()
    seen = {key: saw_gradient(name, optimizer.state[parameter]) for key, parameter in named.items()}
    assert seen == {"block.0.lora_A": True, "block.0.lora_B": False, "block.1.lora_A": True}


def test_states_of_another_shape_or_optimizer_are_refused(name: str) -> None:
    named = parameters()
    optimizer = built(name, named)
    train(optimizer, named, range(1))
    tensors, plain = optimizer_state(optimizer, named)
    largest = max(
        (path for path in tensors if path.startswith("block.0.lora_A")), key=lambda path: tensors[path].numel()
    )
    for wrong in (tensors[largest][..., :-1], tensors[largest].to(torch.float16), tensors[largest].to(torch.int64)):
        with pytest.raises(KeyError, match=r"is none of|is missing"):
            check_states(name, named, {**tensors, largest: wrong}, plain)
    with pytest.raises(KeyError, match="is none of"):
        check_states(name, named, {**tensors, "block.0.lora_A/other": tensors[largest]}, plain)
    with pytest.raises(KeyError, match="is no number"):
        check_states(name, named, tensors, {"block.0.lora_A": {"step": "7"}})
    if name != "muon":  # which has one state
        with pytest.raises(KeyError, match="is missing"):
            check_states(name, named, {path: each for path, each in tensors.items() if path != largest}, plain)


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
            same = {key for key, value in now.items() if value.equal(kept[key]) or key.endswith("/RMS")}  # never read
            assert same == now.keys() if step == 1 else not same & named.keys()
        kept = {key: value.clone() for key, value in now.items()}
