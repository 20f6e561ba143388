"""Streamed blocks compute what resident ones do, bit for bit, whatever runs after what."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixtune.engine import streaming, transfer
from pixtune.engine.activations import recompute_blocks
from pixtune.engine.forwards import replace_computation
from pixtune.engine.streaming import BlockStream, choose_streamed, stream_blocks, upcoming
from pixtune.errors import PlanError
from pixtune.hardware.facts import GIB
from pixtune.hardware.meminfo import HostMemory
from pixtune.trained.fused_step import FusedStep
from pixtune.trained.weight_update import WeightUpdate
from tests.gradients import gradient_of
from tests.unit.engine.tiny import (
    MODELS,
    LateLane,
    assert_same,
    attach,
    blocks_of,
    load_model,
    plain_step,
    step,
)

CPU = torch.device("cpu")


class Block(nn.Module):
    """A frozen layer of any width inside, with one trained vector."""

    shift: Tensor

    def __init__(self, seed: int, inner_width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(8, inner_width), nn.Linear(inner_width, 8)
        self.requires_grad_(False)
        self.register_buffer("shift", torch.randn(8))
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.tanh(self.up(hidden * self.gain))) * self.shift


def make_blocks(num: int, recomputed: bool = True, num_slots: int = 3) -> tuple[list[Block], BlockStream]:
    blocks = [Block(seed, 16 + seed % 3) for seed in range(num)]
    stream = stream_blocks(blocks, CPU, num_slots)
    if recomputed:
        recompute_blocks(blocks, offload=False)
    return blocks, stream


def run_through(blocks: list[Block], hidden: Tensor) -> Tensor:
    for block in blocks:
        hidden = block(hidden=hidden)
    return hidden


def gains(blocks: list[Block]) -> list[Tensor]:
    found = [gradient_of(block.gain) for block in blocks]
    for block in blocks:
        block.gain.grad = None
    return found


# ---- which blocks, in which order


@pytest.mark.parametrize("num_blocks", [1, 7, 57, 60])
def test_streamed_blocks_are_evenly_spread(num_blocks: int) -> None:
    for num_streamed in range(1, num_blocks + 1):
        chosen = choose_streamed(num_blocks, num_streamed)
        assert len(set(chosen)) == num_streamed and list(chosen) == sorted(chosen)
        assert chosen[0] >= 0 and chosen[-1] < num_blocks
        gaps = {after - before for before, after in itertools.pairwise(chosen)}
        assert not gaps or max(gaps) - min(gaps) <= 1
        ends = chosen[0], num_blocks - 1 - chosen[-1]
        assert max(ends) - min(ends) <= 1


def test_none_or_too_many_streamed_blocks() -> None:
    assert choose_streamed(60, 0) == ()
    for num_streamed in (-1, 61):
        with pytest.raises(ValueError, match=f"{num_streamed} of 60"):
            choose_streamed(60, num_streamed)


def test_the_next_blocks_follow_the_pass() -> None:
    assert upcoming(3, 10, 2, backward=False, gradients=True) == (4, 5)
    assert upcoming(8, 10, 2, backward=False, gradients=True) == (9, 7)  # comes back down
    assert upcoming(9, 10, 2, backward=False, gradients=False) == (0, 1)  # begins anew
    assert upcoming(3, 10, 2, backward=True, gradients=True) == (2, 1)
    assert upcoming(0, 10, 2, backward=True, gradients=True) == (1, 2)  # the next forward pass
    assert upcoming(0, 2, 2, backward=True, gradients=True) == (1,)


# ---- equal to the plain run


@pytest.mark.parametrize("lane", [transfer.CopyLane, LateLane])
@pytest.mark.parametrize("linear_format", [None, "int8", "nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_equals_the_plain_one(
    name: str, linear_format: str | None, lane: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "CopyLane", lane)
    model = load_model(name, linear_format)
    blocks = blocks_of(name, model)
    stream_blocks(blocks, CPU, num_slots=2)
    attach(name, model)
    recompute_blocks(blocks, offload=False)
    for seed in (0, 1, 0):
        assert_same(step(name, model, seed), plain_step(name, linear_format, seed))


@pytest.mark.parametrize("name", MODELS)
def test_some_blocks_streamed_and_others_resident(name: str) -> None:
    model = load_model(name)
    blocks = blocks_of(name, model)
    chosen = [blocks[index] for index in choose_streamed(len(blocks), 3)]
    stream_blocks(chosen, CPU, num_slots=2)
    attach(name, model)
    recompute_blocks(chosen, offload=True)
    assert_same(step(name, model), plain_step(name))


@pytest.mark.parametrize("lane", [transfer.CopyLane, LateLane])
@pytest.mark.parametrize("num_slots", [2, 3, 5, 99])
def test_many_steps_between_passes_without_gradients(
    num_slots: int, lane: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "CopyLane", lane)
    plain = [Block(seed, 16 + seed % 3) for seed in range(11)]
    blocks, _ = make_blocks(11, num_slots=num_slots)
    for seed in range(12):
        hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
        if seed % 3 == 2:
            with torch.no_grad():
                assert torch.equal(run_through(blocks, hidden), run_through(plain, hidden))
        for some in (blocks, plain):
            run_through(some, hidden).square().sum().backward()
        for actual, expected in zip(gains(blocks), gains(plain), strict=True):
            assert torch.equal(actual, expected)


def test_two_backward_passes_over_one_graph() -> None:
    plain = [Block(seed, 16 + seed % 3) for seed in range(7)]
    blocks, _ = make_blocks(7)
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for some in (blocks, plain):
        loss = run_through(some, hidden).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    for actual, expected in zip(gains(blocks), gains(plain), strict=True):
        assert torch.equal(actual, expected)


def test_two_forward_passes_before_the_backward_pass() -> None:
    plain = [Block(seed, 16 + seed % 3) for seed in range(7)]
    blocks, _ = make_blocks(7)
    first, second = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    for some in (blocks, plain):
        (run_through(some, first) * run_through(some, second)).sum().backward()
    for actual, expected in zip(gains(blocks), gains(plain), strict=True):
        assert torch.equal(actual, expected)


def test_any_order_of_blocks_finds_the_right_weights() -> None:
    plain = [Block(seed, 16 + seed % 3) for seed in range(7)]
    blocks, stream = make_blocks(7, num_slots=2)
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    order = [6, 0, 3, 3, 5, 1, 6]
    with torch.no_grad():
        for index in order:
            assert torch.equal(blocks[index](hidden), plain[index](hidden))
    assert stream.num_late >= 4  # each jump was fetched on demand


# ---- blocks that are trained: each weight is stepped in its slot, within the backward pass


class Stepped:
    """Seven bf16 blocks whose weights are all stepped as soon as their gradients are there, and their stream."""

    def __init__(self, num_slots: int | None, max_norm: float) -> None:
        self.blocks = [Block(seed, 16 + seed % 3).bfloat16() for seed in range(7)]
        self.stream = None if num_slots is None else stream_blocks(self.blocks, CPU, num_slots)
        recompute_blocks(self.blocks, offload=False)
        self.weights: dict[str, nn.Parameter] = {}
        for number, block in enumerate(self.blocks):
            block.requires_grad_(True)
            self.weights |= {f"{number}.{name}": weight for name, weight in block.named_parameters()}
        self.update = WeightUpdate(
            self.weights, lambda _, given: torch.optim.AdamW(given, lr=0.01, fused=True), 0, 0, stream=self.stream
        )
        self.fused = FusedStep(self.update, max_norm)

    def take(self, num_steps: int) -> list[float]:
        losses = []
        for number in range(num_steps):
            hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(number)).bfloat16()
            if number % 2:
                with torch.no_grad():
                    run_through(self.blocks, hidden)
            loss = run_through(self.blocks, hidden).square().mean()
            self.fused.backward(loss)
            losses.append(loss.item())
        return losses

    def held(self) -> dict[str, Tensor]:
        return {name: self.update.truest(name).clone() for name in self.weights}


@pytest.mark.parametrize("lane", [transfer.CopyLane, LateLane])
@pytest.mark.parametrize("max_norm", [0, 0.01])
@pytest.mark.parametrize("num_slots", [2, 3, 7])
def test_weights_that_are_stepped_in_their_slots_go_back_and_come_again(
    num_slots: int, max_norm: float, lane: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late copies are, in both directions. Clipping runs the backward pass twice."""
    resident = Stepped(None, max_norm)
    expected, begun = resident.take(6), resident.held()
    monkeypatch.setattr(streaming, "CopyLane", lane)
    streamed = Stepped(num_slots, max_norm)
    assert streamed.take(6) == expected and len(set(expected)) == 6
    found = streamed.held()
    assert all(found[name].equal(begun[name]) for name in begun)
    away = [name for name, weight in streamed.weights.items() if weight.isnan().all()]
    assert len(away) == 4 * (7 - num_slots), "up and down of each block that is not in the ring; its gain stays"


