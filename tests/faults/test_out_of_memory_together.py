"""Several processes of a run, one of which runs out of memory: it alone needs less, or all stop with a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pixtune.storage.checkpoint_state import find_checkpoints
from tests.faults.test_out_of_memory import KEPT, NUM_EXAMPLES, RECOMPUTED, FakeCard, plan_of
from tests.runs import overrides, pixtune_together, write_config

NUM_BLOCKS = 2
ALL = NUM_EXAMPLES * NUM_BLOCKS * KEPT
EACH = NUM_EXAMPLES * (KEPT - RECOMPUTED)
SETTINGS: dict[str, object] = {
    "max_train_steps": 3,
    "gradient_accumulation_steps": 2,
    "ema__decay": 0.5,
    "train_batch_size": NUM_EXAMPLES,
}


def with_card(units: int) -> None:
    """Gives process 1 a card that has room for every pass up to its third, and so many units from then on."""
    from pixtune import train as training

    if os.environ["RANK"] == "1":
        card = FakeCard(lambda number: ALL if number < 4 else units, late=True)
        training.forward_backward = card.forward_backward


def failing_after_the_exchange() -> None:
    """Has memory end in process 1's second step when gradients have been exchanged, and the other one goes on."""
    if os.environ["RANK"] == "1":
        step, calls = torch.optim.AdamW.step, []

        def step_or_fail(self: Any, *arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return step(self, *arguments)

        torch.optim.AdamW.step = step_or_fail  # type: ignore[method-assign, assignment]


def with_another_plan() -> None:
    """Has process 1 plan otherwise, as a GPU of another kind might."""
    from pixtune import assembly

    if os.environ["RANK"] == "1":
        decide = assembly.decide_plan
        assembly.decide_plan = lambda *arguments: replace(decide(*arguments), recomputed_blocks=1, tf32=True)


def train(
    folder: Path, cache: Path, before: Callable[[], None] | None, **changes: object
) -> list[CompletedProcess[str]]:
    folder.mkdir(exist_ok=True)
    words = overrides(folder / "run", cache, **{**SETTINGS, **changes})
    return pixtune_together(2, "train", "--config", write_config(folder), *words, before=before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert [each.returncode for each in train(folder, warm_cache, None)] == [0, 0]
    return folder


def test_one_process_recomputes_more_while_the_other_waits_for_it(
    tmp_path: Path, warm_cache: Path, undisturbed: Path
) -> None:
    """In the second micro-batch of its second step; a checkpoint has the plan by which both have room."""
    first, second = train(tmp_path, warm_cache, partial(with_card, ALL - 2 * EACH))
    assert (first.returncode, second.returncode) == (0, 0), first.stdout + second.stdout
    assert "ran out of memory" not in first.stdout
    assert second.stdout.count("step 2 in process 1 ran out of memory") == 2
    assert second.stdout.count("is taken again: 1 more of 2 blocks recomputed") == 2
    weights = [load_file(folder / "run" / "pytorch_lora_weights.safetensors") for folder in (undisturbed, tmp_path)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    assert plan_of(undisturbed)["recomputed_blocks"] == 0
    assert plan_of(tmp_path)["recomputed_blocks"] == 2, "the first process writes it, and the other one needs it"


@pytest.mark.parametrize(
    ("before", "saved"),
    [(partial(with_card, 0), 1), (failing_after_the_exchange, 2)],
    ids=["nothing is left to give up", "the other one has gone on"],
)
def test_otherwise_all_stop_with_a_checkpoint_and_one_message(
    tmp_path: Path, warm_cache: Path, before: Callable[[], None], saved: int
) -> None:
    """The first process saves the steps that it has taken itself."""
    first, second = train(tmp_path, warm_cache, before)
    assert first.returncode and second.returncode
    printed = first.stdout + second.stdout
    assert printed.count("step 2 in process 1 needs more device memory than there is") == 1, printed
    assert "Traceback" not in printed
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == [f"checkpoint-{saved:06}"], printed


def test_processes_whose_plans_differ_are_refused_before_anything_is_loaded(tmp_path: Path, warm_cache: Path) -> None:
    first, second = train(tmp_path, warm_cache, with_another_plan)
    assert first.returncode == second.returncode == 1
    printed = first.stdout + second.stdout
    for key, one, other in (("recomputed_blocks", "0", "1"), ("tf32", "false", "true")):
        assert printed.count(f"the plan's {key}: process 0 has {one}, process 1 has {other}") == 1, printed
    assert "LoRA:" not in printed and "Traceback" not in printed
