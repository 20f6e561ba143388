"""The queue of runs on the page: the same one that `pixtune queue` shows, served as long as the page is."""

from __future__ import annotations

import asyncio
import os
import subprocess
from datetime import datetime
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from pixtune.errors import QueueError
from pixtune.queue.entries import Entry
from pixtune.queue.starting import advance, stop_entry
from pixtune.queue.store import FILE_NAME, Queue, usual_folder
from pixtune.ui import runs, turns
from pixtune.ui.answers import BadRequestError, answer, as_url, done, field, read_form
from pixtune.ui.configs import open_config
from pixtune.ui.run_page import checked_folder
from pixtune.ui.workplace import Workplace, workplace_of

SERVE_SECONDS = 3.0
"""Time after which a run that has ended is followed by the next at the latest."""


async def serve_queue(work: Workplace, folder: Path) -> None:
    """Starts what is due, again and again, while no run is at work that was started outside of the queue.

    Another server may do the same: each entry is started once.
    """
    attendants: list[subprocess.Popen[bytes]] = []
    while True:
        await asyncio.sleep(SERVE_SECONDS)
        attendants = [each for each in attendants if each.poll() is None]
        try:
            if (folder / FILE_NAME).is_file():  # else nobody has ever put a run there
                async with work.turn:
                    attendants += await run_in_threadpool(_serve, work, folder)
        except QueueError:  # its page shows why
            continue


def _serve(work: Workplace, folder: Path) -> list[subprocess.Popen[bytes]]:
    queue = Queue(folder)
    waits = any(entry.state == "waiting" for entry in queue.entries())
    if waits and outside_queue(work, queue):
        return []
    return advance(queue)


def outside_queue(work: Workplace, queue: Queue) -> list[Path]:
    """Finds the folders of runs at work that the queue has not started; the next of its own waits for them, too."""
    own = {entry.output_dir for entry in queue.entries() if entry.state == "running"}
    return [folder for folder in turns.at_work(work) if folder not in own]


async def show(request: Request) -> Response:
    """The runs that wait, run and have ended, in their order."""
    work = workplace_of(request)
    queue = await run_in_threadpool(Queue, usual_folder())
    entries, is_paused = await run_in_threadpool(lambda: (queue.entries(), queue.is_paused))
    others = await run_in_threadpool(outside_queue, work, queue)
    view = {
        "step": "queue",
        "others": [
            {
                "name": folder.name,
                "url": f"/run/{as_url(work.roots.place_of(folder))}" if work.roots.holds(folder) else "",
            }
            for folder in others
        ],
        "is_paused": is_paused,
        "entries": [listed(work, entry) for entry in reversed(entries) if entry.state != "waiting"],
        "waiting": [listed(work, entry) for entry in entries if entry.state == "waiting"],
    }
    return answer(request, "queue.html", view)


def listed(work: Workplace, entry: Entry) -> dict[str, object]:
    """Returns an entry as the page shows it."""
    begin = datetime.fromtimestamp(entry.start_at).strftime("%Y-%m-%d %H:%M") if entry.start_at else None
    is_here = work.roots.holds(entry.output_dir) and entry.output_dir.is_dir()
    return {
        "id": entry.id,
        "name": entry.output_dir.name,
        "state": "held" if entry.is_held else entry.state,
        "place": entry.place,
        "config": entry.config_name,
        "start_at": begin,
        "error": entry.error,
        "url": f"/run/{as_url(work.roots.place_of(entry.output_dir))}" if is_here else None,
    }


async def change(request: Request) -> Response:
    """Changes the queue: field `what` is add, move, remove, pause, start, stop, pause_all or start_all.

    `add` takes `config`, a place, and `start_at` such as 22:30 or +2h (may be empty); `move` takes `id` and `place`, 1
    for the next; the others take `id`.
    """
    work, form = workplace_of(request), await read_form(request)
    queue = await run_in_threadpool(Queue, usual_folder())
    what = field(form, "what")
    if what == "add":
        file = open_config(work, field(form, "config"))
        await turns.wait_for_turn(file, checked_folder(work, file), form.get("start_at", "").strip())
    elif what == "pause_all":
        await run_in_threadpool(queue.pause)
    elif what == "start_all":
        await run_in_threadpool(queue.start)
    elif what in ("move", "remove", "pause", "start", "stop"):
        number = _number(form.get("id", ""))
        if what == "move":
            await run_in_threadpool(queue.move, number, _number(form.get("place", "")))
        elif what == "stop":
            await run_in_threadpool(stop_entry, queue, number)
        elif what == "remove":
            await run_in_threadpool(queue.remove, number)
        elif what == "pause":
            await run_in_threadpool(queue.pause, number)
        else:
            await run_in_threadpool(queue.start, number)
    else:
        raise BadRequestError("what is add, move, remove, pause, start, stop, pause_all or start_all")
    return done(request, "/queue", {"done": what})


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise BadRequestError("id and place are numbers")
    return int(text)


def log_of(folder: Path) -> Path | None:
    """Finds what a run has printed that the queue has started; None where it was not."""
    if not (usual_folder() / FILE_NAME).is_file():
        return None
    try:
        queue = Queue(usual_folder())
        own = [entry for entry in queue.entries() if os.path.realpath(entry.output_dir) == str(folder)]
    except QueueError:
        return None
    return queue.log_of(own[-1].id) if own else None


runs.OTHER_CONSOLES.append(log_of)
