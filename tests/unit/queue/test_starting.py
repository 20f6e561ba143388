"""What is due is started, by processes that outlive their server, and their end is learned however it comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pixtune.commands.words import config_and_overrides
from pixtune.config import load_config
from pixtune.errors import QueueError
from pixtune.queue import starting
from pixtune.queue.entries import ENDED
from pixtune.queue.starting import PROGRAM, advance, settle, stop_entry, take_lock, words_of
from pixtune.queue.store import Queue, set_state
from tests.runs import overrides, write_config

RUN = """
import os, sys, time
output_dir = next(word.partition("=")[2] for word in sys.argv if word.startswith("output_dir="))
os.makedirs(output_dir, exist_ok=True)
open(os.path.join(output_dir, "began"), "w").write(str(os.getpid()))
while not os.path.exists(os.path.join(output_dir, "go")):
    time.sleep(0.01)
print("error: it broke\\n  - here", flush=True)
sys.exit(int(open(os.path.join(output_dir, "go")).read()))
"""
SERVER = """
import json, sys, time
from pathlib import Path
from pixtune.queue.starting import advance
from pixtune.queue.store import Queue
advance(Queue(Path(sys.argv[1])), json.loads(sys.argv[2]))
print("started", flush=True)
time.sleep(60)
"""


class Scene:
    """A queue of runs that begin at once and end when they are let."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.queue = folder, Queue(folder / "queue")
        (folder / "run.py").write_text(RUN)
        self.program = [sys.executable, "-I", "-S", str(folder / "run.py")]

    def add(self, name: str, **changes: object) -> int:
        words = overrides(self.folder / "runs" / name, self.folder / "cache", **changes)
        return self.queue.add(write_config(self.folder), words).id

    def wait(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + 30
        while not what():
            assert time.monotonic() < deadline, [*self.queue.entries()]
            time.sleep(0.01)

    def wait_for_begin(self, name: str) -> int:
        began = self.folder / "runs" / name / "began"
        self.wait(lambda: began.exists() and began.read_text())
        return int(began.read_text())

    def end(self, name: str, code: int) -> None:
        (self.folder / "runs" / name / "go").write_text(str(code))

    def state(self, number: int) -> str:
        return self.queue.entry(number).state


def is_free(queue: Queue, number: int) -> bool:
    """Whether no process of the entry is left."""
    if (lock := take_lock(queue, number)) is None:
        return False
    os.close(lock)
    return True


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_run_outlives_its_server_and_starts_the_next_one_itself(scene: Scene) -> None:
    first, second, third = scene.add("a"), scene.add("b"), scene.add("c")
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(scene.queue.folder), json.dumps(scene.program)], stdout=subprocess.PIPE
    )
    assert server.stdout and server.stdout.readline() == b"started\n"
    run = scene.wait_for_begin("a")
    assert os.getsid(run) not in (os.getsid(server.pid), os.getsid(0)), "no terminal takes it along"
    server.send_signal(signal.SIGKILL)
    server.wait()
    settle(scene.queue)
    assert [scene.state(each) for each in (first, second, third)] == ["running", "waiting", "waiting"]
    assert scene.queue.entry(first).exit_code is None
    scene.end("a", 1)
    scene.wait_for_begin("b")
    failed = scene.queue.entry(first)
    assert (failed.state, failed.exit_code, failed.error) == ("failed", 1, "it broke\n  - here")
    assert failed.ended and failed.began and failed.ended > failed.began
    scene.queue.pause()
    scene.end("b", 130)
    scene.wait(lambda: scene.state(second) == "stopped")
    scene.wait(lambda: is_free(scene.queue, second))
    assert scene.state(third) == "waiting" and not (scene.folder / "runs" / "c").exists(), "it is paused"


def test_a_run_whose_attendant_is_killed_goes_on_and_is_still_known(scene: Scene) -> None:
    number = scene.add("a")
    (attendant,) = advance(scene.queue, scene.program)
    run = scene.wait_for_begin("a")
    attendant.kill()
    attendant.wait()
    assert advance(scene.queue, scene.program) == [] and scene.state(number) == "running"
    os.kill(run, signal.SIGKILL)
    scene.wait(lambda: is_free(scene.queue, number))
    settle(scene.queue)
    assert scene.state(number) == "killed"


def test_stopping_an_entry_that_is_still_loading_reaches_its_run(scene: Scene) -> None:
    number = scene.add("a")
    with pytest.raises(QueueError, match="not running"):
        stop_entry(scene.queue, number)
    (attendant,) = advance(scene.queue, scene.program)
    scene.wait_for_begin("a")
    assert "while it is loading" in stop_entry(scene.queue, number)
    attendant.wait()
    entry = scene.queue.entry(number)
    assert (entry.state, entry.exit_code) == ("killed", -signal.SIGTERM), "this one does not listen"


