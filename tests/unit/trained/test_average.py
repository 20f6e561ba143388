"""The average of weights is the formula's, skipped steps leave it, and it changes places without losing a bit."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from pixtune.plan import footprint
from pixtune.trained import average
from pixtune.trained.average import WeightAverage, average_of_sums, decay_at

SOUND, SPOILED = torch.tensor(0.0), torch.tensor(1.0)


def some_weights() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (7, 1), "c": (2, 2)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def move(weights: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(torch.randn(weight.shape, generator=generator))


def bits(tensors: Mapping[str, Tensor]) -> list[bytes]:
    return [tensor.detach().clone().numpy().tobytes() for tensor in tensors.values()]


@pytest.fixture(params=[footprint.AVERAGE_PIECE_BYTES, 40], ids=["one piece", "several pieces"])
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(average, "AVERAGE_PIECE_BYTES", request.param)


def test_the_ramp_is_the_published_one() -> None:
    assert [decay_at(step, 0.5, True) for step in (0, 1, 2, 8, 100)] == [1 / 10, 2 / 11, 3 / 12, 0.5, 0.5]
    assert decay_at(0, 0.5, False) == 0.5


def test_the_average_of_sums_by_hand() -> None:
    """Sums of 1 and 3: half of 1, then half of that and half of 3; as it warms up, 9/10 and 9/11."""
    assert average_of_sums([1.0, 2.0], 0.5, False) == 0.25 + 1.5
    assert average_of_sums([1.0, 2.0], 0.5, True) == pytest.approx(0.9 * 2 / 11 + 3 * 9 / 11)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("warms_up", [True, False])
def test_it_is_the_weighted_sum_of_all_steps_weights(warms_up: bool) -> None:
    """The sum is written out as w_0 * prod(d) + sum_i (1 - d_i) * prod(later d) * w_i, in fp64."""
    weights = some_weights()
    averaged = WeightAverage(weights, 0.6, warms_up, on_host=False, first_step=3)
    seen = [{name: weight.detach().double() for name, weight in weights.items()}]
    decays = []
    for step in range(3, 9):
        move(weights, step)
        averaged.update(SOUND)
        seen.append({name: weight.detach().double() for name, weight in weights.items()})
        decays.append(min(0.6, (1 + step) / (10 + step)) if warms_up else 0.6)
    shares = [1.0, *(1 - decay for decay in decays)]
    for number in range(len(shares)):
        for decay in decays[number:]:
            shares[number] *= decay
    for name, found in averaged.tensors().items():
        expected = sum(share * values[name] for share, values in zip(shares, seen, strict=True))
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("_pieces")
def test_a_skipped_step_leaves_it_as_it_is_to_the_bit() -> None:
    weights = some_weights()
    averaged = WeightAverage(weights, 0.9, True, on_host=False, first_step=0)
    move(weights, 1)
    averaged.update(SOUND)
    before = bits(averaged.tensors())
    move(weights, 2)
    averaged.update(SPOILED)
    assert bits(averaged.tensors()) == before
    averaged.update(SOUND)
    assert bits(averaged.tensors()) != before


@pytest.mark.usefixtures("_pieces")
def test_both_change_places_and_back_without_losing_a_bit() -> None:
    weights = some_weights()
    weights["a"].data[0, 0], weights["a"].data[0, 1] = -0.0, 1e-42  # what arithmetic would not give back
    averaged = WeightAverage(weights, 0.9, True, on_host=True, first_step=0)
    move(weights, 1)
    weights["b"].data[0, 0] = float("nan")
    raw, mean = bits(weights), bits(averaged.tensors())
    places = [weight.data_ptr() for weight in weights.values()]
    with averaged.in_place(), averaged.in_place():
        assert bits(weights) == mean
    assert (bits(weights), bits(averaged.tensors())) == (raw, mean)
    with pytest.raises(RuntimeError, match="drawing failed"), averaged.in_place():
        raise RuntimeError("drawing failed")
    assert bits(weights) == raw
    assert [weight.data_ptr() for weight in weights.values()] == places, "captured steps read the old memory"
