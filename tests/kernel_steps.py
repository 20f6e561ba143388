"""Checks of AdamW's step in one kernel: against AdamW in fp64, the libraries' own, and itself in parts and resumed.

`tests/gpu/test_optimizer_kernel.py` runs them on a GPU,
`tests/unit/trained/test_adamw_step.py` in Triton's interpreter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.rounding import Draw, noise_at, round_into, round_stochastically
from pixtune.engine.sharding import Rows
from pixtune.plan.optimizers import KERNEL, SEPARATE
from pixtune.trained import optim
from pixtune.trained.optimizers import BUILDERS
from pixtune.trained.skipped_step import is_spoiled
from pixtune.trained.weight_update import WeightUpdate

SHAPES = {"even": (16, 512), "odd": (47, 129), "bias": (5000,), "short": (70,), "one": (1,)}
"""Whole programs of the kernel, blocks with gaps, and weights whose states bitsandbytes keeps in 32 bits."""
EIGHT_BIT = ("even", "odd", "bias")
RATE, DECAY, BETAS, EPSILON, FACTOR = 1e-3, 0.1, (0.9, 0.999), 1e-8, 0.5
KINDS = {"rounded": torch.bfloat16, "masters": torch.bfloat16, "fp32": torch.float32}
"""Formats of weights and gradients, by what becomes of a step."""
OPTIMIZERS = ("adamw", "adamw_8bit")


def random(name: str, step: int, kind: str, device: torch.device) -> Tensor:
    """The weight before step 1, as step 0, or its gradient in a step."""
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    return (0.02 * torch.randn(SHAPES[name], generator=generator)).to(device, KINDS[kind])


class Stepped:
    """Weights, and what steps them."""

    def __init__(
        self, optimizer: str, kind: str, form: str | None, device: torch.device, done: int = 0, at_once: bool = False
    ) -> None:
        self.kind, self.device, self.done, self.at_once = kind, device, done, at_once
        self.weights = {name: nn.Parameter(random(name, 0, kind, device)) for name in SHAPES}
        self.update = WeightUpdate(
            self.weights, lambda _, given: build(optimizer, given), 7, done, kind == "masters", form=form
        )

    def take(self, num_steps: int, spoiled: bool = False) -> Stepped:
        """Takes some steps; if spoiled, without numbers."""
        loss = torch.tensor(math.inf if spoiled else 0.0, device=self.device)
        for _ in range(num_steps):
            self.done += 1
            told = is_spoiled(loss, loss)
            if self.at_once:
                gradients = {name: random(name, self.done, self.kind, self.device) for name in SHAPES}
                self.update.step_weights(gradients, torch.tensor(FACTOR, device=self.device), told)
            else:
                for name in SHAPES:
                    self.take_one(name, told)
            self.update.end_step()
        return self

    def take_one(self, name: str, spoiled: Tensor) -> None:
        gradient = random(name, self.done, self.kind, self.device)
        self.update.step_weight(name, gradient, torch.tensor(FACTOR, device=self.device), spoiled)

    def held(self) -> dict[str, Tensor]:
        """What a checkpoint would hold: weights by their names, states by `NAME/STATE`."""
        states, _ = optim.optimizer_state(self.update, self.weights)
        truest = {name: self.update.truest(name) for name in self.weights}
        return {name: tensor.detach().clone() for name, tensor in (truest | states).items()}


def build(optimizer: str, parameters: Any) -> optim.Optimizer:
    return BUILDERS[optimizer](parameters, lr=RATE, weight_decay=DECAY, betas=BETAS, eps=EPSILON)


def check_exact(kind: str, device: torch.device) -> None:
    """32-bit moments against AdamW by hand in fp64 (Loshchilov and Hutter 2017, algorithm 2)."""
    stepped, sound = Stepped("adamw", kind, KERNEL, device), torch.zeros((), device=device)
    exact = {name: weight.detach().double() for name, weight in stepped.weights.items()}
    firsts, seconds = ({name: torch.zeros_like(value) for name, value in exact.items()} for _ in range(2))
    for step in range(1, 5):
        stepped.done = step
        for name, value in exact.items():
            gradient = FACTOR * random(name, step, kind, device).double()
            firsts[name] = BETAS[0] * firsts[name] + (1 - BETAS[0]) * gradient
            seconds[name] = BETAS[1] * seconds[name] + (1 - BETAS[1]) * gradient**2
            size = (seconds[name] / (1 - BETAS[1] ** step)).sqrt() + EPSILON
            exact[name] = value * (1 - RATE * DECAY) - RATE * firsts[name] / (1 - BETAS[0] ** step) / size
            stepped.take_one(name, sound)
            if kind == "rounded":
                down = (exact[name].float().view(torch.int32) & -65536).view(torch.float32)
                up = (down.view(torch.int32) + 65536).view(torch.float32)
                found = stepped.weights[name].detach().float()
                assert ((found == down) | (found == up)).float().mean() > 0.999, "one of both neighbours"
                exact[name] = found.double()
            else:
                found = stepped.update.truest(name).double()
                torch.testing.assert_close(found, exact[name], rtol=1e-5, atol=1e-7)
                nearest = stepped.update.truest(name).to(KINDS[kind])
                if device.type == "cuda":  # the interpreter (3.6) cuts off instead
                    assert stepped.weights[name].equal(nearest), "the copy, rounded to the nearest"
            state = stepped.update.state[stepped.weights[name]]
            torch.testing.assert_close(state["exp_avg"].double(), firsts[name], rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(state["exp_avg_sq"].double(), seconds[name], rtol=1e-5, atol=1e-14)
        stepped.update.end_step()


def check_against_separate_kernels(optimizer: str, kind: str, device: torch.device) -> None:
    """Nearly all of bitsandbytes' codes are the same, and the others of nearly the same value."""
    found = {}
    for form in (KERNEL, SEPARATE):
        found[form] = Stepped(optimizer, kind, form, device).take(1).take(1, spoiled=True).take(1).held()
    start = {name: random(name, 0, kind, device).float() for name in SHAPES}
    assert found[KERNEL].keys() == found[SEPARATE].keys()
    for name, ours in found[KERNEL].items():
        theirs = found[SEPARATE][name]
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
        if ours.dtype == torch.uint8:
            assert (ours != theirs).float().mean() < 0.02, name
            moments = [dequantized(each, name) for each in found.values()]
            assert (moments[0] - moments[1]).norm() < 0.01 * moments[1].norm(), name
        elif name in start:
            moved = (theirs.float() - start[name]).norm()
            limit = (0.02 if optimizer == "adamw_8bit" else 1e-3) * moved + 1e-6
            if optimizer == "adamw" and kind == "rounded":  # a last bit of fp32 decides which way some are rounded
                assert (ours != theirs).sum() <= max(1, ours.numel() // 1000), name
                limit = 0.02 * moved
            assert (ours.float() - theirs.float()).norm() < limit, name
        else:
            tolerance = 0.02 if "absmax" in name else 1e-4  # of codes that differ
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-9)


