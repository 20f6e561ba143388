"""Blocks that keep their inputs only, on the device or in host memory, train bit for bit as those that keep all."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from pixtune.engine import activations, transfer
from pixtune.engine.activations import (
    BufferPool,
    InputOffload,
    recompute_blocks,
    recompute_projections,
    round_up,
)
from pixtune.engine.forwards import is_recomputed, replace_computation
from pixtune.engine.relief import RecomputeMore
from pixtune.engine.streaming import stream_blocks
from tests.gradients import gradient_of
from tests.unit.engine.tiny import (
    MODELS,
    LateLane,
    assert_same,
    attach,
    blocks_of,
    compile_in_one,
    load_model,
    plain_step,
    step,
    velocity,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes both inputs of the small models count as large: 128 and 24 KiB."""
    monkeypatch.setattr(activations, "MIN_OFFLOADED_BYTES", 2**12)


@pytest.fixture
def offloads(monkeypatch: pytest.MonkeyPatch) -> list[InputOffload]:
    """The offloads that are made."""
    made: list[InputOffload] = []
    original = InputOffload.__init__

    def noting(self: InputOffload) -> None:
        original(self)
        made.append(self)

    monkeypatch.setattr(InputOffload, "__init__", noting)
    return made


class Block(nn.Module):
    """Counts its runs and remembers a text beside the picture, as the real ones do."""

    def __init__(self, seed: int, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(width, width)
        self.num_runs = 0
        self.seen: list[Tensor] = []

    def forward(self, hidden: Tensor, text: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.num_runs += 1
        mixed = torch.tanh(self.linear(hidden + text.mean(dim=1, keepdim=True)))
        return text + mixed.mean(), hidden + (mixed if scale is None else mixed * scale)


def run_through(blocks: list[Block], hidden: Tensor, text: Tensor, **kwargs: Any) -> Tensor:
    for block in blocks:
        text, hidden = block(hidden, text=text, **kwargs)
    return hidden


def make_inputs(length: int = 64) -> tuple[Tensor, Tensor]:
    """16 KiB of picture and 8 KiB of text for `length` 64."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, length, 64, generator=generator, requires_grad=True),
        torch.randn(1, 32, 64, generator=generator, requires_grad=True),
    )


# ---- equal to the plain run


@pytest.mark.parametrize("lane", [transfer.CopyLane, LateLane])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("linear_format", [None, "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_equals_the_plain_one(
    name: str, linear_format: str | None, offload: bool, lane: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "CopyLane", lane)
    model = load_model(name, linear_format)
    attach(name, model)
    recompute_blocks(blocks_of(name, model), offload)
    for seed in (0, 1):
        assert_same(step(name, model, seed), plain_step(name, linear_format, seed))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_some_blocks_recomputed(name: str, offload: bool) -> None:
    model = load_model(name)
    attach(name, model)
    blocks = blocks_of(name, model)
    recompute_blocks(blocks[1::2], offload)
    assert [is_recomputed(block) for block in blocks] == [index % 2 == 1 for index in range(len(blocks))]
    assert_same(step(name, model), plain_step(name))


def test_more_blocks_recomputed_in_the_middle_of_a_run(name: str = "tiny-flux") -> None:
    """Compiled blocks of two kinds, some of which recompute queries, keys and values, compute the same."""
    model = load_model(name)
    attach(name, model)
    blocks = blocks_of(name, model)
    recompute_projections(blocks[1:])
    compile_in_one(blocks)
    recompute_more = RecomputeMore(blocks)
    recomputed = []
    while True:
        assert_same(step(name, model), plain_step(name))
        recomputed.append(sum(is_recomputed(block) for block in blocks))
        if recompute_more() is None:
            break
    assert recomputed[:3] == [0, 1, 3] and recomputed[-1] == len(blocks)


@pytest.mark.parametrize("offload", [False, True])
def test_paths_of_the_modules_stay(offload: bool) -> None:
    model = load_model(MODELS[0])
    before = [name for name, _ in model.named_modules()], list(model.state_dict())
    recompute_blocks(blocks_of(MODELS[0], model), offload)
    assert ([name for name, _ in model.named_modules()], list(model.state_dict())) == before


@pytest.mark.parametrize("offload", [False, True])
def test_no_gradients_no_recomputation(
    offload: bool, offloads: list[InputOffload], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(MODELS[0])
    with torch.no_grad():
        expected = velocity(MODELS[0], model)
        recompute_blocks(blocks_of(MODELS[0], model), offload)
        monkeypatch.setattr(activations, "checkpoint", None)
        assert torch.equal(velocity(MODELS[0], model), expected)
    assert [offload.host_bytes for offload in offloads] == [0] * len(offloads)


@pytest.mark.parametrize("offload", [False, True])
def test_each_block_runs_twice(offload: bool) -> None:
    blocks = [Block(seed) for seed in range(4)]
    recompute_blocks(blocks, offload)
    run_through(blocks, *make_inputs()).sum().backward()
    assert [block.num_runs for block in blocks] == [2] * 4


def assert_offloaded_is_plain(backward: Callable[[list[Block], Tensor, Tensor], Tensor | None]) -> None:
    """Compares gradients without recomputation with those of inputs that wait in host memory.

    Args:
        backward: runs blocks on an image's and a text's tensor forward and backward; what it returns lives on until
            gradients are there.
    """
    gradients = []
    for offload in (None, True):
        blocks = [Block(seed) for seed in range(4)]
        if offload:
            recompute_blocks(blocks, offload)
        hidden, text = make_inputs()
        kept = backward(blocks, hidden, text)
        found = [hidden.grad, text.grad, *(block.linear.weight.grad for block in blocks)]
        gradients.append([gradient for gradient in found if gradient is not None])
        del kept
    for plain, offloaded in zip(*gradients, strict=True):
        assert torch.equal(plain, offloaded)


def test_two_backward_passes_over_one_graph() -> None:
    def backward(blocks: list[Block], hidden: Tensor, text: Tensor) -> None:
        loss = run_through(blocks, hidden, text).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()

    assert_offloaded_is_plain(backward)


@pytest.mark.parametrize("last", range(4))
def test_a_backward_pass_may_begin_at_any_block(last: int) -> None:
    """The block after it, which has its inputs brought back, does not run backward then."""

    def backward(blocks: list[Block], hidden: Tensor, text: Tensor) -> Tensor:
        loss = run_through(blocks[: last + 1], hidden, text).square().sum()
        rest = run_through(blocks[last + 1 :], hidden, text)  # of which nothing depends on the loss
        loss.backward()
        return rest

    assert_offloaded_is_plain(backward)


# ---- where the inputs are


def test_large_inputs_with_gradients_leave_but_not_the_last_blocks(offloads: list[InputOffload]) -> None:
    blocks = [Block(seed) for seed in range(5)]
    recompute_blocks(blocks, offload=True)
    hidden, text = make_inputs()
    scale = torch.ones(1, 64, 64)  # as large as the picture, but the same tensor for all blocks
    loss = run_through(blocks, hidden, text, scale=scale).sum()
    assert offloads[0].host_bytes == 4 * (hidden.nbytes + text.nbytes)
    loss.backward()


def test_inputs_below_the_threshold_stay(offloads: list[InputOffload], monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, text = make_inputs()
    monkeypatch.setattr(activations, "MIN_OFFLOADED_BYTES", hidden.nbytes)
    blocks = [Block(seed) for seed in range(5)]
    recompute_blocks(blocks, offload=True)
    run_through(blocks, hidden, text).sum().backward()
    assert offloads[0].host_bytes == 4 * hidden.nbytes


def test_the_computation_waits_for_a_copy_before_the_original_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes: list[LateLane] = []

    def make(device: torch.device) -> LateLane:
        lanes.append(LateLane(device))
        return lanes[-1]

    monkeypatch.setattr(activations, "CopyLane", make)
    blocks = [Block(seed) for seed in range(3)]
    recompute_blocks(blocks, offload=True)
    hidden, text = make_inputs()
    for block in blocks:
        text, hidden = block(hidden, text)
        assert not lanes[0].pending
    assert lanes[0].num_done == 4


@pytest.mark.parametrize("offload", [False, True])
def test_the_device_memory_of_an_input_is_free_after_its_block(offload: bool) -> None:
    blocks = [Block(seed) for seed in range(4)]
    recompute_blocks(blocks, offload)
    inputs: list[weakref.ref[torch.UntypedStorage]] = []
    hidden, text = make_inputs()
    gc.disable()  # nothing may need the collector
    try:
        for block in blocks:
            text, hidden = block(hidden, text)
            inputs.append(weakref.ref(hidden))
        assert [reference() is None for reference in inputs[:-1]] == [offload, offload, False]  # the last one stays
    finally:
        gc.enable()
    hidden.sum().backward()


def test_host_memory_is_taken_in_the_first_step_only(
    offloads: list[InputOffload], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counting(num_bytes: int, device: torch.device) -> Tensor:
        sizes.append(num_bytes)
        return transfer.host_buffer(num_bytes, device)

    monkeypatch.setattr(activations, "host_buffer", counting)
    blocks = [Block(seed) for seed in range(5)]
    recompute_blocks(blocks, offload=True)
    gc.disable()
    try:
        run_through(blocks, *make_inputs()).sum().backward()
        assert len(sizes) == 8
        for length in (64, 60, 64, 56):  # another shape of picture needs no memory of its own
            run_through(blocks, *make_inputs(length)).sum().backward()
    finally:
        gc.enable()
    assert len(sizes) == 8 and offloads[0].host_bytes == sum(sizes)


def test_inputs_come_back_one_block_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class NotingLane(transfer.CopyLane):
        def copy(self, target: Tensor, source: Tensor, after: transfer.Mark) -> transfer.Mark:
            if target.numel() == 64 * 64:
                happened.append("copy")
            return super().copy(target, source, after)

    monkeypatch.setattr(activations, "CopyLane", NotingLane)
    blocks = [Block(seed) for seed in range(4)]
    for index, block in enumerate(blocks):
        replace_computation(block, noting(happened, f"block {index}"))
    recompute_blocks(blocks, offload=True)
    loss = run_through(blocks, *make_inputs()).sum()
    assert happened == ["copy", "block 0", "copy", "block 1", "copy", "block 2", "block 3"]
    happened.clear()
    loss.backward()
    assert happened == ["copy", "block 3", "copy", "block 2", "copy", "block 1", "block 0"]


def noting(happened: list[str], what: str) -> Callable[[Any], Any]:
    def change(forward: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            happened.append(what)
            return forward(*args, **kwargs)

        return noted

    return change


def test_a_recomputed_block_sees_the_strides_it_saw_before() -> None:
    seen: list[tuple[int, ...]] = []

    class Sliced(nn.Module):
        def forward(self, both: Tensor) -> Tensor:
            seen.append(both.stride())
            return torch.tanh(both)

    block, last = Sliced(), Sliced()
    recompute_blocks([block, last], offload=True)
    whole = torch.randn(2, 96, 64, requires_grad=True)
    part = whole[:, 32:]
    last(block(part)).sum().backward()
    expected = torch.autograd.grad(torch.tanh(torch.tanh(whole[:, 32:])).sum(), whole)[0]
    assert torch.equal(gradient_of(whole), expected)
    assert seen[0] == seen[3] == (96 * 64, 64, 1)


# ---- the pool


def test_a_buffer_serves_what_is_a_little_smaller() -> None:
    pool = BufferPool(CPU)
    large, small = pool.take(1000), pool.take(100)
    assert pool.num_bytes == large.nbytes + small.nbytes
    pool.give_back(large)
    pool.give_back(small)
    assert pool.take(300) is not large  # would be a waste
    assert pool.take(600) is large
    assert pool.take(90) is small
    assert pool.take(90) is not small  # taken


def test_sizes_are_rounded_up_by_less_than_an_eighth() -> None:
    for num_bytes in (1, 7, 8, 9, 1000, 2**20, 2**20 + 1, 26_000_000):
        assert num_bytes <= round_up(num_bytes) <= num_bytes * 9 / 8
    assert round_up(2**20) == 2**20 and round_up(2**20 + 1) == 2**20 + 2**17


# ---- compiled


@pytest.mark.parametrize(("name", "compiled_first"), [("tiny-qwen-image", False), ("tiny-flux", True)])
def test_compiled_streamed_and_offloaded_blocks_equal_compiled_resident_ones(name: str, compiled_first: bool) -> None:
    """Compilation goes inside, whenever it happens, and neither swapped weights nor returned inputs repeat it."""
    torch._dynamo.reset()
    counters.clear()
    plain = load_model(name, "int8")
    attach(name, plain)
    compile_in_one(blocks_of(name, plain))
    expected = step(name, plain)

    model = load_model(name, "int8")
    blocks = blocks_of(name, model)
    stream_blocks(blocks, CPU, num_slots=2)
    attach(name, model)
    if compiled_first:
        compile_in_one(blocks)
    recompute_blocks(blocks, offload=True)
    if not compiled_first:
        compile_in_one(blocks)
    assert_same(step(name, model), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(step(name, model), expected)
        assert_same(step(name, plain), expected)
    assert counters["graph_break"] == {} and counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("compiled_first", [False, True])
def test_the_modules_own_compile_is_refused(compiled_first: bool, fullgraph: bool) -> None:
    """Compiling it whole would include the checkpoint, and the copies with it."""
    torch._dynamo.reset()
    block = Block(0)
    if not compiled_first:
        recompute_blocks([block], offload=True)
    block.compile(fullgraph=fullgraph, backend="aot_eager")
    with pytest.raises(RuntimeError, match="replace_computation"):
        if compiled_first:
            recompute_blocks([block], offload=True)
        else:
            block(*make_inputs())
