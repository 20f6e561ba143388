"""Keeps two runs out of one output folder, by a lock that names its run and does not outlive it.

The system's own lock on the file `run.lock` decides where it can: it ends with the process, however that ends. Some
network file systems keep it to one machine, or have none. There the file's content decides: who holds it, and a
heartbeat that the holder writes every `BEAT_SECONDS`. No clocks of two machines are compared: the file's age is
measured by the clock of the file system that it lies on.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pixtune.errors import InUseError, WriteError
from pixtune.inputs.reading import read_bounded
from pixtune.storage.requests import forget_requests

log = logging.getLogger(__name__)

FILE_NAME = "run.lock"
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
"""Age of the last heartbeat from which a holder that nothing else is known of counts as dead."""
MISSING_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems that have no locks."""
LARGEST_BYTES = 1 << 16
"""Size up to which a file is read that may be another program's."""
NUM_BYTES = 1024
"""Size of the file, which is written in one go: a reader never sees half of it."""


@dataclass(frozen=True)
class Holder:
    """The run that holds a lock, as the file has it."""

    name: str
    """Random hex digits."""
    host: str
    pid: int
    since: str
    """Time at which it began, with the offset of its time zone."""
    step: int = 0
    """Number of steps it had taken at the last heartbeat."""
    beat: int = 0
    """Number of heartbeats."""
    boot: str | None = None
    """The kernel's name for the time since its machine was started; None where it gives none (macOS)."""
    pid_space: str | None = None
    """Namespace that `pid` belongs to: a container has its own."""
    started: str | None = None
    """Time at which the kernel started the process: a later process may have the same `pid`."""


def this_process() -> Holder:
    """Describes this process as a holder."""
    pid = os.getpid()
    return Holder(
        name=secrets.token_hex(8),
        host=socket.gethostname(),
        pid=pid,
        since=datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        boot=_boot(),
        pid_space=_pid_space(),
        started=start_of(pid),
    )


def judge(holder: Holder | None, mine: Holder, locked: bool | None, is_running: Callable[[Holder], bool]) -> str:
    """Decides whether a holder is "alive", "dead", or only a heartbeat can show it ("unknown").

    Args:
        holder: the file's content; None where it holds nothing.
        mine: this process.
        locked: whether the system gave this process its lock; None where the file system has none.
        is_running: whether a holder of this machine and namespace still runs.
    """
    if locked is False:
        return "alive"
    if holder is None:
        return "dead"
    same_kernel = holder.boot == mine.boot and (holder.boot is not None or holder.host == mine.host)
    if same_kernel and locked:
        return "dead"  # the system's lock ends with its process, also in another container
    if same_kernel and holder.pid_space == mine.pid_space:
        return "alive" if is_running(holder) else "dead"
    return "unknown"