def dequantized(values: dict[str, Tensor], path: str) -> Tensor:
    """A moment in fp32, by its state's path `NAME/state1` or `NAME/state2`."""
    number = path[-1]
    scales = values[f"{path[:-6]}absmax{number}"].repeat_interleave(256)
    codes = values[path].flatten().long()
    return values[f"{path[:-6]}qmap{number}"][codes] * scales[: len(codes)]


def check_codes(device: torch.device) -> None:
    """8-bit codes are the nearest levels, by hand from moments in fp64 after a first step."""
    stepped = Stepped("adamw_8bit", "rounded", KERNEL, device).take(1)
    for name in EIGHT_BIT:
        gradient = (random(name, 1, "rounded", device).double() * FACTOR).flatten()
        state = stepped.update.state[stepped.weights[name]]
        for number, moment in ((1, (1 - BETAS[0]) * gradient), (2, (1 - BETAS[1]) * gradient**2)):
            padded = torch.nn.functional.pad(moment, (0, -len(moment) % 256)).view(-1, 256)
            peak = padded.abs().amax(1)
            torch.testing.assert_close(state[f"absmax{number}"].double(), peak, rtol=1e-5, atol=0.0)
            ratio = (padded / peak[:, None]).flatten()[: len(moment)]
            distance = (ratio[:, None] - state[f"qmap{number}"].double()[None, :]).abs()
            codes = state[f"state{number}"].flatten().long()
            excess = distance.gather(1, codes[:, None]).squeeze(1) - distance.amin(1)
            assert excess.max() < 1e-6, (name, number)


