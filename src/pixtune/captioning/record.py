"""Remembers which captions `pixtune caption` wrote, so that those written or changed by hand are known and kept.

It is a file of JSON lines in the folder of pictures, with digests alone. A line is added before its caption is written:
whatever is killed when, a caption by hand is never taken for one of the program's. Each of several processes that write
at the same time has a file of its own, since lines that machines append over a network get lost.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pixtune.errors import WriteError
from pixtune.inputs.reading import MEBIBYTE, check_regular, read_bounded

RECORD = ".pixtune_captions.jsonl"
"""Name of the record; names with a dot in front are no data."""
RECORDS = ".pixtune_captions*.jsonl"
"""Pattern of the names of all records in a folder."""
LARGEST_RECORD_BYTES = 64 * MEBIBYTE
"""Size at which a record is no longer read: three hundred thousand captions have less."""


@dataclass(frozen=True)
class Written:
    """One caption that the program wrote."""

    caption: str
    """SHA-256 of its text, as hex."""
    request: str
    """SHA-256 of everything that decided it, as hex: an equal request would make it again."""


def record_of(share: int, num_shares: int) -> str:
    """Returns the name of the record of one of several processes that write at the same time, 0 for the first."""
    return RECORD if num_shares == 1 else f".pixtune_captions.{share + 1}-of-{num_shares}.jsonl"


def read_records(folder: Path) -> dict[str, Written]:
    """Reads the last line on each caption, by the names of pictures. What cannot be read counts as written by hand.

    Of several records the one that was written to last counts.
    """
    found: dict[str, Written] = {}
    for path in sorted(folder.glob(RECORDS), key=_changed_ns):
        found |= _read(path)
    return found


def _changed_ns(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_mtime_ns, path.name
    except OSError:
        return 0, path.name


def _read(path: Path) -> dict[str, Written]:
    try:
        data = read_bounded(path, LARGEST_RECORD_BYTES)
    except OSError:
        return {}
    found = {}
    for line in data.splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):  # a line whose writer was killed
            continue
        match values:
            case {"name": str(name), "caption": str(caption), "request": str(request)}:
                found[name] = Written(caption, request)
    return found


def add_to_record(folder: Path, written: Mapping[str, Written], record: str = RECORD) -> None:
    """Adds lines on captions that are written next, by the names of their pictures.

    Args:
        record: name of this process's own record.

    Raises:
        WriteError: they could not be written.
    """
    lines = [
        json.dumps({"name": name, "caption": each.caption, "request": each.request}) for name, each in written.items()
    ]
    path = folder / record
    if not lines:
        return
    try:
        if os.path.lexists(path):
            check_regular(path)
        with path.open("ab") as stream:
            # A line that was cut off by a kill ends here.
            stream.write(("\n" if stream.tell() else "").encode() + "\n".join(lines).encode())
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise WriteError(f"{path} could not be written ({error.strerror or error}).") from error
