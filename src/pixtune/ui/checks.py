"""Shows what `pixtune validate` finds in a config's pictures as marks on them. It runs as a process apart."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pixtune.config.folders import folders_of
from pixtune.inputs.reading import MEBIBYTE, read_bounded
from pixtune.storage.files import text_digest
from pixtune.ui import edits
from pixtune.ui.answers import answer, done
from pixtune.ui.configs import ConfigFile, open_config
from pixtune.ui.jobs import end_of
from pixtune.ui.workplace import Workplace, place_in, workplace_of

LARGEST_REPORT_BYTES = 64 * MEBIBYTE
WEIGHTS = {"error": 2, "warning": 1}
"""Order of the levels that are marked on pictures; notes are listed alone."""


@dataclass(frozen=True)
class Mark:
    """Something that a check has found about one picture."""

    level: str
    code: str
    text: str


@dataclass(frozen=True)
class Check:
    """The state of the last check."""

    is_running: bool
    verdict: str
    """"problems", "warnings", "fine", or "" where there was none or it failed."""
    findings: Sequence[Mapping[str, Any]]
    trouble: str = ""
    """Text that the check printed where it failed."""
    is_old: bool = False
    """Whether captions or pictures have changed since."""


def _files(work: Workplace, file: ConfigFile) -> tuple[Path, Path]:
    stem = work.home / ".pixtune-ui" / f"check-{text_digest(str(file.path))[:16]}"
    return stem.with_suffix(".json"), stem.with_suffix(".txt")


def state_of(work: Workplace, file: ConfigFile) -> Check:
    """Reads the last check of a config's pictures."""
    report, console = _files(work, file)
    job = work.jobs.find("check", file.path)
    if job is not None and job.is_running:
        return Check(True, "", ())
    try:
        values = json.loads(read_bounded(report, LARGEST_REPORT_BYTES))
        data_sets = values["data_sets"]
        findings = [finding for each in data_sets for finding in each["findings"]]
        return Check(False, str(values["verdict"]), findings, is_old=_last_change(file) > report.stat().st_mtime)
    except (OSError, ValueError, KeyError, TypeError):
        return Check(False, "", (), "" if job is None else end_of(console, 2000))


def _last_change(file: ConfigFile) -> float:
    """Returns when a config or the captions and pictures of its folders changed last, in seconds since 1970."""
    folders = [] if file.config is None else [each.img_dir for each in folders_of(file.config.data_config)]
    changed = [0.0]
    for path in (file.path, *folders, *(folder / edits.JOURNAL for folder in folders)):
        with contextlib.suppress(OSError):
            changed.append(path.stat().st_mtime)
    return max(changed)


def read_marks(work: Workplace, file: ConfigFile) -> dict[str, list[Mark]]:
    """Returns the marks of files, by their absolute paths."""
    marks: dict[str, list[Mark]] = {}
    for finding in state_of(work, file).findings:
        if finding.get("level") not in WEIGHTS:
            continue
        for case in finding.get("cases", ()):
            text = case.get("detail") or case.get("text") or ""
            mark = Mark(finding["level"], finding["code"], f"{finding['code'].replace('-', ' ')}: {text}")
            for name in case.get("files", ()):
                short = replace(mark, text=mark.text.replace(f"{name} (", "(").replace(f": {name}", ""))
                marks.setdefault(os.path.abspath(work.home / name), []).append(short)
    return marks


async def start(request: Request) -> Response:
    """Starts a check of a config's pictures, as `pixtune validate CONFIG --json` does it."""
    work = workplace_of(request)
    file = open_config(work, place_in(request))
    report, console = _files(work, file)
    report.unlink(missing_ok=True)
    work.jobs.start("check", file.path, ["validate", str(file.path), "--json"], console, report)
    return done(request, f"/pictures/{file.place}", {"is_running": True})


async def show(request: Request) -> Response:
    """Findings of the last check."""
    work = workplace_of(request)
    file = open_config(work, place_in(request))
    view = {"check": state_of(work, file), "file": {"place": file.place, "name": file.name}}
    return answer(request, "check.html", view)
