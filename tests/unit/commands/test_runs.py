"""`pixtune runs`, `watch`, `stop` and `ask` on recorded folders, and on a process that holds the lock as a run does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from pixtune.cli import app
from pixtune.commands import watch as watching
from pixtune.commands.runs import table_of
from pixtune.commands.watch import screen_of
from pixtune.errors import RunError
from pixtune.runs.read import RunReader, read_run
from pixtune.runs.signals import kill_run
from pixtune.storage.output_lock import read_holder
from pixtune.storage.session_note import SessionNote
from tests.recorded import leave_lock

Copy = Callable[..., Path]

HOLDER = """
import signal, sys, time
from dataclasses import replace
from pathlib import Path
from pixtune.storage.output_lock import OutputLock
from pixtune.storage.session_note import SessionNote
folder = Path(sys.argv[1])
stopped = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
with OutputLock(folder) as lock:
    lock.acquire()
    note = replace(SessionNote.read(folder), lock=lock.name, outcome=None, num_steps=50)
    note.write(folder)
    print("ready", flush=True)
    while not stopped or not (folder / "may_end").exists():
        time.sleep(0.01)
    replace(note, outcome="stopped").write(folder)
print(len(stopped), flush=True)
"""


@pytest.fixture
def at_work(copy: Copy) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A folder whose lock is held by a process that ends after it was asked to, once a file `may_end` is there."""
    folder = copy("at-work")
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    yield folder, process
    process.kill()
    process.wait()


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "200"})


def drawn(folder: Path, width: int, height: int = 24, **options: object) -> str:
    console = Console(width=width, height=height, force_terminal=True, color_system=None, **options)  # type: ignore
    with console.capture() as capture:
        console.print(screen_of(RunReader(folder, with_curve=True).read(), console))
    return capture.get()


def test_runs_are_listed_with_what_their_files_say(tmp_path: Path, copy: Copy) -> None:
    folder, failed = copy("styles/one"), copy("two")
    note = SessionNote.read(failed)
    assert note
    replace(note, outcome="failed", error="no more").write(failed)
    outcome = invoke("runs", tmp_path)
    assert outcome.exit_code == 0
    _, *rows = outcome.stdout.splitlines()
    run = read_run(folder)
    assert run.smoothed_loss and run.best
    (one,) = (row.split() for row in rows if row.startswith("styles/one"))
    assert one[:4] == ["styles/one", "finished", "6/6", f"{run.smoothed_loss:.4f}"]
    assert f"{run.best.loss:.4f} at {run.best.step}" in " ".join(one)
    assert [row.split()[:2] for row in rows if row.startswith("two")] == [["two", "failed"]]
    for_programs = json.loads(invoke("runs", tmp_path, "--json").stdout)
    values = {Path(each["folder"]).name: each for each in for_programs}
    assert values["one"]["state"] == "finished" and values["two"]["error"] == "no more"
    assert values["one"]["samples"][0]["index"] == 0 and values["one"]["share"] == 1.0
    assert values["one"]["best"] == {"step": run.best.step, "loss": run.best.loss, "folder": str(folder / "best")}


def test_narrow_terminals_get_fewer_columns_and_no_broken_rows(tmp_path: Path, copy: Copy) -> None:
    folder = copy("a-name-that-is-quite-long-for-a-narrow-terminal")
    for width in (20, 32, 40, 60, 80, 120, 200):
        console = Console(width=width, force_terminal=True, color_system=None)
        with console.capture() as capture:
            console.print(table_of([read_run(folder)], tmp_path, width))
        rows = capture.get().splitlines()
        assert len(rows) == 2 and all(len(row) <= width for row in rows), rows
    assert "finished" in capture.get() and "began" in capture.get()


