"""Decides which checkpoint of a folder is the newest and which ones are kept: by descent, not by the highest number.

Each checkpoint records the sessions whose steps led to it. Those that led to the newest one are its *course*; all
others in the folder are *given up*: the run was set back to an earlier step and took another way. `checkpoint.py` reads
and writes what is decided here.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

UNRECORDED = "unrecorded"
"""Name that stands for all sessions of version 0.1.0, which recorded none."""


@dataclass(frozen=True)
class Session:
    """The steps that one start of the program took, as the checkpoints after them record it."""

    name: str
    """Random hex digits."""
    last_step: int
    """Last of its steps that led to the checkpoint."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """Everything that decides what its steps compute: config hash, base hash, data fingerprint, number of processes."""
    changes: tuple[str, ...] = ()
    """Sentences on what of the run it changed, as `resume_with_changes_in` allowed."""

    @classmethod
    def new(cls, first_step: int, identity: Mapping[str, Any], changes: Sequence[str] = ()) -> Self:
        """Names a session that begins after `first_step`."""
        return cls(secrets.token_hex(8), first_step, identity, tuple(changes))


@dataclass(frozen=True)
class Lineage:
    """Descent of a checkpoint."""

    sessions: tuple[Session, ...]
    """Sessions whose steps led to it, the first one first. The first one's name is the run's."""
    parent: str | None = None
    """Name of the checkpoint before it; None for the first one of a run."""
    serial: int = 0
    """Number that grows with each save in a folder; 0 where version 0.1.0 saved."""

    @property
    def name(self) -> str:
        """Name of the checkpoint, which no other one has: its session and step."""
        return f"{self.sessions[-1].name}-{self.sessions[-1].last_step}"

    @property
    def run(self) -> str:
        """Name of the run."""
        return self.sessions[0].name

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON values, for `read_lineage`."""
        return {**asdict(self), "sessions": [asdict(session) for session in self.sessions]}


def read_lineage(values: Mapping[str, Any] | None, step: int) -> Lineage:
    """Reads `Lineage.to_dict`'s values; None stands for a checkpoint of version 0.1.0 of that step.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: these are other values.
    """
    if values is None:
        return Lineage((Session(UNRECORDED, step),))
    parent = values["parent"]
    if not (parent is None or isinstance(parent, str)) or not values["sessions"]:
        raise TypeError("a lineage has sessions, and a parent that is a name")
    return Lineage(_read_sessions(values["sessions"]), parent, int(values["serial"]))


def read_set_back(values: Mapping[str, Any]) -> SetBack:
    """Reads the values that a `SetBack` was written as.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: these are other values.
    """
    if not isinstance(values["to"], str):
        raise TypeError("a run is set back to a checkpoint's name")
    return SetBack(values["to"], _read_sessions(values["sessions"]), int(values["after_serial"]))


def _read_sessions(values: Sequence[Mapping[str, Any]]) -> tuple[Session, ...]:
    sessions = tuple(Session(**{**each, "changes": tuple(each.get("changes", ()))}) for each in values)
    for session in sessions:
        texts = (session.name, *session.changes)
        if type(session.last_step) is not int or not all(isinstance(text, str) for text in texts):
            raise TypeError("a session has a name, a step and sentences")
    return sessions


def descend(parent: Lineage | None, session: Session, step: int, serial: int) -> Lineage:
    """Returns the lineage of the checkpoint that a session saves after a step.

    Args:
        parent: the checkpoint that the session saved last, or resumed from.
    """
    before = parent.sessions if parent else ()
    if before and before[-1].name == session.name:
        before = before[:-1]
    return Lineage((*before, replace(session, last_step=step)), parent.name if parent else None, serial)


@dataclass(frozen=True)
class Saved:
    """A finished checkpoint as its state describes it; its other files have not been read."""

    path: Path
    step: int
    lineage: Lineage

    def led_to(self, sessions: Iterable[Session]) -> bool:
        """Returns whether it lies on the way that these sessions took."""
        last = self.lineage.sessions[-1]
        return any(session.name == last.name and self.step <= session.last_step for session in sessions)


@dataclass(frozen=True)
class SetBack:
    """A run's return to an earlier checkpoint: until it saves again, that one is its newest."""

    to: str
    """Folder of that checkpoint: its name within the output folder, else its path."""
    sessions: tuple[Session, ...]
    """Sessions that led to it."""
    after_serial: int
    """Highest serial number there was. Larger ones were saved after the return."""


@dataclass(frozen=True)
class Order:
    """The checkpoints of a folder, in two lists with the newest first."""

    course: tuple[Saved, ...]
    """Checkpoints that led to the newest one, itself included. Empty also where none of them is left."""
    given_up: tuple[Saved, ...]

    @property
    def all(self) -> tuple[Saved, ...]:
        """All of them, the least dispensable first."""
        return (*self.course, *self.given_up)


def put_in_order(saved: Sequence[Saved], set_back: SetBack | None = None) -> Order:
    """Puts a folder's checkpoints in order.

    Args:
        set_back: the last time that the run was set back, if ever. It still counts when what the run saved since then
            is damaged or gone: what was given up does not come back by itself.
    """
    after = set_back.after_serial if set_back else -1
    newest = max(
        (each for each in saved if each.lineage.serial > after),
        key=lambda each: (each.lineage.serial, each.step),
        default=None,
    )
    sessions = newest.lineage.sessions if newest else set_back.sessions if set_back else ()
    course = sorted((each for each in saved if each.led_to(sessions)), key=lambda each: each.step, reverse=True)
    given_up = sorted(
        (each for each in saved if not each.led_to(sessions)),
        key=lambda each: (each.lineage.serial, each.step),
        reverse=True,
    )
    return Order(tuple(course), tuple(given_up))


def next_serial(saved: Iterable[Saved], set_back: SetBack | None, parent: Lineage | None, now_ms: int) -> int:
    """Returns a serial number for the next save, larger than all known ones.

    Args:
        now_ms: milliseconds since 1970. A clock alone may be set back; with it, the number is most likely larger also
            than that of a checkpoint that can no longer be read.
    """
    known = [each.lineage.serial for each in saved]
    known += [set_back.after_serial] if set_back else []
    known += [parent.serial] if parent else []
    return max(now_ms, max(known, default=0) + 1)
