"""The checkpoints of a real folder: which one a run goes on from, which are deleted, and what is said about it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pixtune.errors import CheckpointError, InUseError
from pixtune.storage import course as course_module
from pixtune.storage.checkpoint import SET_BACK_FILE, load_checkpoint, remove_unfinished, save_checkpoint
from pixtune.storage.checkpoint_state import STATE_FILE, checkpoint_path, find_checkpoints
from pixtune.storage.course import Course, resolve_resume
from pixtune.storage.output_lock import OutputLock
from pixtune.storage.resume import RunIdentity
from pixtune.storage.safetensors_writer import TensorFile


def session(folder: Path, resume_from: str | None, *steps: int, limit: int | None = None) -> list[str]:
    """One start of the program, which saves after some steps, with losses that are numbers. Returns what it printed."""
    shown: list[str] = []
    path = resolve_resume(folder, resume_from, shown.append)
    resumed = load_checkpoint(path) if path else None
    course = Course(folder, identity(resume_from), resumed=resumed)
    shown += course.begin(limit, takes_steps=True)
    for step in steps:
        course.save(step, {"lora": TensorFile({"x": torch.tensor(step)})}, {})
        course.trust()
        shown += course.prune(limit)
    return shown


def identity(resume_from: str | None = None) -> RunIdentity:
    return RunIdentity({"resume_from_checkpoint": resume_from}, "d", 1, 100, "b")


def steps_in(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("checkpoint-")) for path in find_checkpoints(folder)]


def latest(folder: Path) -> int:
    path = resolve_resume(folder, "latest", lambda sentence: None)
    assert path is not None
    return load_checkpoint(path).step


def set_aside(path: Path) -> None:
    """Saved by another version, without a lineage."""
    (path / STATE_FILE).write_text("")


# ---- set back


def test_set_back_with_a_limit_keeps_what_was_just_saved(tmp_path: Path) -> None:
    session(tmp_path, None, 5, 10)
    (sentence,) = session(tmp_path, "checkpoint-000005", 7, limit=1)
    assert "set back to step 5: checkpoint-000010 will not be resumed" in sentence
    assert "checkpoints_total_limit=1" in sentence
    assert steps_in(tmp_path) == [7] and latest(tmp_path) == 7


def test_what_was_given_up_is_deleted_before_what_led_to_the_newest(tmp_path: Path) -> None:
    session(tmp_path, None, 2, 4, 6, 8)
    session(tmp_path, "checkpoint-000004", 5, limit=4)
    assert steps_in(tmp_path) == [2, 4, 5, 8], "the newest of what was given up goes last"
    session(tmp_path, "latest", 7, limit=3)
    assert steps_in(tmp_path) == [4, 5, 7]


def test_a_set_back_run_that_was_killed_before_it_saved_goes_on_from_there(tmp_path: Path) -> None:
    session(tmp_path, None, 5, 10)
    session(tmp_path, "checkpoint-000005")
    assert latest(tmp_path) == 5
    shown: list[str] = []
    resolve_resume(tmp_path, "latest", shown.append)
    (sentence,) = shown
    assert sentence.startswith("latest is checkpoint-000005: ") and "set back (checkpoint-000010)" in sentence
    assert session(tmp_path, "latest", 6)[1:] == [] and latest(tmp_path) == 6
    session(tmp_path, "checkpoint-000010", 11)
    assert latest(tmp_path) == 11, "and what was given up can be taken up again, by its name"


def test_looking_at_an_earlier_checkpoint_without_taking_a_step_gives_nothing_up(tmp_path: Path) -> None:
    session(tmp_path, None, 5, 10)
    resumed = load_checkpoint(checkpoint_path(tmp_path, 5))
    assert Course(tmp_path, identity("checkpoint-000005"), resumed=resumed).begin(1, takes_steps=False) == []
    assert latest(tmp_path) == 10


def test_a_damaged_newest_after_a_set_back_does_not_bring_back_what_was_given_up(tmp_path: Path) -> None:
    session(tmp_path, None, 5, 10)
    session(tmp_path, "checkpoint-000005", 9)
    set_aside(checkpoint_path(tmp_path, 9))
    assert latest(tmp_path) == 5
    shutil.rmtree(checkpoint_path(tmp_path, 5))
    with pytest.raises(
        CheckpointError, match=r"(?s)000009.*000010 was given up.*resume_from_checkpoint=checkpoint-000010"
    ):
        latest(tmp_path)


def test_names_and_clocks_do_not_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session(tmp_path, None, 5, 10)
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    session(tmp_path, "checkpoint-000005", 6)
    assert latest(tmp_path) == 6, "the clock was set back to 1970"
    checkpoint_path(tmp_path, 5).rename(tmp_path / "checkpoint-000077")
    assert latest(tmp_path) == 6, "the folder says 77, and holds step 5"
    session(tmp_path, "latest", 7, limit=2)
    assert steps_in(tmp_path) == [6, 7]


def test_the_same_step_again_replaces_what_was_given_up(tmp_path: Path) -> None:
    session(tmp_path, None, 5, 10)
    before = load_checkpoint(checkpoint_path(tmp_path, 10)).lineage
    session(tmp_path, "checkpoint-000005", 10)
    after = load_checkpoint(checkpoint_path(tmp_path, 10)).lineage
    assert before.sessions != after.sessions and before.run == after.run and after.parent == before.parent


def test_killed_while_one_is_replaced_the_older_one_gets_its_name_back(tmp_path: Path) -> None:
    session(tmp_path, None, 5)
    checkpoint_path(tmp_path, 5).rename(tmp_path / ".checkpoint-000005.replaced")
    (tmp_path / ".checkpoint-000005.writing").mkdir()
    (tmp_path / ".checkpoint-000004.deleting").mkdir()
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000005"]
    shutil.copytree(checkpoint_path(tmp_path, 5), tmp_path / ".checkpoint-000005.replaced")
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000005"]


def test_from_another_folder_and_killed_before_it_saved(tmp_path: Path) -> None:
    session(tmp_path / "a", None, 5, 10)
    source = checkpoint_path(tmp_path / "a", 5)
    (tmp_path / "b").mkdir()
    assert session(tmp_path / "b", str(source)) == []
    assert latest(tmp_path / "b") == 5, "and not a new run"
    session(tmp_path / "b", "latest", 7)
    assert latest(tmp_path / "b") == 7
    shutil.rmtree(tmp_path / "a")
    assert latest(tmp_path / "b") == 7


def test_from_another_folder_into_one_that_holds_another_run(tmp_path: Path) -> None:
    session(tmp_path / "a", None, 5)
    session(tmp_path / "b", None, 8)
    with pytest.raises(CheckpointError, match=r"already holds another run .*checkpoint-000008"):
        session(tmp_path / "b", str(checkpoint_path(tmp_path / "a", 5)))
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    session(tmp_path / "copy", str(checkpoint_path(tmp_path / "a", 5)), 6)
    assert latest(tmp_path / "copy") == 6


# ---- damage


def flip(path: Path) -> None:
    file = path / "lora.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def no_file(path: Path) -> None:
    (path / "lora.safetensors").unlink()


def another_step(path: Path) -> None:
    file = path / STATE_FILE
    file.write_text(file.read_text().replace('"step": 10\n', '"step": 90\n'))


def empty_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def plain_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


def dead_link(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to("nowhere")


def nested(path: Path) -> None:
    (path / STATE_FILE).write_text("[" * 100_000)


def not_text(path: Path) -> None:
    (path / STATE_FILE).write_bytes(b"\xff\xfe\0")


def folder_for_state(path: Path) -> None:
    (path / STATE_FILE).unlink()
    (path / STATE_FILE).mkdir()


def pipe_for_state(path: Path) -> None:
    (path / STATE_FILE).unlink()
    os.mkfifo(path / STATE_FILE)


def pipe_for_tensors(path: Path) -> None:
    no_file(path)
    os.mkfifo(path / "lora.safetensors")


def endless_link(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path.name)


DAMAGES = [
    pipe_for_state, pipe_for_tensors, endless_link,
    flip, no_file, another_step, set_aside, empty_folder, plain_file, dead_link, nested, not_text, folder_for_state,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_latest_passes_over_what_is_damaged_and_says_so(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    session(tmp_path, None, 5, 10)
    damage(checkpoint_path(tmp_path, 10))
    (warning,) = session(tmp_path, "latest", 7, limit=2)
    assert warning.startswith("warning: ") and "checkpoint-000010" in warning
    assert warning.endswith("going on after step 5 with checkpoint-000005")
    assert latest(tmp_path) == 7 and {5, 7} <= set(steps_in(tmp_path)), "neither counts against the limit"


def test_a_checkpoint_that_is_damaged_in_mid_run_is_said_once(tmp_path: Path) -> None:
    course = Course(tmp_path, identity())
    course.begin(None, takes_steps=True)
    said = []
    for step in (1, 2, 3):
        course.save(step, {"lora": TensorFile({"x": torch.tensor(step)})}, {})
        course.trust()
        said.append(course.prune(None))
        (checkpoint_path(tmp_path, 1) / STATE_FILE).write_bytes(b"")
    assert said[0] == said[2] == []
    (warning,) = said[1]
    assert "checkpoint-000001" in warning and "is damaged" in warning
    assert warning.endswith("It is neither counted nor deleted.")


def test_latest_does_not_start_anew_where_all_is_damaged(tmp_path: Path) -> None:
    session(tmp_path, None, 5, 10)
    for step, damage in ((5, no_file), (10, empty_folder)):
        damage(checkpoint_path(tmp_path, step))
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint in .* can be resumed from:.*000010.*000005"):
        latest(tmp_path)


def test_latest_stops_at_what_another_version_wrote(tmp_path: Path) -> None:
    """Going on from an earlier step would throw away what is no damage."""
    session(tmp_path, None, 5, 10)
    file = checkpoint_path(tmp_path, 10) / STATE_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    with pytest.raises(CheckpointError, match="format 2, this version reads 1"):
        latest(tmp_path)


def test_a_named_checkpoint_that_is_damaged_is_refused(tmp_path: Path) -> None:
    session(tmp_path, None, 5, 10)
    flip(checkpoint_path(tmp_path, 10))
    with pytest.raises(CheckpointError, match=r"lora\.safetensors is damaged"):
        session(tmp_path, "checkpoint-000010")


def test_a_damaged_note_of_a_set_back_is_said_and_the_order_of_saving_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session(tmp_path, None, 5, 10)
    session(tmp_path, "checkpoint-000005", 7)
    (tmp_path / SET_BACK_FILE).write_text('{"to": ')
    assert latest(tmp_path) == 7 and "set_back.json cannot be read" in caplog.text


def test_what_cannot_be_deleted_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(course_module, "delete_checkpoint", fail)
    (warning,) = session(tmp_path, None, 5, 10, limit=1)
    assert "checkpoint-000005 is beyond checkpoints_total_limit" in warning and steps_in(tmp_path) == [5, 10]


# ---- what 0.1.0 wrote, and who may save


def test_checkpoints_without_a_lineage_resume_and_are_descended_from(tmp_path: Path) -> None:
    for step in (5, 10):
        save_checkpoint(tmp_path, step, {"lora": TensorFile({"x": torch.tensor(step)})}, {})
    assert latest(tmp_path) == 10
    session(tmp_path, "checkpoint-000005", 7)
    lineage = load_checkpoint(checkpoint_path(tmp_path, 7)).lineage
    assert [(each.name == "unrecorded", each.last_step) for each in lineage.sessions] == [(True, 5), (False, 7)]
    assert lineage.sessions[1].identity == {
        "config": identity("checkpoint-000005").in_short()["config"], "data": "d", "num_processes": 1, "num_steps": 100,
        "base": "b",
    }  # fmt: skip
    assert latest(tmp_path) == 7


def test_changes_are_recorded_in_the_lineage(tmp_path: Path) -> None:
    session(tmp_path, None, 5)
    resumed = load_checkpoint(checkpoint_path(tmp_path, 5))
    course = Course(tmp_path, identity("latest"), ["seed: was 1, is 2"], resumed)
    course.save(6, {}, {})
    read = load_checkpoint(checkpoint_path(tmp_path, 6))
    assert [each.changes for each in read.lineage.sessions] == [(), ("seed: was 1, is 2",)]
    assert read.record["base"] == "b"


def test_nothing_is_saved_where_another_run_has_taken_over(tmp_path: Path) -> None:
    with OutputLock(tmp_path) as lock:
        lock.acquire()
        course = Course(tmp_path, identity(), lock=lock)
        course.save(5, {}, {})
        values = json.loads(lock.path.read_text())
        lock.path.write_text(json.dumps({**values, "name": "other", "host": "elsewhere"}))
        with pytest.raises(InUseError, match=r"elsewhere.*saves nothing more"):
            course.save(6, {}, {})
    assert steps_in(tmp_path) == [5] and lock.path.exists(), "the other's lock stays"


# ---- checkpoints whose weights may yield no number


def course_of(folder: Path, resume_from: str | None = None) -> Course:
    path = resolve_resume(folder, resume_from, lambda sentence: None)
    course = Course(folder, identity(resume_from), resumed=load_checkpoint(path) if path else None)
    course.begin(None, takes_steps=True)
    return course


def test_the_last_good_one_stays_until_the_newest_has_shown_a_number(tmp_path: Path) -> None:
    course = course_of(tmp_path)
    for step in (6, 12, 18):
        course.save(step, {}, {})
        assert course.prune(1) == []
        assert steps_in(tmp_path) == [step - 6, step][step == 6 :]
        if step < 18:
            assert course.trust() and not course.trust(), "news only once"
    course.prune(1)
    assert course.give_up_doubtful() == ["checkpoint-000012"] and latest(tmp_path) == 12


@pytest.mark.parametrize("limit", [1, 2])
def test_the_last_good_ones_stay_however_many_without_numbers_follow(tmp_path: Path, limit: int) -> None:
    """Also over a kill: steps are skipped, and saved, before anything proves the weights of step 18."""
    course = course_of(tmp_path)
    for step in (6, 12, 18):
        course.trust()
        course.save(step, {}, {})
        course.prune(limit)
    for step in (24, 30):
        course = course_of(tmp_path, "latest")
        course.save(step, {}, {})
        course.prune(limit)
        assert steps_in(tmp_path) == [6, 12, step][2 - limit :]
    assert course_of(tmp_path, "latest").give_up_doubtful() == ["checkpoint-000012", "checkpoint-000006"][:limit]
    assert latest(tmp_path) == 12


def test_a_number_that_is_lost_later_is_not_the_newest_ones_fault(tmp_path: Path) -> None:
    course = course_of(tmp_path)
    for step in (6, 12):
        course.save(step, {}, {})
    course.trust()
    assert course.give_up_doubtful() == ["checkpoint-000012", "checkpoint-000006"] and latest(tmp_path) == 12


def test_resumed_ones_are_given_up_too_and_the_only_one_is_not(tmp_path: Path) -> None:
    session(tmp_path, None, 6, 12)
    assert course_of(tmp_path, "latest").give_up_doubtful() == ["checkpoint-000006"] and latest(tmp_path) == 6
    assert course_of(tmp_path, "latest").give_up_doubtful() == [] and latest(tmp_path) == 6
    assert course_of(tmp_path / "new").give_up_doubtful() == []


def test_what_a_killed_session_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    left = [tmp_path / place / ".a.safetensors.17.tmp" for place in (".", "best", "samples/step-000002")]
    whole = [path.with_name("a.safetensors") for path in left]
    for path in (*left, *whole):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    Course(tmp_path, identity()).begin(None, takes_steps=True)
    assert not [path for path in left if path.exists()] and all(path.exists() for path in whole)
