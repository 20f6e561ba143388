"""How small updates reach bf16 weights; stepping within the backward pass or from host memory changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixtune.engine.rounding import Draw, noise_at, round_stochastically
from pixtune.engine.together import Together
from pixtune.plan.optimizers import SEPARATE
from pixtune.storage.checkpoint import joined, sharded
from pixtune.trained import optim
from pixtune.trained.full_weights import FullWeights, gather_in_fp32
from pixtune.trained.fused_step import FusedStep
from pixtune.trained.host_states import HostStates
from pixtune.trained.optimizers import BUILDERS
from pixtune.trained.read_back import checksums
from pixtune.trained.skipped_step import is_spoiled
from pixtune.trained.weight_update import WeightUpdate
from tests.unit.engine.tiny import late_lane

LEARNING_RATE = 1e-4
SOUND = torch.zeros(())
Spoil = Callable[[Tensor], Tensor]
"""Changes a network's outputs, or the gradients that they get."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int) -> Tensor:
    return noise_at(Draw(0), count, torch.device("cpu"))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_rounding_takes_both_neighbours_and_is_right_on_average(sign: int, share: float) -> None:
    spacing = 2**-7  # of bf16 between 1 and 2
    values = torch.full((200_000,), sign * (1 + share * spacing))
    rounded = round_stochastically(values, noise(len(values))).float()
    assert set(rounded.tolist()) <= {float(sign), sign * (1 + spacing)}
    ups = (rounded != sign).float().mean().item()
    assert ups == pytest.approx(share, abs=0.006)  # five standard deviations


def test_what_bf16_holds_and_what_is_no_number_stays() -> None:
    exact = torch.randn(1000, generator=generator()).bfloat16()
    assert round_stochastically(exact.float(), noise(1000)).equal(exact)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    odd_bits = torch.cat([odd, torch.tensor([-1], dtype=torch.int32).view(torch.float32)])  # a NaN of all ones
    assert round_stochastically(odd_bits, noise(5)).float().tolist()[:2] == [float("inf"), -float("inf")]
    assert round_stochastically(odd_bits, noise(5)).isnan().tolist() == [False, False, True, False, True]


def weights() -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator(number)).bfloat16())
        for number, (name, shape) in enumerate({"a": (16, 8), "b": (8,), "unused": (3,)}.items())
    }


def adamw(name: str, parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.1, fused=True)


def muon(name: str, parameters: Any) -> optim.Optimizer:
    return BUILDERS["muon"](parameters, lr=LEARNING_RATE, weight_decay=0.1, in_block=name != "again.weight")


def gradient(name: str, weight: Tensor, step: int) -> Tensor:
    return torch.randn(weight.shape, generator=generator(1000 * step + ord(name[0]))).bfloat16()


