"""The processes of one run as each of them sees the others, beside the exchange of gradients.

The first process holds a connection to each other one (`joining.py`). They agree where to stop, meet before work that
needs all of them, and notice a lost one. All but `ask_to_stop`, `come`, `need`, `saved` and `leave` is called by the
one thread that watches for requests to stop (`stop.py`), so a process that computes is heard, and one that is stopped
or killed is not.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pixtune.launch.agreement import Facts, digest_of

BEAT_SECONDS = 1.0
"""Seconds between two signs of life in a small run."""
BEATS_PER_SECOND = 200
"""Signs of life that the first process hears in a second, at most: in a large run they come less often."""
LONGEST_BEAT_SECONDS = 5.0
SILENT_SECONDS = 45.0
"""Silence after which a process counts as stopped. Calls into libraries may hold its threads for some seconds."""
MANY = 32
"""Number of connections from which on messages are read some at a time, and not each as it comes."""
GATHER_SECONDS = 0.02
MOST_BYTES = 1 << 22
"""Largest number of bytes without a line's end; more do not come from this program."""
MOST_LETTERS = 1 << 13
"""Letters of another process's error that are passed on."""
ADVICE = "Look at its machine, and resume from the last checkpoint with resume_from_checkpoint=latest."


@dataclass
class Link:
    """A connection to another process of the run."""

    rank: int
    name: str
    connection: socket.socket
    heard_at: float = 0.0
    received: bytes = b""
    unsent: bytes = b""
    has_left: bool = False
    """Whether it has said that it ends."""


@dataclass(frozen=True)
class Meeting:
    """The outcome of a meeting of all processes, as one of them learns it."""

    differing: tuple[int, ...]
    """Processes that came with other facts than the first one."""
    facts: Facts
    """The first process's facts, in those that differ."""


