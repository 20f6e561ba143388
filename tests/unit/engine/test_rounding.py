"""What rounding draws: even, without pattern, the same for parts as for the whole; and right on average."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from pixtune.engine import rounding
from pixtune.engine.rounding import Draw, noise_at, round_into, round_stochastically
from pixtune.randomness import draw_key
from tests import kernel_steps

CPU = torch.device("cpu")
COUNT = 1 << 18


def noise(*where: int, first: int = 0, count: int = COUNT) -> Tensor:
    return noise_at(Draw(draw_key(0, "rounding", *where), first), count, CPU)


def by_hand(key: int, place: int) -> int:
    """The same in Python's whole numbers: multiplications and shifts of 32 bits."""
    x = (place ^ key) & 0xFFFFFFFF
    x = ((x ^ x >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    x ^= key >> 32
    return ((x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF) >> 16


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, 0x7FFFFFFF80000000, draw_key(3, "rounding", 5, "weight")])
@pytest.mark.parametrize("first", [0, 12345, 2**31 - 10, 2**32 - 10, 2**33 + 7])
def test_the_noise_is_that_of_its_formula(key: int, first: int) -> None:
    assert noise_at(Draw(key, first), 20, CPU).tolist() == [by_hand(key, first + place) for place in range(20)]


def test_each_bit_and_each_pair_of_neighbours_is_even() -> None:
    """Five standard deviations of a fair coin, for every bit of a place, of its neighbours, and of the next step."""
    limit = 5 * 0.5 / COUNT**0.5
    one, next_step, other_weight = noise(1), noise(2), noise(1, 7)
    for bit in range(16):
        mine = one >> bit & 1
        assert abs(mine.float().mean() - 0.5) < limit
        for other in (one.roll(1), one.roll(2), one.roll(256), one.roll(3072), next_step, other_weight):
            for shift in (0, 15 - bit):
                differs = (mine ^ other >> (bit ^ shift) & 1).float().mean() if bit ^ shift < 16 else 0.5
                assert abs(differs - 0.5) < limit, (bit, shift)
    counts = torch.bincount(one >> 8, minlength=256).float()
    chi_squared = ((counts - COUNT / 256).square() / (COUNT / 256)).sum()
    assert abs(chi_squared - 255) < 5 * (2 * 255) ** 0.5


def test_parts_draw_what_is_theirs() -> None:
    whole = noise(1, count=3000)
    for start, end in ((0, 1000), (1000, 1001), (1001, 3000)):
        assert noise(1, first=start, count=end - start).equal(whole[start:end])


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_a_number_is_right_on_average_over_steps(share: float) -> None:
    """One place in 1500 steps, whose neighbours in bf16 are 2^-7 away."""
    value, spacing, steps = torch.tensor([1 + share * 2**-7]), 2**-7, 1500
    ups = sum(
        float(round_stochastically(value, noise(step, first=99, count=1)).float()) > 1 + spacing / 2
        for step in range(steps)
    )
    assert abs(ups / steps - share) < 5 * (share * (1 - share) / steps) ** 0.5 + 2**-16


def test_without_triton_torch_rounds_into_a_tensor_of_any_layout() -> None:
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    target, turned = torch.empty(6, 4).bfloat16(), torch.empty(4, 6).bfloat16().t()
    for each in (target, turned):
        round_into(each, values, Draw(5))
    assert target.equal(turned) and (target.float() - values).abs().max() < 2**-5


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None,
    reason="needs Triton and TRITON_INTERPRET=1",
)
def test_the_kernel_rounds_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "has_triton", lambda tensor: True)
    kernel_steps.check_rounding(CPU, 5003)
