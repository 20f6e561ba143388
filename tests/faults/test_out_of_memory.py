"""Steps that run out of memory are taken again with less, and compute what they would have computed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pixtune import assembly
from pixtune import train as training
from pixtune.config import load_config
from pixtune.config.schema import TrainConfig
from pixtune.data.batches import Batch
from pixtune.engine import relief
from pixtune.engine.apply import load_planned
from pixtune.engine.capture import CapturedPass, ReplayedPass
from pixtune.engine.forwards import is_recomputed
from pixtune.engine.relief import MemoryOfOthers, lacks_memory
from pixtune.errors import MemoryShortage
from pixtune.hardware.facts import GIB
from pixtune.judging.validation import ValidationLoss, measure
from pixtune.plan.training import TrainingPlan
from pixtune.planning import Leaner, plan_on_this_machine
from pixtune.services import measuring
from pixtune.storage.checkpoint import load_checkpoint
from pixtune.storage.checkpoint_state import find_checkpoints
from pixtune.trained.weight_update import WeightUpdate
from tests.runs import DEMO_HELD_OUT, ROOT, TINY_MODEL, overrides, write_config

CHARACTER = ROOT / "assets" / "demo-character"
FOLDERS = [
    {"img_dir": str(CHARACTER / "images"), "mask_dir": str(CHARACTER / "masks"), "loss_weight": 0.5},
    {"img_dir": str(DEMO_HELD_OUT)},
]
SETTINGS: dict[str, object] = {
    "pretrained_model_name_or_path": TINY_MODEL,
    "max_train_steps": 3,
    "gradient_accumulation_steps": 2,
    "data_config__img_dir": "null",
    "data_config__folders": json.dumps(FOLDERS),
    "ema__decay": 0.5,
}
NUM_BLOCKS, NUM_EXAMPLES = 5, 2
KEPT, RECOMPUTED = 4, 1
EACH = NUM_EXAMPLES * (KEPT - RECOMPUTED)
ALL = NUM_EXAMPLES * NUM_BLOCKS * KEPT
"""Units of memory: what one more recomputed block frees, and what a batch takes where none is."""

plain_forward_backward = training.forward_backward


class FakeCard:
    """A card whose free memory changes from pass to pass. A pass takes units for each example and block.

    Args:
        free: number of the pass -> free units.
        late: passes fail in the middle of their backward pass and not before they begin.
    """

    def __init__(self, free: Callable[[int], int], late: bool = False) -> None:
        self.free, self.late, self.passes, self.failures = free, late, 0, 0

    def forward_backward(
        self, config: TrainConfig, family: Any, transformer: nn.Module, backward: Callable[[Tensor], None], batch: Batch
    ) -> Tensor:
        self.passes += 1
        blocks = [block for path in family.block_paths for block in transformer.get_submodule(path).children()]
        needed = len(batch) * sum(RECOMPUTED if is_recomputed(block) else KEPT for block in blocks)
        if needed <= self.free(self.passes):
            return plain_forward_backward(config, family, transformer, backward, batch)
        self.failures += 1
        if not self.late:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        weights = [weight for weight in transformer.parameters() if weight.requires_grad]

        def fail(gradient: Tensor) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        handle = weights[len(weights) // 2].register_hook(fail)
        try:
            return plain_forward_backward(config, family, transformer, backward, batch)
        finally:
            handle.remove()


def config_of(folder: Path, cache: Path, **changes: object) -> TrainConfig:
    folder.mkdir(exist_ok=True)
    return load_config(write_config(folder), overrides(folder / "run", cache, **{**SETTINGS, **changes}))


def result_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "run" / "pytorch_lora_weights.safetensors")


def plan_of(folder: Path) -> dict[str, Any]:
    plan: dict[str, Any] = load_checkpoint(find_checkpoints(folder / "run")[-1]).record["plan"]
    return plan


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    training.train(config_of(folder, warm_cache))
    return folder


@pytest.fixture
def insert_card(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeCard], FakeCard]:
    def insert(card: FakeCard) -> FakeCard:
        monkeypatch.setattr(training, "forward_backward", card.forward_backward)
        return card

    return insert


def test_more_blocks_are_recomputed_and_the_result_is_the_same(
    tmp_path: Path,
    warm_cache: Path,
    undisturbed: Path,
    insert_card: Callable[[FakeCard], FakeCard],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Part of the memory is gone for good: in the second step's second micro-batch, within its backward pass."""
    card = insert_card(FakeCard(lambda number: ALL if number < 4 else ALL - 3 * EACH, late=True))
    assert training.train(config_of(tmp_path, warm_cache)).finished
    assert card.failures == 2
    assert caplog.text.count("step 2 ran out of memory (CUDA out of memory") == 2
    assert "1 more of 5 blocks recomputed" in caplog.text and "2 more of 5 blocks recomputed" in caplog.text
    for name, weight in result_of(undisturbed).items():
        assert torch.equal(weight, result_of(tmp_path)[name]), name
    assert plan_of(undisturbed)["recomputed_blocks"] == 0
    assert plan_of(tmp_path)["recomputed_blocks"] == 3