class Peers:
    """The other processes of a run, as one of them sees them.

    Args:
        links: connections, to all others in the first process and to the first one in others.
    """

    def __init__(self, rank: int, num_processes: int, links: list[Link]) -> None:
        self.rank, self.num_processes = rank, num_processes
        self._links = {link.rank: link for link in links}
        self._selector = selectors.DefaultSelector()
        for link in links:
            self._selector.register(link.connection, selectors.EVENT_READ, link)
        self.keeps_open: object = None
        """The store through which they met, which has to live as long as the connections."""
        self.reason: str | None = None
        """Reason for which the run is to stop."""
        self.stop_at: int | None = None
        """Number of steps after which all stop, once that is agreed."""
        self.is_frozen = False
        """Whether this process takes no step beyond those that it has begun, unless others have."""
        self.is_saved = False
        """Whether the first process has written what is to be kept."""
        self.lost: str | None = None
        """Report of the process that has been lost, if one has."""
        self.is_told = False
        """Whether the first process reports the end: that of the lost process, or of this one, as it has confirmed."""
        self.first_is_gone = False
        """Whether the first process, which is the one that saves, is not there any more."""
        self.needs: dict[str, int] = {}
        """Numbers that steps have come to need, the most that any process has reported; the first one knows of all."""
        self._reached: dict[int, int] = {}
        self._here: dict[str, dict[int, str]] = {}
        self._facts: dict[str, Facts] = {}
        self._meetings: dict[str, Meeting] = {}
        self._has_left = False
        self._beat_seconds = min(LONGEST_BEAT_SECONDS, max(BEAT_SECONDS, num_processes / BEATS_PER_SECOND))
        self._awake_seconds = self._beat_at = 0.0
        self._looked_at = time.monotonic()

    def listen_to(self, other: socket.socket) -> None:
        """Has `wait` come back as well when this socket has something to read."""
        self._selector.register(other, selectors.EVENT_READ)

    def wait(self, seconds: float) -> None:
        """Waits until there is something to read, or for so long."""
        if self._selector.select(seconds) and len(self._links) > MANY:
            time.sleep(GATHER_SECONDS)

    # ---- what this process has to say

    def ask_to_stop(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
            self._tell(stop=reason)

    def freeze(self, begun: int) -> None:
        """Reports once how many steps this process will have taken. Steps are taken together, so the most decide."""
        if not self.is_frozen:
            self.is_frozen = True
            self._reach(self.rank, begun)
            if self.rank:
                self._tell(reached=begun)

    def come(self, place: str, facts: Facts) -> None:
        """Reports that this process has come to a place that all of them come to, with what it finds there."""
        self._facts[place] = facts
        digest = digest_of(facts)
        self._arrive(self.rank, place, digest)
        if self.rank:
            self._tell(at=place, digest=digest)

    def need(self, needs: Mapping[str, int]) -> None:
        """Reports to the first process what this one has come to need; what is less than before changes nothing."""
        more = {what: number for what, number in needs.items() if number > self.needs.get(what, -1)}
        self.needs |= more
        if more and self.rank:
            self._tell(needs=more)

    def meeting(self, place: str) -> Meeting | None:
        """Returns the outcome of the meeting at a place, once all have come; it is told once."""
        return self._meetings.pop(place, None)

    def saved(self) -> None:
        if self.rank == 0:
            self.is_saved = True
            self._tell(saved=True)

    def leave(self, error: str) -> None:
        """Says, once, that this process ends, with the error for which it does; "" for none."""
        if not self._has_left:
            self._has_left = True
            self._tell(left=error[:MOST_LETTERS])

    # ---- what others say

    def exchange(self) -> None:
        """Sends a sign of life when it is time, reads what others have sent, and finds out whether one is lost."""
        now = time.monotonic()
        # Time in which this process itself was stopped or asleep does not count as others' silence.
        self._awake_seconds += min(now - self._looked_at, 2 * BEAT_SECONDS)
        self._looked_at = now
        for key, _ in self._selector.select(0):
            if key.data is not None and not self._read(key.data):
                self._close(key.data)
        if self._awake_seconds - self._beat_at < self._beat_seconds:
            return
        self._beat_at = self._awake_seconds
        self._tell()
        for link in self._links.values():
            if self._awake_seconds - link.heard_at > SILENT_SECONDS and not link.has_left:
                self._lose(
                    link,
                    f"{link.name} has not been heard of for {SILENT_SECONDS:.0f} s: it was stopped, or its machine "
                    f"hangs. {ADVICE}",
                )

    def _read(self, link: Link) -> bool:
        """Reads what has come; returns False at the connection's end."""
        try:
            data = link.connection.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        link.heard_at = self._awake_seconds
        *lines, link.received = (link.received + data).split(b"\n")
        for line in filter(None, lines):
            self._hear(link, json.loads(line))
        return bool(data) and len(link.received) < MOST_BYTES

    def _hear(self, link: Link, message: Mapping[str, Any]) -> None:
        if "stop" in message:
            self.ask_to_stop(message["stop"])
        if "reached" in message:
            self._reach(link.rank, message["reached"])
        if "stop_at" in message:
            self.stop_at = message["stop_at"]
        if "saved" in message:
            self.is_saved = True
        if "at" in message:
            self._arrive(link.rank, message["at"], message["digest"])
        if "needs" in message:
            self.need(message["needs"])
        if "met" in message:
            self._meetings[message["met"]] = Meeting(tuple(message["differing"]), message["facts"])
        if "lost" in message:
            self.lost, self.is_told = message["lost"], True
        if "heard" in message:
            self.is_told = True
        if "left" in message:
            link.has_left = True
            if message["left"]:
                self.is_told |= link.rank == 0
                self._lose(link, f"{link.name} has ended with an error: {message['left']}")
                if self.rank == 0:
                    self._send(link, heard=True)

    def _close(self, link: Link) -> None:
        self._selector.unregister(link.connection)
        link.connection.close()
        del self._links[link.rank]
        self.first_is_gone = link.rank == 0
        if not link.has_left:
            self._lose(link, f"{link.name} is gone: it was killed, or its machine is down. {ADVICE}")
        elif link.rank == 0:
            self.is_saved = True  # it saves before it leaves
        self._agree()
        for place in list(self._here):
            self._meet(place)

    def _lose(self, lost: Link, report: str) -> None:
        if self.lost is None:
            self.lost = report
            for link in self._links.values():
                if link is not lost:
                    self._send(link, lost=report)

    def _reach(self, rank: int, steps: int) -> None:
        self._reached[rank] = steps
        self._agree()

    def _agree(self) -> None:
        """Decides in the first process, once all that are still there have reported."""
        if self.rank == 0 and self.stop_at is None and self._reached.keys() >= {0, *self._links}:
            self.stop_at = max(self._reached.values())
            self._tell(stop_at=self.stop_at)

    def _arrive(self, rank: int, place: str, digest: str) -> None:
        if self.rank == 0:
            self._here.setdefault(place, {})[rank] = digest
            self._meet(place)

    def _meet(self, place: str) -> None:
        """Lets all go on, in the first process, once those that are still there have come."""
        here = self._here[place]
        if not here.keys() >= {0, *self._links}:
            return
        del self._here[place]
        differing, facts = tuple(rank for rank in sorted(here) if here[rank] != here[0]), self._facts.pop(place)
        self._meetings[place] = Meeting(differing, {})
        for link in self._links.values():
            self._send(link, met=place, differing=differing, facts=facts if link.rank in differing else {})

    def _tell(self, **message: Any) -> None:
        """Sends a message to all that this process is connected to; an empty one is a sign of life."""
        for link in self._links.values():
            self._send(link, **message)

    def _send(self, link: Link, **message: Any) -> None:
        link.unsent += (json.dumps(message) if message else "").encode() + b"\n"
        try:
            link.unsent = link.unsent[link.connection.send(link.unsent) :]
        except OSError:  # it takes nothing now, or is gone, which reading shows
            link.unsent = link.unsent[-MOST_BYTES:]


def name_of(rank: int, num_processes: int, host: str, process: int) -> str:
    """Names a process of a run for people."""
    return f"process {rank} of {num_processes} (pid {process} on {host})"


Share = Callable[[Any], Any]
"""The type of a function that returns in all processes what the first one was given."""
