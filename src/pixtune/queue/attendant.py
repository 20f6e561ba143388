"""The process that stands beside a run of a queue: starts it, notes how it ended, and has the next one started.

It is started by `starting.py` with the entry's lock, in a session of its own: `python -m pixtune.queue.attendant QUEUE
ENTRY LOCK PROGRAM`. All that it and the run print is the entry's log.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from pixtune.errors import PixtuneError
from pixtune.launch.stop import STOPPED
from pixtune.queue.entries import EntryState
from pixtune.queue.starting import advance, last_words, words_of
from pixtune.queue.store import Queue, set_state
from pixtune.storage.output_lock import this_process


def attend(queue: Queue, number: int, lock: int, program: list[str]) -> None:
    """Runs an entry to its end, and starts what is due after it.

    Args:
        lock: descriptor of the entry's lock, which the run inherits.

    Raises:
        QueueError: the queue's files cannot be used.
    """
    with queue.transaction() as database:
        set_state(database, number, "running", is_attended=1, attendant=json.dumps(asdict(this_process())))
    entry = queue.entry(number)
    command = [*program, *words_of(queue, entry)]
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} entry {number}, start {entry.num_starts}: {entry.config_name}")
    sys.stdout.flush()
    is_told = False
    run: subprocess.Popen[bytes] | None = None

    def pass_on(received: int, frame: FrameType | None) -> None:
        nonlocal is_told
        is_told = True
        if run is not None and run.poll() is None:
            run.send_signal(signal.SIGTERM)

    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, pass_on)
    if not entry.folder.is_dir():
        print(f"error: the folder from which it was added is gone: {entry.folder}", flush=True)
        code = 1
    elif is_told:
        code = STOPPED
    else:
        run = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(lock,))
        if is_told:  # between the two
            run.send_signal(signal.SIGTERM)
        code = run.wait()
    state: EntryState = (
        "finished" if code == 0 else "stopped" if code == STOPPED else "killed" if code < 0 else "failed"
    )
    error = last_words(queue, number) if state == "failed" else None
    with queue.transaction() as database:
        set_state(database, number, state, ended=time.time(), exit_code=code, error=error)
    os.close(lock)
    advance(queue, program)


def main() -> None:
    """Attends the entry that the command line names."""
    folder, number, lock, program = sys.argv[1:]
    try:
        attend(Queue(Path(folder)), int(number), int(lock), json.loads(program))
    except PixtuneError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