def test_what_is_held_or_not_due_is_passed_over(scene: Scene) -> None:
    held, later = scene.add("held"), scene.add("later")
    scene.queue.pause(held)
    with scene.queue.transaction() as database:
        database.execute("UPDATE entries SET start_at = ? WHERE id = ?", (time.time() + 3600, later))
    assert advance(scene.queue, scene.program) == []
    due = scene.add("due")
    attendants = advance(scene.queue, scene.program)
    scene.wait_for_begin("due")
    assert [scene.state(each) for each in (held, later, due)] == ["waiting", "waiting", "running"]
    assert advance(scene.queue, scene.program) == [], "one at a time"
    scene.queue.start(later)
    assert scene.queue.entry(later).start_at is None
    scene.end("due", 0)
    scene.wait_for_begin("later")
    scene.end("later", 0)
    for attendant in attendants:
        attendant.wait()
    scene.wait(lambda: scene.state(later) in ENDED)


def test_after_a_machine_went_down_a_run_goes_on_from_its_checkpoint(scene: Scene) -> None:
    number = scene.add("a")
    other = scene.add("b")
    with scene.queue.transaction() as database:
        set_state(database, number, "running", is_attended=1, num_starts=1, boot="an earlier one")
    assert "resume_from_checkpoint=latest" not in words_of(scene.queue, scene.queue.entry(number))
    settle(scene.queue)
    assert [each.id for each in scene.queue.entries()] == [number, other], "it is the next"
    assert scene.state(number) == "waiting"
    (scene.folder / "runs" / "a" / "checkpoint-000002").mkdir(parents=True)
    with scene.queue.transaction() as database:
        set_state(database, number, "running", is_attended=1, num_starts=2, boot="an earlier one")
    assert words_of(scene.queue, scene.queue.entry(number))[-1] == "resume_from_checkpoint=latest"
    with scene.queue.transaction() as database:
        set_state(database, number, "running", is_attended=1, num_starts=starting.MOST_RESTARTS + 1, boot="earlier")
    settle(scene.queue)
    assert scene.state(number) in ENDED, "or a run that brings the machine down would do so for ever"


def test_a_run_that_cannot_begin_is_given_up_and_holds_nobody_up(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    number = scene.add("a")
    with monkeypatch.context() as patch:
        patch.setattr(starting.sys, "executable", "/bin/false")  # type: ignore[attr-defined]
        for _ in range(starting.MOST_RESTARTS + 2):
            for attendant in advance(scene.queue, scene.program):
                attendant.wait()
    assert scene.state(number) == "failed"
    with monkeypatch.context() as patch:
        patch.setattr(starting.sys, "executable", str(scene.folder / "nowhere"))  # type: ignore[attr-defined]
        scene.add("b")
        with pytest.raises(QueueError, match="nowhere"):
            advance(scene.queue, scene.program)
    settle(scene.queue)
    assert [each.state for each in scene.queue.entries()] == ["failed", "waiting"]


def test_files_of_the_folder_where_it_was_added_are_not_imported(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    place = scene.folder / "place"
    place.mkdir()
    for name in ("json.py", "queue.py", "pixtune.py"):
        (place / name).write_text("raise SystemExit('imported')")
    monkeypatch.chdir(place)
    number = scene.add("a")
    (attendant,) = advance(scene.queue, scene.program)
    scene.wait_for_begin("a")
    scene.end("a", 0)
    attendant.wait()
    assert scene.state(number) == "finished"


def test_a_folder_that_is_gone_is_told(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    place = scene.folder / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    number = scene.add("a")
    monkeypatch.chdir(scene.folder)
    place.rmdir()
    (attendant,) = advance(scene.queue, scene.program)
    attendant.wait()
    entry = scene.queue.entry(number)
    assert entry.state == "failed" and entry.error and str(place) in entry.error


def test_the_copy_of_the_config_is_what_runs(scene: Scene) -> None:
    number = scene.add("a", rank=8)
    (scene.folder / "run.yaml").write_text("nothing: at all\n")
    (attendant,) = advance(scene.queue, scene.program)
    scene.wait_for_begin("a")
    words = words_of(scene.queue, scene.queue.entry(number))
    assert words[0] == "--config"
    settings = load_config(*config_and_overrides(words[2:], Path(words[1])))
    assert settings.rank == 8 and settings.output_dir == scene.folder / "runs" / "a"
    assert PROGRAM[-3:] == ("-m", "pixtune.cli", "train")
    scene.end("a", 0)
    attendant.wait()


def test_a_lock_is_taken_once(scene: Scene) -> None:
    lock = take_lock(scene.queue, 1)
    assert lock is not None and not is_free(scene.queue, 1) and is_free(scene.queue, 2)
    os.close(lock)
    assert is_free(scene.queue, 1)
