"""A picture that is edited or deleted while a run trains on it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pixtune.storage.checkpoint import find_checkpoints
from pixtune.tracking.metrics import read_metrics
from tests import processes
from tests.runs import DEMO_TRAIN, environment, overrides, write_config

NUM_PICTURES = 2


def edit(path: Path) -> None:
    Image.new("RGB", (64, 64), (250, 250, 250)).save(path)


def steps_done(output_dir: Path) -> int:
    return max((line["step"] for line in read_metrics(output_dir / "metrics.jsonl")), default=0)


def train_and_change(tmp_path: Path, change: Callable[[Path], None], **changes: object) -> tuple[int | None, str]:
    """A run in which every picture changes after the second step: its exit code and what it printed."""
    pictures = tmp_path / "pictures"
    for source in sorted(DEMO_TRAIN.glob("*.png"))[:NUM_PICTURES]:
        for path in (source, source.with_suffix(".txt")):
            pictures.mkdir(exist_ok=True)
            shutil.copy(path, pictures)
    words = overrides(
        tmp_path / "out", tmp_path / "cache", data_config__img_dir=pictures, logging_steps=1, **changes,
    )  # fmt: skip
    run = processes.start(
        ["-m", "pixtune.cli", "train", "--config", str(write_config(tmp_path)), *words], environment()
    )
    deadline = time.monotonic() + 120
    while steps_done(tmp_path / "out") < 2:
        assert run.poll() is None, f"ended early: {run.communicate()[0]}"
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.005)
    for path in pictures.glob("*.png"):
        change(path)
    printed, _ = run.communicate(timeout=120)
    return run.returncode, printed


@pytest.mark.parametrize("change", [edit, Path.unlink])
def test_a_run_whose_pictures_are_in_the_cache_goes_on(tmp_path: Path, change: Callable[[Path], None]) -> None:
    code, printed = train_and_change(tmp_path, change, max_train_steps=60)
    assert code == 0, printed
    assert steps_done(tmp_path / "out") == 60


@pytest.mark.parametrize(("change", "problem"), [(edit, "has other content"), (Path.unlink, "was moved or deleted")])
def test_a_run_that_encodes_them_in_the_loop_saves_and_names_one(
    tmp_path: Path, change: Callable[[Path], None], problem: str
) -> None:
    code, printed = train_and_change(tmp_path, change, max_train_steps=5000, precompute_image_embeddings="false")
    assert code == 1 and "Traceback" not in printed
    assert f".png {problem}" in printed and "resume" in printed
    (saved,) = find_checkpoints(tmp_path / "out")
    assert int(saved.name.removeprefix("checkpoint-")) == steps_done(tmp_path / "out") >= 2
