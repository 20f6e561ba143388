"""Reads files that others made: regular ones alone, and never more of them than was agreed.

A pipe makes its reader wait, perhaps for ever, a device may never end, and either can stand under any name.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MEBIBYTE = 2**20

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def check_regular(path: Path) -> os.stat_result:
    """Checks that a path is a regular file, or a link to one, without opening it.

    Raises:
        OSError: it is absent, or something else; `strerror` says what.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, f"it is {KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}, not a file", str(path))
    return found


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Reads a regular file of at most `most_bytes`.

    Raises:
        OSError: it is absent, no regular file, larger, or cannot be read; `strerror` says which.
    """
    check_regular(path)
    with path.open("rb") as stream:
        data = stream.read(most_bytes + 1)
    if len(data) > most_bytes:
        most = f"{most_bytes // MEBIBYTE:,} MiB" if most_bytes >= MEBIBYTE else f"{most_bytes:,} bytes"
        raise OSError(errno.EFBIG, f"it has more than {most}, the most that such a file may have", str(path))
    return data
