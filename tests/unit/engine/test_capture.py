"""Passes are captured and replayed when they should be, and a replay is the plain pass: by a capturer without a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pixtune.engine.capture import PLAIN_CALLS, CaptureHistory, Replay, ReplayedPass
from pixtune.engine.relief import in_turn
from tests.unit.engine.tiny import Numbers


class FakeCapturer:
    """Does what CUDA graphs do: the work runs again on the memory of the captured inputs, without effects before."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter, self.captured, self.replayed = parameter, 0, 0

    def __call__(self, work: Callable[[], Tensor]) -> Replay:
        self.captured += 1
        standing = None if self.parameter.grad is None else self.parameter.grad.clone()
        result = work()
        assert standing is not None and self.parameter.grad is not None
        self.parameter.grad.copy_(standing)

        def replay() -> Tensor:
            self.replayed += 1
            result.copy_(work())
            return result

        return replay


def build(
    capturer: type[FakeCapturer] | None = FakeCapturer, max_captures: int = 1, free_bytes: Callable[[], int] = lambda: 0
) -> tuple[ReplayedPass[Numbers], nn.Parameter, FakeCapturer]:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def compute(numbers: Numbers) -> Tensor:
        loss = (numbers.values.sum() * weight).square().sum()
        loss.backward()
        return loss.detach()

    fake = (capturer or FakeCapturer)(weight)
    return ReplayedPass(compute, [weight], fake if capturer else None, max_captures, free_bytes), weight, fake


def test_what_is_replayed_gives_the_plain_gradients() -> None:
    replayed, weight, fake = build()
    plain, plain_weight, _ = build(capturer=None)
    for number in range(6):
        for micro_batch in range(2):  # gradients of two micro-batches add up
            values = torch.arange(3.0) + number + 10 * micro_batch
            torch.testing.assert_close(replayed(Numbers(values)), plain(Numbers(values)), rtol=0, atol=0)
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, plain_weight.grad, rtol=0, atol=0)
        replayed.zero_gradients()
        plain.zero_gradients()
    assert fake.captured == 1 and fake.replayed == 12 - PLAIN_CALLS
    assert plain_weight.grad is None and weight.grad is not None and not weight.grad.any()


def test_each_shape_is_captured_once_and_the_first_to_come_are() -> None:
    replayed, _, fake = build(max_captures=2)

    def call(length: int, times: int) -> None:
        for _ in range(times):
            replayed(Numbers(torch.ones(length)))

    call(1, PLAIN_CALLS)
    assert fake.captured == 0
    call(1, 3)
    call(2, 2 * PLAIN_CALLS)  # as long as shapes may still come up, plain passes do not alternate with captures
    assert fake.captured == 1
    call(2, 1)
    call(1, 1)
    assert (fake.captured, fake.replayed) == (2, 5)
    call(3, PLAIN_CALLS + 4)  # runs plainly
    call(1, 1)
    call(2, 1)
    assert (fake.captured, fake.replayed) == (2, 7)


class InertCapturer(FakeCapturer):
    """A capturer that runs no plain pass, neither to capture nor to replay."""

    def __call__(self, work: Callable[[], Tensor]) -> Replay:
        self.captured += 1
        return lambda: torch.zeros(())


