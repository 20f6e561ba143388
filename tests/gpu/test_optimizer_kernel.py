"""AdamW's step in one kernel as a GPU runs it (`tests/kernel_steps.py`); no step waits for it or takes memory."""

from __future__ import annotations

import pytest
import torch

from pixtune.trained.step_trial import LARGEST_ERROR, largest_error, step_obstacle
from tests import kernel_steps
from tests.kernel_steps import KINDS, OPTIMIZERS, SHAPES, Stepped, random

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")


def test_the_kernel_passes_its_trial() -> None:
    assert step_obstacle(GPU) is None
    assert all(largest_error(optimizer, GPU) < LARGEST_ERROR / 2 for optimizer in OPTIMIZERS)


@pytest.mark.parametrize("kind", KINDS)
def test_32_bit_moments_are_those_of_fp64(kind: str) -> None:
    kernel_steps.check_exact(kind, GPU)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_kernel_does_what_several_do(optimizer: str, kind: str) -> None:
    kernel_steps.check_against_separate_kernels(optimizer, kind, GPU)


def test_8_bit_codes_are_the_nearest_levels() -> None:
    kernel_steps.check_codes(GPU)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_spoiled_step_changes_nothing_and_the_next_one_does(optimizer: str, kind: str) -> None:
    kernel_steps.check_spoiled(optimizer, kind, GPU)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_all_weights_at_once_are_what_one_by_one_makes_them(optimizer: str, kind: str) -> None:
    kernel_steps.check_at_once(optimizer, kind, GPU)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_is_uninterrupted_to_the_bit_and_either_form_goes_on(optimizer: str) -> None:
    kernel_steps.check_resumed(optimizer, GPU)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parts_are_stepped_as_whole_weights_bit_for_bit(optimizer: str) -> None:
    kernel_steps.check_parts(optimizer, GPU)


def test_rounding_is_that_of_the_cpu_to_the_bit() -> None:
    kernel_steps.check_rounding(GPU, 100_003)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_step_waits_or_takes_memory(optimizer: str) -> None:
    stepped = Stepped(optimizer, "rounded", "kernel", GPU).take(2)
    gradients = {name: random(name, 9, "rounded", GPU) for name in SHAPES}
    factor, sound = torch.tensor(0.5, device=GPU), torch.zeros((), device=GPU)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, gradient in gradients.items():
            stepped.update.step_weight(name, gradient, factor, sound)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() == before