def test_the_screen_fits_terminals_of_any_size(copy: Copy) -> None:
    folder = copy()
    for width, height in ((10, 5), (24, 8), (40, 12), (80, 24), (200, 60)):
        rows = drawn(folder, width, height).splitlines()
        assert all(len(row) <= width for row in rows), rows
        assert height < 12 or len(rows) <= height, "else the terminal would scroll at each look"
    wide = drawn(folder, 80)
    assert "finished" in wide and "6/6" in wide and "│" in wide and "o held-out" in wide
    assert drawn(folder, 80, 24, legacy_windows=True)


@pytest.mark.parametrize(("step", "num_steps", "share"), [(0, 4, 0.0), (1, 4, 0.25), (90, 180, 0.5), (180, 180, 1.0)])
def test_the_bar_is_as_long_as_the_part_that_is_done(copy: Copy, step: int, num_steps: int, share: float) -> None:
    """In columns: what is left is drawn in another colour, and without colours not at all."""
    run = replace(read_run(copy()), step=step, num_steps=num_steps)
    for width in (40, 80, 200):
        console = Console(width=width, height=24, force_terminal=True, color_system=None)
        with console.capture() as capture:
            console.print(screen_of(run, console))
        (row,) = (row for row in capture.get().splitlines() if f"{step}/{num_steps}" in row)
        room = width - len(f"{step}/{num_steps}") - 2
        assert abs(sum(mark in "\u2501\u2578" for mark in row) - share * room) <= 1, row


def test_colours_are_left_out_where_they_are_not_wanted(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(width=80, height=24, force_terminal=True)
    with console.capture() as capture:
        console.print(screen_of(RunReader(copy(), with_curve=True).read(), console))
    assert "\x1b[3" not in capture.get() and "\x1b[9" not in capture.get(), "colours are 30 to 37 and 90 to 97"


def test_names_and_warnings_of_others_steer_no_terminal(copy: Copy) -> None:
    folder = copy("a\x1b[31m[bold]b")
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"kind": "problem", "step": 6, "message": "\x1b]0;title\x07[red]x"}) + "\n")
    for text in (drawn(folder, 80), invoke("runs", folder.parent).stdout, invoke("watch", folder).stdout):
        assert ("\x1b" not in text and "\x07" not in text and "[bold]b" in text) or "[red]x" in text
        assert "\x1b]0" not in text and "\x1b[31m" not in text


