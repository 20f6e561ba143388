"""A run on its own page, live: figures, samples, what it prints, and what it is asked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from pixtune.config import load_config
from pixtune.data.examples import folders_apart
from pixtune.errors import RunError
from pixtune.report.record import Sample
from pixtune.runs.state import RunState
from pixtune.storage.requests import REQUESTS, ask, withdraw
from pixtune.ui import runs, turns
from pixtune.ui.answers import BadRequestError, answer, as_url, done, field, plain_values, read_form
from pixtune.ui.configs import ConfigFile, open_config
from pixtune.ui.jobs import CONSOLE, command_line
from pixtune.ui.roots import OutsideError
from pixtune.ui.watch import Watch
from pixtune.ui.workplace import Workplace, place_in, workplace_of

MOST_STREAMS = 256
"""Number of event streams that are served at once."""


def watch_of(work: Workplace, folder: Path) -> Watch:
    """Returns the one watch of a run's folder."""
    if folder not in work.watches:
        if len(work.watches) > 64:  # those that nobody looks at hold curves for nothing
            for each in [path for path, watch in work.watches.items() if not watch.has_viewers]:
                del work.watches[each]
        work.watches[folder] = Watch(folder)
    return work.watches[folder]


def run_folder(request: Request) -> tuple[Workplace, Path]:
    """Returns the folder of the run that a request is about.

    Raises:
        OutsideError: it lies outside the chosen folders.
        BadRequestError: it is no folder.
    """
    work = workplace_of(request)
    folder = work.roots.find(place_in(request))
    if not folder.is_dir():
        raise BadRequestError("there is no run: its folder was moved or deleted")
    return work, folder


async def start(request: Request) -> Response:
    """Starts the run of a config as a process of its own, or goes on with it where it has checkpoints.

    While another run is at work it is put into the queue, unless the field `beside` is "yes": two runs share one GPU.
    """
    work = workplace_of(request)
    file = open_config(work, place_in(request))
    await run_in_threadpool(load_config, file.path)  # all problems, folders that are missing included
    folder = checked_folder(work, file)
    place = work.roots.place_of(folder)
    if await begin_or_wait(work, file, is_beside=(await read_form(request)).get("beside") == "yes"):
        return done(request, f"/run/{as_url(place)}", {"place": place})
    return done(request, "/queue", {"place": place, "is_queued": True})


async def begin_or_wait(work: Workplace, file: ConfigFile, is_beside: bool) -> bool:
    """Starts or continues a config's run, or puts it into the queue where another one is at work.

    Args:
        is_beside: whether it is started all the same.

    Returns:
        Whether it was started.
    """
    folder = checked_folder(work, file)
    async with work.turn:
        is_alive = folder in (busy := await run_in_threadpool(turns.at_work, work))
        if busy and not is_alive and not is_beside:
            await turns.wait_for_turn(file, folder)
            return False
        if not is_alive:
            await begin(work, file)
        return True


async def begin(work: Workplace, file: ConfigFile) -> Path:
    """Starts or continues a config's run; one that is alive stays as it is."""
    folder = checked_folder(work, file)
    state = await watch_of(work, folder).refresh()
    if state is None or state.process is None:
        words = ["train", str(file.path), *(["resume_from_checkpoint=latest"] if state and state.checkpoints else [])]
        work.jobs.start("run", folder, words, folder / CONSOLE, appends=True)
    return folder


def checked_folder(work: Workplace, file: ConfigFile) -> Path:
    """Returns a config's output folder.

    Raises:
        PixtuneError: the config has problems.
        OutsideError: a run would read or write folders outside the chosen ones.
    """
    config = file.required()
    folder = runs.folder_of_config(work, file)
    if folder is None:
        raise OutsideError(
            f"output_dir of {file.name} lies outside the folders that this page may write to: choose another, such as "
            f"runs/{file.name}"
        )
    if outside := [str(path) for path in folders_apart(config) if not work.roots.holds(work.home / path.expanduser())]:
        raise OutsideError(
            f"{file.name} names folders outside those that this page may open: {', '.join(outside)}. Start it with "
            "--root FOLDER for each, or train in a terminal by the command that is shown"
        )
    return folder


