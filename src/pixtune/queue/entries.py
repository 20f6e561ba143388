"""The entries of a queue as plain values, and start times as people write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from pixtune.errors import QueueError

EntryState = Literal["waiting", "running", "finished", "stopped", "failed", "killed"]
ENDED = ("finished", "stopped", "failed", "killed")


@dataclass(frozen=True)
class Entry:
    """One run in a queue."""

    id: int
    state: EntryState
    is_held: bool
    """Whether it is left out as long as nobody starts it."""
    place: int
    """Number among the entries that wait, 1 for the next; 0 for others."""
    output_dir: Path
    """Absolute path of the run's folder."""
    folder: Path
    """Current folder of the run: relative paths of its config are relative to it."""
    config_name: str
    """Name of the config file that was added."""
    overrides: tuple[str, ...]
    """`key=value` words that win over the file."""
    start_at: float | None
    """Time before which it is not started, in seconds since 1970."""
    added: float
    began: float | None
    ended: float | None
    exit_code: int | None
    """Exit code of the run's process; negative: the signal that ended it. None where nobody saw its end."""
    error: str | None
    """The last words of a run that failed."""
    num_starts: int

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        values = asdict(self)
        return {**values, "output_dir": str(self.output_dir), "folder": str(self.folder)}


UNITS = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}


def read_time(words: str, now: datetime) -> datetime:
    """Reads the time at which a run is to start: "22:30", "2026-12-24 22:30", or "+90min", "+2h", "+1d" from now.

    A time of day is the next one.

    Args:
        now: the current time, with its time zone.

    Raises:
        QueueError: it is none of these, or past.
    """
    text = words.strip()
    if match := re.fullmatch(r"\+([0-9]{1,6}) ?(s|min|m|h|d)", text):
        return now + timedelta(seconds=int(match[1]) * UNITS[match[2]])
    try:
        if re.fullmatch(r"[0-9]{1,2}:[0-9]{2}", text):
            clock = datetime.strptime(text, "%H:%M")
            at = now.replace(hour=clock.hour, minute=clock.minute, second=0, microsecond=0)
            return at if at > now else at + timedelta(days=1)
        at = datetime.fromisoformat(text)
    except ValueError:
        raise QueueError(
            f"{words!r} is no time: give a time of day (22:30), a date and time (2026-12-24 22:30), or a while from "
            "now (+90min, +2h, +1d)."
        ) from None
    at = at if at.tzinfo else at.replace(tzinfo=now.tzinfo)
    if at <= now:
        raise QueueError(f"{words!r} is past: it is {now:%Y-%m-%d %H:%M}.")
    return at


def entry_of(row: Mapping[str, Any], place: int) -> Entry:
    """Reads a row of the queue's table."""
    return Entry(
        id=row["id"],
        state=row["state"],
        is_held=bool(row["is_held"]),
        place=place,
        output_dir=Path(row["output_dir"]),
        folder=Path(row["folder"]),
        config_name=row["config_name"],
        overrides=tuple(json.loads(row["overrides"])),
        start_at=row["start_at"],
        added=row["added"],
        began=row["began"],
        ended=row["ended"],
        exit_code=row["exit_code"],
        error=row["error"],
        num_starts=row["num_starts"],
    )
