"""Processes that the page starts: runs, checks and captions, as a person would start them, with the same command line.

Each is a session of its own: it goes on when the server ends.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pixtune.errors import WriteError

CONSOLE = "console.txt"
"""File in a run's folder with all that its process has printed."""


@dataclass
class Job:
    """A process that was started here."""

    words: tuple[str, ...]
    """Words of its command, after `pixtune`."""
    process: subprocess.Popen[bytes]
    console: Path
    """File with all that it printed."""
    began: float = field(default_factory=time.time)
    """Time of its start, in seconds since 1970."""

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None


class Jobs:
    """The processes that this server has started, by what they work on; a later one takes the place of an ended one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """Folder in which they run: relative paths of configs mean it."""
        self._jobs: dict[tuple[str, Path], Job] = {}

    def find(self, kind: str, path: Path) -> Job | None:
        """Returns the last process of a kind that was started on a path."""
        return self._jobs.get((kind, path))

    def running(self, kind: str) -> list[Path]:
        """Lists what processes of a kind that still run were started on."""
        return [path for (own_kind, path), job in self._jobs.items() if own_kind == kind and job.is_running]

    def start(
        self,
        kind: str,
        path: Path,
        words: Sequence[str],
        console: Path,
        output: Path | None = None,
        appends: bool = False,
    ) -> Job:
        """Starts `pixtune WORDS` unless such a process still runs, which is returned then.

        Args:
            console: file for all that it prints.
            output: file for its results alone; None: they go to the console file, too.
            appends: whether the console file keeps what stood in it.

        Raises:
            WriteError: its console file cannot be written.
        """
        known = self.find(kind, path)
        if known is not None and known.is_running:
            return known
        try:
            console.parent.mkdir(parents=True, exist_ok=True)
            with console.open("ab" if appends else "wb") as stream, (output or console).open("ab") as results:
                process = subprocess.Popen(
                    [sys.executable, "-m", "pixtune.cli", *words], cwd=self.folder, stdin=subprocess.DEVNULL,
                    stdout=stream if output is None else results, stderr=stream, start_new_session=True,
                    env={**os.environ, "PYTHONUNBUFFERED": "1"},
                )  # fmt: skip
        except OSError as error:
            raise WriteError(f"{console} could not be written ({error.strerror or error}).") from error
        job = self._jobs[kind, path] = Job(tuple(words), process, console)
        return job

    def reap(self) -> None:
        """Takes note of processes that have ended, so that none is left as a zombie."""
        for job in self._jobs.values():
            job.process.poll()


def command_line(words: Sequence[str]) -> str:
    """Returns the command that does the same in a terminal."""
    return shlex.join(["pixtune", *words])


def end_of(path: Path, most_bytes: int) -> str:
    """Reads the end of what a process has printed; "" where there is no such file."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(stream.seek(0, os.SEEK_END) - most_bytes, 0))
            text = stream.read(most_bytes).decode("utf-8", errors="replace")
    except OSError:
        return ""
    # A bar draws over its own line: only its last form is of use.
    return "\n".join(line.rpartition("\r")[2] for line in text.split("\n"))