class OutputLock:
    """The lock on an output folder; released at the end of a `with` block, whether it was acquired or not."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / FILE_NAME
        self.step = 0
        """Number of steps taken, which the next heartbeat writes."""
        self._mine: Holder | None = None
        self._descriptor: int | None = None
        self._made: list[Path] = []
        self._over = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def name(self) -> str | None:
        """Name that the lock's file has of this process; None while it is not acquired."""
        return self._mine.name if self._mine else None

    def acquire(self, show: Callable[[str], None] = lambda sentence: None) -> None:
        """Takes the lock, unless it has it already, and makes the folder where there is none.

        Args:
            show: receives a sentence if it takes up to `STALE_SECONDS` to see whether another run is alive.

        Raises:
            InUseError: another run is alive; names it.
            WriteError: the folder cannot be written to.
        """
        if self._mine is not None:
            return
        mine = this_process()
        try:
            self._made = _make_folders(self.path.parent)
            locked = self._open()
            holder = _read(self.path)
            verdict = judge(holder, mine, locked, is_running)
            if verdict == "unknown" and holder is not None:
                verdict = self._watch(holder, show)
            if verdict == "alive":
                raise InUseError(_in_use(self.path, _read(self.path)))
            self._write(mine)
            if locked is None:  # two may have got this far at the same moment, and the last one that wrote has it
                time.sleep(1)
                if (other := _read(self.path)) is not None and other.name != mine.name:
                    raise InUseError(_in_use(self.path, other))
        except OSError as error:
            self._close()
            if isinstance(error, InUseError):
                raise
            raise WriteError(
                f"output_dir: {self.path.parent} cannot be written to ({error.strerror or error}). Choose another."
            ) from error
        except InUseError:
            self._close()
            raise
        forget_requests(self.path.parent)
        self._mine = mine
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._beating.start()

    def check(self) -> None:
        """Checks that the lock is still this process's, which may have been stopped for longer than a heartbeat lasts.

        Raises:
            InUseError: another run has taken it; names it.
        """
        holder = _read(self.path)
        if self._mine is not None and holder is not None and holder.name != self._mine.name:
            raise InUseError(
                f"{_in_use(self.path, holder)} It took the folder while this run was stopped or out of reach; this "
                "run saves nothing more there."
            )

    def release(self) -> None:
        """Gives the lock back, and removes what of it lies in the folder."""
        self._over.set()
        if self._beating is not None:
            self._beating.join()
        if self._mine is not None:
            forget_requests(self.path.parent)
            try:
                self._clear_away(self._mine)
            except OSError as error:  # the run may be ending because of the same trouble, which is to be told
                log.warning("%s could not be removed (%s); it keeps no other run out", self.path, error)
            self._mine = None
        self._close()

    def _clear_away(self, mine: Holder) -> None:
        """Removes the file, and folders that were made for it and are empty."""
        holder = _read(self.path)
        if holder is None or holder.name == mine.name:
            self.path.unlink(missing_ok=True)
        for folder in reversed(self._made):
            if any(folder.iterdir()):
                break
            folder.rmdir()

    def _open(self) -> bool | None:
        """Opens the file and asks for the system's lock on it; see `judge` for what is returned."""
        while True:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    return False
                if error.errno in MISSING_LOCKS:
                    return None
                raise
            try:
                if os.path.samestat(os.stat(self.path), os.fstat(self._descriptor)):
                    return True
            except FileNotFoundError:
                pass
            self._close()  # its holder deleted the file as we waited for it: lock the one that is there now

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, holder: Holder) -> None:
        assert self._descriptor is not None
        os.pwrite(self._descriptor, json.dumps(asdict(holder)).encode().ljust(NUM_BYTES - 1) + b"\n", 0)
        os.ftruncate(self._descriptor, NUM_BYTES)
        os.fsync(self._descriptor)  # to the server of a network file system, whose other clients look at it

    def _beat(self) -> None:
        assert self._mine is not None
        beat, failed = 0, False
        while not self._over.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._write(replace(self._mine, step=self.step, beat=beat))
            except OSError as error:
                if not failed:
                    log.warning("the heartbeat in %s cannot be written (%s)", self.path, error)
                failed = True

    def _watch(self, holder: Holder, show: Callable[[str], None]) -> str:
        """Waits for a heartbeat, or for the last one to be too old."""
        left = min(STALE_SECONDS - self._age_seconds(), STALE_SECONDS)
        if left > 0:
            show(
                f"{self.path.parent} was last used by {_described(holder)}: waiting up to {left:.0f} s to see whether "
                "that run is still alive"
            )
        deadline = time.monotonic() + left
        while time.monotonic() < deadline:
            time.sleep(min(1.0, STALE_SECONDS / 10))
            now = _read(self.path)
            if now is not None and (now.name, now.beat) != (holder.name, holder.beat):
                return "alive"
        return "dead"

    def _age_seconds(self) -> float:
        """Returns the seconds since the file was written, by the clock of its file system."""
        probe = self.path.with_name(f".{FILE_NAME}.{secrets.token_hex(4)}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self.path.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)


def read_holder(output_dir: Path) -> Holder | None:
    """Reads who holds a folder, or held it until being killed; None where nobody does, or it cannot be read."""
    try:
        return _read(output_dir / FILE_NAME)
    except OSError:
        return None


def is_alive(holder: Holder, output_dir: Path) -> bool:
    """Returns whether the holder still runs, without touching the lock: whoever takes it for a moment keeps a run out.

    A process of another machine or container counts as alive while its heartbeats are new. Their age is taken by this
    machine's clock, since a reader writes nothing into the folder; it only shows, and decides nothing.
    """
    verdict = judge(holder, this_process(), None, is_running)
    if verdict != "unknown":
        return verdict == "alive"
    try:
        return time.time() - (output_dir / FILE_NAME).stat().st_mtime <= STALE_SECONDS
    except OSError:
        return False


def is_within_reach(holder: Holder) -> bool:
    """Returns whether the holder's process is one of this machine and namespace, which signals reach."""
    return judge(holder, this_process(), None, lambda holder: True) == "alive"


def _make_folders(folder: Path) -> list[Path]:
    """Makes a folder and its parents; returns those that were not there."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _read(path: Path) -> Holder | None:
    if not path.is_file():
        return None
    try:
        holder = Holder(**json.loads(read_bounded(path, LARGEST_BYTES).decode()))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EFBIG):
            return None
        raise
    except (ValueError, TypeError, RecursionError):  # empty: its holder is about to write; or another version's
        return None
    numbers, texts = (holder.pid, holder.step, holder.beat), (holder.name, holder.host, holder.since)
    right = all(type(number) is int for number in numbers) and all(isinstance(text, str) for text in texts)
    return holder if right and 0 < holder.pid < 2**31 else None


def _in_use(path: Path, holder: Holder | None) -> str:
    who = _described(holder) if holder else "another run"
    return (
        f"{path.parent} is in use by {who}. Two runs in one folder would delete and mix each other's files. Wait for "
        "that run to end, stop it, or choose another output_dir."
    )


def _described(holder: Holder) -> str:
    return f"a run on {holder.host} (process {holder.pid}, since {holder.since}, last seen at step {holder.step})"


def is_running(holder: Holder) -> bool:
    """Returns whether the holder's process runs, which has to be one of this machine and namespace."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    return holder.started == start_of(holder.pid)


def start_of(pid: int) -> str | None:
    """Returns when a process was started, in the kernel's ticks; None for a dead one, and where there is no /proc."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _pid_space() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
