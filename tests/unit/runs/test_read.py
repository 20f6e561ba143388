"""The state of a run, from folders as runs leave them, and as they are left when something goes wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pixtune.errors import RunError
from pixtune.runs.read import RunReader, find_runs, read_run
from pixtune.storage.output_lock import FILE_NAME as LOCK
from pixtune.storage.output_lock import OutputLock
from pixtune.storage.requests import ask
from pixtune.storage.session_note import SessionNote
from tests.recorded import NUM_STEPS, leave_lock

Copy = Callable[..., Path]


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def note_of(folder: Path, **changes: Any) -> SessionNote:
    note = SessionNote.read(folder)
    assert note is not None
    changed = replace(note, **changes)
    changed.write(folder)
    return changed


def test_a_finished_run_is_what_its_files_say(recorded: Path) -> None:
    run = read_run(recorded)
    steps, validations = lines_of(recorded, "step"), lines_of(recorded, "validation")
    assert run.state == "finished" and run.process is None and not run.is_paused and run.error is None
    assert (run.step, run.num_steps, run.share) == (NUM_STEPS, NUM_STEPS, 1.0)
    assert run.loss == steps[-1]["loss"]
    assert run.smoothed_loss == pytest.approx(math.fsum(line["loss"] for line in steps) / NUM_STEPS)
    assert run.seconds_per_step == sorted(line["seconds"] for line in steps)[2:4][0] or run.seconds_per_step
    assert run.seconds_left is None, "nothing is left, and nobody at work"
    assert [(each.step, each.loss) for each in run.validations] == [(v["step"], v["loss"]) for v in validations]
    assert run.held_out_loss == run.validations[-1] and run.first_loss == run.validations[0]
    lowest = min(validations[1:], key=lambda line: line["loss"])
    assert run.best and (run.best.step, run.best.loss) == (lowest["step"], lowest["loss"])
    assert run.best.folder == recorded / "best"
    assert [each.step for each in run.checkpoints] == [3, 6] and all(each.path.is_dir() for each in run.checkpoints)
    assert [(each.step, each.index, each.prompt) for each in run.samples] == [
        (step, index, prompt) for step in (0, 6) for index, prompt in enumerate(["a [cat]", "a dog"])
    ]
    assert all((recorded / each.path).is_file() for each in run.samples)
    assert run.report == recorded / "report.html" and run.config["max_train_steps"] == NUM_STEPS
    assert run.peak_memory_gib is None and run.requests == ()


def test_a_run_is_running_as_long_as_its_process_is(copy: Copy) -> None:
    folder = copy()
    with OutputLock(folder) as lock:
        lock.acquire()
        note_of(folder, lock=lock.name, outcome=None, ended=None, num_steps=20)
        run = read_run(folder)
        assert run.state == "running" and run.process and run.process.pid == os.getpid()
        assert run.seconds_per_step and run.seconds_left == pytest.approx(14 * run.seconds_per_step)
        assert (run.step, run.num_steps) == (NUM_STEPS, 20)
        note_of(folder, is_paused=True)
        ask(folder, "save_now")
        assert read_run(folder).is_paused and read_run(folder).requests == ("save_now",)
    assert read_run(folder).state == "killed", "it has ended, and noted no outcome"


@pytest.mark.parametrize("outcome", ["finished", "stopped", "failed"])
def test_how_a_session_ended_is_told_by_its_own_note(copy: Copy, outcome: str) -> None:
    folder = copy()
    note = note_of(folder, outcome=outcome, error="it is broken" if outcome == "failed" else None)
    assert read_run(folder).state == outcome
    assert read_run(folder).error == note.error
    leave_lock(folder, name=note.lock)
    assert read_run(folder).state == outcome, "ended at once, after noting it"
    leave_lock(folder, name="another")
    assert read_run(folder).state == "killed", "a later session, which got as far as the lock"


def test_a_process_number_that_is_used_again_is_not_the_run(copy: Copy) -> None:
    folder = copy()
    note_of(folder, outcome=None)
    leave_lock(folder, pid=os.getpid(), started="1")
    assert read_run(folder).state == "killed"


def test_a_run_on_another_machine_is_alive_while_it_gives_signs(copy: Copy) -> None:
    folder = copy()
    leave_lock(folder, host="elsewhere", boot="another", pid_space="another")
    assert read_run(folder).state == "running"
    old = (folder / LOCK).stat().st_mtime - 3600
    os.utime(folder / LOCK, (old, old))
    assert read_run(folder).state == "killed"


def test_older_runs_without_a_note_are_told_by_checkpoints_and_log(copy: Copy) -> None:
    folder = copy()
    (folder / "session.json").unlink()
    run = read_run(folder)
    assert (run.state, run.step, run.num_steps) == ("finished", NUM_STEPS, NUM_STEPS)
    assert run.config["max_train_steps"] == NUM_STEPS, "from the checkpoint"
    cut = [line for line in (folder / "metrics.jsonl").read_text().splitlines(keepends=True) if '"step": 6' not in line]
    (folder / "metrics.jsonl").write_text("".join(cut))
    (folder / "checkpoint-000006").rename(folder / "gone")
    run = read_run(folder)
    assert (run.state, run.step, run.num_steps) == ("stopped", 5, NUM_STEPS)


def test_half_written_and_damaged_lines_are_left_out(copy: Copy) -> None:
    folder = copy()
    whole = read_run(folder)
    with (folder / "metrics.jsonl").open("ab") as log:
        log.write(b'\xff\xfe\n[]\n{"kind": "step", "step": "7"}\n{"kind": "step", "step": 7, "loss": null}\n')
        log.write(b'{"kind": "sample", "step": 7, "prompt": "", "seed": 0, "path": "../../x.png"}\n')
        log.write(b'{"kind": "step", "step": 8, "loss": 0.')
    run = read_run(folder)
    assert (run.step, run.loss) == (7, whole.loss) and run.samples == whole.samples


def test_reading_again_takes_what_was_added_and_notices_another_log(copy: Copy) -> None:
    folder = copy()
    log = folder / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:4]) + lines[4][:9])
    (folder / "session.json").unlink()
    reader, taken = RunReader(folder, with_curve=True), list[bytes]()
    whole_take = reader._take

    def take(raw: bytes) -> None:
        taken.append(raw)
        whole_take(raw)

    reader._take = take  # type: ignore[method-assign]
    reader.read()
    assert len(taken) == 4
    with log.open("ab") as stream:
        stream.write(lines[4][9:] + b"".join(lines[5:]))
    assert reader.read() == RunReader(folder, with_curve=True).read()
    assert len(taken) == len(lines), "each line once"
    log.write_bytes(b"".join(lines[:3]))  # as a run that was set back
    assert reader.read() == RunReader(folder, with_curve=True).read()
    assert len(taken) == len(lines) + 3
    longer = [line.replace(b'"seconds": 0', b'"seconds": 1') for line in lines]
    log.write_bytes(b"".join(longer))  # another session's, which has become longer than what was read
    assert reader.read() == RunReader(folder, with_curve=True).read()
    log.unlink()
    assert reader.read().loss is None


def test_long_runs_are_read_fast_and_their_curve_stays_small(copy: Copy) -> None:
    folder = copy()
    line = '{"kind": "step", "step": %d, "loss": %.1f, "seconds": 0.5, "peak_memory_gib": 20.5}\n'
    with (folder / "metrics.jsonl").open("w") as log:
        log.writelines(line % (step, step) for step in range(1, 200_001))
    reader = RunReader(folder)
    began = os.times().user
    run = reader.read()
    seconds = os.times().user - began
    assert (run.step, run.peak_memory_gib) == (200_000, 20.5)
    assert seconds < 1.0, "a line of a step costs a comparison, and no parsing"
    began = os.times().user
    for _ in range(100):
        reader.read()
    assert os.times().user - began < 1.0, "reading again does not depend on the length"
    curve = RunReader(folder, with_curve=True).read().losses
    assert 400 <= len(curve) <= 800 and curve[0][0] < 500 and curve[-1][0] > 199_000
    assert all(later > step for (step, _), (later, _) in pairwise(curve))
    assert all(value == pytest.approx(step, abs=0.51) for step, value in curve), "the mean of a line is the line"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\0" * 40, b'{"outcome": "finished"}', b"[" * 100_000])
def test_a_note_that_is_none_is_not_believed(copy: Copy, content: bytes) -> None:
    folder = copy()
    (folder / "session.json").write_bytes(content)
    assert read_run(folder).state == "finished", "by log and checkpoints"


def test_what_is_no_run_is_refused_in_words(tmp_path: Path, copy: Copy) -> None:
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(RunError, match="pixtune runs"):
            read_run(folder)
    folder = copy("strange")
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    with pytest.raises(RunError, match="it is no file"):
        read_run(folder)


def test_runs_are_found_below_a_folder(tmp_path: Path, copy: Copy) -> None:
    runs = [copy("a"), copy("b/c"), copy("b/d/e")]
    copy(".hidden")
    copy("too/deep/for/it")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert find_runs(tmp_path) == runs, "a run's own folders are none"
    assert find_runs(runs[0]) == runs[:1]
    with pytest.raises(RunError, match="searched"):
        find_runs(tmp_path / "nowhere")


def test_the_room_needs_no_torch() -> None:
    code = "import sys, pixtune.runs.read; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_pause_is_over_with_its_session(copy: Copy) -> None:
    folder = copy()
    note_of(folder, is_paused=True, outcome=None)
    with OutputLock(folder) as lock:
        lock.acquire()
        assert read_run(folder).state == "running" and not read_run(folder).is_paused, "it is loading"


def test_figures_that_no_run_has_are_left_out(copy: Copy) -> None:
    folder = copy()
    before = read_run(folder)
    with (folder / "metrics.jsonl").open("a") as log:
        for step in (10**400, 2**60, -5):
            log.write(f'{{"kind": "step", "step": {step}, "loss": 0.5, "seconds": 1}}\n')
        for loss in ("1e308", "-1e308", "1e999", "NaN", "true", '"0.5"', "[]", str(10**300)):
            log.write(f'{{"kind": "step", "step": 6, "loss": {loss}, "seconds": {loss}}}\n')
            log.write(f'{{"kind": "validation", "step": 6, "loss": {loss}, "quarters": [{loss}, 1, 1, 1]}}\n')
        log.write(json.dumps({"kind": "sample", "step": 6, "prompt": "x" * 10**5, "seed": 0, "path": "a.png"}) + "\n")
    run = RunReader(folder, with_curve=True).read()
    assert (run.step, run.smoothed_loss is not None) == (before.step, True)
    json.loads(json.dumps(run.to_dict(), allow_nan=False))
    assert len(run.samples[-1].prompt) == 4000
