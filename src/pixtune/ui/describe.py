"""Captions written by `pixtune caption`, as a process apart, for the pictures that have none."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from pixtune.captioning.presets import PRESETS
from pixtune.storage.files import text_digest
from pixtune.ui.answers import BadRequestError, answer, done, read_form
from pixtune.ui.configs import ConfigFile, open_config
from pixtune.ui.jobs import end_of
from pixtune.ui.workplace import Workplace, place_in, workplace_of


def _console(work: Workplace, file: ConfigFile) -> Path:
    return work.home / ".pixtune-ui" / f"caption-{text_digest(str(file.path))[:16]}.txt"


async def start(request: Request) -> Response:
    """Starts writing captions: fields `preset` and `trigger`, both may be empty. Captions that are there are kept."""
    work, form = workplace_of(request), await read_form(request)
    file = open_config(work, place_in(request))
    file.required()
    words = ["caption", str(file.path)]
    if preset := form.get("preset", ""):
        if preset not in PRESETS:
            raise BadRequestError(f"preset is one of {', '.join(PRESETS)}")
        words += ["--preset", preset]
    if trigger := " ".join(form.get("trigger", "").split()):
        words += [f"--trigger={trigger}"]
    work.jobs.start("caption", file.path, words, _console(work, file))
    return done(request, f"/pictures/{file.place}", {"is_running": True})


async def show(request: Request) -> Response:
    """Progress of writing captions, with the last lines that it printed."""
    work = workplace_of(request)
    file = open_config(work, place_in(request))
    job = work.jobs.find("caption", file.path)
    lines: list[str] = []
    if job is not None:
        lines = end_of(job.console, 4000).strip().split("\n")[-6:]
    view = {
        "file": {"place": file.place, "name": file.name},
        "is_known": job is not None,
        "is_running": job is not None and job.is_running,
        "failed": job is not None and not job.is_running and job.process.returncode != 0,
        "lines": lines,
    }
    return answer(request, "describe.html", view)