def test_watching_through_a_pipe_prints_lines_until_the_end(
    copy: Copy, monkeypatch: pytest.MonkeyPatch, at_work: tuple[Path, subprocess.Popen[str]]
) -> None:
    folder, process = at_work
    monkeypatch.setattr(watching, "LINE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(watching, "LOOK_SECONDS", 0.05)

    def next_step(seconds: float) -> None:
        steps.append(steps[-1] + 1)
        with (folder / "metrics.jsonl").open("a") as log:
            log.write(json.dumps({"kind": "step", "step": steps[-1], "loss": 0.25, "seconds": 0.5}) + "\n")
        if len(steps) == 4:
            (folder / "may_end").touch()
            process.send_signal(signal.SIGTERM)
            process.wait()

    steps = [6]
    monkeypatch.setattr("pixtune.commands.watch.time.sleep", next_step)
    outcome = invoke("watch", folder)
    lines = outcome.stdout.splitlines()
    assert outcome.exit_code == 130 and "\x1b" not in outcome.stdout
    assert [line.split("  ")[0] for line in lines[:4]] == [f"step {step}/50" for step in (6, 7, 8, 9)]
    assert "stopped after step 9" in lines[-1] and "resume_from_checkpoint=latest" in lines[-1]


def test_the_exit_code_tells_what_became_of_a_run(copy: Copy) -> None:
    for outcome, code in (("finished", 0), ("stopped", 130), ("failed", 1), (None, 1)):
        folder = copy(f"run-{outcome}")
        note = SessionNote.read(folder)
        assert note
        replace(note, outcome=outcome, error="it broke" if outcome == "failed" else None).write(folder)  # type: ignore[arg-type]
        watched = invoke("watch", folder)
        assert watched.exit_code == code and (outcome or "killed") in watched.stdout
        assert ("it broke" in watched.stdout) == (outcome == "failed")
        assert invoke("watch", "--once", folder).exit_code == 0


def test_a_run_is_stopped_once_however_often_it_is_asked(at_work: tuple[Path, subprocess.Popen[str]]) -> None:
    folder, process = at_work
    first = invoke("stop", folder, "--no-wait")
    again = invoke("stop", folder, "--no-wait")
    assert first.exit_code == again.exit_code == 0
    assert "is asked to stop" in first.stdout and "already" in again.stdout
    (folder / "may_end").touch()
    assert process.communicate()[0] == "1\n", "a second signal would end it at once"
    refused = invoke("stop", folder)
    assert (
        refused.exit_code == 1 and isinstance(refused.exception, RunError) and "not running" in str(refused.exception)
    )


def test_stopping_waits_for_the_end_and_killing_does_not_ask(at_work: tuple[Path, subprocess.Popen[str]]) -> None:
    folder, process = at_work
    began = time.monotonic()
    outcome = invoke("stop", folder, "--kill")
    assert outcome.exit_code == 0 and "killed after step 6; saved up to step 6" in outcome.stdout
    assert process.wait() == -signal.SIGKILL and time.monotonic() - began < 5


def test_a_process_that_took_over_the_number_is_left_alone(copy: Copy) -> None:
    folder = copy()
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        leave_lock(folder, pid=bystander.pid, started="1")
        outcome = invoke("stop", folder)
        assert outcome.exit_code == 1 and "not running" in str(outcome.exception)
        run = read_run(folder)
        with pytest.raises(RunError, match="has ended meanwhile"):
            kill_run(replace(run, state="running", process=read_holder(folder)))
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_process_that_a_forged_lock_names_is_left_alone(copy: Copy) -> None:
    folder = copy()
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        started = Path(f"/proc/{bystander.pid}/stat").read_text().rpartition(")")[2].split()[19]
        leave_lock(folder, pid=bystander.pid, started=started)
        assert read_run(folder).state == "running", "as far as its file tells"
        for words in (("stop", folder), ("stop", "--kill", folder)):
            outcome = invoke(*words)
            assert outcome.exit_code == 1 and "does not hold" in str(outcome.exception)
        assert bystander.poll() is None and not (folder / "stop_now").exists()
    finally:
        bystander.kill()
        bystander.wait()


def test_a_run_on_another_machine_is_asked_by_a_file(copy: Copy) -> None:
    folder = copy()
    leave_lock(folder, host="elsewhere", boot="another", pid_space="another", pid=os.getpid())
    outcome = invoke("stop", folder, "--no-wait")
    assert outcome.exit_code == 0 and "elsewhere" in outcome.stdout and (folder / "stop_now").exists()
    assert "killed there" in str(invoke("stop", folder, "--kill").exception)


def test_requests_are_left_for_runs_alone(copy: Copy, at_work: tuple[Path, subprocess.Popen[str]]) -> None:
    folder, _ = at_work
    for word, file in (("save", "save_now"), ("sample", "sample_now"), ("pause", "pause")):
        assert invoke("ask", word, folder).exit_code == 0 and (folder / file).is_file()
    assert invoke("ask", "continue", folder).exit_code == 0 and not (folder / "pause").exists()
    assert "nobody has asked" in str(invoke("ask", "continue", folder).exception)
    assert invoke("ask", "dance", folder).exit_code == 2
    finished = copy("finished")
    assert "not running" in str(invoke("ask", "save", finished).exception) and not (finished / "save_now").exists()


def test_a_name_below_runs_is_enough(copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy("runs/mine")
    monkeypatch.chdir(tmp_path)
    assert invoke("watch", "mine").exit_code == 0
    assert "mine" in invoke("runs").stdout
    assert "pixtune runs" in str(invoke("watch", "yours").exception)


def test_help_has_examples() -> None:
    for command in ("runs", "watch", "stop", "ask"):
        assert f"Example: pixtune {command} " in textwrap.dedent(invoke(command, "--help").stdout)