def take_steps(update: WeightUpdate, named: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for name, weight in named.items():
            if name != "unused":
                update.step_weight(name, gradient(name, weight, step), None, SOUND)
        update.end_step()


def test_a_rounded_step_is_a_neighbour_of_the_exact_one() -> None:
    named, exact = weights(), weights()["a"].detach().float()
    stand_in = nn.Parameter(exact.clone())
    stand_in.grad = gradient("a", exact, 0).float()
    adamw("a", [stand_in]).step()
    take_steps(WeightUpdate(named, adamw, seed=0, first_step=0), named, range(1))
    down = (stand_in.detach().view(torch.int32) & -65536).view(torch.float32)
    up = ((stand_in.detach().view(torch.int32) & -65536) + 65536).view(torch.float32)
    result = named["a"].detach().float()
    assert ((result == down) | (result == up)).all()
    assert named["unused"].equal(weights()["unused"]), "no gradient, no step"


def test_updates_too_small_for_bf16_are_not_lost() -> None:
    """1000 steps of 1e-4 upon 1.0, whose neighbours in bf16 are 0.0078 and 0.0039 away."""
    named = {"w": nn.Parameter(torch.ones(4000).bfloat16())}
    update = WeightUpdate(named, lambda _, p: torch.optim.SGD(p, lr=1e-4, fused=True), seed=0, first_step=0)
    nearest = torch.ones(1).bfloat16()
    for _ in range(1000):
        update.step_weight("w", torch.ones(4000).bfloat16(), None, SOUND)
        update.end_step()
        nearest -= 1e-4
    assert nearest.item() == 1.0, "rounded to the nearest, nothing moves"
    assert named["w"].float().mean().item() == pytest.approx(0.9, abs=0.005)


@pytest.mark.parametrize("build", [adamw, muon])
def test_rounding_goes_on_where_it_was(build: Any) -> None:
    straight = weights()
    take_steps(WeightUpdate(straight, build, seed=3, first_step=0), straight, range(4))
    parts = weights()
    first = WeightUpdate(parts, build, seed=3, first_step=0)
    take_steps(first, parts, range(2))
    second = WeightUpdate(parts, build, seed=3, first_step=2)
    states, plain = optim.optimizer_state(first, parts)
    for name, weight in parts.items():
        own = {path: tensor for path, tensor in states.items() if path.startswith(f"{name}/")}
        second.restore(name, weight.detach().clone(), own, plain.get(name, {}))
    take_steps(second, parts, range(2, 4))
    assert all(parts[name].equal(straight[name]) for name in parts)

    other = weights()
    take_steps(WeightUpdate(other, build, seed=4, first_step=0), other, range(4))
    assert not other["a"].equal(straight["a"]), "another seed rounds otherwise"


def test_sums_of_gradients_are_fp32() -> None:
    """256 gradients of 1 and one of 1/2: a sum in bf16 stops at 256."""
    weight = nn.Parameter(torch.zeros(4).bfloat16())
    sums = gather_in_fp32({"w": weight})
    for scale in [1.0] * 257 + [0.5]:
        (weight.sum() * scale).backward()
        assert weight.grad is None, "kept twice"
    assert sums["w"].tolist() == [257.5] * 4


# ---- stepping elsewhere is stepping as usual


class Network(nn.Module):
    """Layers of different sizes, one weight that is used twice, and one that no loss depends on."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        sides = [256, 384, 256, 256]
        layers = [nn.Linear(a, b, dtype=dtype) for a, b in pairwise(sides)]
        self.layers = nn.ModuleList(layers)
        self.again = nn.Linear(256, 256, dtype=dtype)
        self.unused = nn.Linear(256, 256, dtype=dtype)
        with torch.no_grad():
            for number, weight in enumerate(self.parameters()):
                weight.copy_(torch.randn(weight.shape, generator=generator(number)) * 0.1)

    def forward(self, features: Tensor) -> Tensor:
        features = self.again(features)
        for layer in self.layers:
            features = nn.functional.gelu(layer(features))
        return self.again(features)


@dataclass(frozen=True)
class Trained:
    network: Network
    update: WeightUpdate
    losses: list[float]
    norms: list[float]


def train(
    kind: str,
    max_norm: float,
    build: Any = adamw,
    fused: bool = False,
    host: HostStates | None = None,
    spoil: Spoil | None = None,
    num_steps: int = 5,
    form: str = SEPARATE,
) -> Trained:
    """Some steps of a small network, in the way of `FullWeights`. In the third one `spoil` is at work."""
    network = Network(torch.float32 if kind == "fp32" else torch.bfloat16)
    named = dict(network.named_parameters())
    update = WeightUpdate(named, build, 7, 0, keeps_masters=kind == "master", host=host, form=form)
    stepping = FusedStep(update, max_norm) if fused else None
    losses, norms = [], []
    for step in range(num_steps):
        features = torch.randn(16, 256, generator=generator(100 + step)).to(named["again.weight"].dtype)
        outputs = network(features)
        if spoil is not None and step == 2:
            outputs = spoil(outputs)
        loss = outputs.float().square().mean()
        if stepping:
            stepping.backward(loss)
            norm = stepping.norm()
        else:
            loss.backward()
            gradients = optim.gradients_of(named)
            norm = optim.global_norm([optim.norm_of(gradient) for gradient in gradients.values()])
            update.begin_step()
            for name, gradient in gradients.items():
                update.step_weight(name, gradient, optim.clipping_factor(norm, max_norm), is_spoiled(loss, norm))
                named[name].grad = None
            update.end_step()
        losses.append(loss.item())
        norms.append(norm.item())
        assert all(weight.grad is None for weight in named.values())
    return Trained(network, update, losses, norms)


def assert_same(one: Trained, other: Trained) -> None:
    """Bit for bit, what a checkpoint would hold included."""
    assert one.losses == other.losses and one.norms == other.norms
    assert_same_weights_and_states(one, other)


def assert_same_weights_and_states(one: Trained, other: Trained, counts_steps: bool = True) -> None:
    for name, weight in one.network.named_parameters():
        assert weight.equal(dict(other.network.named_parameters())[name]), name
        assert one.update.truest(name).equal(other.update.truest(name)), name
    states = [optim.optimizer_state(t.update, dict(t.network.named_parameters())) for t in (one, other)]
    assert states[0][0].keys() == states[1][0].keys()
    assert states[0][1] == states[1][1] or not counts_steps
    assert all(tensor.equal(states[1][0][path]) for path, tensor in states[0][0].items())


def adamw_8bit(name: str, parameters: Any) -> optim.Optimizer:
    return BUILDERS["adamw_8bit"](parameters, lr=LEARNING_RATE, weight_decay=0.1)


KINDS = ("rounded", "master", "fp32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_norm", [0, 0.01, 1e6])
def test_a_step_within_the_backward_pass_is_the_plain_one(kind: str, max_norm: float) -> None:
    plain = train(kind, max_norm)
    assert (min(plain.norms) > max_norm) == (max_norm < 1), "it must clip in one case and not in the other"
    assert_same(train(kind, max_norm, fused=True), plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("build", [adamw, adamw_8bit, muon])
def test_states_in_host_memory_are_the_same(kind: str, fused: bool, build: Any) -> None:
    host = HostStates(torch.device("cpu"), ahead_bytes=0, make_lane=late_lane)  # the ring: two of the largest
    assert_same(train(kind, 0.01, build, fused=fused, host=host), train(kind, 0.01, build))
    assert host.host_bytes > 2**16, "something lives there"
    assert sum(chunk.used_bytes for chunk in host._chunks) == host.host_bytes, "at one place, whatever the step"


def test_a_ring_that_holds_them_all_changes_nothing() -> None:
    host = HostStates(torch.device("cpu"), make_lane=late_lane)
    assert_same(train("master", 0.01, fused=True, host=host), train("master", 0.01))


def test_visits_in_another_order_than_the_last_are_only_slower() -> None:
    results = []
    for host in (None, HostStates(torch.device("cpu"), ahead_bytes=0, make_lane=late_lane)):
        named = dict(Network(torch.bfloat16).named_parameters())
        update = WeightUpdate(named, adamw, 1, 0, keeps_masters=True, host=host)
        for step in range(6):
            update.begin_step()
            names = [list(named)[i] for i in torch.randperm(len(named), generator=generator(step)).tolist()]
            for name in names[step % 3 :]:
                update.step_weight(name, gradient(name, named[name], step), None, SOUND)
            update.end_step()
        results.append({name: update.truest(name) for name in named})
    assert all(results[0][name].equal(results[1][name]) for name in results[0])


def no_number(outputs: Tensor) -> Tensor:
    """Makes the loss infinite, and its gradients NaN."""
    return outputs * torch.inf


def no_gradient(outputs: Tensor) -> Tensor:
    """Leaves the loss as it is, and makes its gradients infinite."""
    if outputs.requires_grad:
        outputs.register_hook(lambda gradient: gradient * torch.inf)
    return outputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [adamw, adamw_8bit, muon])
@pytest.mark.parametrize(
    ("spoil", "fused", "max_norm"), [(no_gradient, False, 0), (no_gradient, True, 0.01), (no_number, True, 0)]
)
def test_a_step_without_numbers_changes_neither_weights_nor_states(
    kind: str, build: Any, spoil: Spoil, fused: bool, max_norm: float
) -> None:
    before = train(kind, max_norm, build, fused, num_steps=2)
    after = train(kind, max_norm, build, fused, spoil=spoil, num_steps=3)
    assert not math.isfinite(after.norms[2]) and math.isfinite(after.losses[2]) == (spoil is no_gradient)
    assert_same_weights_and_states(after, before, counts_steps=build is not adamw_8bit)
    more = train(kind, max_norm, build, fused, spoil=spoil)
    assert all(map(math.isfinite, more.losses[3:])), "later steps train"
    assert not more.update.truest("again.weight").equal(after.update.truest("again.weight"))


def test_without_clipping_a_fused_step_leaves_only_weights_whose_own_gradients_are_no_numbers() -> None:
    """The limit that `fused_step.py` states: gradients break between two layers, under a loss that is a number."""
    network = Network(torch.float32)
    held = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    stepping = FusedStep(WeightUpdate(dict(network.named_parameters()), adamw, 0, 0), max_norm=0)
    hidden = no_gradient(network.again(torch.ones(2, 256)))
    stepping.backward(network.layers[0](hidden).square().mean())
    moved = {name for name, weight in network.named_parameters() if not weight.equal(held[name])}
    assert moved == {"layers.0.weight", "layers.0.bias"}
    assert all(weight.isfinite().all() for weight in network.parameters())


def test_a_fused_step_never_holds_all_gradients() -> None:
    network = Network(torch.float32)
    named = dict(network.named_parameters())
    present: list[int] = []
    for weight in named.values():
        weight.register_post_accumulate_grad_hook(
            lambda _: present.append(sum(weight.grad is not None for weight in named.values()))
        )
    FusedStep(WeightUpdate(named, adamw, 0, 0), max_norm=1.0).backward(network(torch.ones(2, 256)).square().mean())
    assert len(present) == 2 * 8, "each weight of two passes"
    assert max(present) == 1


def test_what_depends_on_nothing_is_refused() -> None:
    named = dict(Network(torch.float32).named_parameters())
    stepping = FusedStep(WeightUpdate(named, adamw, 0, 0), max_norm=1.0)
    with pytest.raises(RuntimeError, match="no gradient reached"):
        stepping.backward(torch.zeros((), requires_grad=True) * 2)


def test_shards_hold_everything_and_stay_small() -> None:
    tensors = {f"t{i}": torch.full((size,), float(i)) for i, size in enumerate([10, 10, 100, 1, 1])}
    files = sharded("weights", tensors, max_bytes=100)
    assert [list(part) for part, _ in files.values()] == [["t0", "t1"], ["t2"], ["t3", "t4"]]
    assert next(iter(files)) == "weights-00001-of-00003"
    read = {stem: dict(part) for stem, (part, _) in files.items()} | {"weights_other": {"x": torch.zeros(1)}}
    back = joined(read, "weights")
    assert back.keys() == tensors.keys() and all(back[name].equal(tensors[name]) for name in tensors)
    assert list(sharded("weights", tensors)) == ["weights"]


def test_no_tensor_must_move_at_a_rate_that_rounding_swallows() -> None:
    large = {"weight": nn.Parameter(torch.zeros(512, 512)), "bias": nn.Parameter(torch.zeros(512))}
    of_rate: Any = FullWeights.must_move
    for rate, names in ((1e-5, ["weight"]), (1e-12, [])):
        weights = SimpleNamespace(parameters=large, config=SimpleNamespace(learning_rate=rate))
        assert of_rate.fget(weights) == names


def test_a_sum_of_bits_changes_where_neighbours_move_up_and_down() -> None:
    """As numbers do that are rounded by chance: of 2 bytes each, both moves would cancel."""
    tensor = torch.ones(3, 64).bfloat16()
    before = checksums({"w": tensor}, Together())
    tensor.view(torch.int16)[1, 5] += 1
    tensor.view(torch.int16)[2, 10] -= 1
    assert checksums({"w": tensor}, Together()) != before
    odd = {"bytes": torch.ones(5, dtype=torch.uint8), "halves": torch.ones(7).bfloat16()[1:], "one": torch.ones(1)}
    before = checksums(odd, Together())
    for each in odd.values():
        each[0] = 3
    assert all(before[name] != found for name, found in checksums(odd, Together()).items())


def test_norms_by_few_launches_are_those_of_each() -> None:
    gradients = [torch.randn(40, 70).bfloat16(), torch.zeros(0, 3).bfloat16(), torch.full((3,), 1e-3), torch.zeros(5)]
    norms = optim.norms_of(gradients)
    assert all(norm.dtype == torch.float32 for norm in norms)
    exact = [gradient.double().norm().float() for gradient in gradients]
    torch.testing.assert_close(torch.stack(norms), torch.stack(exact), rtol=1e-6, atol=0)
    assert optim.norms_of([]) == []
