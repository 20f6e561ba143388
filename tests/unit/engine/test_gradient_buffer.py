"""Gradients share one piece of memory, which is exchanged at once and stays where it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from pixtune.engine.gradient_buffer import ALIGNED_BYTES, GradientBuffer
from pixtune.errors import ExchangeError
from pixtune.plan.exchange_cost import lora_gradient_bytes


def processes(count: int) -> Any:
    return SimpleNamespace(num_processes=count, device=torch.device("cpu"))


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    """The last one never has a gradient, and the second has no whole number of 16 bytes."""
    found = [nn.Parameter(torch.zeros(shape)) for shape in ((4, 2), (3,), (2, 2), (5,))]
    for number, each in enumerate(found[:3]):
        each.grad = torch.full_like(each, number + 1.0)
    return found


class Others:
    """An exchange with two processes whose gradients are 10 and 20 everywhere, and their totals too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tensors: list[Tensor] = []
        monkeypatch.setattr(distributed, "all_reduce", self.all_reduce)

    def all_reduce(self, tensor: Tensor) -> None:
        self.tensors.append(tensor)
        tensor.add_(30)


def test_a_step_has_one_exchange_of_means_with_its_totals(
    monkeypatch: pytest.MonkeyPatch, parameters: list[nn.Parameter]
) -> None:
    others, buffer, totals_2 = Others(monkeypatch), GradientBuffer(parameters), torch.tensor([3.0, 6.0])
    buffer.average(processes(3), totals_2)
    assert totals_2.tolist() == [11, 12]
    assert [each.grad is None for each in parameters] == [False, False, False, True]
    for number, each in enumerate(parameters[:3]):
        assert each.grad is not None and each.grad.shape == each.shape
        torch.testing.assert_close(each.grad, torch.full_like(each, (31 + number) / 3))
        assert each.grad.data_ptr() % ALIGNED_BYTES == 0
    (sent,) = others.tensors
    assert sent.nbytes == buffer.num_bytes == lora_gradient_bytes(8 + 4 + 4 + 8), "3 and 5 take the room of 4 and 8"


def test_gradients_stay_where_they_are_and_are_zeroed_in_place(
    monkeypatch: pytest.MonkeyPatch, parameters: list[nn.Parameter]
) -> None:
    others, buffer = Others(monkeypatch), GradientBuffer(parameters)
    places = set()
    for _ in range(3):
        buffer.average(processes(3), torch.zeros(2))
        places.add(tuple(each.grad.data_ptr() for each in parameters[:3] if each.grad is not None))
        buffer.zero(in_place=False)  # also where nothing is captured: what is exchanged has its place
        assert not any(each.grad.any() for each in parameters[:3] if each.grad is not None)
        sum((index + 1.0) * each.sum() for index, each in enumerate(parameters[:3])).backward()  # type: ignore[union-attr]
    assert len(places) == 1 and len({id(each) for each in others.tensors}) == 1
    assert [each.grad.flatten()[0].item() for each in parameters[:3] if each.grad is not None] == [1, 2, 3]


def test_a_gradient_that_comes_later_takes_its_place(parameters: list[nn.Parameter]) -> None:
    buffer = GradientBuffer(parameters)
    buffer.gather()
    before = [each.grad for each in parameters[:3]]
    parameters[3].grad = torch.arange(5.0)
    buffer.zero(in_place=True)
    assert parameters[3].grad is not None and not parameters[3].grad.any(), "one that lies elsewhere is zeroed, too"
    parameters[3].grad += 7
    buffer.gather()
    assert parameters[3].grad.tolist() == [7] * 5
    assert all(now is then for now, then in zip([each.grad for each in parameters[:3]], before, strict=True))


def test_one_process_exchanges_nothing_and_drops_its_gradients(
    monkeypatch: pytest.MonkeyPatch, parameters: list[nn.Parameter]
) -> None:
    others, buffer, totals_2 = Others(monkeypatch), GradientBuffer(parameters), torch.tensor([3.0, 6.0])
    buffer.average(processes(1), totals_2)
    assert not others.tensors and totals_2.tolist() == [3, 6] and buffer.num_bytes == 0
    buffer.zero(in_place=True)
    assert parameters[0].grad is not None
    buffer.zero(in_place=False)
    assert all(each.grad is None for each in parameters)


def test_a_lost_process_ends_the_exchange_with_an_error_that_saves(
    monkeypatch: pytest.MonkeyPatch, parameters: list[nn.Parameter]
) -> None:
    def fail(tensor: Tensor) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(distributed, "all_reduce", fail)
    with pytest.raises(ExchangeError, match="Connection closed"):
        GradientBuffer(parameters).average(processes(2), torch.zeros(2))
