"""A picture, or its encoding in the cache, that is changed or deleted while a run trains on it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pixtune.storage.checkpoint import load_checkpoint
from pixtune.storage.checkpoint_state import find_checkpoints
from pixtune.tracking.metrics import read_metrics
from pixtune.trained.export import DIFFUSERS_FILE
from tests import processes
from tests.runs import DEMO_TRAIN, environment, overrides, write_config

NUM_PICTURES = 2


def edit(path: Path) -> None:
    Image.new("RGB", (64, 64), (250, 250, 250)).save(path)


def steps_done(output_dir: Path) -> int:
    return max((line["step"] for line in read_metrics(output_dir / "metrics.jsonl")), default=0)


def start(
    tmp_path: Path, before: processes.Before | None = None, env: Mapping[str, str] | None = None, **changes: object
) -> processes.Started:
    """A run on a few pictures of its own."""
    pictures = tmp_path / "pictures"
    pictures.mkdir(exist_ok=True)
    for source in sorted(DEMO_TRAIN.glob("*.png"))[:NUM_PICTURES]:
        for path in (source, source.with_suffix(".txt")):
            shutil.copy(path, pictures)
    settings = {"data_config__img_dir": pictures, "logging_steps": 1, **changes}
    words = overrides(tmp_path / "out", tmp_path / "cache", **settings)
    arguments = ["-m", "pixtune.cli", "train", "--config", str(write_config(tmp_path)), *words]
    return processes.start(arguments, env or environment(), before)


def wait_for_steps(run: processes.Started, tmp_path: Path) -> None:
    deadline = time.monotonic() + 120
    while steps_done(tmp_path / "out") < 2:
        assert run.poll() is None, f"ended early: {run.communicate()[0]}"
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.005)


def train_and_change(tmp_path: Path, change: Callable[[Path], None], **changes: object) -> tuple[int | None, str]:
    """A run in which every picture changes after the second step: its exit code and what it printed."""
    run = start(tmp_path, None, None, **changes)
    wait_for_steps(run, tmp_path)
    for path in (tmp_path / "pictures").glob("*.png"):
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


def out_of_reach_at_the_sixth_reading() -> None:
    """What a process sees of a share that it alone has lost."""
    from PIL.Image import Image as Picture

    from pixtune.data.encode import FramedPicture
    from pixtune.errors import DataError

    read, readings = FramedPicture.read, iter(range(5))

    def reading(self: FramedPicture) -> Picture:
        if next(readings, None) is None:
            raise DataError("a picture changed while it was in use", [f"{self.path} was moved or deleted"])
        return read(self)

    FramedPicture.read = reading  # type: ignore[method-assign]


def test_a_picture_that_only_another_process_lacks_costs_no_step(tmp_path: Path) -> None:
    port = 28000 + os.getpid() % 900
    first, second = (
        start(
            tmp_path,
            out_of_reach_at_the_sixth_reading if rank else None,
            environment(
                ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo", RANK=str(rank), LOCAL_RANK=str(rank),
                WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            ),
            max_train_steps=5000,
            train_batch_size=1,
            precompute_image_embeddings="false",
            data_config__num_workers=0,
        )
        for rank in (0, 1)
    )  # fmt: skip
    printed, others = (run.communicate(timeout=120)[0] for run in (first, second))
    assert (first.returncode, second.returncode) == (1, 1), printed + others
    assert (printed + others).count("\nerror: ") == 1, "one process says it for all"
    assert "process 1 of 2" in printed and ".png was moved or deleted" in printed, printed + others
    assert "Traceback" not in printed + others, printed + others
    (saved,) = find_checkpoints(tmp_path / "out")
    assert load_checkpoint(saved).step == steps_done(tmp_path / "out") == 5, printed


# ---- entries of the cache


def exchange(entries: Path) -> None:
    """Gives each entry the next one's file."""
    files = sorted(entries.rglob("*.safetensors"))
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, [*contents[1:], contents[0]], strict=True):
        file.write_bytes(content)


def test_entries_that_are_damaged_during_a_run_cost_no_step_and_are_made_anew(tmp_path: Path) -> None:
    run = start(tmp_path, max_train_steps=40)
    wait_for_steps(run, tmp_path)
    exchange(tmp_path / "cache" / "entries")
    printed, _ = run.communicate(timeout=120)
    assert run.returncode == 1 and ".safetensors is damaged" in printed and "Traceback" not in printed, printed
    (saved,) = find_checkpoints(tmp_path / "out")
    assert 2 <= load_checkpoint(saved).step == steps_done(tmp_path / "out") < 40

    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    for folder, resume_from in ((tmp_path, "latest"), (undisturbed, "null")):
        run = start(folder, max_train_steps=40, resume_from_checkpoint=resume_from)
        printed, _ = run.communicate(timeout=120)
        assert run.returncode == 0, printed
    ours, expected = (load_file(folder / "out" / DIFFUSERS_FILE) for folder in (tmp_path, undisturbed))
    assert expected and all(torch.equal(ours[name], expected[name]) for name in expected)


def cannot_look_beyond_the_third_step() -> None:
    from pixtune.engine.modulation_ahead import StepsAhead
    from pixtune.errors import DataError

    def look_ahead(self: StepsAhead, step: int) -> None:
        if step == 2:
            raise DataError("an encoding in the cache cannot be used any more", ["it is damaged"])

    StepsAhead.look_ahead = look_ahead  # type: ignore[method-assign]


def test_what_fails_after_a_step_is_saved_behind_it(tmp_path: Path) -> None:
    """Weights of three steps that were saved as those of two would take the third step twice."""
    run = start(tmp_path, cannot_look_beyond_the_third_step, max_train_steps=9)
    printed, _ = run.communicate(timeout=120)
    assert run.returncode == 1 and "stopped after step 3;" in printed, printed
    (saved,) = find_checkpoints(tmp_path / "out")
    checkpoint = load_checkpoint(saved)
    counts = {int(tensor) for name, tensor in checkpoint.tensors["optimizer"].items() if name.endswith("step")}
    assert (checkpoint.step, counts) == (3, {3})
