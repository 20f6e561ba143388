"""A checkpoint is whole or it is not there; what is damaged is said, and older ones survive a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pixtune.errors import CheckpointError
from pixtune.storage import checkpoint
from pixtune.storage.checkpoint import load_checkpoint, remove_unfinished, save_checkpoint
from pixtune.storage.checkpoint_state import STATE_FILE, checkpoint_path, find_checkpoints
from pixtune.storage.course import prune_checkpoints, resolve_resume
from pixtune.storage.files import file_digest
from pixtune.storage.safetensors_writer import TensorFile, save_safetensors
from tests.runs import python

RECORD = {"config": {"rank": 4, "rate": 1e-4}, "text": "狐", "nothing": None}


def tensors(step: int) -> dict[str, TensorFile]:
    generator = torch.Generator().manual_seed(step)
    optimizer = {
        "layer/exp_avg": torch.randn(3, 4, generator=generator),
        "layer/step": torch.tensor(float(step)),
        "layer/codes": torch.randint(0, 255, (7,), dtype=torch.uint8, generator=generator),
        "layer/half": torch.randn(5, generator=generator).bfloat16(),
    }
    return {
        "lora": TensorFile({"layer.weight": torch.randn(4, 2, generator=generator)}, {"k": "v"}),
        "optimizer": TensorFile(optimizer),
    }


def save(output_dir: Path, *steps: int) -> list[Path]:
    return [save_checkpoint(output_dir, step, tensors(step), RECORD) for step in steps]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_whole(path: Path, step: int) -> None:
    read = load_checkpoint(path)
    assert (read.step, read.record, read.path) == (step, RECORD, path)
    assert read.tensors.keys() == {"lora", "optimizer"}
    for stem, (expected, _) in tensors(step).items():
        assert read.tensors[stem].keys() == expected.keys()
        for name, tensor in expected.items():
            assert read.tensors[stem][name].dtype == tensor.dtype
            assert torch.equal(read.tensors[stem][name], tensor)


# ---- round trip


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    (path,) = save(tmp_path / "not" / "yet" / "there", 7)
    assert path.name == "checkpoint-000007"
    assert_whole(path, 7)


def test_a_checkpoint_is_tensors_and_json_only(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 7)
    assert {file.name for file in path.iterdir()} == {"lora.safetensors", "optimizer.safetensors", STATE_FILE}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_same_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 7)
    path = save_checkpoint(tmp_path, 7, {"lora": tensors(8)["lora"]}, {"other": 1})
    read = load_checkpoint(path)
    assert read.record == {"other": 1} and read.tensors.keys() == {"lora"}
    assert torch.equal(read.tensors["lora"]["layer.weight"], tensors(8)["lora"][0]["layer.weight"])


def test_files_are_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut may leave the final name over empty files."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        events.append(f"rename to {Path(target).name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    save(tmp_path, 7)
    final = events.index("rename to checkpoint-000007")
    for name in ("lora.safetensors", "optimizer.safetensors", STATE_FILE):
        (synced,) = [i for i, event in enumerate(events) if event.startswith(f"sync .{name}")]
        assert synced < events.index(f"rename to {name}") < final
    assert events[final + 1 :] == [f"sync {tmp_path.name}"]
    assert events.index(f"rename to {STATE_FILE}") > events.index("rename to optimizer.safetensors")


# ---- damage


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("file_name", ["lora.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", [flip_byte, cut_off, grow, empty, Path.unlink], ids=lambda damage: damage.__name__)
def test_damage_of_a_tensor_file_is_found_and_another_checkpoint_named(
    tmp_path: Path, file_name: str, damage: Any
) -> None:
    _, older, newest = save(tmp_path, 1, 2, 3)
    damage(newest / file_name)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(newest)
    message = str(caught.value)
    assert str(newest / file_name) in message
    assert ("missing" if damage is Path.unlink else "damaged") in message
    assert "resume_from_checkpoint=checkpoint-000002" in message
    assert_whole(older, 2)


STATES = {"cut off": '{"format": 1, "st', "empty": "", "a list": "[]", "no files": '{"format": 1, "step": 3}'}


@pytest.mark.parametrize("text", STATES.values(), ids=STATES.keys())
def test_damage_of_the_state_file_is_found(tmp_path: Path, text: str) -> None:
    _, newest = save(tmp_path, 2, 3)
    (newest / STATE_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"damaged.*\n?.*resume_from_checkpoint=checkpoint-000002"):
        load_checkpoint(newest)


@pytest.mark.parametrize(("old", "new"), [('"step": 3', '"step": 2'), ('"rank": 4', '"rank": 8'), ("0.0001", "0.0002")])
def test_a_changed_digit_in_the_state_is_found(tmp_path: Path, old: str, new: str) -> None:
    """Still JSON, and it would resume at another step or with other settings."""
    (path,) = save(tmp_path, 3)
    text = (path / STATE_FILE).read_text()
    assert text.count(old) == 1
    (path / STATE_FILE).write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        load_checkpoint(path)


def test_a_folder_without_state_is_no_checkpoint(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 3)
    (path / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint of pixtune: it has no state\.json.*start anew"):
        load_checkpoint(path)
    file = tmp_path / "a file"
    file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint of pixtune: it is no folder"):
        load_checkpoint(file)


def test_another_format_is_refused_rather_than_misread(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 3)
    state = json.loads((path / STATE_FILE).read_text())
    (path / STATE_FILE).write_text(json.dumps({**state, "format": 2}))
    with pytest.raises(CheckpointError, match="format 2, this version reads 1"):
        load_checkpoint(path)


# ---- a full disk


@pytest.mark.parametrize("failing_call", range(9))
def test_disk_full_at_any_sync_leaves_older_ones_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    (older,) = save(tmp_path, 1)
    before = content(older)
    calls: list[int] = []
    fsync, lock = os.fsync, threading.Lock()

    def full(descriptor: int) -> None:
        with lock:  # several threads write
            calls.append(descriptor)
            is_full = len(calls) == failing_call + 1
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    if failing_call >= 7:  # three files, each itself and its folder, and the output folder
        save(tmp_path, 2)
        assert len(calls) == 7
        return
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert content(older) == before
    names = {path.name for path in tmp_path.iterdir()}
    if failing_call < 6:
        assert names == {"checkpoint-000001"}
    else:  # renamed already, its durability alone is unknown
        assert_whole(tmp_path / "checkpoint-000002", 2)
    assert_whole(save(tmp_path, 2)[0], 2)


def test_disk_full_in_a_real_process_leaves_the_older_one(tmp_path: Path) -> None:
    """The kernel itself refuses the bytes, in the middle of a file."""
    (older,) = save(tmp_path, 1)
    before = content(older)
    script = f"""
        import resource, signal
        from pathlib import Path
        import torch
        from pixtune.storage.checkpoint import save_checkpoint
        from pixtune.errors import CheckpointError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with an error instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        big = {{"lora": ({{"w": torch.zeros(10)}}, {{}}), "optimizer": ({{"w": torch.zeros(100_000)}}, {{}})}}
        try:
            save_checkpoint(Path({str(tmp_path)!r}), 2, big, {{}})
        except CheckpointError as error:
            print(error)
            raise SystemExit(7)
    """
    (folder := tmp_path / "script").mkdir()
    (folder / "fill.py").write_text(textwrap.dedent(script), encoding="utf-8")
    outcome = python(folder / "fill.py")
    shutil.rmtree(folder)
    assert outcome.returncode == 7, outcome.stdout
    assert "step 2 could not be written" in outcome.stdout and "resume_from_checkpoint=latest" in outcome.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]
    assert content(older) == before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("the device is gone")])
def test_a_failure_ends_all_threads_before_the_folder_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    begun: list[str] = []
    ended: list[str] = []
    failed = threading.Event()

    def write(path: Path, tensors: object, metadata: object) -> str:
        begun.append(path.name)
        if path.stem == "0":
            failed.set()
            raise error
        failed.wait(60)
        time.sleep(0.05)
        path.write_bytes(b"")
        ended.append(path.name)
        return ""

    monkeypatch.setattr(checkpoint, "save_safetensors", write)
    expected = CheckpointError if isinstance(error, OSError) else RuntimeError
    with pytest.raises(expected, match=str(error.args[-1])):
        save_checkpoint(tmp_path, 1, {str(number): TensorFile({}) for number in range(50)}, {})
    assert len(begun) == len(ended) + 1 < 20, "the others are not begun any more"
    assert list(tmp_path.iterdir()) == [], "nothing is written after the folder has gone"


def test_files_are_written_and_checked_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(checkpoint.NUM_THREADS, timeout=60)

    def write(*arguments: Any) -> str:
        together.wait()
        return save_safetensors(*arguments)

    def check(path: Path) -> str:
        together.wait()
        return file_digest(path)

    monkeypatch.setattr(checkpoint, "save_safetensors", write)
    monkeypatch.setattr(checkpoint, "file_digest", check)
    files = {str(number): TensorFile({"x": torch.tensor(number)}) for number in range(2 * checkpoint.NUM_THREADS)}
    read = load_checkpoint(save_checkpoint(tmp_path, 1, files, {}))
    assert list(read.tensors) == sorted(files), "state.json is sorted"
    assert all(read.tensors[stem]["x"].item() == int(stem) for stem in files)


def test_the_first_damaged_file_is_the_one_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(tmp_path, 1, {f"{n}": TensorFile({"x": torch.tensor(n)}) for n in range(9)}, {})
    flip_byte(path / "2.safetensors")
    (path / "3.safetensors").unlink()  # found at once, while the one before is still being read

    def slow(file: Path) -> str:
        time.sleep(0.1 if file.stem == "2" else 0)
        return file_digest(file)

    monkeypatch.setattr(checkpoint, "file_digest", slow)
    with pytest.raises(CheckpointError, match=r"/2\.safetensors is damaged"):
        load_checkpoint(path)


def test_an_output_folder_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "runs", 1)


# ---- leftovers, pruning, finding


def test_what_a_killed_process_was_writing_is_removed_and_never_resumed_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    leftover = tmp_path / ".checkpoint-000002.writing"
    leftover.mkdir()
    (leftover / STATE_FILE).write_text("{")
    other = tmp_path / ".checkpoint-notes.txt"
    other.write_text("mine")
    assert resolve_resume(tmp_path, "latest", print) == checkpoint_path(tmp_path, 1)
    with caplog.at_level("INFO"):
        remove_unfinished(tmp_path)
    assert not leftover.exists() and other.exists()
    assert caplog.messages == [f"removing {leftover}, left by an interrupted write"]
    assert_whole(checkpoint_path(tmp_path, 1), 1)


def test_a_leftover_of_the_same_step_does_not_get_into_the_checkpoint(tmp_path: Path) -> None:
    leftover = tmp_path / ".checkpoint-000002.writing"
    leftover.mkdir()
    (leftover / "stale.safetensors").write_text("old")
    (path,) = save(tmp_path, 2)
    assert not (path / "stale.safetensors").exists() and not leftover.exists()


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (None, [2, 9, 9_999_999, 10_000_000]),
        (1, [10_000_000]),
        (3, [9, 9_999_999, 10_000_000]),
        (9, [2, 9, 9_999_999, 10_000_000]),
    ],
)
def test_without_a_lineage_pruning_keeps_the_highest_steps(tmp_path: Path, limit: int | None, kept: list[int]) -> None:
    save(tmp_path, 9_999_999, 2, 10_000_000, 9)  # neither in order of writing nor of names
    prune_checkpoints(tmp_path, limit)
    assert find_checkpoints(tmp_path) == [checkpoint_path(tmp_path, step) for step in kept]


def test_only_checkpoints_are_found(tmp_path: Path) -> None:
    save(tmp_path, 3)
    for name in ("checkpoint-best", "my-checkpoint-000009", "checkpoint-000009.bak", "samples"):
        (tmp_path / name).mkdir()
    assert find_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 3)]
    assert find_checkpoints(tmp_path / "nowhere") == []


# ---- resuming


def test_without_a_lineage_latest_is_the_highest_step_or_a_new_start(tmp_path: Path) -> None:
    assert resolve_resume(tmp_path / "new", "latest", print) is None
    save(tmp_path, 9, 10, 8)
    assert resolve_resume(tmp_path, "latest", print) == checkpoint_path(tmp_path, 10)


def test_a_named_checkpoint_by_path_or_by_name(tmp_path: Path) -> None:
    path, _ = save(tmp_path, 9, 10)
    assert resolve_resume(tmp_path, str(path), print) == path
    assert resolve_resume(tmp_path, "checkpoint-000009", print) == path
    with pytest.raises(CheckpointError, match=r"no folder checkpoint-000011.*checkpoint-000009, checkpoint-000010"):
        resolve_resume(tmp_path, "checkpoint-000011", print)
    with pytest.raises(CheckpointError, match="there are: none"):
        resolve_resume(tmp_path / "new", "checkpoint-000009", print)


def test_a_new_start_does_not_overwrite_an_older_run(tmp_path: Path) -> None:
    assert resolve_resume(tmp_path, None, print) is None
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"up to checkpoint-000005.*resume_from_checkpoint=latest"):
        resolve_resume(tmp_path, None, print)
