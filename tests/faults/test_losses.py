"""Losses that are no numbers change nothing, end a run only where they go on, and the ways on that are named work."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pixtune import assembly
from pixtune.config.load import load_config
from pixtune.data.batches import BatchSource
from pixtune.data.order import Turn
from pixtune.errors import TrainingError
from pixtune.judging import validation
from pixtune.storage.checkpoint import load_checkpoint
from pixtune.storage.checkpoint_state import checkpoint_path, find_checkpoints
from pixtune.tracking.figures import StepOutcome
from pixtune.tracking.metrics import read_metrics
from tests.runs import DEMO_HELD_OUT, DEMO_TRAIN, TINY_MODEL, overrides

training = import_module("pixtune.train")  # the package has a function of that name

NUM_STEPS, NUM_PICTURES = 8, 6
SETTINGS: dict[str, Any] = {
    "max_train_steps": NUM_STEPS, "checkpointing_steps": 2, "checkpoints_total_limit": 1, "logging_steps": 3,
    "gradient_accumulation_steps": 2, "resume_from_checkpoint": "latest",
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for picture in sorted(DEMO_TRAIN.glob("*.png"))[:NUM_PICTURES]:
        shutil.copy(picture, folder)
        shutil.copy(picture.with_suffix(".txt"), folder)
    return folder


class Poison:
    """Encodings of some pictures that are no numbers, and notes in which micro-batches they are drawn."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.names: set[str] = set()
        self.from_micro_batch = 0
        self.drawn: dict[int, dict[str, float]] = {}
        draw = BatchSource._draw

        def poisoned(source: BatchSource, index: int, slot: int, turn: Turn) -> Any:
            single = draw(source, index, slot, turn)
            if single.name in self.names and index >= self.from_micro_batch:
                self.drawn.setdefault(index, {})[single.name] = single.sigma.item()
                single.latents_BCHW[0, 0, 0, 0] = torch.nan
            return single

        patch.setattr(BatchSource, "_draw", poisoned)

    def steps(self) -> dict[int, dict[str, float]]:
        """Names and sigmas by step, 1 for the first."""
        found: dict[int, dict[str, float]] = {}
        for index, names in self.drawn.items():
            found.setdefault(index // 2 + 1, {}).update(names)
        return found


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    return Poison(monkeypatch)


def train(output_dir: Path, cache: Path, pictures: Path, *words: str, **changes: object) -> None:
    settings = {**SETTINGS, "data_config__img_dir": pictures, "data_config__num_workers": 0, **changes}
    training.train(load_config(None, [*overrides(output_dir, cache, **settings), *words]))


def ending_of(output_dir: Path, cache: Path, pictures: Path, **changes: object) -> str:
    with pytest.raises(TrainingError) as caught:
        train(output_dir, cache, pictures, **changes)
    return str(caught.value)


def lines(output_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(output_dir / "metrics.jsonl") if line["kind"] == kind]


def tensors(output_dir: Path, step: int) -> dict[str, Tensor]:
    files = load_checkpoint(checkpoint_path(output_dir, step)).tensors
    return {f"{file}/{name}": tensor for file, part in files.items() for name, tensor in part.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_a_picture_without_numbers_is_named_and_trains_nothing(
    tmp_path: Path, warm_cache: Path, pictures: Path, poison: Poison, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The run equals one that never takes the steps in which the picture is drawn, and itself in parts."""
    bad = sorted(pictures.glob("*.png"))[2].name
    poison.names = {bad}
    train(tmp_path / "whole", warm_cache, pictures)
    printed = capfd.readouterr().out
    expected = poison.steps()
    assert 0 < len(expected) < NUM_STEPS, "some steps with it and some without"
    logged = lines(tmp_path / "whole", "skipped")
    assert {line["step"]: {each["name"]: each["sigma"] for each in line["examples"]} for line in logged} == expected
    steps = lines(tmp_path / "whole", "step")
    assert {line["step"] for line in steps if line.get("skipped")} == expected.keys()
    assert all((line["loss"] is None) == (line["step"] in expected) for line in steps) and len(steps) == NUM_STEPS
    for row_begins in (step for step in expected if step - 1 not in expected):
        assert printed.count(f"warning: step {row_begins} was skipped: its loss was nan, because of: {bad} (sigma") == 1
    assert f"skipped steps: {len(expected)}, with the examples {bad}" in printed

    for end in (5, NUM_STEPS):
        train(tmp_path / "parts", warm_cache, pictures, max_train_steps=end)
    assert_same(tensors(tmp_path / "parts", NUM_STEPS), tensors(tmp_path / "whole", NUM_STEPS))
    assert lines(tmp_path / "parts", "skipped") == logged

    poison.names, take_step = set(), training.take_step

    def step_or_leave(run: Any, micro_batches: Iterator[Any], step: int) -> StepOutcome:
        if step + 1 not in expected:
            return take_step(run, micro_batches, step)
        batches = [batch for batches in micro_batches for batch in batches]
        return StepOutcome(torch.ones(2), torch.ones(()), torch.ones(sum(map(len, batches))))

    monkeypatch.setattr(training, "take_step", step_or_leave)
    train(tmp_path / "without", warm_cache, pictures)
    assert_same(tensors(tmp_path / "without", NUM_STEPS), tensors(tmp_path / "whole", NUM_STEPS))


WAY = re.compile(r"^  - ([^:]*): (.*)$", re.MULTILINE)


@pytest.mark.parametrize("way", ["with a lower rate", "without these examples"])
def test_a_row_of_skipped_steps_ends_the_run_and_each_way_on_works_as_it_is_written(
    tmp_path: Path, warm_cache: Path, pictures: Path, poison: Poison, way: str
) -> None:
    """From the third step on half of the pictures are no good: each batch has culprits, and some that give numbers."""
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    names = sorted(path.name for path in folder.glob("*.png"))
    poison.names, poison.from_micro_batch = set(names[: NUM_PICTURES // 2]), 4
    changes = {"train_batch_size": 6, "guard__max_skipped_steps": 3, "logging_steps": 1}
    told = ending_of(tmp_path / "run", warm_cache, folder, **changes)
    assert "3 steps in a row were skipped" in told and "guard.max_skipped_steps=3" in told
    assert "resume_from_checkpoint=latest goes on from checkpoint-000005." in told, "no step is lost"
    typed = dict(WAY.findall(told))[way]
    if way == "without these examples":
        listed, typed = typed.split(f" out of {folder}, and then: ")
        assert {*listed.removeprefix("take ").split(", ")} == poison.names
        for name in poison.names:
            (folder / name).unlink()
            (folder / name).with_suffix(".txt").unlink()
    else:
        poison.names = set()
    train(tmp_path / "run", warm_cache, folder, *shlex.split(typed), **changes)
    steps = lines(tmp_path / "run", "step")
    assert [line["step"] for line in steps if line.get("skipped")] == [3, 4, 5] and steps[-1]["step"] == NUM_STEPS
    assert steps[-1]["learning_rate"] == (1e-3 if way == "without these examples" else pytest.approx(1e-4))
    recorded = load_checkpoint(checkpoint_path(tmp_path / "run", NUM_STEPS)).lineage.sessions[-1].changes
    assert recorded and all(word in str(recorded) for word in re.findall(r"resume_with_changes_in='\[(\w+)\]'", typed))


def test_weights_that_give_no_number_never_displace_good_ones(tmp_path: Path, warm_cache: Path, pictures: Path) -> None:
    """The rate is sane for two steps and then 1e30. What is saved after that is given up when the run ends."""
    told = ending_of(
        tmp_path / "run", warm_cache, pictures, learning_rate=1e30, lr_scheduler="piecewise_constant",
        lr_step_rules="'1e-33:2,1'", max_train_steps=20, guard__max_skipped_steps=5, checkpointing_steps=1,
    )  # fmt: skip
    assert "goes on from checkpoint-000002." in told and "for each of its examples" in told
    assert "without these examples" not in told, "the weights are at fault"
    assert find_checkpoints(tmp_path / "run")[0] == checkpoint_path(tmp_path / "run", 2)
    train(
        tmp_path / "run", warm_cache, pictures, learning_rate=1e-3, lr_scheduler="constant", max_train_steps=4,
        resume_with_changes_in="[learning_rate,lr_scheduler,lr_step_rules]",
    )  # fmt: skip
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path / "run", 4).values())


def test_weights_that_are_no_numbers_are_recognized(
    tmp_path: Path, warm_cache: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble = assembly.assemble

    def spoil(*arguments: Any) -> Any:
        run, services = assemble(*arguments)
        next(iter(run.trained.parameters.values())).data[0, 0] = torch.nan
        return run, services

    monkeypatch.setattr(assembly, "assemble", spoil)
    told = ending_of(tmp_path / "run", warm_cache, pictures)
    assert "The trained weights themselves are no numbers any more, in 1 tensors" in told
    assert f"There is no earlier checkpoint in {tmp_path / 'run'}" in told


@pytest.mark.parametrize("measured", [False, True])
def test_a_loss_that_explodes_is_told_once_or_ends_the_run(
    tmp_path: Path, warm_cache: Path, pictures: Path, capfd: Any, measured: bool
) -> None:
    settings = {
        "pretrained_model_name_or_path": TINY_MODEL, "learning_rate": 100, "max_train_steps": 10,
        "checkpointing_steps": 4, "gradient_accumulation_steps": 1,
        **({"validation__held_out": 0.2, "validation__every": 5, "validation__num_draws": 1} if measured else {}),
    }  # fmt: skip
    train(tmp_path / "warned", warm_cache, pictures, **settings)
    printed = capfd.readouterr().out
    assert printed.count("has exploded") == len(lines(tmp_path / "warned", "exploded")) == 1 + measured
    assert "has exploded" in (tmp_path / "warned" / "report.html").read_text()
    told = ending_of(tmp_path / "stopped", warm_cache, pictures, **settings, guard__exploded_loss="stop")
    assert "has exploded" in told and "learning_rate=10" in told


def test_a_held_out_picture_without_numbers_is_named(
    tmp_path: Path, warm_cache: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses_at, bad = validation.losses_at, "avocado.png"

    def spoiled(family: Any, transformer: Any, picture: validation.HeldOutPicture, *others: Any) -> Tensor:
        return losses_at(family, transformer, picture, *others) * (torch.nan if picture.name == bad else 1)

    monkeypatch.setattr(validation, "losses_at", spoiled)
    told = ending_of(
        tmp_path / "run", warm_cache, pictures, validation__held_out_dir=pictures, validation__num_draws=1,
        data_config__img_dir=DEMO_HELD_OUT,
    )  # fmt: skip
    assert f"step 0: held-out loss nan, because of {bad}. Training stops here" in told
    assert f"without these examples: take {bad} out of {DEMO_HELD_OUT} or {pictures}" in told
