"""The note `session.json` in an output folder: what the last session set out to do, and how it ended.

The lock shows that a session is alive (`output_lock.py`), this file what became of one that is not. A session that was
killed leaves both the lock's file and a note without an outcome.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pixtune.inputs.reading import MEBIBYTE, read_bounded
from pixtune.storage.files import write_atomically

FILE_NAME = "session.json"
LARGEST_BYTES = 4 * MEBIBYTE
LONGEST_ERROR = 4000
"""Number of letters of an error that are noted: one may list a fault for every picture."""

Outcome = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class SessionNote:
    """The task of a session, and how it ended."""

    lock: str | None
    """Name of the lock that it held on the folder (`Holder.name`)."""
    began: str
    """Time of its start, with the offset of its time zone."""
    start_step: int
    """Number of steps that were taken before it."""
    num_steps: int
    """Optimizer steps of the whole run."""
    step: int = 0
    """Number of steps taken when the note was written."""
    is_paused: bool = False
    outcome: Outcome | None = None
    """The way it ended; None while it runs, and for ever if it was killed."""
    ended: str | None = None
    error: str | None = None
    """Text of the error that ended it."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The run's config, nested, as `config.to_dict` returns it."""

    def write(self, output_dir: Path) -> None:
        """Writes the note.

        Raises:
            WriteError: it could not be written.
        """
        write_atomically(output_dir / FILE_NAME, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, output_dir: Path) -> Self | None:
        """Reads a folder's note; None where there is none that this version understands."""
        try:
            values = json.loads(read_bounded(output_dir / FILE_NAME, LARGEST_BYTES).decode())
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(values, dict) or not _is_right(values):
            return None
        known = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        return cls(**known)


def now_in_words() -> str:
    """Returns the time with the offset of its time zone, to the second."""
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def _is_right(values: Mapping[str, Any]) -> bool:
    """Returns whether all values are of their kind: another version, or a person, may have written the file."""
    numbers = [values.get("start_step"), values.get("num_steps"), values.get("step", 0)]
    texts = [values.get(name) for name in ("lock", "ended", "error")]
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and isinstance(values.get("began"), str)
        and all(text is None or isinstance(text, str) for text in texts)
        and values.get("outcome") in (None, *get_args(Outcome))
        and isinstance(values.get("is_paused", False), bool)
        and isinstance(values.get("config", {}), dict)
    )
