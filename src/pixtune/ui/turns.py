"""Whose turn it is: runs that are at work on this machine, and the queue for one that would have to share the GPU."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from pixtune.errors import PixtuneError, QueueError
from pixtune.queue.entries import Entry, read_time
from pixtune.queue.starting import settle, stop_entry
from pixtune.queue.store import FILE_NAME, Queue, usual_folder
from pixtune.runs.read import find_runs
from pixtune.storage.checkpoint_state import find_checkpoints
from pixtune.storage.output_lock import is_alive, read_holder
from pixtune.ui.configs import ConfigFile
from pixtune.ui.workplace import Workplace


def at_work(work: Workplace, apart_from: Path | None = None) -> list[Path]:
    """Finds the folders of runs that live: of the queue, started by this page, or by anyone in the chosen folders."""
    found = dict.fromkeys(work.jobs.running("run"))
    if (usual_folder() / FILE_NAME).is_file():
        queue = Queue(usual_folder())
        settle(queue)
        found |= dict.fromkeys(entry.output_dir for entry in queue.entries() if entry.state == "running")
    for root in work.roots.folders.values():
        try:
            folders = find_runs(root)
        except PixtuneError:  # a root that cannot be read now
            continue
        for folder in folders:
            holder = read_holder(folder)
            if holder is not None and is_alive(holder, folder):
                found[folder.resolve()] = None
    return [folder for folder in found if folder != apart_from]


def loading_since(work: Workplace, folder: Path) -> float | None:
    """Returns when the process of a run was started, in seconds since 1970, by this page or the queue.

    None where none of them has a process that runs.
    """
    job = work.jobs.find("run", folder)
    if job is not None and job.is_running:
        return job.began
    entry = _queued(folder)
    return entry.began if entry is not None else None


def stop_loading(work: Workplace, folder: Path) -> bool:
    """Ends the process of a run that is loading yet, so that nothing has to be saved; returns whether there was one."""
    job = work.jobs.find("run", folder)
    if job is not None and job.is_running:
        job.process.terminate()
        return True
    entry = _queued(folder)
    if entry is not None:
        stop_entry(Queue(usual_folder()), entry.id)
    return entry is not None


def _queued(folder: Path) -> Entry | None:
    """Finds the entry of the queue that is at work in a folder."""
    if not (usual_folder() / FILE_NAME).is_file():
        return None
    try:
        entries = Queue(usual_folder()).entries()
    except QueueError:  # its page shows why
        return None
    return next((entry for entry in entries if entry.state == "running" and entry.output_dir == folder), None)


async def wait_for_turn(file: ConfigFile, folder: Path, start_at: str = "") -> None:
    """Puts a config's run at the queue's end, to go on from its last checkpoint where it has one.

    Args:
        start_at: time before which it is not started, such as 22:30 or +2h; "" for none.

    Raises:
        PixtuneError: the config has problems, or its folder is another entry's.
    """
    at = read_time(start_at, datetime.now().astimezone()).timestamp() if start_at else None
    resume = ("resume_from_checkpoint=latest",) if find_checkpoints(folder) else ()
    await run_in_threadpool(lambda: Queue(usual_folder()).add(file.path, resume, at))
