"""AdamW's step in one kernel on a GPU: against AdamW in fp64, the libraries' own, and itself in parts and resumed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixtune.engine.rounding import Draw, noise_at, round_into, round_stochastically
from pixtune.engine.sharding import Rows
from pixtune.plan.optimizers import KERNEL, SEPARATE
from pixtune.trained import adamw_step, optim
from pixtune.trained.optimizers import BUILDERS
from pixtune.trained.skipped_step import is_spoiled
from pixtune.trained.step_trial import largest_error, step_obstacle
from pixtune.trained.weight_update import WeightUpdate

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
SHAPES = {"even": (16, 512), "odd": (1037, 129), "bias": (5000,), "short": (70,), "one": (1,)}
RATE, DECAY, BETAS, EPSILON = 1e-3, 0.1, (0.9, 0.999), 1e-8
KINDS = {"rounded": torch.bfloat16, "masters": torch.bfloat16, "fp32": torch.float32}


def random(name: str, step: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    return (0.02 * torch.randn(SHAPES[name], generator=generator)).to(GPU, dtype)


def weights_of(kind: str) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(random(name, 0, KINDS[kind])) for name in SHAPES}


def updating(
    weights: dict[str, nn.Parameter], optimizer: str, kind: str, form: str | None, done: int = 0
) -> WeightUpdate:
    def build(_: str, parameters: Any) -> optim.Optimizer:
        return BUILDERS[optimizer](parameters, lr=RATE, weight_decay=DECAY, betas=BETAS, eps=EPSILON)

    return WeightUpdate(weights, build, 7, done, kind == "masters", form=form)


def take_steps(update: WeightUpdate, kind: str, steps: range, spoiled: int | None = None) -> None:
    factor = torch.tensor(0.5, device=GPU)
    for step in steps:
        for name in SHAPES:
            gradient = random(name, step + 1, KINDS[kind])
            loss = torch.tensor(math.inf if step == spoiled else 0.0, device=GPU)
            update.step_weight(name, gradient, factor, is_spoiled(loss, loss))
        update.end_step()


def held(update: WeightUpdate, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    states, _ = optim.optimizer_state(update, weights)
    return {**{name: update.truest(name).clone() for name in weights}, **{k: v.clone() for k, v in states.items()}}


def dequantized(values: dict[str, Tensor], path: str) -> Tensor:
    """A moment in fp32, by its state's path `NAME/state1` or `NAME/state2`."""
    number = path[-1]
    scales = values[f"{path[:-6]}absmax{number}"].repeat_interleave(256)
    codes = values[path].flatten().long()
    return values[f"{path[:-6]}qmap{number}"][codes] * scales[: len(codes)]


def test_the_kernel_runs_here() -> None:
    assert step_obstacle(GPU) is None
    for optimizer in ("adamw", "adamw_8bit"):
        print(f"{optimizer}: {largest_error(optimizer, GPU):.2e}")


