"""Each optimizer steps as its library's does when applied by hand, and one in steps of a run as one at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pixtune.config.schema import TrainConfig
from pixtune.errors import ConfigError
from pixtune.trained import of_libraries, prodigy
from pixtune.trained.optim import Optimizer, estimates_of, optimizer_state, restore_optimizer_state
from pixtune.trained.optimizers import BUILDERS, build_optimizer, check_optimizer
from pixtune.trained.schedule import set_learning_rate
from pixtune.trained.schedule_free import AverageOfOptimizer

ADAM = {"betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-6}


def build(name: str, named: dict[str, nn.Parameter], in_block: bool = True, **changes: Any) -> Optimizer:
    values = {
        "pretrained_model_name_or_path": "x", "output_dir": "x", "data_config": {"img_dir": "x"}, "max_train_steps": 30,
        "optimizer": name, "method": "full" if name == "muon" else "lora", "adam_weight_decay": 0.1,
    }  # fmt: skip
    if name != "adafactor":
        values |= {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    return build_optimizer(TrainConfig.model_validate({**values, **changes}), name, named.values(), in_block)


def weights() -> dict[str, nn.Parameter]:
    """Both factors of two LoRA layers, one of each as they begin; and one that no gradient reaches."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.A": (8, 96), "0.B": (64, 8), "1.A": (8, 40), "1.B": (40, 8), "unused": (8, 8)}
    return {
        name: nn.Parameter(torch.zeros(shape) if name == "0.B" else 0.1 * torch.randn(shape, generator=generator))
        for name, shape in shapes.items()
    }


def gradient(weight: Tensor, step: int, number: int) -> Tensor:
    """Points to 0.3, with noise, so that an estimate of the distance has something to find."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 * step + number))
    return 1e-2 * (weight.detach() - 0.3 + noise)


def take_steps(
    optimizer: Any, named: dict[str, nn.Parameter], steps: range, rate_at: Callable[[int], float] = lambda step: 1.0
) -> None:
    for step in steps:
        set_learning_rate(optimizer, rate_at(step))
        for number, (name, weight) in enumerate(named.items()):
            weight.grad = None if name == "unused" else gradient(weight, step, number)
        optimizer.step()


def assert_close(ours: dict[str, nn.Parameter], theirs: dict[str, nn.Parameter], rtol: float = 0.0) -> None:
    for name, weight in ours.items():
        if rtol:
            torch.testing.assert_close(weight, theirs[name], rtol=rtol, atol=rtol * 1e-2)
        else:
            assert weight.equal(theirs[name]), name


# ---- Prodigy


@pytest.mark.parametrize(
    ("keys", "settings"),
    [
        ({}, {"use_bias_correction": True}),
        ({"slice": 11, "d0": 1e-4, "bias_correction": False}, {"slice_p": 11, "d0": 1e-4}),
        ({"d_coef": 2.0, "growth_rate": 1.5, "bias_correction": False}, {"d_coef": 2.0, "growth_rate": 1.5}),
        (
            {"safeguard_warmup": True, "d0": 1e-4},
            {"safeguard_warmup": True, "use_bias_correction": True, "d0": 1e-4},
        ),
    ],
)
@pytest.mark.parametrize("rate_at", [lambda step: 1.0, lambda step: min(step / 5, 1.0)], ids=["constant", "warm-up"])
def test_prodigy_steps_as_the_package_does(
    keys: dict[str, Any], settings: dict[str, Any], rate_at: Callable[[int], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums are rounded in another order, and steps of 1e-6 on weights of 0.1 are rounded to some percent of them."""
    package = pytest.importorskip("prodigyopt")
    monkeypatch.setattr(prodigy, "UNDO_BYTES", 4000)  # several groups
    ours, theirs = weights(), weights()
    own, other = build("prodigy", ours, prodigy=keys), package.Prodigy(theirs.values(), **ADAM, **settings)
    tolerance = 1e-4 if "d0" in keys else 2e-3
    for step in range(40):
        take_steps(own, ours, range(step, step + 1), rate_at)
        take_steps(other, theirs, range(step, step + 1), rate_at)
        found = estimates_of(own)["d"].item() if step else None
        assert found is None or found == pytest.approx(other.param_groups[0]["d"], rel=tolerance)
    assert estimates_of(own)["d"].item() > 20 * keys.get("d0", 1e-6), "or nothing was estimated"
    assert_close(ours, theirs, rtol=10 * tolerance)
    assert not ours["1.A"].equal(weights()["1.A"]) and ours["unused"].equal(weights()["unused"])


