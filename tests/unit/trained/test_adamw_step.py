"""AdamW's step in one kernel: by Triton's interpreter what it computes, and anywhere which weights it steps.

    TRITON_INTERPRET=1 python -m pytest tests/unit/trained/test_adamw_step.py

`tests/gpu/test_optimizer_kernel.py` runs what a GPU really does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixtune import assembly
from pixtune.engine import kernels, rounding
from pixtune.plan.optimizers import KERNEL, SEPARATE
from pixtune.randomness import draw_key
from pixtune.trained import adamw_step, full_weights, step_trial
from pixtune.trained.full_weights import FullWeights
from pixtune.trained.host_states import HostStates
from pixtune.trained.optimizers import BUILDERS
from pixtune.trained.weight_update import WeightUpdate
from tests import kernel_steps
from tests.kernel_steps import KINDS, OPTIMIZERS
from tests.unit.engine.tiny import late_lane
from tests.unit.plan.test_all_weights import CONFIG
from tests.unit.trained.test_full_weights import adamw, adamw_8bit, assert_same, train

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None,
    reason="needs Triton and TRITON_INTERPRET=1",
)


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has the kernels run on a CPU."""
    for module in (adamw_step, rounding):
        monkeypatch.setattr(module, "has_triton", lambda tensor: True)
    yield


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_32_bit_moments_are_those_of_fp64(kind: str, by_kernel: None) -> None:
    kernel_steps.check_exact(kind, CPU)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_kernel_does_what_several_do(optimizer: str, kind: str, by_kernel: None) -> None:
    kernel_steps.check_against_separate_kernels(optimizer, kind, CPU)


@interpreted
def test_8_bit_codes_are_the_nearest_levels(by_kernel: None) -> None:
    kernel_steps.check_codes(CPU)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_spoiled_step_changes_nothing_and_the_next_one_does(optimizer: str, kind: str, by_kernel: None) -> None:
    kernel_steps.check_spoiled(optimizer, kind, CPU)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_all_weights_at_once_are_what_one_by_one_makes_them(
    optimizer: str, kind: str, by_kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw_step, "TURNS", 3)  # weights of several programs
    kernel_steps.check_at_once(optimizer, kind, CPU)


@interpreted
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_is_uninterrupted_to_the_bit(optimizer: str, by_kernel: None) -> None:
    kernel_steps.check_resumed(optimizer, CPU)


@interpreted
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parts_are_stepped_as_whole_weights_bit_for_bit(optimizer: str, by_kernel: None) -> None:
    kernel_steps.check_parts(optimizer, CPU)


@interpreted
@pytest.mark.parametrize(("kind", "build"), [("rounded", adamw_8bit), ("master", adamw)])
def test_within_the_backward_pass_and_from_host_memory_it_is_the_plain_step(
    kind: str, build: Any, by_kernel: None
) -> None:
    plain = train(kind, 0.01, build, form=KERNEL, num_steps=2)
    host = HostStates(CPU, ahead_bytes=0, make_lane=late_lane)
    assert_same(train(kind, 0.01, build, fused=True, host=host, form=KERNEL, num_steps=2), plain)
    assert host.host_bytes > 2**16


@interpreted
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.0), (0.0, 0.0)])
def test_a_moment_without_memory_is_the_gradient(
    betas: tuple[float, float], by_kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_steps, "BETAS", betas)
    kernel_steps.check_against_separate_kernels("adamw", "fp32", CPU)


@interpreted
def test_gradients_of_zero_and_of_any_layout_or_format_are_stepped(by_kernel: None) -> None:
    """Moments of zeros stay so; a gradient's transpose, slice and fp32 or fp16 form are that gradient."""
    random = torch.randn(64, 80, generator=torch.Generator().manual_seed(0)).bfloat16()
    forms = [random, random.float(), random.t().contiguous().t(), torch.stack([random, random], 2)[:, :, 0]]
    found = []
    for gradient in (*forms, torch.zeros(64, 80)):
        weights = {"w": nn.Parameter(random.clone())}
        update = WeightUpdate(weights, lambda _, given: kernel_steps.build("adamw_8bit", given), 0, 0, form=KERNEL)
        update.step_weight("w", gradient, None, torch.zeros(()))
        found.append((weights["w"].detach().clone(), update.state[weights["w"]]))
    assert all(weight.equal(found[0][0]) for weight, _ in found[1:4])
    zeros = found[4][1]
    assert not zeros["absmax1"].any() and not zeros["absmax2"].any()
    assert (zeros["state1"] == 127).all() and (zeros["state2"] == 0).all()
    decayed = random.float() * (1 - kernel_steps.RATE * kernel_steps.DECAY)
    assert (found[4][0].float() - decayed).abs().max() < 2**-6, "decay alone"


# ---- which form of a step


def test_without_triton_separate_kernels_step() -> None:
    """The same numbers, whichever form was planned: a CPU has no kernel."""
    found = [kernel_steps.Stepped("adamw_8bit", "rounded", form, CPU).take(2).held() for form in (KERNEL, SEPARATE)]
    assert all(tensor.equal(found[1][name]) for name, tensor in found[0].items())


def test_only_adamw_upon_plain_memory_is_stepped_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw_step, "has_triton", lambda tensor: True)
    weight = nn.Parameter(torch.zeros(4, 6))
    for name, can in (("adamw", True), ("adamw_8bit", True), ("adafactor", False), ("muon", False)):
        optimizer = BUILDERS[name]([nn.Parameter(torch.zeros(4, 6))], lr=1e-3)
        assert adamw_step.can_step(optimizer, weight) == can, name
        assert not adamw_step.can_step(optimizer, weight.t()), name


