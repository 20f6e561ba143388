"""Connects the processes of one run, beside the exchange of gradients: they agree where to stop, and notice a lost one.

The first process holds a connection to each other one. Everything here is called by the one thread that watches for
requests to stop (`stop.py`), so a process that computes is heard, and one that is stopped or killed is not.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pixtune.errors import TrainingError

BEAT_SECONDS = 1.0
SILENT_SECONDS = 45.0
"""Silence after which a process counts as stopped. Calls into libraries may hold its threads for some seconds."""
CONNECT_SECONDS = 120.0
MOST_BYTES = 1 << 16
"""Largest number of bytes without a line's end; more do not come from this program."""
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


class Peers:
    """The other processes of a run, as one of them sees them.

    Args:
        links: connections, to all others in the first process and to the first one in others.
    """

    def __init__(self, rank: int, num_processes: int, links: list[Link]) -> None:
        self.rank, self._num_processes = rank, num_processes
        self._links = {link.rank: link for link in links}
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
        self.first_is_gone = False
        """Whether the first process, which is the one that saves, is not there any more."""
        self._reached: dict[int, int] = {}
        self._awake_seconds = self._beat_at = 0.0
        self._looked_at = time.monotonic()

    def sockets(self) -> list[socket.socket]:
        """Lists the connections that may have something to read."""
        return [link.connection for link in self._links.values()]

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

    def saved(self) -> None:
        if self.rank == 0:
            self.is_saved = True
            self._tell(saved=True)

    def leave(self, error: str) -> None:
        """Says that this process ends, with the error for which it does; "" for none."""
        self._tell(left=error)

    # ---- what others say

    def exchange(self) -> None:
        """Sends a sign of life when it is time, reads what others have sent, and finds out whether one is lost."""
        now = time.monotonic()
        # Time in which this process itself was stopped or asleep does not count as others' silence.
        self._awake_seconds += min(now - self._looked_at, 2 * BEAT_SECONDS)
        self._looked_at = now
        if self._awake_seconds - self._beat_at >= BEAT_SECONDS:
            self._beat_at = self._awake_seconds
            self._tell()
        for link in list(self._links.values()):
            if not self._read(link):
                self._close(link)
            elif self._awake_seconds - link.heard_at > SILENT_SECONDS and not link.has_left:
                self._lose(
                    f"{link.name} has not been heard of for {SILENT_SECONDS:.0f} s: it was stopped, or its machine "
                    f"hangs. {ADVICE}"
                )

    def _read(self, link: Link) -> bool:
        """Reads what has come; returns False at the connection's end."""
        try:
            data = link.connection.recv(1 << 12)
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
        if "lost" in message:
            self.lost = message["lost"]
        if "left" in message:
            link.has_left = True
            if message["left"]:
                self._lose(f"{link.name} has ended with an error: {message['left']}")

    def _close(self, link: Link) -> None:
        link.connection.close()
        del self._links[link.rank]
        self.first_is_gone = link.rank == 0
        if not link.has_left:
            self._lose(f"{link.name} is gone: it was killed, or its machine is down. {ADVICE}")
        elif link.rank == 0:
            self.is_saved = True  # it saves before it leaves
        self._agree()

    def _lose(self, report: str) -> None:
        if self.lost is None:
            self.lost = report
            self._tell(lost=report)

    def _reach(self, rank: int, steps: int) -> None:
        self._reached[rank] = steps
        self._agree()

    def _agree(self) -> None:
        """Decides in the first process, once all that are still there have reported."""
        if self.rank == 0 and self.stop_at is None and self._reached.keys() >= {0, *self._links}:
            self.stop_at = max(self._reached.values())
            self._tell(stop_at=self.stop_at)

    def _tell(self, **message: Any) -> None:
        """Sends a message to all that this process is connected to; an empty one is a sign of life."""
        line = (json.dumps(message) if message else "").encode() + b"\n"
        for link in self._links.values():
            link.unsent += line
            try:
                link.unsent = link.unsent[link.connection.send(link.unsent) :]
            except OSError:  # it takes nothing now, or is gone, which reading shows
                link.unsent = link.unsent[-MOST_BYTES:]


# ---- how they meet


def connect_peers(rank: int, num_processes: int, share: Callable[[Any], Any]) -> Peers:
    """Connects the processes of a run. All of them must call it.

    Args:
        share: returns in all processes what the first one was given.

    Raises:
        TrainingError: this process cannot reach the first one.
    """
    host, process = socket.gethostname(), os.getpid()
    if rank == 0:
        dual = socket.has_dualstack_ipv6()
        with socket.create_server(
            ("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=num_processes
        ) as server:
            token = secrets.token_hex(16)
            address = os.environ.get("MASTER_ADDR") or host
            share([address, server.getsockname()[1], token, host, process])
            return Peers(rank, num_processes, _accept(server, num_processes, token))
    address, port, token, first_host, first_process = share(None)
    try:
        connection = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        connection.sendall(
            json.dumps({"token": token, "rank": rank, "host": host, "process": process}).encode() + b"\n"
        )
    except OSError as error:
        raise TrainingError(
            f"process {rank} cannot reach process 0 at {address}:{port} ({error}). Processes of a run must be able to "
            "open connections to the first one's machine: look at its firewall."
        ) from error
    connection.setblocking(False)
    return Peers(rank, num_processes, [Link(0, _name(0, num_processes, first_host, first_process), connection)])


def _accept(server: socket.socket, num_processes: int, token: str) -> list[Link]:
    """Waits for all other processes; connections that do not know the token are closed."""
    links: dict[int, Link] = {}
    end_by = time.monotonic() + CONNECT_SECONDS
    while len(links) < num_processes - 1:
        server.settimeout(max(end_by - time.monotonic(), 0.01))
        try:
            connection, _ = server.accept()
            connection.settimeout(5)
            hello = json.loads(connection.makefile("rb", buffering=0).readline(1000))
            if not secrets.compare_digest(hello["token"], token):
                raise ValueError("another run's process")
        except TimeoutError as error:
            if time.monotonic() < end_by:
                continue
            missing = sorted(set(range(1, num_processes)) - links.keys())
            raise TrainingError(
                f"processes {missing} of {num_processes} have not come within {CONNECT_SECONDS:.0f} s. {ADVICE}"
            ) from error
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()
            continue
        connection.setblocking(False)
        rank = int(hello["rank"])
        links[rank] = Link(rank, _name(rank, num_processes, hello["host"], hello["process"]), connection)
    return list(links.values())


def _name(rank: int, num_processes: int, host: str, process: int) -> str:
    return f"process {rank} of {num_processes} (pid {process} on {host})"