def test_a_streamed_weight_is_put_back_where_it_is_kept_and_fetched_anew() -> None:
    streamed = Stepped(3, 0.01)
    streamed.take(2)
    begun = streamed.held()
    rest = streamed.take(2)
    for name, value in begun.items():
        streamed.update.restore(name, value, {}, {})
    assert all(streamed.update.truest(name).equal(value) for name, value in begun.items())
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert run_through(streamed.blocks, hidden).square().mean().item() == rest[0]
    with pytest.raises(ValueError, match="streamed"):
        assert streamed.stream is not None
        streamed.stream.replace(torch.ones(3), torch.ones(3))


# ---- captured steps: what was captured finds each block where it was


@pytest.mark.parametrize("lane", [transfer.CopyLane, LateLane])
def test_the_first_blocks_come_back_whatever_ran_last(lane: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CopyLane", lane)
    plain = [Block(seed, 16 + seed % 3) for seed in range(7)]
    blocks, stream = make_blocks(7, num_slots=3)
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for last in (None, 6, 0, 2, 3, 5):
        with torch.no_grad():
            assert last is None or torch.equal(blocks[last](hidden), plain[last](hidden))
            stream.rewind()
            stream.settle()
            assert stream.arrangement() == (0, 1, 2)
            for block, same in zip(blocks[:3], plain[:3], strict=True):
                assert torch.equal(block.up.weight, same.up.weight)
            assert all(block.up.weight.isnan().all() for block in blocks[3:])
            assert torch.equal(run_through(blocks, hidden), run_through(plain, hidden))


class CapturingLane(transfer.CopyLane):
    """Copies nothing while work is captured, and lets nobody wait for that later."""

    captures = False

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        assert self.captures or after is not self
        if self.captures:
            return self
        target.copy_(source)
        return None

    def reached(self) -> Any:
        return self if self.captures else None

    def wait(self, mark: Any) -> None:
        assert self.captures or mark is not self


def test_work_that_was_captured_and_never_ran_has_moved_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CopyLane", CapturingLane)
    plain = [Block(seed, 16 + seed % 3) for seed in range(7)]
    blocks, stream = make_blocks(7)
    hidden = torch.randn(4, 8)
    with torch.no_grad():
        run_through(blocks, hidden)
        stream.settle()
        here, moved = stream.arrangement(), stream.num_copied_bytes
        monkeypatch.setattr(CapturingLane, "captures", True)  # a capture that fails halfway
        run_through(blocks[:5], hidden)
        assert stream.arrangement() != here and stream.num_copied_bytes > moved
        monkeypatch.setattr(CapturingLane, "captures", False)
        stream.forget()
        assert stream.arrangement() == here
        assert torch.equal(run_through(blocks, hidden), run_through(plain, hidden))


@pytest.mark.parametrize("num_blocks", [3, 7, 8])
def test_passes_with_gradients_begin_and_end_with_the_first_blocks_each_in_its_slot(num_blocks: int) -> None:
    """Else processes that hold the blocks together would not gather the same ones, if one of them replays a pass."""
    blocks, stream = make_blocks(num_blocks)
    hidden = torch.randn(4, 8)
    with torch.no_grad():
        run_through(blocks, hidden)
    stream.rewind()
    assert stream.arrangement() == (0, 1, 2)
    moved = []
    for is_rewound in (True, False, False, True):
        before = stream.num_copied_bytes
        if not is_rewound:
            with torch.no_grad():
                run_through(blocks, hidden)
            before = stream.num_copied_bytes + sum(
                stream.block_bytes[index] for index in range(3) if stream.arrangement()[index] != index
            )
        run_through(blocks, hidden).sum().backward()
        assert stream.arrangement() == (0, 1, 2)
        moved.append(stream.num_copied_bytes - before)
    assert len(set(moved)) == 1


# ---- what moves


def test_a_step_moves_each_block_twice_but_for_those_in_the_ring() -> None:
    blocks, stream = make_blocks(9, num_slots=3)
    hidden = torch.randn(4, 8)
    assert stream.device_bytes == 3 * max(stream.block_bytes)

    def moved_by(run: Callable[[], object]) -> int:
        before = stream.num_copied_bytes
        run()
        return stream.num_copied_bytes - before

    def train() -> None:
        run_through(blocks, hidden).sum().backward()

    train()  # the first blocks are not there yet
    assert moved_by(train) == moved_by(train) == sum(stream.block_bytes[3:]) + sum(stream.block_bytes[:6])
    with torch.no_grad():
        run_through(blocks, hidden)
        assert moved_by(lambda: run_through(blocks, hidden)) == sum(stream.block_bytes)
    assert stream.num_late == 1  # only the very first


def test_nothing_moves_once_all_blocks_are_in_the_ring() -> None:
    blocks, stream = make_blocks(3, num_slots=3)
    run_through(blocks, torch.randn(4, 8)).sum().backward()
    run_through(blocks, torch.randn(4, 8)).sum().backward()
    assert stream.num_copied_bytes == sum(stream.block_bytes)


@pytest.mark.parametrize("early_stop", [True, False])
def test_copies_start_before_they_are_needed_and_only_into_slots_that_were_passed(
    early_stop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The computation is counted in launches; a copy into a slot must come after all that the slot was used for.

    Args:
        early_stop: a recomputation ends with the last tensor it has to save; else it runs to its end.
    """
    launched: list[int] = []
    num_copies = 0

    class CountingLane(LateLane):
        def reached(self) -> int:
            return len(launched)

        def copy(self, target: Tensor, source: Tensor, after: int | None) -> int:
            nonlocal num_copies
            num_copies += 1
            last_use = max((i + 1 for i, slot in enumerate(launched) if slot == target.data_ptr()), default=0)
            assert (after or 0) >= last_use
            return super().copy(target, source, after)

    def launching(forward: Callable[[Tensor], Tensor], block: Block) -> Callable[[Tensor], Tensor]:
        def launch(gradient: Tensor | None = None) -> None:
            launched.append(block.up.weight.untyped_storage().data_ptr())

        def run(hidden: Tensor) -> Tensor:
            launch()
            if not streaming.in_backward_pass():
                hidden.register_hook(launch)  # called when the block's backward pass ends
            return forward(hidden)

        return run

    monkeypatch.setattr(streaming, "CopyLane", CountingLane)
    blocks, stream = make_blocks(9)
    for block in blocks:
        replace_computation(block, partial(launching, block=block))
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        for _ in range(2):
            run_through(blocks, torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert len(launched) == 2 * 9 * 3 and num_copies == 9 + 6 + 6 + 6
    assert stream.num_late == 1


# ---- where the weights are


def test_frozen_tensors_leave_and_trained_ones_stay() -> None:
    block = Block(0, 4096)
    weight, gain = block.up.weight, block.gain
    expected = weight.clone()
    stream = stream_blocks([block, Block(1)], CPU)
    assert weight is block.up.weight and torch.isnan(weight).all()
    assert weight.untyped_storage().nbytes() < 100  # its memory is free
    assert torch.equal(gain, torch.ones(8))
    assert all(size % 256 == 0 for size in stream.block_bytes)
    with torch.no_grad():
        block(torch.randn(1, 8))
    assert torch.equal(weight, expected) and weight.stride() == expected.stride()
    assert weight.data_ptr() % 64 == 0 and torch.isfinite(block.shift).all()


def test_a_block_that_had_to_go_holds_no_other_blocks_weights() -> None:
    blocks, _ = make_blocks(7)
    with torch.no_grad():
        run_through(blocks, torch.randn(4, 8))
    away = [block for block in blocks if torch.isnan(block.up.weight).any()]
    assert len(away) == 4
    assert all(torch.isnan(block.down.weight).all() and torch.isnan(block.shift).all() for block in away)


def test_strides_of_a_transposed_weight_survive_and_a_slice_comes_alone() -> None:
    transposed, whole = torch.randn(4, 6).t(), torch.randn(10, 6)
    block: Any = nn.Module()
    block.register_buffer("transposed", transposed.clone(memory_format=torch.preserve_format))
    block.register_buffer("sliced", whole[:, 2:5])
    block.register_buffer("same", block.transposed)
    block.forward = lambda: (block.transposed.clone(memory_format=torch.preserve_format), block.sliced.clone())
    stream = stream_blocks([block, Block(0)], CPU)
    with torch.no_grad():
        seen_transposed, seen_sliced = block()
    assert torch.equal(seen_transposed, transposed) and seen_transposed.stride() == transposed.stride()
    assert torch.equal(seen_sliced, whole[:, 2:5])
    assert stream.block_bytes[0] == 256 * 2


# ---- compiled


def test_swapping_weights_compiles_nothing_anew() -> None:
    torch._dynamo.reset()
    plain = [Block(seed) for seed in range(7)]
    blocks = [Block(seed) for seed in range(7)]
    stream_blocks(blocks, CPU, num_slots=2)
    recompute_blocks(blocks, offload=False)
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for block in [*blocks, *plain]:
        replace_computation(block, lambda forward: torch.compile(forward, fullgraph=True, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            for some in (blocks, plain):
                run_through(some, hidden).square().sum().backward()
            for actual, expected in zip(gains(blocks), gains(plain), strict=True):
                assert torch.equal(actual, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---- what is refused


def test_gradients_without_recomputation_are_refused() -> None:
    blocks, _ = make_blocks(4, recomputed=False)
    with pytest.raises(RuntimeError, match="recompute_blocks"):
        run_through(blocks, torch.randn(4, 8))
    with torch.no_grad():
        run_through(blocks, torch.randn(4, 8))


@pytest.mark.parametrize(("num_blocks", "num_slots"), [(0, 3), (4, 1)])
def test_too_few_blocks_or_slots(num_blocks: int, num_slots: int) -> None:
    with pytest.raises(ValueError, match=f"{num_blocks} and {num_slots}"):
        stream_blocks([Block(seed) for seed in range(num_blocks)], CPU, num_slots)


def test_a_block_without_frozen_weights() -> None:
    with pytest.raises(ValueError, match="Linear has no frozen weights"):
        stream_blocks([nn.Linear(2, 2)], CPU)


def test_too_little_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "read_host_memory", lambda: HostMemory(8 * GIB, GIB // 4, 0, 0))
    with torch.device("meta"):  # stands for blocks on a GPU; nothing of them is read before the check
        blocks = [nn.Linear(8192, 4096).requires_grad_(False) for _ in range(8)]
    with pytest.raises(PlanError, match=r"streaming 8 blocks needs 1\.1\d GiB .* 0\.25 GiB are available"):
        stream_blocks(blocks, CPU)


def pretend(monkeypatch: pytest.MonkeyPatch, driver: object, integrated: bool = False) -> None:
    """A GPU with a driver, whose memory is the host's or its own."""
    properties = types.SimpleNamespace(is_integrated=integrated)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


def test_memory_that_cannot_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = types.SimpleNamespace(cudaHostRegister=lambda address, size, flags: 2)
    pretend(monkeypatch, driver)
    with pytest.raises(PlanError, match=r"could not lock 0\.12 GiB .*CUDA error 2.* GiB are available"):
        transfer.host_buffer(GIB // 8, torch.device("cuda"))


def test_locked_memory_is_unlocked_when_it_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: dict[int, int] = {}

    def register(address: int, size: int, flags: int) -> int:
        locked[address] = size
        return 0

    driver = types.SimpleNamespace(
        cudaHostRegister=register, cudaHostUnregister=lambda address: 0 if locked.pop(address) else 1
    )
    pretend(monkeypatch, driver)
    buffer = transfer.host_buffer(5000, torch.device("cuda"))
    assert locked == {buffer.data_ptr(): 5000}  # exactly what was asked for, not the next power of two
    del buffer
    assert not locked
    pretend(monkeypatch, driver, integrated=True)
    assert transfer.host_buffer(5000, torch.device("cuda")).nbytes == 5000 and not locked, "one pool: nothing to lock"
