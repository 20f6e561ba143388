"""Makes a disk fail at a chosen moment: a helper of tests, called first thing in the process that is to suffer it."""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EPIPE)


@dataclass
class FailingDisk:
    """Lets one call on a path below `folder`, or all from there on, fail with an error of the system.

    Calls are numbered from 1 in the order in which they happen: opening, writing, syncing, renaming, making and
    deleting files and folders; with `reads`, opening to read as well. Each call is noted in `journal`, so that a first
    run with number 0 tells how many there are.
    """

    folder: Path
    number: int
    error: int = errno.ENOSPC
    lasts: bool = False
    journal: Path | None = None
    reads: bool = False
    calls: int = 0

    def __call__(self) -> None:
        """Begins."""
        really_open = open
        journal = os.open(self.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if self.journal else None

        def check(what: str, path: object) -> None:
            if not isinstance(path, str | os.PathLike) or not Path(os.fspath(path)).is_relative_to(self.folder):
                return
            if what == "mkdir" and os.path.isdir(path):
                return  # it fails anyway, and nobody minds
            if what == "open" and os.path.isdir(path):
                return  # a file without a name; where there is none to be had, `tempfile` makes one with a name
            self.calls += 1
            if journal is not None:
                real_write(journal, f"{self.calls} {what} {Path(os.fspath(path)).relative_to(self.folder)}\n".encode())
            if self.number and (self.calls == self.number or (self.lasts and self.calls > self.number)):
                raise OSError(self.error, os.strerror(self.error), os.fspath(path))

        real_write = os.write

        def opened(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+"):
                if self.reads:
                    check("read", path)
                return really_open(path, mode, *args, **options)
            check("open", path)
            return _Stream(really_open(path, mode, *args, **options), partial(check, "write", path))

        builtins.open = io.open = opened  # type: ignore[assignment]
        for name in ("replace", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, _checked(getattr(os, name), partial(check, name)))
        os.fsync = _checked(os.fsync, lambda number: check("fsync", os.readlink(f"/proc/self/fd/{number}")))


class _Stream:
    """An open file whose writes are checked."""

    def __init__(self, stream: Any, check: Callable[[], None]) -> None:
        self._stream, self._check = stream, check

    def write(self, data: Any) -> int:
        self._check()
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def __iter__(self) -> Any:
        return iter(self._stream)


def _checked(call: Callable[..., Any], check: Callable[[Any], None]) -> Callable[..., Any]:
    def checked(first: Any, *args: Any, **options: Any) -> Any:
        check(first)
        return call(first, *args, **options)

    return checked


def random_fault(folder: Path, calls: Sequence[str], seed: int) -> FailingDisk:
    """A fault at a random one of a run's calls, with a random error; half of them last.

    Args:
        calls: lines of a `journal`. Calls on one kind of file are drawn together as often as those on another.
    """
    draw = random.Random(seed)
    kinds: dict[str, list[int]] = {}
    for line in calls:
        place, call = line.split(" ", 1)
        kinds.setdefault(re.sub(r"[0-9a-f]{2,}|\d", "", call), []).append(int(place))
    number = draw.choice(kinds[draw.choice(sorted(kinds))])
    return FailingDisk(folder, number, draw.choice(ERRORS), draw.random() < 0.5)