async def show(request: Request) -> Response:
    """A run: its state, figures and samples."""
    work, folder = run_folder(request)
    watch = watch_of(work, folder)
    await watch.refresh()
    file = await run_in_threadpool(runs.config_of_run, work, folder)
    view = runs.view_of(watch, turns.loading_since(work, folder))
    place = work.roots.place_of(folder)
    return answer(
        request,
        "run.html",
        {
            "step": "run",
            "name": folder.name,
            "place": place,
            "run": view,
            "file": {"place": file.place, "name": file.name} if file else None,
            "command": command_line(["train", str(file.path)]) if file else None,
            "steps": runs.steps_of(file.place if file else None, place),
            "console": runs.console_end(folder),
        },
    )


async def events(request: Request) -> Response:
    """The run's state as server-sent events: one at once, and one after each change."""
    work, folder = run_folder(request)
    if sum(watch.num_viewers for watch in work.watches.values()) >= MOST_STREAMS:
        return PlainTextResponse("too many pages are open", 503, headers={"retry-after": "10"})
    watch = watch_of(work, folder)
    await watch.refresh()

    async def stream() -> AsyncIterator[str]:
        async for version in watch.follow():
            if version < 0:
                yield ": still here\n\n"
                continue
            view = runs.view_of(watch, turns.loading_since(work, folder))
            yield f"event: state\ndata: {json.dumps(plain_values(view))}\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


async def figures(request: Request) -> Response:
    """The run's curves and measurements."""
    work, folder = run_folder(request)
    watch = watch_of(work, folder)
    await watch.refresh()
    return JSONResponse({"version": watch.version, **(plain_values(watch.figures) if watch.figures else {})})


async def samples(request: Request) -> Response:
    """The run's samples: a strip for each prompt, seed and strength."""
    work, folder = run_folder(request)
    state = await watch_of(work, folder).refresh()
    watch = watch_of(work, folder)
    view = {
        "strips": strips_of(work, folder, state) if state else [],
        "best_step": state.best.step if state and state.best else None,
        "suspects": [
            {"name": each.name, "caption": each.caption, "gain": each.gain,
             "thumb": f"/thumb/{as_url(work.roots.place_of(folder))}/{as_url(each.path)}"}
            for each in (watch.figures.suspects if watch.figures else ())
        ],
        "is_alive": runs.view_of(watch, turns.loading_since(work, folder))["is_alive"],
    }  # fmt: skip
    return answer(request, "samples.html", view)


def strips_of(work: Workplace, folder: Path, state: RunState) -> list[dict[str, Any]]:
    """Groups samples by what they come from besides the weights."""
    grouped: dict[tuple[object, ...], list[Sample]] = {}
    for sample in state.samples:
        grouped.setdefault((*sample.origin, sample.strength), []).append(sample)
    place = as_url(work.roots.place_of(folder))
    strips = []
    for number, group in enumerate(grouped.values()):
        by_step = {sample.step: sample for sample in group}
        first = group[0]
        strips.append(
            {
                "number": number,
                "prompt": first.prompt,
                "detail": first.detail,
                "strength": first.strength,
                "samples": [
                    {"step": step, "thumb": f"/thumb/{place}/{as_url(by_step[step].path)}"} for step in sorted(by_step)
                ],
            }
        )
    return strips


async def console(request: Request) -> Response:
    """The end of what the run has printed."""
    _, folder = run_folder(request)
    return PlainTextResponse(await run_in_threadpool(runs.console_end, folder))


async def ask_run(request: Request) -> Response:
    """Asks a run: field `what` is stop_now, pause, go_on, sample_now, save_now or resume (see `start`)."""
    work, folder = run_folder(request)
    form = await read_form(request)
    what, place = field(form, "what"), work.roots.place_of(folder)
    watch = watch_of(work, folder)
    state = await watch.refresh()
    if what == "resume":
        file = await run_in_threadpool(runs.config_of_run, work, folder)
        if file is None:
            raise RunError(
                "this run was started without a config of this page: go on with it in the terminal, by the command "
                "that started it and resume_from_checkpoint=latest"
            )
        if not await begin_or_wait(work, file, form.get("beside") == "yes"):
            return done(request, "/queue", {"asked": what, "is_queued": True})
    elif what == "go_on":
        await run_in_threadpool(withdraw, folder, "pause")
    elif what in REQUESTS:
        if state is None or state.process is None:
            if what != "stop_now" or not await run_in_threadpool(turns.stop_loading, work, folder):
                raise RunError("this run is not running, so nothing can be asked of it")
        else:
            await run_in_threadpool(ask, folder, what)
    else:
        raise BadRequestError(f"what is one of {', '.join(REQUESTS)}, go_on, resume")
    await watch.refresh()
    return done(request, f"/run/{as_url(place)}", {"asked": what})