class Card:
    """A card with room for `passes` passes at a time: one for all captures together, and one plain one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, passes: int, max_captures: int) -> None:
        self.passes, self.most_held = passes, 0
        self.replayed, _, self.fake = build(InertCapturer, max_captures, lambda: passes - bool(self.replayed._captures))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2)
        compute = self.replayed._compute

        def noting(numbers: Numbers) -> Tensor:
            self.most_held = max(self.most_held, 1 + bool(self.replayed._captures))
            return compute(numbers)

        self.replayed._compute = noting

    def run(self, *lengths: int) -> None:
        for length in lengths:
            self.replayed(Numbers(torch.ones(length)))


@pytest.mark.parametrize("passes", [1, 2])
def test_a_plain_pass_and_captures_share_a_card_only_if_it_holds_both(
    monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    card = Card(monkeypatch, passes, max_captures=3)
    card.run(*[1, 2] * 6)
    assert card.fake.captured == 2
    card.run(3)  # one more shape, late
    assert card.most_held == passes
    assert len(card.replayed._captures) == (0 if passes == 1 else 2)
    card.run(*[1, 2, 3] * 6)
    assert len(card.replayed._captures) == 3


def test_more_shapes_than_a_full_card_can_capture_are_not_captured_in_turns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card = Card(monkeypatch, passes=1, max_captures=2)
    with caplog.at_level(logging.WARNING):
        card.run(*[1, 2, 3] * 8)
    assert card.most_held == 1 and card.fake.captured == 2 and not card.replayed._captures
    assert caplog.text.count("come in 3 shapes, and memory has room for 2 captures") == 1


def test_memory_that_was_given_back_is_taken_again_at_the_next_call() -> None:
    replayed, _, fake = build()
    for _ in range(PLAIN_CALLS + 1):
        replayed(Numbers(torch.ones(2)))
    replayed.release()
    replayed(Numbers(torch.ones(2)))
    assert fake.captured == 2


def test_captures_are_given_back_only_when_no_replay_runs_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed, _, _ = build()
    for _ in range(PLAIN_CALLS + 1):
        replayed(Numbers(torch.ones(2)))
    held: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: held.append(len(replayed._captures)))
    replayed.release()
    assert held == [1] and not replayed._captures


def test_what_cannot_be_captured_runs_plainly_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(work: Callable[[], Tensor]) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    plain, weight, _ = build(capturer=None)
    replayed = ReplayedPass(plain._compute, [weight], refuse)
    with caplog.at_level(logging.WARNING):
        losses = [replayed(Numbers(torch.ones(2))) for _ in range(PLAIN_CALLS + 3)]
    assert len({float(loss) for loss in losses}) == 1
    assert caplog.text.count("could not be captured (operation not permitted when stream is capturing)") == 1


def test_a_capture_that_lacks_memory_is_tried_again_with_less_kept(caplog: pytest.LogCaptureFixture) -> None:
    """Each try follows a plain pass, which may have to compile, until there is room or nothing is left to drop."""
    replayed, _, fake = build()
    happened: list[str] = []
    computes, captures = replayed._compute, replayed._capture
    assert captures is not None

    def capture(work: Callable[[], Tensor]) -> Replay:
        happened.append("capture")
        if happened.count("capture") <= 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 54.00 MiB.")
        return captures(work)

    def keep_less() -> str:
        happened.append("keep less")
        return "2 more of 60 blocks recomputed"

    def compute(numbers: Numbers) -> Tensor:
        happened.append("plain")
        return computes(numbers)

    replayed._capture, replayed._keep_less = capture, keep_less
    replayed._compute = compute
    with caplog.at_level(logging.INFO):
        for _ in range(PLAIN_CALLS + 3):
            replayed(Numbers(torch.ones(2)))
    tries = ["capture", "keep less", "plain"] * 2
    assert happened == ["plain"] * PLAIN_CALLS + tries + ["capture", "plain", "plain"], "captured, then replayed once"
    assert fake.replayed == 1
    assert caplog.text.count("2 more of 60 blocks recomputed") == 2
    assert replayed.history == CaptureHistory(made=1, savings=("2 more of 60 blocks recomputed",) * 2)
    assert "could not be captured" not in caplog.text


def test_where_nothing_is_left_to_be_dropped_steps_run_plainly(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(work: Callable[[], Tensor]) -> Replay:
        raise torch.OutOfMemoryError("CUDA out of memory")

    plain, weight, _ = build(capturer=None)
    ways = iter(["1 more of 1 blocks recomputed"])
    replayed = ReplayedPass(plain._compute, [weight], refuse, keep_less=lambda: next(ways, None))
    with caplog.at_level(logging.WARNING):
        for _ in range(PLAIN_CALLS + 4):
            replayed(Numbers(torch.ones(2)))
    assert caplog.text.count("could not be captured (CUDA out of memory)") == 1
    why = "they could not be captured (CUDA out of memory)"
    assert replayed.history == CaptureHistory(savings=("1 more of 1 blocks recomputed",), stopped=why)


def test_a_parameter_that_gets_its_first_gradient_while_capturing_is_a_fault() -> None:
    replayed, weight, _ = build()
    for _ in range(PLAIN_CALLS):
        replayed(Numbers(torch.ones(2)))
    weight.grad = None
    replayed._capture = lambda work: partial(Tensor.clone, work())
    with pytest.raises(RuntimeError, match="cuda_graphs=false"):
        replayed(Numbers(torch.ones(2)))


def test_all_captured_shapes_read_their_inputs_from_the_same_memory() -> None:
    replayed, _, _ = build(max_captures=3)
    for length in (3, 2, 4):
        for _ in range(8):
            replayed(Numbers(torch.ones(length)))
    small, smaller, larger = (capture.inputs.values for capture in replayed._captures.values())
    assert small.data_ptr() == smaller.data_ptr() != larger.data_ptr()
    plain, _, _ = build(capturer=None)
    for length in (4, 2, 3, 2):
        values = torch.randn(length, generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(replayed(Numbers(values)), plain(Numbers(values)), rtol=0, atol=0)


def test_gradients_leave_the_memory_of_the_first_backward_pass_before_a_capture() -> None:
    replayed, weight, _ = build()
    replayed(Numbers(torch.ones(2)))
    assert weight.grad is not None
    first, value = weight.grad, weight.grad.clone()
    replayed(Numbers(torch.zeros(2)))
    assert weight.grad is first
    replayed(Numbers(torch.zeros(2)))  # captured
    assert weight.grad.data_ptr() != first.data_ptr()
    torch.testing.assert_close(weight.grad, value, rtol=0, atol=0)


def test_memory_that_a_replay_takes_again_counts_although_the_allocator_does_not_count_it() -> None:
    """Two passes of 8 bytes are captured, then 3 bytes of optimizer states come: a step needs 1 + 3 + 8."""
    from pixtune.hardware.facts import GIB
    from pixtune.hardware.monitor import DeviceMemory, StageLog
    from pixtune.tracking.memory import STEPS, RunMemory

    memory = RunMemory.__new__(RunMemory)
    memory.stages = StageLog(lambda: DeviceMemory(4.0, 12.0, 9.0, 12.0), lambda: None, lambda: 0)
    memory._before, memory.outside_bytes = None, 0
    memory.stages.record(STEPS)
    assert memory.compare(12 * GIB)["measured_peak_gib"] == 9.0
    assert memory.compare(12 * GIB, replayed_bytes=8 * GIB) == {
        "expected_peak_gib": 12.0, "measured_peak_gib": 12.0, "reserved_peak_gib": 12.0, "error_percent": 0.0
    }  # fmt: skip
    memory.outside_bytes = 2 * GIB  # parts of blocks that other processes read
    assert memory.compare(12 * GIB)["measured_peak_gib"] == 11.0


def test_what_changed_runs_plainly_before_it_is_captured() -> None:
    """A capture in which something is compiled for the first time breaks."""
    replayed, _, fake = build()
    numbers = Numbers(torch.ones(2))
    for _ in range(PLAIN_CALLS + 1):
        replayed(numbers)
    assert (fake.captured, fake.replayed) == (1, 1)
    assert replayed.give_up_captures()
    replayed(numbers)  # plainly, since the relief may have changed it
    assert (fake.captured, fake.replayed) == (1, 1)
    replayed(numbers)
    assert (fake.captured, fake.replayed) == (2, 2)
    assert replayed.give_up_captures()  # nothing is captured any more


def test_reliefs_are_used_up_one_after_the_other() -> None:
    first, second = iter(["a", "b"]), iter(["c"])
    relief = in_turn(lambda: next(first, None), lambda: next(second, None))
    assert [relief() for _ in range(4)] == ["a", "b", "c", None]
