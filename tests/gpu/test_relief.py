"""Captures and steps that run out of a GPU's memory at random points give it all back, and the run goes on."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pixtune.engine.activations import recompute_blocks
from pixtune.engine.capture import GraphCapturer, ReplayedPass
from pixtune.engine.relief import RecomputeMore, free_bytes, lacks_memory
from tests.unit.engine.tiny import Numbers

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
WIDTH, NUM_BLOCKS, NUM_ROWS = 1024, 12, 16384
MIB = 2**20


class Remembers(nn.Module):
    """Keeps a tensor that it made until the next pass, as modulation does with the rows that it hands out."""

    def forward(self, inputs: Tensor) -> Tensor:
        self.rows = inputs[:4096].detach() * 1
        return inputs + self.rows.mean()


@pytest.fixture(autouse=True)
def _whole_card() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


def allow(num_bytes: int) -> None:
    """Lets torch's allocator have so much and no more."""
    torch.cuda.set_per_process_memory_fraction(num_bytes / torch.cuda.get_device_properties(DEVICE).total_memory)


def build() -> tuple[list[nn.Module], nn.Parameter, Callable[[Numbers], Tensor]]:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH), nn.GELU()] * 3  # each GELU keeps its input; a recomputed block keeps one tensor
    blocks: list[nn.Module] = [
        nn.Sequential(Remembers(), *copy.deepcopy(layers)).to(DEVICE).requires_grad_(False) for _ in range(NUM_BLOCKS)
    ]
    gain = nn.Parameter(torch.ones((), device=DEVICE))

    def compute(inputs: Numbers) -> Tensor:
        hidden = inputs.values * gain
        for block in blocks:
            hidden = block(hidden)
        loss = hidden.square().mean()
        loss.backward()
        return loss.detach()

    return blocks, gain, compute


def peak_of(compute: Callable[[Numbers], Tensor], inputs: Numbers, gain: nn.Parameter) -> int:
    """What the allocator holds at most for a plain pass."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    compute(inputs)
    gain.grad = None
    return torch.cuda.max_memory_reserved()


def test_captures_that_fail_at_random_points_give_all_memory_back_and_the_next_one_succeeds() -> None:
    _, gain, compute = build()
    inputs = Numbers(torch.randn(NUM_ROWS, WIDTH, device=DEVICE))
    peak = peak_of(compute, inputs, gain)
    gain.grad = torch.zeros_like(gain)
    capture = GraphCapturer()
    expected = compute(inputs).clone()
    gain.grad.zero_()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    draws, failures = random.Random(5), 0
    for _ in range(12):
        allow(before + round((peak - before) * draws.uniform(0.05, 0.95)))
        try:
            capture(lambda: compute(inputs))
        except RuntimeError as error:
            assert lacks_memory(error), error
            failures += 1
        allow(2 * peak)
        compute(inputs)  # replaces what the blocks remember
        gain.grad.zero_()
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= before + 2 * MIB
        replay = capture(lambda: compute(inputs))
        gain.grad.zero_()
        assert replay().equal(expected)
        gain.grad.zero_()
        del replay
        gc.collect()
        torch.cuda.empty_cache()
    assert failures == 12


def test_a_pass_finds_its_way_into_any_limit(caplog: pytest.LogCaptureFixture) -> None:
    """Under random limits a pass is captured after some more blocks are recomputed, and computes the same."""
    draws = random.Random(7)
    for _ in range(6):
        blocks, gain, compute = build()
        inputs = Numbers(torch.randn(NUM_ROWS, WIDTH, device=DEVICE))
        peak = peak_of(compute, inputs, gain)
        kept = torch.cuda.memory_allocated()
        expected = compute(inputs).clone()
        assert gain.grad is not None
        expected_gradient = gain.grad.clone()
        recompute_blocks(blocks[:2], offload=False)
        limit = kept + round((peak - kept) * draws.uniform(0.65, 1.05))
        replayed: ReplayedPass[Numbers] = ReplayedPass(
            compute, [gain], GraphCapturer(), 1, partial(free_bytes, limit), RecomputeMore(blocks)
        )
        relieve = RecomputeMore(blocks)
        torch.cuda.empty_cache()
        allow(limit)
        for _ in range(8):
            while True:
                replayed.zero_gradients()
                try:
                    loss = replayed(inputs).clone()
                except torch.OutOfMemoryError:
                    loss = None
                if loss is not None:
                    break
                torch.cuda.empty_cache()
                assert replayed.give_up_captures() or relieve(), "nothing is left to give up"
            assert loss.equal(expected) and gain.grad is not None and gain.grad.equal(expected_gradient)
        assert replayed._captures, caplog.text
        allow(2 * peak)
        replayed.release()
        del blocks, gain, compute, replayed, relieve
