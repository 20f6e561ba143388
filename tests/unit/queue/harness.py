"""Kills servers and attendants of a queue at one line of their code after the other. A program, since it forks.

`python -m tests.unit.queue.harness server|attendant|two FOLDER EVERY` prints what became of each try as JSON.
Attendants are forked instead of being started as new Pythons, which take a quarter of a second each.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

from pixtune.queue import starting
from pixtune.queue.attendant import attend
from pixtune.queue.entries import ENDED
from pixtune.queue.starting import advance
from pixtune.queue.store import Queue

RUN = """
import os, sys, time
folder = next(word.partition("=")[2] for word in sys.argv if word.startswith("output_dir="))
code = int(next(word.partition("=")[2] for word in sys.argv if word.startswith("seed=")))
journal, busy = os.path.join(os.path.dirname(folder), "journal"), os.path.join(os.path.dirname(folder), "busy")
def note(word):
    with open(journal, "a") as file:
        file.write(word + " " + os.path.basename(folder) + "\\n")
try:
    os.mkdir(busy)
except FileExistsError:
    note("overlap")
note("begin")
time.sleep(0.01)
try:
    os.rmdir(busy)
except FileNotFoundError:
    pass
sys.exit(code)
"""
"""Program that stands for a run: notes that it began, and that another one is at work."""
LIMIT_SECONDS = 30.0


def program(folder: Path) -> list[str]:
    """The command that gets an entry's words. Its runs note in the folder that holds their output folders."""
    script = folder / "run.py"
    script.write_text(RUN)
    return [sys.executable, "-I", "-S", str(script)]


class ForkedAttendant:
    """In place of `subprocess.Popen` for attendants."""

    tracing: Callable[[], None] | None = None
    """What the attendant does first."""

    def __init__(self, command: list[str], **options: Any) -> None:
        folder, number, lock, words = command[-4:]
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            sys.settrace(None)
            output = os.open(folder + "/attendant.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if ForkedAttendant.tracing is not None:
                tracing, ForkedAttendant.tracing = ForkedAttendant.tracing, None
                tracing()
            with leaving():
                attend(Queue(Path(folder)), int(number), int(lock), json.loads(words))

    def poll(self) -> int | None:
        return None


@contextmanager
def leaving() -> Iterator[None]:
    """The forked process ends here, whatever happens."""
    code = 1
    try:
        yield
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


def killed_at(line: int) -> None:
    """This process kills itself before the line of that number that it executes in the queue's code."""
    left = line

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if "/pixtune/queue/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def serve(queue: Queue, command: list[str]) -> bool:
    """A server that is not killed; returns whether all came to an end."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        advance(queue, command)
        reap()
        if all(each.state in ENDED for each in queue.entries()):
            return True
        time.sleep(0.01)
    return False


def outcome(queue: Queue, ended: bool) -> dict[str, Any]:
    journal = queue.folder / "runs" / "journal"
    lines = journal.read_text().splitlines() if journal.exists() else []
    return {
        "ended": ended,
        "states": [each.state for each in queue.entries()],
        "begins": [line.split()[1] for line in lines if line.startswith("begin")],
        "overlaps": sum(line.startswith("overlap") for line in lines),
    }


def prepared(template: Path, name: str) -> tuple[Queue, list[str]]:
    """A copy of a queue whose runs have their output folders beside it."""
    folder = template.with_name(name)
    shutil.copytree(template, folder)
    (folder / "runs").mkdir()
    queue = Queue(folder)
    with queue.transaction() as database:
        database.execute("UPDATE entries SET output_dir = replace(output_dir, '/template/', '/' || ? || '/')", (name,))
        database.execute("UPDATE entries SET overrides = replace(overrides, '/template/', '/' || ? || '/')", (name,))
    return queue, program(folder)


def kill_everywhere(template: Path, who: str, every: int) -> list[dict[str, Any]]:
    """Kills a server, or the attendant of the first entry, at each `every`-th line, until one is not killed."""
    tries = []
    for line in range(1, 10_000, every):
        queue, command = prepared(template, f"{who}-{line}")
        ForkedAttendant.tracing = (lambda line=line: killed_at(line)) if who == "attendant" else None
        child = os.fork()
        if child == 0:
            if who == "server":
                killed_at(line)
            with leaving():
                advance(queue, command)
        _, status = os.waitpid(child, 0)
        ForkedAttendant.tracing = None
        is_over = who == "server" and os.WIFEXITED(status)
        tries.append({"line": line, **outcome(queue, serve(queue, command))})
        shutil.rmtree(queue.folder, ignore_errors=True)
        if is_over or (who == "attendant" and line > 160):
            return tries
    raise AssertionError("a server executes no ten thousand lines")


def two_servers(template: Path) -> list[dict[str, Any]]:
    """Several servers serve one queue at the same time."""
    queue, command = prepared(template, "two")
    servers = []
    for _ in range(3):
        server = os.fork()
        if server == 0:
            with leaving():
                assert serve(queue, command)
        servers.append(server)
    codes = [os.waitstatus_to_exitcode(os.waitpid(server, 0)[1]) for server in servers]
    return [{"codes": codes, **outcome(queue, True)}]


def main() -> None:
    who, folder, every = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    vars(starting)["subprocess"] = SimpleNamespace(Popen=ForkedAttendant, DEVNULL=-3, STDOUT=-2)
    tries = two_servers(folder) if who == "two" else kill_everywhere(folder, who, every)
    print(json.dumps(tries))


if __name__ == "__main__":
    main()