def test_then_batches_are_computed_in_parts_and_a_resumed_run_does_so_too(
    tmp_path: Path, warm_cache: Path, undisturbed: Path, insert_card: Callable[[FakeCard], FakeCard]
) -> None:
    """The config forbids to recompute."""
    changes = {"disable_gradient_checkpointing": "true"}
    card = insert_card(FakeCard(lambda number: ALL if number < 4 else ALL // 2))
    assert training.train(config_of(tmp_path, warm_cache, **changes)).finished
    assert card.failures == 1
    largest = max(float(weight.abs().max()) for weight in result_of(undisturbed).values())
    for name, weight in result_of(undisturbed).items():
        torch.testing.assert_close(weight, result_of(tmp_path)[name], rtol=0, atol=1e-3 * largest)
    assert (plan_of(tmp_path)["micro_batch_parts"], plan_of(tmp_path)["recomputed_blocks"]) == (2, 0)

    card = insert_card(FakeCard(lambda number: ALL // 2))
    longer = {**changes, "max_train_steps": 4}
    assert training.train(config_of(tmp_path, warm_cache, **longer, resume_from_checkpoint="latest")).finished
    assert card.failures == 0 < card.passes
    insert_card(FakeCard(lambda number: ALL if number < 4 else ALL // 2))
    training.train(config_of(tmp_path / "at once", warm_cache, **longer))
    for name, weight in result_of(tmp_path / "at once").items():
        assert torch.equal(weight, result_of(tmp_path)[name]), f"{name} is not as it is without a stop in between"


def test_where_nothing_is_left_to_give_up_the_steps_before_are_saved(
    tmp_path: Path, warm_cache: Path, insert_card: Callable[[FakeCard], FakeCard]
) -> None:
    insert_card(FakeCard(lambda number: ALL if number < 6 else 0))
    with pytest.raises(MemoryShortage, match=r"step 3 needs more device memory .*nothing is left.*Tried to allocate"):
        training.train(config_of(tmp_path, warm_cache))
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-000002"]


def test_memory_that_another_program_gives_back_is_waited_for(
    tmp_path: Path,
    warm_cache: Path,
    undisturbed: Path,
    insert_card: Callable[[FakeCard], FakeCard],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another program holds all the memory in step 3, and frees it once nothing is left to be given up."""
    thief = iter([3 * GIB, 3 * GIB, 1 * GIB, 0])
    card = insert_card(FakeCard(lambda number: 0 if 6 <= number < 11 else ALL))
    monkeypatch.setattr(assembly, "bytes_of_others", lambda expected: next(thief))
    assert training.train(config_of(tmp_path, warm_cache)).finished
    assert card.failures == 5, "3 for the recomputed blocks, 1 for the parts, and the one that waits"
    assert "is taken again: other programs gave 3.0 GiB back within 0." in caplog.text
    for name, weight in result_of(undisturbed).items():
        torch.testing.assert_close(weight, result_of(tmp_path)[name], rtol=1e-3, atol=1e-5)


def test_others_are_waited_for_in_vain_once_and_not_where_the_run_is_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relief, "LONGEST_WAIT_SECONDS", 0.3)
    monkeypatch.setattr(relief, "WAITING_SECONDS", 0.35)
    began = time.monotonic()
    others = MemoryOfOthers(lambda: GIB, lambda: False)
    assert [others.await_some(), others.await_some(), others.await_some()] == [None] * 3
    assert 0.3 <= time.monotonic() - began < 1, "in the whole run not longer than it may"
    assert MemoryOfOthers(lambda: 0, lambda: pytest.fail("nothing is missing")).await_some() is None
    monkeypatch.setattr(relief, "LONGEST_WAIT_SECONDS", 60.0)
    assert MemoryOfOthers(lambda: GIB, lambda: True).await_some() is None


def test_then_the_run_is_planned_anew_and_goes_on_in_the_same_process(
    tmp_path: Path,
    warm_cache: Path,
    undisturbed: Path,
    insert_card: Callable[[FakeCard], FakeCard],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory that was missing for a while is back when the second plan is carried out."""
    card = insert_card(FakeCard(lambda number: 0 if number in range(6, 6 + 5) else ALL))
    planned: list[TrainConfig] = []

    def plan_by(config: TrainConfig, *others: Any) -> TrainingPlan:
        planned.append(config)
        return plan_on_this_machine(config, *others)

    monkeypatch.setattr(assembly, "plan_on_this_machine", plan_by)
    monkeypatch.setattr(training, "leaner_than", lambda plan, before: Leaner(replace(plan, usable_bytes=10 * GIB)))
    assert training.train(config_of(tmp_path, warm_cache)).finished
    assert card.failures == 5
    first, second = planned
    assert first.gpu_memory_limit_gib is None
    assert second.gpu_memory_limit_gib == pytest.approx(9.5 + 0.86 + 0.25, abs=0.01)
    for name, weight in result_of(undisturbed).items():
        torch.testing.assert_close(weight, result_of(tmp_path)[name], rtol=1e-3, atol=1e-5)


def test_a_held_out_loss_that_lacks_memory_is_measured_one_by_one(
    tmp_path: Path, warm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of a run which has the memory, and captured steps are given up for it."""
    changes = {"max_train_steps": 1, "validation__held_out": 0.05}
    whole = training.train(config_of(tmp_path / "whole", warm_cache, **changes))
    batch_sizes: list[int] = []

    def lack_memory(*arguments: Any) -> ValidationLoss:
        batch_sizes.append(arguments[-2])
        if arguments[-2] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return measure(*arguments)

    monkeypatch.setattr(measuring, "measure", lack_memory)
    once = training.train(config_of(tmp_path / "lacking", warm_cache, **changes))
    assert batch_sizes == [2, 1] * 4, (
        "held-out pictures and training pictures, before the first step and after the last"
    )
    assert once.last_loss is not None and whole.last_loss is not None
    assert once.last_loss.mean == pytest.approx(whole.last_loss.mean, rel=1e-5)


def test_memory_that_ends_while_the_model_is_loaded_is_tried_once_more(
    tmp_path: Path, warm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([1, 0, 1, 1])

    def load_or_fail(*arguments: Any) -> Any:
        if next(failures):
            raise RuntimeError("CUDA error: out of memory")
        return load_planned(*arguments)

    monkeypatch.setattr(assembly, "load_planned", load_or_fail)
    assert training.train(config_of(tmp_path / "once", warm_cache, max_train_steps=1)).finished
    with pytest.raises(MemoryShortage, match="setting the run up needs more device memory"):
        training.train(config_of(tmp_path / "twice", warm_cache, max_train_steps=1))


def test_a_step_that_has_changed_some_weights_is_never_saved(
    tmp_path: Path, warm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights are trained; memory ends in the second step, when half of the weights have moved."""
    step_weight, calls = WeightUpdate.step_weight, []

    def step_until_full(update: WeightUpdate, name: str, *others: Any) -> None:
        calls.append(name)
        if len(calls) == len(update.weights) * 3 // 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        step_weight(update, name, *others)

    changes = {"method": "full", "ema__decay": "null", "learning_rate": 1e-5, "max_train_steps": 2}
    settings = [config_of(tmp_path / name, warm_cache, **changes) for name in ("whole", "torn")]
    training.train(settings[0])
    monkeypatch.setattr(WeightUpdate, "step_weight", step_until_full)
    monkeypatch.setattr(training, "leaner_than", lambda plan, before: Leaner(replace(plan, usable_bytes=10 * GIB)))
    assert training.train(settings[1]).finished
    assert len(calls) > 3 * len(set(calls))
    whole, torn = (load_file(find_checkpoints(each.output_dir)[-1] / "transformer.safetensors") for each in settings)
    assert all(torch.equal(whole[name], torn[name]) for name in whole)


def test_the_second_shortage_beside_captured_steps_ends_capturing(caplog: pytest.LogCaptureFixture) -> None:
    replayed: ReplayedPass[Any] = ReplayedPass(lambda inputs: torch.zeros(()), (), capture=lambda work: work)
    nothing = torch.zeros(0)
    assert replayed.give_up_captures() is None, "nothing is captured"
    for words in ("will be captured anew", "are given up"):
        replayed._captures["shape"] = CapturedPass(
            Batch(nothing, nothing, nothing, {}, (), [""]), lambda: torch.zeros(())
        )
        assert words in str(replayed.give_up_captures())
        assert not replayed._captures
    assert replayed._capture is None


def test_errors_of_drivers_and_libraries_count_as_well() -> None:
    assert lacks_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert lacks_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"))
    assert lacks_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not lacks_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not lacks_memory(ValueError("out of memory"))


@pytest.mark.parametrize(("num_examples", "num_parts", "sizes"), [(5, 2, [3, 2]), (2, 4, [1, 1]), (4, 1, [4])])
def test_a_batch_in_parts(num_examples: int, num_parts: int, sizes: list[int]) -> None:
    rows = torch.arange(num_examples)
    names = [str(number) for number in range(num_examples)]
    whole = Batch(rows, 10 * rows, 20 * rows, {"prompt": 30 * rows}, (40 * rows,), names)
    parts = whole.parts(num_parts)
    assert [len(part) for part in parts] == sizes
    for joined, tensors in zip(whole.tensors(), zip(*(part.tensors() for part in parts), strict=True), strict=True):
        assert torch.equal(joined, torch.cat(tensors))
    assert [name for part in parts for name in part.names] == names
