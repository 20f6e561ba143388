"""How small updates reach bf16 weights: right on average, or exactly in an fp32 copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixtune.checkpoint import joined, sharded
from pixtune.full_weights import RoundedUpdate, make_masters, round_stochastically
from pixtune.train import buckets_of

LEARNING_RATE = 1e-4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_rounding_takes_both_neighbours_and_is_right_on_average(sign: int, share: float) -> None:
    spacing = 2**-7  # of bf16 between 1 and 2
    values = torch.full((200_000,), sign * (1 + share * spacing))
    rounded = round_stochastically(values, generator()).float()
    assert set(rounded.tolist()) <= {float(sign), sign * (1 + spacing)}
    ups = (rounded != sign).float().mean().item()
    assert ups == pytest.approx(share, abs=0.006)  # five standard deviations


def test_what_bf16_holds_and_what_is_no_number_stays() -> None:
    exact = torch.randn(1000, generator=generator()).bfloat16()
    assert round_stochastically(exact.float(), generator()).equal(exact)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    odd_bits = torch.cat([odd, torch.tensor([-1], dtype=torch.int32).view(torch.float32)])  # a NaN of all ones
    assert round_stochastically(odd_bits, generator()).float().tolist()[:2] == [float("inf"), -float("inf")]
    assert round_stochastically(odd_bits, generator()).isnan().tolist() == [False, False, True, False, True]


def weights() -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator(number)).bfloat16())
        for number, (name, shape) in enumerate({"a": (16, 8), "b": (8,), "unused": (3,)}.items())
    }


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.1)


def gradient(name: str, weight: Tensor, step: int) -> Tensor:
    return torch.randn(weight.shape, generator=generator(1000 * step + ord(name[0]))).bfloat16()


def take_steps(optimizer: RoundedUpdate, named: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for name, weight in named.items():
            weight.grad = None if name == "unused" else gradient(name, weight, step)
        optimizer.step()
        optimizer.zero_grad()


def test_a_rounded_step_is_a_neighbour_of_the_exact_one() -> None:
    named, exact = weights(), weights()["a"].detach().float()
    stand_in = nn.Parameter(exact.clone())
    stand_in.grad = gradient("a", exact, 0).float()
    adamw([stand_in]).step()
    take_steps(RoundedUpdate(named, adamw, seed=0, first_step=0), named, range(1))
    down = (stand_in.detach().view(torch.int32) & -65536).view(torch.float32)
    up = ((stand_in.detach().view(torch.int32) & -65536) + 65536).view(torch.float32)
    result = named["a"].detach().float()
    assert ((result == down) | (result == up)).all()
    assert named["unused"].equal(weights()["unused"]), "no gradient, no step"


def test_updates_too_small_for_bf16_are_not_lost() -> None:
    """1000 steps of 1e-4 upon 1.0, whose neighbours in bf16 are 0.0078 and 0.0039 away."""
    named = {"w": nn.Parameter(torch.ones(4000).bfloat16())}
    optimizer = RoundedUpdate(named, lambda p: torch.optim.SGD(p, lr=1e-4), seed=0, first_step=0)
    nearest = torch.ones(1).bfloat16()
    for _ in range(1000):
        named["w"].grad = torch.ones(4000).bfloat16()
        optimizer.step()
        nearest -= 1e-4
    assert nearest.item() == 1.0, "rounded to the nearest, nothing moves"
    assert named["w"].float().mean().item() == pytest.approx(0.9, abs=0.005)


def test_rounding_goes_on_where_it_was() -> None:
    straight = weights()
    take_steps(RoundedUpdate(straight, adamw, seed=3, first_step=0), straight, range(4))
    parts = weights()
    first = RoundedUpdate(parts, adamw, seed=3, first_step=0)
    take_steps(first, parts, range(2))
    second = RoundedUpdate(parts, adamw, seed=3, first_step=2)
    for weight, state in first.state.items():
        second.state[weight].update(state)
    take_steps(second, parts, range(2, 4))
    assert all(parts[name].equal(straight[name]) for name in parts)

    other = weights()
    take_steps(RoundedUpdate(other, adamw, seed=4, first_step=0), other, range(4))
    assert not other["a"].equal(straight["a"]), "another seed rounds otherwise"


def test_masters_gather_gradients_in_fp32() -> None:
    """256 gradients of 1 and one of 1/2: a sum in bf16 stops at 256."""
    weight = nn.Parameter(torch.zeros(4).bfloat16())
    masters = make_masters({"w": weight})
    for scale in [1.0] * 257 + [0.5]:
        (weight.sum() * scale).backward()
        assert weight.grad is None, "kept twice"
    assert masters["w"].grad is not None
    assert masters["w"].grad.tolist() == [257.5] * 4


def test_shards_hold_everything_and_stay_small() -> None:
    tensors = {f"t{i}": torch.full((size,), float(i)) for i, size in enumerate([10, 10, 100, 1, 1])}
    files = sharded("weights", tensors, most_bytes=100)
    assert [list(part) for part, _ in files.values()] == [["t0", "t1"], ["t2"], ["t3", "t4"]]
    assert next(iter(files)) == "weights-00001-of-00003"
    read = {stem: dict(part) for stem, (part, _) in files.items()} | {"weights_other": {"x": torch.zeros(1)}}
    back = joined(read, "weights")
    assert back.keys() == tensors.keys() and all(back[name].equal(tensors[name]) for name in tensors)
    assert list(sharded("weights", tensors)) == ["weights"]


def test_exchanges_are_bounded() -> None:
    tensors = [torch.zeros(n) for n in (1, 5, 6, 30, 2)]
    assert [[t.numel() for t in bucket] for bucket in buckets_of(tensors, 10)] == [[1, 5], [6], [30], [2]]
    assert buckets_of([], 10) == []