@pytest.mark.parametrize("kind", KINDS)
def test_32_bit_moments_are_those_of_fp64(kind: str) -> None:
    """AdamW by hand (Loshchilov and Hutter, algorithm 2); rounding is done by the noise that the step draws."""
    weights = weights_of(kind)
    update = updating(weights, "adamw", kind, KERNEL)
    exact = {name: weight.detach().double() for name, weight in weights.items()}
    firsts = {name: torch.zeros_like(value) for name, value in exact.items()}
    seconds = {name: torch.zeros_like(value) for name, value in exact.items()}
    for step in range(4):
        for name, value in exact.items():
            gradient = random(name, step + 1, KINDS[kind]).double() * 0.5
            firsts[name] = BETAS[0] * firsts[name] + (1 - BETAS[0]) * gradient
            seconds[name] = BETAS[1] * seconds[name] + (1 - BETAS[1]) * gradient**2
            size = (seconds[name] / (1 - BETAS[1] ** (step + 1))).sqrt() + EPSILON
            moved = value * (1 - RATE * DECAY) - RATE * firsts[name] / (1 - BETAS[0] ** (step + 1)) / size
            if kind == "rounded":
                down = ((moved.float().view(torch.int32)) & -65536).view(torch.float32)
                take_one(update, name, step, kind)
                found = weights[name].detach().float()
                up = (down.view(torch.int32) + 65536).view(torch.float32)
                assert ((found == down) | (found == up)).float().mean() > 0.999, "one of both neighbours"
                exact[name] = found.double()
            else:
                exact[name] = moved
                take_one(update, name, step, kind)
                torch.testing.assert_close(update.truest(name).double(), moved, rtol=1e-5, atol=1e-7)
            state = update.state[weights[name]]
            torch.testing.assert_close(state["exp_avg"].double(), firsts[name], rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(state["exp_avg_sq"].double(), seconds[name], rtol=1e-5, atol=1e-14)
        update.end_step()


def take_one(update: WeightUpdate, name: str, step: int, kind: str) -> None:
    gradient, sound = random(name, step + 1, KINDS[kind]), torch.zeros((), device=GPU)
    update.step_weight(name, gradient, torch.tensor(0.5, device=GPU), sound)


@pytest.mark.parametrize("looks_up", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_one_kernel_does_what_several_do(
    optimizer: str, kind: str, looks_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of bitsandbytes' codes nearly all are the same; others are neighbours."""
    monkeypatch.setattr(adamw_step, "LOOKS_UP", looks_up)
    found = {}
    for form in (KERNEL, SEPARATE):
        weights = weights_of(kind)
        update = updating(weights, optimizer, kind, form)
        take_steps(update, kind, range(3), spoiled=1)
        found[form] = held(update, weights)
    start = {name: weight.detach().float() for name, weight in weights_of(kind).items()}
    assert found[KERNEL].keys() == found[SEPARATE].keys()
    for name, ours in found[KERNEL].items():
        theirs = found[SEPARATE][name]
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
        if ours.dtype == torch.uint8:
            differing = (ours != theirs).float().mean()
            print(f"{name}: {differing:.2%} of the codes differ")
            assert differing < 0.02, name
            moments = [dequantized(each, name) for each in found.values()]
            assert (moments[0] - moments[1]).norm() < 0.01 * moments[1].norm(), name
        elif name in start:
            moved = (theirs.float() - start[name]).norm()
            assert (ours.float() - theirs.float()).norm() < (0.02 if optimizer == "adamw_8bit" else 1e-3) * moved + 1e-6
        elif "/" in name:
            tolerance = 0.02 if "absmax" in name else 1e-4  # of codes that differ
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-9)


def test_8_bit_codes_are_the_nearest_levels() -> None:
    """By hand, from moments in fp64 after one step: the first has zero moments before it."""
    weights = weights_of("rounded")
    update = updating(weights, "adamw_8bit", "rounded", KERNEL)
    take_steps(update, "rounded", range(1))
    for name in ("even", "odd", "bias"):
        gradient = (random(name, 1, torch.bfloat16).double() * 0.5).flatten()
        state = update.state[weights[name]]
        for number, moment in ((1, (1 - BETAS[0]) * gradient), (2, (1 - BETAS[1]) * gradient**2)):
            padded = torch.nn.functional.pad(moment, (0, -len(moment) % 256)).view(-1, 256)
            peak = padded.abs().amax(1)
            torch.testing.assert_close(state[f"absmax{number}"].double(), peak, rtol=1e-5, atol=0.0)
            ratio = (padded / peak[:, None]).flatten()[: len(moment)]
            levels = state[f"qmap{number}"].double()
            distance = (ratio[:, None] - levels[None, :]).abs()
            codes = state[f"state{number}"].flatten().long()
            excess = distance.gather(1, codes[:, None]).squeeze(1) - distance.amin(1)
            assert excess.max() < 1e-6, (name, number)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_spoiled_step_changes_nothing_and_the_next_one_does(optimizer: str, kind: str) -> None:
    weights = weights_of(kind)
    update = updating(weights, optimizer, kind, KERNEL)
    take_steps(update, kind, range(2))
    before = held(update, weights)
    take_steps(update, kind, range(2, 3), spoiled=2)
    after = held(update, weights)
    assert [name for name in before if not before[name].equal(after[name])] == []
    take_steps(update, kind, range(3, 4))
    later = held(update, weights)
    assert all(not before[name].equal(later[name]) for name in ("even", "odd", "bias"))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_resumed_is_uninterrupted_to_the_bit_and_either_form_goes_on(optimizer: str) -> None:
    weights = weights_of("rounded")
    straight = updating(weights, optimizer, "rounded", KERNEL)
    take_steps(straight, "rounded", range(4))
    results = {}
    for form in (KERNEL, SEPARATE):
        first = weights_of("rounded")
        begun = updating(first, optimizer, "rounded", KERNEL)
        take_steps(begun, "rounded", range(2))
        states, plain = optim.optimizer_state(begun, first)
        second = weights_of("rounded")
        resumed = updating(second, optimizer, "rounded", form, done=2)
        for name in SHAPES:
            own = {path: state.clone() for path, state in states.items() if path.startswith(f"{name}/")}
            resumed.restore(name, begun.truest(name), own, plain.get(name, {}))
        take_steps(resumed, "rounded", range(2, 4))
        results[form] = held(resumed, second)
    wanted = held(straight, weights)
    assert [name for name in wanted if not wanted[name].equal(results[KERNEL][name])] == []
    for name in SHAPES:
        torch.testing.assert_close(results[SEPARATE][name].float(), wanted[name].float(), rtol=0.02, atol=3e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_parts_are_stepped_as_whole_weights_bit_for_bit(optimizer: str) -> None:
    """Rows of 512 numbers: the blocks of each part are those of the whole."""
    weights = weights_of("rounded")
    whole = updating(weights, optimizer, "rounded", KERNEL)
    take_steps(whole, "rounded", range(3))
    joined = []
    for start, end in ((0, 5), (5, 11), (11, 16)):
        part = {"even": nn.Parameter(random("even", 0, torch.bfloat16)[start:end].clone())}
        update = updating(part, optimizer, "rounded", KERNEL)
        update._rows["even"] = Rows(SHAPES["even"], start, end)
        if optimizer == "adamw_8bit":  # as `build_optimizer` decides by the whole weight
            update._optimizers["even"].inner.args.min_8bit_size = 0  # type: ignore[attr-defined]
        for step in range(3):
            gradient = random("even", step + 1, torch.bfloat16)[start:end].contiguous()
            update.step_weight("even", gradient, torch.tensor(0.5, device=GPU), torch.zeros((), device=GPU))
            update.end_step()
        joined.append(part["even"].detach())
    assert torch.cat(joined).equal(weights["even"].detach())


def test_rounding_is_that_of_the_cpu_to_the_bit() -> None:
    values = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    values[:3] = torch.tensor([math.inf, -math.inf, math.nan])
    for draw in (Draw(0), Draw(2**63 - 1, 12345), Draw(0x8000000080000000 >> 1, 2**32 - 50_000), Draw(1, 16)):
        target = torch.empty(len(values), dtype=torch.bfloat16, device=GPU)
        round_into(target, values.to(GPU), draw)
        wanted = round_stochastically(values, noise_at(draw, len(values), torch.device("cpu")))
        assert target.cpu()[3:].equal(wanted[3:]) and target.cpu()[:2].equal(wanted[:2]) and bool(target[2].isnan())
        assert noise_at(draw, 1000, GPU).cpu().equal(noise_at(draw, 1000, torch.device("cpu")))


def test_no_step_waits_or_takes_memory() -> None:
    weights = weights_of("rounded")
    update = updating(weights, "adamw_8bit", "rounded", KERNEL)
    take_steps(update, "rounded", range(2))
    gradients = {name: random(name, 9, torch.bfloat16) for name in SHAPES}
    factor, sound = torch.tensor(0.5, device=GPU), torch.zeros((), device=GPU)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, gradient in gradients.items():
            update.step_weight(name, gradient, factor, sound)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() == before
