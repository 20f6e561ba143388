"""Asks a run for something from outside: by a signal to its own process where there is one in reach, or by a file."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from pixtune.errors import RunError
from pixtune.runs.state import RunState
from pixtune.storage.output_lock import FILE_NAME as LOCK_NAME
from pixtune.storage.output_lock import Holder, is_running, is_within_reach
from pixtune.storage.requests import Request, ask, is_asked, withdraw


def stop_run(run: RunState) -> str:
    """Asks a run to save and end. A second request does no more than the first.

    Returns:
        What was done, in a sentence.

    Raises:
        RunError: it is not running, or belongs to another user.
        WriteError: it is on another machine, and the request could not be written.
    """
    process = _process_of(run)
    if is_asked(run.folder, "stop_now"):
        return f"{run.name} has been asked to stop already; it saves the step that it takes, and ends"
    # First the file, which keeps a second signal from being sent: that would end the run at once, with nothing saved.
    ask(run.folder, "stop_now")
    if not is_within_reach(process):
        return f"{run.name} runs on {process.host}: it sees the request after the next step that is logged"
    try:
        send_signal(process, signal.SIGTERM, run.folder / LOCK_NAME)
    except RunError:
        withdraw(run.folder, "stop_now")
        raise
    return f"{run.name} is asked to stop: it saves the step that it takes, and ends"


def kill_run(run: RunState) -> str:
    """Ends a run at once. The steps since its last checkpoint are lost.

    Returns:
        What was done, in a sentence.

    Raises:
        RunError: it is not running, on another machine, or another user's.
    """
    process = _process_of(run)
    if not is_within_reach(process):
        raise RunError(f"{run.name} runs on {process.host} (process {process.pid}): it can be killed there alone.")
    send_signal(process, signal.SIGKILL, run.folder / LOCK_NAME)
    last = f"step {run.checkpoints[-1].step}" if run.checkpoints else "nothing: there is no checkpoint"
    return f"{run.name} is killed; what is saved is {last}"


def ask_run(run: RunState, request: Request) -> str:
    """Leaves a request for a run.

    Returns:
        What was done, in a sentence.

    Raises:
        RunError: it is not running.
        WriteError: the request could not be written.
    """
    _process_of(run)
    ask(run.folder, request)
    return f"{run.name} is asked for {request}: it sees that after the next step that is logged"


def let_go_on(run: RunState) -> str:
    """Lets a paused run go on.

    Returns:
        What was done, in a sentence.

    Raises:
        RunError: it is not running, nobody has asked it to pause, or the request cannot be deleted.
    """
    _process_of(run)
    if not is_asked(run.folder, "pause"):
        raise RunError(f"{run.name} is not paused: nobody has asked it to.")
    try:
        withdraw(run.folder, "pause")
    except OSError as error:
        raise RunError(f"{run.folder / 'pause'} cannot be deleted ({error.strerror or error}).") from error
    return f"{run.name} goes on"


def _process_of(run: RunState) -> Holder:
    if run.process is None:
        raise RunError(f"{run.folder} is not running: it is {run.state}, at step {run.step}.")
    return run.process


def send_signal(process: Holder, number: signal.Signals, lock: Path) -> None:
    """Sends a signal to the very process that holds a lock, whoever may have its number by now.

    Args:
        lock: the lock's file, which the process has to have open: anybody may have written a number into a folder.

    Raises:
        RunError: it has ended, does not hold the lock, or is another user's.
    """
    gone = RunError(f"process {process.pid} has ended meanwhile; nothing was sent.")
    stranger = RunError(f"process {process.pid} does not hold {lock}, whoever wrote that it does; nothing was sent.")
    try:
        if not hasattr(os, "pidfd_open"):  # macOS
            if not is_running(process):
                raise gone
            os.kill(process.pid, number)
            return
        descriptor = os.pidfd_open(process.pid)
        try:
            if not is_running(process):  # asked while the number is held, so that it cannot change owners any more
                raise gone
            if has_open(process.pid, lock) is False:
                raise stranger
            signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)
    except ProcessLookupError:
        raise gone from None
    except PermissionError as error:
        raise RunError(f"process {process.pid} is another user's, who alone can stop it.") from error


def has_open(pid: int, path: Path) -> bool | None:
    """Returns whether a process has a file open; None where that cannot be seen.

    Raises:
        PermissionError: it is another user's.
        ProcessLookupError: there is no such process.
    """
    folder = Path(f"/proc/{pid}/fd")
    try:
        wanted, descriptors = path.stat(), [*folder.iterdir()]
    except FileNotFoundError:
        return None if not Path("/proc/self/fd").exists() else False
    for descriptor in descriptors:
        try:
            if os.path.samestat(descriptor.stat(), wanted):
                return True
        except OSError:  # closed meanwhile, or a file that is gone
            continue
    return False