def check_spoiled(optimizer: str, kind: str, device: torch.device) -> None:
    stepped = Stepped(optimizer, kind, KERNEL, device)
    before = stepped.take(2).held()
    after = stepped.take(1, spoiled=True).held()
    assert [name for name in before if not before[name].equal(after[name])] == []
    later = stepped.take(1).held()
    assert all(not before[name].equal(later[name]) for name in EIGHT_BIT)


def check_resumed(optimizer: str, device: torch.device) -> None:
    """Resumed is uninterrupted to the bit, all weights at once, and the other form goes on from these states."""
    straight = Stepped(optimizer, "rounded", KERNEL, device, at_once=True).take(4).held()
    begun = Stepped(optimizer, "rounded", KERNEL, device, at_once=True).take(2)
    states, plain = optim.optimizer_state(begun.update, begun.weights)
    for form in (KERNEL, SEPARATE):
        resumed = Stepped(optimizer, "rounded", form, device, done=2, at_once=True)
        for name in SHAPES:
            own = {path: state.clone() for path, state in states.items() if path.startswith(f"{name}/")}
            resumed.update.restore(name, begun.update.truest(name), own, plain.get(name, {}))
        found = resumed.take(2).held()
        if form == KERNEL:
            assert [name for name in straight if not straight[name].equal(found[name])] == []
        for name in SHAPES:
            torch.testing.assert_close(found[name].float(), straight[name].float(), rtol=0.02, atol=3e-4)


def check_parts(optimizer: str, device: torch.device) -> None:
    """Rows of 512 numbers, whose blocks are those of the whole, are stepped in parts to the bit as together."""
    whole = Stepped(optimizer, "rounded", KERNEL, device).take(3)
    joined = []
    for start, end in ((0, 5), (5, 11), (11, 16)):
        part = {"even": nn.Parameter(random("even", 0, "rounded", device)[start:end].clone())}
        update = WeightUpdate(part, lambda _, given: build(optimizer, given), 7, 0, form=KERNEL)
        update._rows["even"] = Rows(SHAPES["even"], start, end)
        if optimizer == "adamw_8bit":  # as `build_optimizer` decides by the whole weight
            update._optimizers["even"].inner.args.min_8bit_size = 0  # type: ignore[attr-defined]
        for step in range(1, 4):
            gradient = random("even", step, "rounded", device)[start:end].contiguous()
            factor, sound = torch.tensor(FACTOR, device=device), torch.zeros((), device=device)
            update.step_weight("even", gradient, factor, sound)
            update.end_step()
        joined.append(part["even"].detach())
    assert torch.cat(joined).equal(whole.weights["even"].detach())


def check_rounding(device: torch.device, count: int) -> None:
    """Rounding by the kernel is that of torch's operators on a CPU, to the bit."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    values[:3] = torch.tensor([math.inf, -math.inf, math.nan])
    for draw in (Draw(0), Draw(2**63 - 1, 12345), Draw(0x4000000080000000, 2**32 - count // 2), Draw(1, 16)):
        target = torch.empty(count, dtype=torch.bfloat16, device=device)
        round_into(target, values.to(device), draw)
        noise = noise_at(draw, count, torch.device("cpu"))
        assert noise_at(draw, count, device).cpu().equal(noise)
        wanted = round_stochastically(values, noise)
        assert target.cpu()[3:].equal(wanted[3:]) and target.cpu()[:2].equal(wanted[:2]) and bool(target[2].isnan())


def check_at_once(optimizer: str, kind: str, device: torch.device) -> None:
    """All weights in one launch of each kind are what single launches make them, spoiled steps among them.

    What a launch is given as numbers may be rounded otherwise in a table, which moves one number in hundreds over an
    edge: to another level, or another bf16 number.
    """
    found = []
    for at_once in (False, True):
        stepped = Stepped(optimizer, kind, KERNEL, device, at_once=at_once)
        found.append(stepped.take(2).take(1, spoiled=True).take(2).held())
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        other = found[1][name]
        is_exact = tensor.dtype == torch.float32 and optimizer == "adamw"
        limit = 1e-5 if is_exact and kind != "rounded" else 2.0**-7
        assert (tensor.float() - other.float()).norm() <= limit * (tensor.float().norm() + 1e-12), name
        if tensor.dtype != torch.float32:
            assert (tensor != other).sum() <= max(2, tensor.numel() // 100), name
