"""Which passes are recorded and replayed, and that a replay is the plain pass: with a recorder that needs no GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pixtune.fit.capture import PLAIN_CALLS, Replay, ReplayedPass


@dataclass(frozen=True)
class Numbers:
    """Inputs of one tensor."""

    values: Tensor

    @property
    def shapes(self) -> Hashable:
        return self.values.shape

    def map(self, change: Callable[[Tensor], Tensor]) -> Numbers:
        return Numbers(change(self.values))

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)


class FakeRecorder:
    """Does what CUDA graphs do: the work runs again on the memory of the recorded inputs, without effects before."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter, self.recorded, self.replayed = parameter, 0, 0

    def __call__(self, work: Callable[[], Tensor]) -> Replay:
        self.recorded += 1
        standing = None if self.parameter.grad is None else self.parameter.grad.clone()
        result = work()
        assert standing is not None and self.parameter.grad is not None
        self.parameter.grad.copy_(standing)

        def replay() -> Tensor:
            self.replayed += 1
            result.copy_(work())
            return result

        return replay


def build(recorder: bool = True, most: int = 1) -> tuple[ReplayedPass[Numbers], nn.Parameter, FakeRecorder]:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def compute(numbers: Numbers) -> Tensor:
        loss = (numbers.values.sum() * weight).square().sum()
        loss.backward()
        return loss.detach()

    fake = FakeRecorder(weight)
    return ReplayedPass(compute, [weight], fake if recorder else None, most), weight, fake


def test_what_is_replayed_gives_the_plain_gradients() -> None:
    replayed, weight, fake = build()
    plain, plain_weight, _ = build(recorder=False)
    for number in range(6):
        for micro_batch in range(2):  # gradients of two micro-batches add up
            values = torch.arange(3.0) + number + 10 * micro_batch
            torch.testing.assert_close(replayed(Numbers(values)), plain(Numbers(values)), rtol=0, atol=0)
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, plain_weight.grad, rtol=0, atol=0)
        replayed.zero_gradients()
        plain.zero_gradients()
    assert fake.recorded == 1 and fake.replayed == 12 - PLAIN_CALLS
    assert plain_weight.grad is None and weight.grad is not None and not weight.grad.any()


def test_each_shape_is_recorded_once_and_the_first_to_come_are() -> None:
    replayed, _, fake = build(most=2)

    def call(length: int, times: int) -> None:
        for _ in range(times):
            replayed(Numbers(torch.ones(length)))

    call(1, PLAIN_CALLS)
    assert fake.recorded == 0
    call(1, 3)
    call(2, PLAIN_CALLS + 1)
    call(1, 1)
    assert (fake.recorded, fake.replayed) == (2, 5)
    call(3, PLAIN_CALLS + 4)  # runs plainly
    call(1, 1)
    call(2, 1)
    assert (fake.recorded, fake.replayed) == (2, 7)


def test_memory_that_was_given_back_is_taken_again_at_the_next_call() -> None:
    replayed, _, fake = build()
    for _ in range(PLAIN_CALLS + 1):
        replayed(Numbers(torch.ones(2)))
    replayed.release()
    replayed(Numbers(torch.ones(2)))
    assert fake.recorded == 2


def test_what_cannot_be_recorded_runs_plainly_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(work: Callable[[], Tensor]) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    plain, weight, _ = build(recorder=False)
    replayed = ReplayedPass(plain._compute, [weight], refuse)
    with caplog.at_level(logging.WARNING):
        losses = [replayed(Numbers(torch.ones(2))) for _ in range(PLAIN_CALLS + 3)]
    assert len({float(loss) for loss in losses}) == 1
    assert caplog.text.count("could not be recorded (operation not permitted when stream is capturing)") == 1


def test_a_parameter_that_gets_its_first_gradient_while_recording_is_a_fault() -> None:
    replayed, weight, _ = build()
    for _ in range(PLAIN_CALLS):
        replayed(Numbers(torch.ones(2)))
    weight.grad = None
    replayed._record = lambda work: partial(Tensor.clone, work())
    with pytest.raises(RuntimeError, match="cuda_graphs=false"):
        replayed(Numbers(torch.ones(2)))
