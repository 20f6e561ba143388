"""Makes printing safe: a name that a console cannot show, a reader that has gone or a full disk ends no run."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import TextIO

FOR_GOOD = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ENODEV, errno.ESTALE}
"""Errors after which nothing that is written arrives any more. A full disk may have room again."""


class SafeStream(io.TextIOWrapper):
    """A text stream whose errors end nothing: letters it lacks are escaped, and what cannot be written is left out."""

    problem: str | None = None
    """First error of writing, if there was one."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        is_first, self.problem = self.problem is None, error.strerror or str(error)
        if error.errno in FOR_GOOD:
            with suppress(OSError):  # what is still in the buffer, and what libraries print, goes nowhere
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)
        if is_first and self is not sys.stderr:
            print(f"note: output can no longer be printed ({self.problem}); the work goes on", file=sys.stderr)


def make_printing_safe() -> None:
    """Puts a `SafeStream` in place of stdout and stderr; streams of another kind, as in notebooks, are left alone."""
    for number in range(3):  # else the next file that is opened would take a closed stream's number
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = _safe(sys.stdout), _safe(sys.stderr)


def _safe(stream: TextIO) -> TextIO:
    if type(stream) is not io.TextIOWrapper:
        return stream
    with suppress(OSError):
        stream.flush()
    written = open(stream.fileno(), "wb", closefd=False)  # noqa: SIM115 - open as long as the process
    return SafeStream(written, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)


def printing_problem() -> str | None:
    """Returns why lines can no longer be printed; None where they can."""
    return getattr(sys.stdout, "problem", None)


def tell_at_once(line: str) -> None:
    """Writes a line to stderr from any thread, unless that would have to wait."""
    stream = sys.stderr
    with suppress(OSError, ValueError, AttributeError):  # closed, or none
        number = stream.fileno()
        if sys.platform == "win32" or select.select([], [number], [], 0)[1]:
            os.write(number, f"\n{line}\n".encode(stream.encoding or "utf-8", "backslashreplace"))
