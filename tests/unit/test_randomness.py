"""Draws are functions of their key alone, and the key scheme is pinned: changing it would break every resume."""

from __future__ import annotations

import random
from itertools import combinations

import numpy
import pytest
import torch

from pixtune import randomness
from pixtune.randomness import draw_key


def test_the_key_scheme_is_what_saved_runs_were_drawn_with() -> None:
    assert draw_key(42, "order", 0) == 8135689836156478190
    assert draw_key(42, "noise", 7, 3) == 3250225932932203152
    assert randomness.uniform(42, "sigma", 7, 3) == 0.7695612506456989
    assert randomness.shuffled(6, 42, "order", 0) == [3, 5, 4, 1, 2, 0]
    torch.testing.assert_close(
        randomness.normal((3,), 42, "noise", 7, 3), torch.tensor([0.9007172, 1.4751474, -0.4601715]), rtol=0, atol=1e-6
    )


def test_no_global_generator_is_read_or_moved() -> None:
    def everything() -> tuple[object, ...]:
        return (
            randomness.uniform(1, "sigma", 0),
            randomness.normal((2, 3), 1, "noise", 0).tolist(),
            randomness.shuffled(9, 1, "order", 0),
        )

    before = everything()
    torch.manual_seed(99)
    random.seed(99)
    numpy.random.seed(99)
    states = (torch.get_rng_state(), random.getstate(), numpy_state())
    assert everything() == before
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), numpy_state())


def numpy_state() -> tuple[list[int], int]:
    state = numpy.random.get_state(legacy=False)["state"]
    return state["key"].tolist(), state["pos"]


def test_every_part_of_the_key_counts() -> None:
    keys = [
        draw_key(1, "noise", 2, 3), draw_key(2, "noise", 2, 3), draw_key(1, "sigma", 2, 3),
        draw_key(1, "noise", 3, 3), draw_key(1, "noise", 2, 4), draw_key(1, "noise", 2),
        draw_key(1, "noise", 23), draw_key(12, "noise", 3), draw_key(1, "noise", 3, 2),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys), "torch's manual_seed takes no more"


def test_parts_do_not_run_together() -> None:
    assert draw_key(0, "order", 1, 11) != draw_key(0, "order", 11, 1)
    assert draw_key(0, "order", 1, 11) != draw_key(0, "order", 111)


def test_draws_of_other_purposes_steps_and_slots_are_independent() -> None:
    rows = [
        [randomness.uniform(5, purpose, step, slot) for step in range(4000)]
        for purpose in ("sigma", "caption dropout")
        for slot in (0, 1)
    ]
    rows += [rows[0][1:] + rows[0][:1]]  # one step later
    correlation = torch.corrcoef(torch.tensor(rows)) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.06  # deviation 0.016


def test_uniform_covers_the_open_interval_evenly() -> None:
    numbers = torch.tensor([randomness.uniform(0, "sigma", step) for step in range(20_000)], dtype=torch.float64)
    assert 0 < numbers.min() < 0.001 and 0.999 < numbers.max() < 1
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    assert ((counts - 1000).abs() < 150).all(), counts  # deviation 31


@pytest.mark.parametrize("key", [0, 1, 2**62, 2**63 - 1, 2**63 - 1024])
def test_the_ends_are_never_drawn(monkeypatch: pytest.MonkeyPatch, key: int) -> None:
    """At 0 and 1 the logit of a uniform number is infinite, and so is a weight."""
    monkeypatch.setattr(randomness, "draw_key", lambda *parts: key)
    assert 0 < randomness.uniform(0, "sigma") < 1


def test_normal_has_the_moments_of_a_normal() -> None:
    numbers = randomness.normal((4, 50, 500), 3, "noise", 0)
    assert numbers.shape == (4, 50, 500) and numbers.dtype == torch.float32 and numbers.device.type == "cpu"
    mean, deviation = numbers.mean(), numbers.std()
    skew, kurtosis = ((numbers - mean) ** 3).mean() / deviation**3, ((numbers - mean) ** 4).mean() / deviation**4
    assert abs(mean) < 0.015 and abs(deviation - 1) < 0.01 and abs(skew) < 0.04 and abs(kurtosis - 3) < 0.08


def test_shuffled_is_a_permutation_and_another_one_each_time() -> None:
    orders = [randomness.shuffled(50, 7, "order", epoch) for epoch in range(20)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 20
    agreements = [sum(a == b for a, b in zip(one, other, strict=True)) for one, other in combinations(orders, 2)]
    assert sum(agreements) / len(agreements) < 2  # 1 expected
    assert randomness.shuffled(0, 7, "order", 0) == []