@pytest.mark.parametrize("shape", [(5000,), (16, 512), (7,)])
def test_states_begin_as_the_optimizer_would_make_them(shape: tuple[int, ...]) -> None:
    made, stepped = (BUILDERS["adamw_8bit"]([nn.Parameter(torch.ones(shape))], lr=0.0) for _ in range(2))
    (stand_in,), (parameter,) = made.param_groups[0]["params"], stepped.param_groups[0]["params"]
    stand_in.data = torch.empty(0)
    made.begin(stand_in, torch.ones(shape).bfloat16())  # type: ignore[attr-defined]
    assert stand_in.numel() == 0
    parameter.grad = torch.zeros(shape)
    stepped.step()
    ours, theirs = made.state[stand_in], stepped.state[parameter]
    assert ours.keys() == theirs.keys() and ours["step"] == 0
    for key, tensor in ours.items():
        if isinstance(tensor, Tensor):
            assert tensor.shape == theirs[key].shape and tensor.dtype == theirs[key].dtype, key


def test_a_run_that_knows_no_form_draws_from_torchs_generator() -> None:
    """To the bit as before there were forms, written out by hand."""
    start, gradient = (torch.randn(16, 8, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (0, 1))
    weights = {"w": nn.Parameter(start.clone())}
    update = WeightUpdate(weights, lambda _, given: kernel_steps.build("adamw", given), 3, first_step=5, form=None)
    update.step_weight("w", gradient, None, torch.zeros(()))
    precise = nn.Parameter(start.float())
    precise.grad = gradient.float()
    kernel_steps.build("adamw", [precise]).step()
    generator = torch.Generator().manual_seed(draw_key(3, "rounding", 5, "w"))
    noise = torch.randint(0, 1 << 16, (16, 8), generator=generator, dtype=torch.int32)
    wanted = ((precise.detach().view(torch.int32) + noise) & -65536).view(torch.float32).bfloat16()
    assert weights["w"].equal(wanted)


def accelerator(device: str) -> Any:
    return SimpleNamespace(device=torch.device(device))


def planned(form: str | None) -> Any:
    return SimpleNamespace(step_form=form)


def test_a_run_plans_the_kernel_where_all_its_processes_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    others: list[str | None] = []
    monkeypatch.setattr(assembly, "gather_object", lambda own: [*own, *others])
    monkeypatch.setattr(assembly, "step_obstacle", lambda device: None)
    assert assembly.step_form_of(CONFIG, accelerator("cuda"), None) == KERNEL
    assert assembly.step_form_of(CONFIG, accelerator("cuda"), planned(SEPARATE)) == KERNEL
    assert assembly.step_form_of(CONFIG, accelerator("cuda"), planned(None)) is None, "it goes on as it was"
    assert assembly.step_form_of(CONFIG, accelerator("cpu"), None) == SEPARATE
    assert not caplog.messages
    others.append("RuntimeError: no compiler")
    assert assembly.step_form_of(CONFIG, accelerator("cuda"), None) == SEPARATE
    assert "no compiler" in caplog.text and "takes longer" in caplog.text


def test_a_planned_kernel_that_fails_here_is_replaced_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    choose: Any = FullWeights._step_form
    assert choose(None, SEPARATE, CPU) == SEPARATE and choose(None, None, CPU) is None
    assert choose(None, KERNEL, CPU) == SEPARATE and "Triton does not run here" in caplog.text
    monkeypatch.setattr(full_weights, "step_obstacle", lambda device: None)
    assert choose(None, KERNEL, CPU) == KERNEL


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (0.01, None),
        (0.5, "wrong by 0.5 times"),
        (float("nan"), "wrong by nan"),
        (TypeError("odd\nmore"), "TypeError: odd"),
    ],
)
def test_the_trial_reports_what_is_wrong(outcome: Any, told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(optimizer: str, device: torch.device) -> float:
        if isinstance(outcome, Exception):
            raise outcome
        return float(outcome)

    monkeypatch.setitem(sys.modules, "triton.compiler", SimpleNamespace(CompilationError=KeyError))
    monkeypatch.setattr(step_trial, "try_triton", lambda device: None)
    monkeypatch.setattr(kernels.TRITON, "works", True)
    monkeypatch.setattr(step_trial, "largest_error", error)
    found = step_trial.step_obstacle.__wrapped__(torch.device("cuda"))
    assert found is None if told is None else found is not None and told in found and "more" not in found


def test_the_trial_measures_how_far_steps_lead_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU both forms are the same; with one twice as far as the other, they are one way of the other apart."""
    assert step_trial.largest_error("adamw", CPU) == 0
    stepped: Any = step_trial._stepped

    def too_far(optimizer: str, form: str, device: torch.device) -> dict[str, Tensor]:
        start = {name: step_trial._random(name, 0, device).bfloat16().float() for name in step_trial.SHAPES}
        ways: dict[str, Tensor] = stepped(optimizer, form, device)
        return {name: start[name] + (2 if form == KERNEL else 1) * (way - start[name]) for name, way in ways.items()}

    monkeypatch.setattr(step_trial, "_stepped", too_far)
    assert step_trial.largest_error("adamw", CPU) == pytest.approx(1.0)
