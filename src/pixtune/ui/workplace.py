"""Holds what the page works with: the chosen folders, the processes it has started, and where new things go."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request

from pixtune.ui.answers import BadRequestError
from pixtune.ui.jobs import Jobs
from pixtune.ui.roots import Roots
from pixtune.ui.thumbnails import Thumbnails

CONFIGS, DATASETS, RUNS = "configs", "datasets", "runs"
"""Folders within the first root for what is made on the page."""
NAME = re.compile(r"[^\W_][\w-]{0,63}")
"""Form of a name that a user gives; it becomes that of files and folders."""


@dataclass
class Workplace:
    """Things that all routes share."""

    roots: Roots
    jobs: Jobs
    thumbnails: Thumbnails
    watches: dict[Path, Any] = field(default_factory=dict)
    """Runs that somebody looks at, by their folders; see `events`."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held from the look at which runs are at work until the next one is started, so that no two start at once."""

    @property
    def home(self) -> Path:
        return self.roots.home


def workplace_of(request: Request) -> Workplace:
    """Returns the server's workplace."""
    found: Workplace = request.app.state.workplace
    return found


def place_in(request: Request) -> str:
    """Returns the place that a URL's path ends with."""
    place: str = request.path_params["place"]
    return place


def checked_name(name: str) -> str:
    """Returns a name without white space around it.

    Raises:
        BadRequestError: it cannot be that of a folder.
    """
    name = name.strip()
    if not NAME.fullmatch(name):
        raise BadRequestError(
            f"{name[:80]!r} cannot be a name: letters, digits, - and _ make one, and it begins with a letter or digit"
        )
    return name
