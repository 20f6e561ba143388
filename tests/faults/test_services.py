"""What a run can do without fails: it is reported in a line, no step is lost and the weights are the same."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from pixtune.storage.checkpoint_state import find_checkpoints
from pixtune.tracking.metrics import read_metrics
from tests import processes
from tests.io_faults import FailingDisk, random_fault
from tests.runs import overrides, pixtune, write_config

SETTINGS = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 1,
    "logging_steps": 1,
    "validation__held_out": 0.05,
    "validation__every": 2,
    "validation__num_draws": 1,
    "samples__prompts": "['a cat']",
    "samples__every": 2,
    "samples__num_steps": 1,
    "samples__width": 64,
    "samples__height": 64,
    "report_to": "tensorboard",
}
LORA_FILE = "pytorch_lora_weights.safetensors"
LOOKS = ("step", "validation", "sample")
"""Kinds of lines that do not depend on the clock."""


def train(
    folder: Path, cache: Path, before: processes.Before | None = None, **changes: object
) -> subprocess.CompletedProcess[str]:
    words = overrides(folder / "run", cache, **{**SETTINGS, **changes})
    return pixtune("train", "--config", write_config(folder), *words, before=before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Path:
    """Folder of a run on a good disk, with the journal of what it did there."""
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = train(folder, warm_cache, FailingDisk(folder / "run", 0, journal=folder / "journal"))
    assert outcome.returncode == 0, outcome.stdout
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "run" / LORA_FILE)


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine)


@pytest.mark.parametrize("seed", range(4))
def test_a_disk_that_fails_at_any_moment_is_reported_and_costs_no_saved_step(
    tmp_path: Path, warm_cache: Path, undisturbed: Path, seed: int
) -> None:
    calls = (undisturbed / "journal").read_text().splitlines()
    fault = random_fault(tmp_path / "run", calls, seed)
    outcome = train(tmp_path, warm_cache, fault)
    assert "Traceback" not in outcome.stdout, outcome.stdout
    kinds = [line.split(":")[0] for line in outcome.stdout.splitlines() if line.startswith(("warning:", "error:"))]
    assert kinds, f"{calls[fault.number - 1]} failed in silence:\n{outcome.stdout}"
    if outcome.returncode:
        assert kinds[-1] == "error", outcome.stdout
        outcome = train(tmp_path, warm_cache, resume_from_checkpoint="latest")
        assert outcome.returncode == 0, outcome.stdout
    assert_same_weights(tmp_path, undisturbed)


def break_services() -> None:
    """Everything around the steps raises, and not only what one would expect."""
    import torch
    from accelerate import Accelerator

    from pixtune.report import results
    from pixtune.sampler import PromptSampler
    from pixtune.services import measuring
    from pixtune.storage.course import Course
    from pixtune.tracking.figures import DriftWatch

    def fail(error: Exception) -> Any:
        def failing(*arguments: object, **options: object) -> None:
            raise error

        return failing

    for owner, name, error in (
        (measuring, "measure", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
        (results, "write_report", RuntimeError("no page")),
        (PromptSampler, "sample", ValueError("a picture with no pixels")),
        (Course, "prune", PermissionError(13, "Permission denied")),
        (DriftWatch, "look_at", ZeroDivisionError("division by zero")),
        (Accelerator, "log", ConnectionError("the tracker's server has gone")),
    ):
        assert hasattr(owner, name), name
        setattr(owner, name, fail(error))


def test_whatever_a_service_raises_the_run_goes_on_and_names_it_once(
    tmp_path: Path, warm_cache: Path, undisturbed: Path
) -> None:
    outcome = train(tmp_path, warm_cache, break_services)
    assert outcome.returncode == 0, outcome.stdout
    for once in (
        "the held-out loss failed at step 0: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "the loss on training pictures failed at step 0: OutOfMemoryError: CUDA out of memory",
        "samples failed at step 0: ValueError: a picture with no pixels.",
        "tracker tensorboard failed at step 1: the tracker's server has gone.",
        "the watch for slow steps failed at step 1: ZeroDivisionError: division by zero.",
        "deleting old checkpoints failed at step 2: [Errno 13] Permission denied.",
        "the report failed at step 2: RuntimeError: no page.",
    ):
        assert outcome.stdout.count(once) == 1, outcome.stdout
    assert "failed in this session: " in outcome.stdout and "samples 3 times" in outcome.stdout
    assert "Traceback" not in outcome.stdout
    assert_same_weights(tmp_path, undisturbed)
    recorded = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "problem"]
    assert {line["service"] for line in recorded} >= {"the held-out loss", "samples", "tracker tensorboard"}


def die_measuring() -> None:
    """The process is killed as it begins to measure after the second step."""
    from pixtune.services import Services

    look = Services._look

    def killed(self: Services, step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), 9)
        look(self, step)

    Services._look = killed  # type: ignore[method-assign]


def test_what_was_due_after_the_last_checkpoint_is_made_up_for(
    tmp_path: Path, warm_cache: Path, undisturbed: Path
) -> None:
    assert train(tmp_path, warm_cache, die_measuring).returncode == -9
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-000002"], "saving comes first"
    saved = load_file(tmp_path / "run" / "checkpoint-000002" / LORA_FILE)
    assert all(tensor.equal(saved[name]) for name, tensor in weights(tmp_path).items()), "and gives a LoRA at once"
    outcome = train(tmp_path, warm_cache, resume_from_checkpoint="latest")
    assert outcome.returncode == 0, outcome.stdout

    def looks(folder: Path) -> list[tuple[object, ...]]:
        lines = read_metrics(folder / "run" / "metrics.jsonl")
        return [(line["kind"], line["step"], line.get("loss")) for line in lines if line["kind"] in LOOKS]

    assert looks(tmp_path) == looks(undisturbed)
    assert (tmp_path / "run" / "samples" / "step-000002" / "000.png").is_file()


# ---- the console


def print_on_full_disk() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no full disk to print to")
def test_a_full_disk_under_the_printed_lines_is_noted_and_the_run_goes_on(
    tmp_path: Path, warm_cache: Path, undisturbed: Path
) -> None:
    outcome = train(tmp_path, warm_cache, print_on_full_disk)
    assert outcome.returncode == 0, outcome.stdout
    assert outcome.stdout.count("can no longer be printed (No space left on device)") == 1
    assert "Traceback" not in outcome.stdout and "Exception ignored" not in outcome.stdout
    assert_same_weights(tmp_path, undisturbed)
    recorded = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "problem"]
    assert [line["service"] for line in recorded] == ["printing"]


def close_readers() -> None:
    """Stdout is a pipe whose reader has gone, as in `pixtune train | head -1`; stderr too, as if ssh had died."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)


def close_all() -> None:
    """The streams of a process that a service manager has started with none."""
    for number in range(3):
        os.close(number)


@pytest.mark.parametrize("before", [close_readers, close_all])
def test_a_run_that_nobody_reads_goes_on(
    tmp_path: Path, warm_cache: Path, undisturbed: Path, before: processes.Before
) -> None:
    outcome = train(tmp_path, warm_cache, before)
    assert outcome.returncode == 0
    assert_same_weights(tmp_path, undisturbed)


def test_names_that_a_console_cannot_show_are_escaped(tmp_path: Path, warm_cache: Path) -> None:
    folder = tmp_path / "Fotos für 東京"
    folder.mkdir()
    words = overrides(folder / "run", warm_cache, max_train_steps=1)
    outcome = pixtune(
        "train", "--config", write_config(tmp_path), *words,
        before=functools.partial(print_in, "ascii"),
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout
    assert r"Fotos f\xfcr \u6771\u4eac" in outcome.stdout.replace("\n", "")


def print_in(encoding: str) -> None:
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding=encoding)
