"""A step without numbers changes nothing on a GPU either: captured passes, fused and 8-bit Adam, and no wait."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixtune import assembly
from pixtune.config import load_config
from pixtune.data.batches import Batch
from pixtune.run import Run
from pixtune.tracking.figures import StepOutcome
from pixtune.trained import optim
from tests.runs import overrides

pytestmark = pytest.mark.gpu

training = import_module("pixtune.train")  # the package has a function of that name

STEPS_UNTIL_CAPTURED = 6


@pytest.fixture(autouse=True)
def _no_debug_mode_is_left() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def held_by(run: Run) -> dict[str, Tensor]:
    """Copies of all weights, as a checkpoint would hold them, and of the optimizer's tensors."""
    weights = {name: parameter.detach().clone() for name, parameter in run.trained.parameters.items()}
    states, _ = optim.optimizer_state(run.trained.optimizer, run.trained.parameters)
    return weights | {path: state.clone() for path, state in states.items()}


def take(run: Run, batch: Batch, step: int, spoiled: bool = False) -> StepOutcome:
    """Takes a step on the same batch, whose first latent is no number if it is spoiled."""
    latents_BCHW = batch.latents_BCHW.clone()
    latents_BCHW[0, 0, 0, 0] = torch.nan if spoiled else latents_BCHW[0, 0, 0, 0]
    parts = [Batch(latents_BCHW, *[getattr(batch, name) for name in FIELDS]).pin_memory()]
    outcome: StepOutcome = training.take_step(run, [parts], step)
    return outcome


FIELDS = ("noise_BCHW", "sigma_B", "conditioning", "controls", "names")


@pytest.mark.parametrize("adam8bit", [False, True])
@pytest.mark.parametrize(("method", "rate"), [("lora", 1e-3), ("full", 1e-5)])
def test_a_spoiled_step_changes_nothing_and_later_ones_train(
    tmp_path: Path, warm_cache: Path, method: str, adam8bit: bool, rate: float
) -> None:
    if adam8bit:
        pytest.importorskip("bitsandbytes")
    words = overrides(
        tmp_path / "run", warm_cache, method=method, adam8bit=adam8bit, learning_rate=rate, mixed_precision="bf16",
        max_train_steps=40, data_config__num_workers=0,
    )  # fmt: skip
    run, _ = assembly.assemble(load_config(None, words), training.forward_backward)
    (batch, *_) = run.source.parts(0, run.source.order.micro_batch(0))
    for step in range(STEPS_UNTIL_CAPTURED):
        outcome = take(run, batch, step)
    assert outcome.figures_3.isfinite().all()
    if method == "lora":
        assert run.plan.captures and run.forward_backward.history.made, "the pass is replayed from now on"

    before = held_by(run)
    torch.cuda.synchronize()
    if method == "lora":
        torch.cuda.set_sync_debug_mode("error")
        torch.cuda._sleep(2_000_000_000)  # the host is done long before the device
    outcome = take(run, batch, STEPS_UNTIL_CAPTURED, spoiled=True)
    if method == "lora":
        assert not torch.cuda.current_stream().query(), "the host has waited"
        torch.cuda.set_sync_debug_mode("default")
    after = held_by(run)
    assert outcome.losses_B.isfinite().tolist() == [False, True] and not outcome.totals_2[0].isfinite()
    assert before.keys() == after.keys()
    assert [name for name, tensor in before.items() if not tensor.equal(after[name])] == []

    for step in range(STEPS_UNTIL_CAPTURED + 1, STEPS_UNTIL_CAPTURED + 4):
        outcome = take(run, batch, step)
    later = held_by(run)
    assert outcome.figures_3.isfinite().all() and all(tensor.isfinite().all() for tensor in later.values())
    assert any(not before[name].equal(later[name]) for name in run.trained.parameters)
