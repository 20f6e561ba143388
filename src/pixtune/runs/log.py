"""Follows a growing file of lines: each reading takes only what was appended since the one before.

A log that is another one by now, as after a resume or a set-back, is noticed and read anew.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from pixtune.tracking.metrics import LARGEST_FILE_BYTES, LONGEST_LINE_BYTES

PART_BYTES = 1 << 20
SEAM_BYTES = 512
"""Number of bytes before the place where reading goes on that must be as they were: a step's line holds its seconds,
which no other session repeats."""


class LogFollower:
    """The place up to which a log has been read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._seam = b""

    def read(self, begin_anew: Callable[[], None], take: Callable[[bytes], None]) -> None:
        """Hands each new line to `take`, without its end; first calls `begin_anew` where all lines are new.

        A last line without an end is left for later; one of more than `LONGEST_LINE_BYTES` is left out.

        Raises:
            OSError: the file is there and cannot be read.
        """
        try:
            stream = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would keep a reader waiting
        except FileNotFoundError:
            if self._offset:
                self._offset, self._seam = 0, b""
                begin_anew()
            return
        try:
            found = os.fstat(stream)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "it is no file", str(self.path))
            seam = os.pread(stream, len(self._seam), self._offset - len(self._seam))
            if found.st_size < self._offset or seam != self._seam:
                self._offset, self._seam = 0, b""
                begin_anew()
            self._take_lines(stream, min(found.st_size, LARGEST_FILE_BYTES), take)
        finally:
            os.close(stream)

    def _take_lines(self, stream: int, end: int, take: Callable[[bytes], None]) -> None:
        position, rest, is_too_long = self._offset, b"", False
        while position < end and (part := os.pread(stream, min(PART_BYTES, end - position), position)):
            position += len(part)
            *whole, rest = (rest + part).split(b"\n")
            for line in whole:
                if not is_too_long and len(line) < LONGEST_LINE_BYTES:
                    take(line)
                is_too_long = False
            if len(rest) >= LONGEST_LINE_BYTES:
                rest, is_too_long = b"", True
            self._offset = position - len(rest)
        length = min(SEAM_BYTES, self._offset)
        self._seam = os.pread(stream, length, self._offset - length)
