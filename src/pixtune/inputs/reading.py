"""Reads files that others made: regular ones alone, and never more of them than was agreed.

A pipe makes its reader wait, perhaps for ever, a device may never end, and either can stand under any name.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def check_size(path: Path, most_bytes: int) -> os.stat_result:
    """Checks that a path is a regular file of at most `most_bytes`, without opening it.

    Raises:
        OSError: it is absent, no regular file, or larger; `strerror` says which.
    """
    found = check_regular(path)
    if found.st_size > most_bytes:
        raise _too_large(path, most_bytes)
    return found


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Reads a regular file of at most `most_bytes`.

    Raises:
        OSError: it is absent, no regular file, larger, or cannot be read; `strerror` says which.
    """
    check_size(path, most_bytes)
    with path.open("rb") as stream:
        data = stream.read(most_bytes + 1)
    if len(data) > most_bytes:  # it has grown, or is one of the kernel's, which have no size
        raise _too_large(path, most_bytes)
    return data


def read_lines(path: Path, most_bytes: int, longest_bytes: int) -> Iterator[bytes | None]:
    """Reads a regular file of at most `most_bytes` line by line. A line feed alone ends a line, and stays with it.

    Yields:
        Each line; None for one of more than `longest_bytes`.

    Raises:
        OSError: as `read_bounded`.
    """
    check_size(path, most_bytes)
    with path.open("rb") as stream:
        while line := stream.readline(longest_bytes):
            if len(line) < longest_bytes or line.endswith(b"\n"):
                yield line
                continue
            yield None
            while line and not line.endswith(b"\n"):
                line = stream.readline(MEBIBYTE)


def _too_large(path: Path, most_bytes: int) -> OSError:
    most = f"{most_bytes // MEBIBYTE:,} MiB" if most_bytes >= MEBIBYTE else f"{most_bytes:,} bytes"
    return OSError(errno.EFBIG, f"it has more than {most}, the most that such a file may have", str(path))


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object of JSON of its pairs; for `object_pairs_hook`, since `json` itself takes the last of two.

    Raises:
        ValueError: a key stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        name = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"{name[:60]} is given twice in one mapping: keep one")
    return found
