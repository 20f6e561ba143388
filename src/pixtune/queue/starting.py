"""Starts the runs of a queue whose turn has come, and learns what became of those that have ended.

A lock of the system's on a file of each entry is what shows that it is at work. Whoever starts an entry takes the lock
before anything is noted, and hands it on to the attendant, which hands it on to the run. The kernel gives it back when
the last of these processes is gone, however that happens. So an entry that is noted as running while its lock is free
has no process, at whatever point its server was killed; and of two servers, one gets the lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from pixtune.errors import QueueError, RunError
from pixtune.queue.entries import Entry, EntryState
from pixtune.queue.store import Queue, all_entries, set_state, setting, wait_again
from pixtune.runs.read import read_run
from pixtune.runs.signals import send_signal, stop_run
from pixtune.storage.checkpoint_state import find_checkpoints
from pixtune.storage.files import write_atomically
from pixtune.storage.output_lock import Holder, this_process

PROGRAM = (sys.executable, "-P", "-m", "pixtune.cli", "train")
"""Command that an entry's words are given to. Of the folder where it runs, no file is imported."""
AT_ONCE = 1
"""Number of runs that a queue has at work at the same time."""
MOST_RESTARTS = 3
"""Number of times that a run is started again whose machine went down, or whose attendant could not begin."""
LAST_WORDS_BYTES = 4000


def advance(queue: Queue, program: Sequence[str] = PROGRAM) -> list[subprocess.Popen[bytes]]:
    """Settles what has ended, and starts what is due.

    Args:
        program: the command that is given an entry's words.

    Returns:
        Attendants that were started, to be waited for some time: each stands beside its run until that ends.

    Raises:
        QueueError: the queue's files cannot be used.
    """
    started = []
    settle(queue)
    while (taken := _take_next(queue)) is not None:
        entry, lock = taken
        try:
            started.append(_start(queue, entry, lock, program))
        finally:
            os.close(lock)
    return started


def settle(queue: Queue) -> None:
    """Learns what became of entries that are noted as running and have no process any more."""
    boot = this_process().boot
    with queue.transaction() as database:
        for entry in all_entries(database):
            if entry.state != "running" or (lock := take_lock(queue, entry.id)) is None:
                continue
            os.close(lock)
            row = database.execute("SELECT is_attended, boot FROM entries WHERE id = ?", (entry.id,)).fetchone()
            went_down = row["boot"] is not None and row["boot"] != boot
            if (not row["is_attended"] or went_down) and entry.num_starts <= MOST_RESTARTS:
                wait_again(database, entry.id, first=True)
            else:
                state = _became_of(entry) if row["is_attended"] else "failed"
                set_state(database, entry.id, state, ended=time.time(), error=last_words(queue, entry.id))


def take_lock(queue: Queue, number: int) -> int | None:
    """Takes an entry's lock.

    Returns:
        A descriptor of the file; closing it gives the lock back. None where a process of the entry has it.

    Raises:
        QueueError: the file cannot be locked.
    """
    path = queue.lock_of(number)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise QueueError(f"{path} cannot be opened ({error.strerror or error}).") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise QueueError(
            f"{path} cannot be locked ({error.strerror or error}), as on some network file systems. Name a folder of "
            "a disk of this machine: --queue FOLDER."
        ) from error
    return descriptor


def words_of(queue: Queue, entry: Entry) -> list[str]:
    """Returns the words of `pixtune train` for an entry. One that was begun before goes on from its checkpoint."""
    resumes = entry.num_starts > 1 and bool(find_checkpoints(entry.output_dir))
    resume = ["resume_from_checkpoint=latest"] if resumes else []
    return ["--config", str(queue.config_of(entry.id)), *entry.overrides, *resume]


def stop_entry(queue: Queue, number: int) -> str:
    """Asks the run of an entry to save and end, also while it is loading.

    Returns:
        What was done, in a sentence.

    Raises:
        QueueError: the entry does not run, or is just being started.
        RunError: the run has ended meanwhile, or is another user's.
    """
    entry = queue.entry(number)
    if entry.state != "running":
        raise QueueError(f"entry {number} is not running: it is {entry.state}.")
    try:
        run = read_run(entry.output_dir)
    except RunError:
        run = None
    if run is not None and run.process is not None:
        return stop_run(run)
    with queue.transaction() as database:
        row = database.execute("SELECT attendant FROM entries WHERE id = ?", (number,)).fetchone()
    if row is None or row["attendant"] is None:
        raise QueueError(f"entry {number} is just being started: try again in a moment.")
    send_signal(Holder(**json.loads(row["attendant"])), signal.SIGTERM, queue.lock_of(number))
    return f"entry {number} is asked to stop while it is loading"


def last_words(queue: Queue, number: int) -> str | None:
    """Returns the error that a run's log ends with, or its last line; None where there is no log."""
    try:
        with queue.log_of(number).open("rb") as log:
            log.seek(max(log.seek(0, os.SEEK_END) - LAST_WORDS_BYTES, 0))
            text = log.read().decode(errors="replace").strip()
    except OSError:
        return None
    at = text.rfind("error: ")
    return text[at + len("error: ") :] if at >= 0 else text.rpartition("\n")[2] or None


def _take_next(queue: Queue) -> tuple[Entry, int] | None:
    """Notes the entry whose turn it is as running, and returns it with its lock; None where it is no one's turn."""
    with queue.transaction() as database:
        entries = all_entries(database)
        if setting(database, "is_paused") == "true" or sum(each.state == "running" for each in entries) >= AT_ONCE:
            return None
        now = time.time()
        for entry in entries:
            is_due = entry.state == "waiting" and not entry.is_held and (entry.start_at or 0) <= now
            if not is_due or (lock := take_lock(queue, entry.id)) is None:
                continue
            try:
                set_state(
                    database, entry.id, "running", began=now, ended=None, exit_code=None, error=None, is_attended=0,
                    num_starts=entry.num_starts + 1, boot=this_process().boot,
                )  # fmt: skip
                config = database.execute("SELECT config FROM entries WHERE id = ?", (entry.id,)).fetchone()["config"]
                write_atomically(queue.config_of(entry.id), config.encode())
            except BaseException:
                os.close(lock)
                raise
            return entry, lock
    return None


def _start(queue: Queue, entry: Entry, lock: int, program: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts an attendant in a session of its own: no terminal that closes and no server that ends takes it along."""
    words = [str(queue.folder), str(entry.id), str(lock), json.dumps([*program])]
    try:
        with _log_to_write(queue, entry.id) as output:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "pixtune.queue.attendant", *words],
                cwd=entry.folder if entry.folder.is_dir() else Path("/"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),
                start_new_session=True,
            )
    except OSError as error:
        raise QueueError(f"entry {entry.id} cannot be started ({error}).") from error


def _log_to_write(queue: Queue, number: int) -> BinaryIO:
    path = queue.log_of(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")


def _became_of(entry: Entry) -> EntryState:
    """Returns how a run ended whose attendant was killed, by its own files."""
    try:
        state = read_run(entry.output_dir).state
    except RunError:
        return "killed"
    return "killed" if state == "running" else state