def test_what_is_left_out_is_as_in_the_package() -> None:
    """A run leaves nothing out, and trials and benchmarks do. The correction for having begun at zero is on here."""
    package = pytest.importorskip("prodigyopt")
    ours, theirs = (inspect.signature(each).parameters for each in (prodigy.Prodigy, package.Prodigy))
    own = {name: each.default for name, each in ours.items() if each.default is not each.empty}
    assert own == {name: theirs[name].default for name in own} | {"use_bias_correction": True}


def test_what_is_left_out_of_muon_is_as_in_torch() -> None:
    own = {name: each.default for name, each in inspect.signature(BUILDERS["muon"]).parameters.items()}
    of_torch = {
        name: inspect.signature(kind).parameters[name].default
        for kind, names in (
            (torch.optim.Muon, ("momentum", "nesterov", "ns_steps")),
            (torch.optim.AdamW, ("betas", "eps")),
        )
        for name in names
    }
    assert {name: own[name] for name in of_torch} == of_torch and own["in_block"] is True


def test_a_warm_up_safeguards_the_estimate_unless_told_otherwise() -> None:
    """Without a warm-up the learning rate is part of it, and with one it is not."""
    found = {}
    for steps, told in ((0, None), (0, False), (0, True), (5, None), (5, True), (5, False)):
        named, changes = weights(), {} if told is None else {"safeguard_warmup": told}
        optimizer = build("prodigy", named, lr_warmup_steps=steps, prodigy={"d0": 1e-4, **changes})
        take_steps(optimizer, named, range(20), lambda step: 0.5)
        found[steps, told] = estimates_of(optimizer)["d"].item()
    assert found[0, None] == found[0, False] == found[5, False] != found[5, True] == found[5, None] == found[0, True]


class NoWaiting(TorchDispatchMode):
    """Refuses to read a value of a tensor, which waits for a device."""

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(operator), "waited for the device"
        return operator(*arguments, **(keywords or {}))


@pytest.mark.parametrize("name", ["prodigy", "adamw_schedule_free", "adafactor", "muon"])
def test_steps_after_the_first_do_not_wait_for_the_device(name: str) -> None:
    if name == "adamw_schedule_free":
        pytest.importorskip("schedulefree")
    named = weights()
    optimizer = build(name, named)
    for step in range(3):
        for number, weight in enumerate(named.values()):
            weight.grad = gradient(weight, step, number)
        optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
        if step == 0 and name != "prodigy":
            optimizer.step()
            continue
        with NoWaiting():
            optimizer.step()


def test_prodigy_skips_a_spoiled_step_as_if_it_had_not_been() -> None:
    ours, skipping = weights(), weights()
    take_steps(build("prodigy", ours), ours, range(6))
    optimizer = build("prodigy", skipping)
    for step in (0, 1, 2, None, 3, 4, 5):
        optimizer.found_inf = torch.tensor(float(step is None))  # type: ignore[attr-defined]
        if step is not None:
            take_steps(optimizer, skipping, range(step, step + 1))
            continue
        for weight in skipping.values():
            weight.grad = torch.full_like(weight, float("nan")) if weight.grad is not None else None
        optimizer.step()
    assert_close(skipping, ours)


# ---- optimizers of libraries


