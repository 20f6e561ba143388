"""Watches a run's folder for everyone who looks at it: one reading serves all, and none is made where nobody looks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from pixtune.errors import PixtuneError, RunError
from pixtune.hardware.nvidia_smi import query
from pixtune.report.record import Suspect, Validation, is_finite, read_suspect
from pixtune.runs.curve import Curve
from pixtune.runs.log import LogFollower
from pixtune.runs.read import RunReader
from pixtune.runs.state import RunState
from pixtune.storage import output_lock, session_note
from pixtune.storage.requests import REQUESTS
from pixtune.tracking import metrics
from pixtune.ui.jobs import CONSOLE

LOOK_SECONDS = 1.0
"""Time between two looks at the files' sizes and times."""
READ_SECONDS = 5.0
"""Time after which a run that is alive is read although no file has changed: its process may be gone."""
SERIES = ("loss", "seconds", "peak_memory_gib", "learning_rate", "grad_norm")
MOST_SUSPECTS = 60
FILES = (metrics.FILE_NAME, session_note.FILE_NAME, output_lock.FILE_NAME, CONSOLE, "report.html", *REQUESTS)


@dataclass(frozen=True)
class Figures:
    """Figures that are drawn of a run: means along its steps, and everything that was measured."""

    curves: dict[str, tuple[tuple[int, float], ...]]
    validations: tuple[Validation, ...]
    training_pictures: tuple[Validation, ...]
    suspects: tuple[Suspect, ...]


class FigureReader:
    """Reads the figures of a log that grows, in memory that does not."""

    def __init__(self, folder: Path) -> None:
        self._log = LogFollower(folder / metrics.FILE_NAME)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._curves = {name: Curve() for name in SERIES}
        self._validations: dict[int, Validation] = {}
        self._training: dict[int, Validation] = {}
        self._suspects: tuple[Suspect, ...] = ()

    def read(self) -> Figures:
        """Reads what was added to the log, and returns all of it.

        Raises:
            OSError: the log cannot be read.
        """
        self._log.read(self._begin_anew, self._take)
        return Figures(
            {name: curve.points() for name, curve in self._curves.items()},
            tuple(self._validations[step] for step in sorted(self._validations)),
            tuple(self._training[step] for step in sorted(self._training)),
            self._suspects,
        )

    def _take(self, raw: bytes) -> None:
        line = metrics.parse_line(raw)
        if line is None:
            return
        kind, step = line["kind"], line["step"]
        if kind == "step":
            for name, curve in self._curves.items():
                if is_finite(line.get(name)):
                    curve.add(step, float(line[name]))
        elif kind in ("validation", "training_pictures") and all(map(is_finite, (line["loss"], *line["quarters"]))):
            measured = self._validations if kind == "validation" else self._training
            measured[step] = Validation(step, line["loss"], tuple(line["quarters"]))
        elif kind == "captions":
            read = [read_suspect(entry) for entry in line["suspects"][:MOST_SUSPECTS]]
            self._suspects = tuple(suspect for suspect in read if suspect is not None)


@dataclass(frozen=True)
class GpuNow:
    """The first GPU at one moment, as nvidia-smi reports it."""

    temperature_celsius: float | None
    used_gib: float | None
    watts: float | None


def read_gpu() -> GpuNow | None:
    """Reads the first GPU; None where there is none, or no nvidia-smi. It starts no CUDA."""
    values = query("0", "temperature.gpu", "memory.used", "power.draw", timeout_seconds=3.0)
    if not values:
        return None
    numbers = [float(word) if word.replace(".", "", 1).isdigit() else None for word in values]
    return GpuNow(numbers[0], numbers[1] / 1024 if numbers[1] is not None else None, numbers[2])


class Watch:
    """A run that somebody looks at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.version = 0
        """Number of changes that were seen."""
        self.gpu: GpuNow | None = None
        self.state: RunState | None = None
        """The run as it was read last; None while its folder holds none."""
        self.figures: Figures | None = None
        self._reader, self._figure_reader = RunReader(folder), FigureReader(folder)
        self._seen: tuple[Any, ...] = ()
        self._read_at = 0.0
        self._changed = asyncio.Condition()
        self.num_viewers = 0
        self._task: asyncio.Task[None] | None = None
        self._reading = asyncio.Lock()
        self._is_closed = False

    @property
    def has_viewers(self) -> bool:
        return self.num_viewers > 0

    def _signature(self) -> tuple[Any, ...]:
        found: list[Any] = []
        for name in FILES:
            try:
                stat = os.stat(self.folder / name)
                # The lock's heartbeat is no news.
                found.append(stat.st_ino if name == output_lock.FILE_NAME else (stat.st_mtime_ns, stat.st_size))
            except OSError:
                found.append(None)
        return tuple(found)

    async def refresh(self) -> RunState | None:
        """Reads the run anew where its files have changed, or its process may have ended."""
        async with self._reading:
            seen = self._signature()
            is_stale = time.monotonic() - self._read_at > READ_SECONDS
            is_alive = self.state is not None and self.state.process is not None
            if seen != self._seen or (is_stale and is_alive) or self._read_at == 0.0:
                self._read_at, before = time.monotonic(), self.state
                await run_in_threadpool(self._read)
                if seen != self._seen or before != self.state:
                    self._seen = seen
                    self.version += 1
                    async with self._changed:
                        self._changed.notify_all()
        return self.state

    def _read(self) -> None:
        try:
            self.state = self._reader.read()
            self.gpu = read_gpu() if self.state.process is not None else None
            self.figures = self._figure_reader.read()
        except (RunError, OSError):  # it has just been started, or was moved away
            self.state = self.figures = None

    async def follow(self) -> AsyncGenerator[int, None]:
        """Yields the version at once, and after each change; -1 now and then where there is none."""
        self.num_viewers += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look())
        seen = -1
        try:
            while not self._is_closed:
                if seen == self.version:
                    try:
                        async with asyncio.timeout(15), self._changed:
                            await self._changed.wait_for(lambda: self._is_closed or self.version != seen)  # noqa: B023
                    except TimeoutError:
                        yield -1
                        continue
                if not self._is_closed:
                    seen = self.version
                    yield seen
        finally:
            self.num_viewers -= 1
            if self.num_viewers == 0 and self._task is not None:
                self._task.cancel()
                self._task = None

    async def close(self) -> None:
        """Lets everyone who follows it come to an end, since the server does."""
        self._is_closed = True
        async with self._changed:
            self._changed.notify_all()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            with contextlib.suppress(PixtuneError):
                await self.refresh()