def test_schedule_free_adamw_steps_as_the_package_does(monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("schedulefree")
    monkeypatch.setattr(of_libraries, "UNDO_BYTES", 8000)
    ours, theirs = weights(), weights()
    own = build("adamw_schedule_free", ours, schedule_free={"r": 0.5, "weight_lr_power": 1.0})
    other = package.AdamWScheduleFree(theirs.values(), **ADAM, r=0.5, weight_lr_power=1.0)
    other.train()
    for optimizer, named in ((own, ours), (other, theirs)):
        take_steps(optimizer, named, range(8), lambda step: 1e-2 * min(step / 4, 1.0))
    assert_close(ours, theirs)
    average = AverageOfOptimizer(ours, own)
    before = {name: weight.detach().clone() for name, weight in ours.items()}
    other.eval()
    with average.in_place():
        assert_close(ours, theirs)
        assert not ours["0.A"].equal(before["0.A"]), "the average is another place"
        with average.in_place():
            assert_close(ours, theirs)
    assert all(weight.equal(before[name]) for name, weight in ours.items()), "and back, bit for bit"
    assert all(tensor.equal(theirs[name]) for name, tensor in average.tensors().items())


def test_schedule_free_prodigy_steps_as_the_package_does() -> None:
    package = pytest.importorskip("prodigyplus")
    ours, theirs = weights(), weights()
    own = build("prodigy_schedule_free", ours, prodigy={"d0": 1e-4, "d_coef": 2.0})
    other = package.ProdigyPlusScheduleFree(theirs.values(), **ADAM, d0=1e-4, d_coef=2.0, split_groups=False)
    take_steps(own, ours, range(8))
    take_steps(other, theirs, range(8))
    assert_close(ours, theirs)
    assert estimates_of(own)["d"].item() == other.param_groups[0]["d"] > 1e-4
    other.eval()
    average = AverageOfOptimizer(ours, own).tensors()
    assert all(tensor.equal(theirs[name]) for name, tensor in average.items())


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_adafactor_steps_as_transformers_does(momentum: float | None) -> None:
    from transformers.optimization import Adafactor

    ours, theirs = weights(), weights()
    keys = {"momentum": momentum, "decay_rate": -0.7, "clip_threshold": 0.5}
    own = build("adafactor", ours, adafactor=keys)
    other = Adafactor(
        theirs.values(), lr=1.0, beta1=momentum, decay_rate=-0.7, clip_threshold=0.5, weight_decay=0.1,
        scale_parameter=False, relative_step=False,
    )  # fmt: skip
    for optimizer, named in ((own, ours), (other, theirs)):
        take_steps(optimizer, named, range(6), lambda step: 1e-2 / (1 + step))
    assert_close(ours, theirs)


def test_muon_steps_matrices_of_blocks_and_adamw_the_rest() -> None:
    for shape, in_block in (((24, 40), True), ((24, 40), False), ((24,), True)):
        begun = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        ours, theirs = ({"w": nn.Parameter(begun.clone())} for _ in range(2))
        own = build("muon", ours, in_block, muon={"momentum": 0.9, "nesterov": False, "ns_steps": 4})
        other: torch.optim.Optimizer = torch.optim.AdamW(theirs.values(), fused=True, **ADAM)  # type: ignore[arg-type]
        if in_block and len(shape) == 2:
            other = torch.optim.Muon(
                theirs.values(), momentum=0.9, nesterov=False, ns_steps=4, weight_decay=0.1,
                adjust_lr_fn="match_rms_adamw",
            )  # fmt: skip
        for optimizer, named in ((own, ours), (other, theirs)):
            take_steps(optimizer, named, range(4), lambda step: 1e-3)
        assert_close(ours, theirs)
        assert not ours["w"].equal(begun)


def test_a_step_of_muon_is_as_large_as_one_of_adamw() -> None:
    """Root mean squares of 0.2 to 0.4 of the rate in the paper of this scaling (arXiv 2502.16982, section 2.2)."""
    named = {"w": nn.Parameter(torch.zeros(64, 256))}
    named["w"].grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    build("muon", named, learning_rate=1e-3, adam_weight_decay=0.0).step()
    assert 1e-4 < named["w"].detach().square().mean().sqrt().item() < 5e-4


@pytest.mark.parametrize("name", ["prodigy", "adamw_schedule_free", "prodigy_schedule_free"])
def test_estimates_and_averages_go_on_from_a_checkpoint(name: str) -> None:
    """What is of the run as a whole, too: d, the sums of weights, the number of steps."""
    for module in {"adamw_schedule_free": ["schedulefree"], "prodigy_schedule_free": ["prodigyplus"]}.get(name, []):
        pytest.importorskip(module)
    rate = 1e-2 if name == "adamw_schedule_free" else 1.0
    straight, halves = weights(), weights()
    straight_optimizer = build(name, straight)
    take_steps(straight_optimizer, straight, range(10), lambda step: rate)
    first = build(name, halves)
    take_steps(first, halves, range(5), lambda step: rate)
    tensors, plain = optimizer_state(first, halves)
    second = build(name, halves)
    restore_optimizer_state(second.state, halves, {key: each.clone() for key, each in tensors.items()}, plain)
    take_steps(second, halves, range(5, 10), lambda step: rate)
    assert_close(halves, straight)
    assert estimates_of(second) == estimates_of(straight_optimizer)
    if name != "prodigy":
        averages = (AverageOfOptimizer(*each).tensors() for each in ((halves, second), (straight, straight_optimizer)))
        one, other = averages
        assert all(one[key].equal(other[key]) for key in one)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("adamw_schedule_free", "schedulefree", "schedulefree"),
        ("prodigy_schedule_free", "prodigyplus", "prodigy-plus-schedule-free"),
    ],
)
def test_a_missing_package_is_named_before_the_long_work(
    name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ConfigError, match=rf"(?s){name}.*pip install {package}"):
        check_optimizer(name)
