"""Requests to end a run early: by a signal, by another process of the run, or because its launcher is gone.

The first request ends the run after the current step, with a checkpoint; while no step is unsaved it ends it at once. A
second one ends the process at once. A thread notices them, since Python's own handlers wait until the main thread comes
back from a library's call.
"""

from __future__ import annotations

import math
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType, MappingProxyType, TracebackType
from typing import Self

from pixtune.console import tell_at_once
from pixtune.errors import ExchangeError, PixtuneError, TrainingError
from pixtune.launch.agreement import Facts, refuse_differences
from pixtune.launch.peers import Meeting, Peers

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""Signals that ask for the end: Ctrl-C, a supervisor, a closed terminal, and what a cluster sends some time before."""
NUDGE = getattr(signal, "SIGUSR1", None)
"""Signal by which the main thread is interrupted where none has come from outside; None: this system has none."""
STOPPED = 130
"""Exit code of a run that was asked to stop and lost nothing."""
TICK_SECONDS = 0.5
SAME_SECONDS = 1.0
"""Time within which signals count as one: some programs pass on what their whole process group has been sent."""
SAME_SECONDS_UNDER_LAUNCHER = 3.0
GRACE_SECONDS = 2.5
"""Time for the main thread to end where nothing has to be saved. A library's call may hold it longer."""
LEAVE_SECONDS = 3.5
"""Time for it to end once all is saved: trackers send what they have."""
NEWS_SECONDS = 3.0
"""Time in which the loss of a process is known at the latest, once gradients cannot be exchanged."""
LOST_SECONDS = 10.0
"""Time for the main thread to end once another process is gone: it is stuck if it exchanges gradients."""
FAILED_SECONDS = 30.0
"""Time for it after an error of its own, until it comes to the end of the run."""
SAVING_SECONDS = 600.0
"""Time for it while a checkpoint is written."""
NO_FACTS: Facts = MappingProxyType({})


class Stopped(BaseException):
    """The run was asked to stop at a moment when no step had to be saved."""


class StopRequest:
    """The request to stop, as the loop asks for it. Entered as a context it notices signals; otherwise it never comes.

    Args:
        launcher: number of the launcher's process, whose end is such a request; None: the run has none.
    """

    def __init__(self, launcher: int | None = None) -> None:
        self._launcher = launcher
        self._same_seconds = SAME_SECONDS if launcher is None else SAME_SECONDS_UNDER_LAUNCHER
        self._changed = threading.Condition(threading.RLock())
        self._wanted = self._is_told = self._closed = False
        self._raises = True
        """Whether a signal may still interrupt the main thread."""
        self._defers = False
        """Whether a step is unsaved, so that the end has to wait for it."""
        self._saves = False
        self._signalled_at: float | None = None
        self._end_by = math.inf
        """Time at which the process ends, unless something is unsaved."""
        self._begun = 0
        """Number of steps that this process will have taken before it asks the next time."""
        self._peers: Peers | None = None
        self._failed = False
        """Whether this process ends because of an error, of which the others know."""
        self._exchange_error: Callable[[], str | None] = lambda: None
        self._lost: str | None = None
        self._lost_at = math.inf
        self._previous: dict[int, object] = {}
        self._num_nudges = 0
        """Signals on their way that this process has sent itself, and that are no requests."""
        self._wakeup: socket.socket | None = None

    # ---- life

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals
        self._wakeup, written = socket.socketpair()
        self._wakeup.setblocking(False)
        written.setblocking(False)
        self._written = written
        for name in NAMES:
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue  # nohup has a run ignore the end of its terminal
            self._previous[number] = signal.signal(number, self._receive)
        self._previous_fd = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop-request", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wakeup is None:
            return
        with self._changed:
            self._defers = self._raises = False
            self.failing(error)
            # If a stop is wanted, or libraries may wait for processes that are gone, the thread ends the process.
            self._closed = not self._wanted and not self._failed
            self._end_by = time.monotonic() + LEAVE_SECONDS
            if self._peers is not None:
                self._peers.leave("")
        if self._closed:
            signal.set_wakeup_fd(self._previous_fd)
            for number, handler in self._previous.items():
                signal.signal(number, handler)  # type: ignore[arg-type]

    def connect(self, peers: Peers) -> None:
        """Agrees with the other processes of the run from here on."""
        if self._wakeup is None:
            return  # no thread would answer them
        with self._changed:
            peers.listen_to(self._wakeup)
            self._peers = peers

    @property
    def is_connected(self) -> bool:
        """Whether this process knows of the others of its run."""
        return self._peers is not None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that reports for all."""
        return self._peers is None or self._peers.rank == 0

    def notice(self, exchange_error: Callable[[], str | None]) -> None:
        """Ends the process as soon as this function returns why GPUs cannot exchange any more."""
        self._exchange_error = exchange_error

    # ---- asked by the run

    def requested(self, step: int) -> bool:
        """Returns whether to stop with `step` steps taken, the same in all processes; waits for no device."""
        with self._changed:
            self._defers |= self._peers is not None  # others may have begun the step
            if self._peers is None or self._lost is not None:
                return self._wanted or self._lost is not None
            if not self._peers.is_frozen:
                self._begun = step + 1
                return False
            peers = self._peers
            self._changed.wait_for(lambda: peers.stop_at is not None or self._lost is not None)
            return peers.stop_at is None or step >= peers.stop_at or self._lost is not None

    @property
    def lost(self) -> str | None:
        """Report of another process of the run that is gone; None: none is known to be."""
        return self._lost

    def news(self) -> str | None:
        """Returns `lost`, which may take some seconds to be known after an exchange has failed. Waits for it."""
        with self._changed:
            if self._peers is not None:
                self._changed.wait_for(lambda: self._lost is not None, NEWS_SECONDS)
            return self._lost

    def meet(self, place: str) -> None:
        """Waits until all processes have come to a place between steps, or one is lost, which `requested` returns.

        However long one of them works alone, the others wait here, and not in an exchange of gradients that would give
        up; and a process that is gone is noticed.
        """
        self._meet(place, NO_FACTS)

    def agree(self, place: str, facts: Facts = NO_FACTS) -> None:
        """Waits until all processes have come to a place before the first step, with the same facts.

        Raises:
            ConfigError: this process has come with other facts than the first one.
            TrainingError: another process is gone.
        """
        meeting = self._meet(place, facts)
        if self._lost is not None:
            raise TrainingError(self._lost)
        if meeting is not None and self._peers is not None:
            refuse_differences(self._peers.rank, meeting.differing, facts, meeting.facts)

    def _meet(self, place: str, facts: Facts) -> Meeting | None:
        with self._changed:
            if (peers := self._peers) is None:
                return None
            peers.come(place, facts)
            meeting: Meeting | None = None
            while meeting is None and self._lost is None and not peers.first_is_gone:
                if (meeting := peers.meeting(place)) is None:
                    self._changed.wait()
            return meeting

    def most_needed(self, own: Mapping[str, int]) -> Mapping[str, int]:
        """Tells the first process what this one has come to need for its steps, and returns the most of all it knows.

        Args:
            own: numbers by what they count.
        """
        with self._changed:
            if self._peers is None:
                return own
            self._peers.need(own)
            return dict(self._peers.needs)

    def failing(self, error: BaseException | None) -> None:
        """Tells the other processes that this one ends with an error, before anything that would wait for them."""
        if error is None or isinstance(error, Stopped | ExchangeError) or self._peers is None:
            return
        with self._changed:
            if not self._failed:
                self._failed, self._end_by = True, time.monotonic() + FAILED_SECONDS
            text = str(error) if isinstance(error, PixtuneError) else f"{type(error).__name__}: {error}"
            self._peers.leave(text if self._lost is None else "")

    def one_voice(self, error: Exception) -> Exception | None:
        """Returns what this process is to report of its end, so that a run of several reports it once; None: nothing.

        The first process reports for all. Where it is the one that is gone, another one of each machine does.
        """
        if (peers := self._peers) is None:
            return error
        with self._changed:
            is_users = isinstance(error, PixtuneError | OSError) and not isinstance(error, ExchangeError)
            if not is_users:  # it may be the trace that another one's end has left in a library
                self._changed.wait_for(lambda: self._lost is not None, NEWS_SECONDS)
            if self._lost is not None and not (is_users and peers.rank == 0):
                return TrainingError(self._lost) if self._reports() else None
            self.failing(error)
            if peers.rank == 0 or not is_users:
                return error
            self._changed.wait_for(lambda: peers.is_told or peers.first_is_gone, NEWS_SECONDS)
            return None if peers.is_told else error

    def _reports(self) -> bool:
        """Returns whether this process is to report that one has been lost."""
        if (peers := self._peers) is None or peers.rank == 0:
            return True
        return not peers.is_told and (peers.rank == 1 or os.environ.get("LOCAL_RANK") == "0")

    def ask(self, reason: str) -> None:
        """Requests the end as the first signal does, for a reason that is printed."""
        self._want(reason)

    def defer(self, until_saved: bool = True) -> None:
        """Lets requests wait, since a step has been taken and is unsaved; or no longer, since all are saved."""
        self._defers = until_saved

    def check(self) -> None:
        """Ends work that can be left out, such as samples, where a stop is requested.

        Raises:
            Stopped: it is.
        """
        if self._wanted or self._lost is not None:
            raise Stopped

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Lets what is written within the block come to its end, unless there is a second request."""
        self._saves = True
        try:
            yield
        finally:
            self._saves = False

    def after_saving(self) -> str | None:
        """Waits until the first process has saved: a launcher ends all processes as soon as one of them ends.

        Returns:
            A report of another process of the run that is gone; None if all are there.
        """
        with self._changed:
            if (peers := self._peers) is not None:
                peers.saved()
                # Without an agreement, this process ends because of an error, which may be that another one is gone.
                is_agreed = peers.stop_at is not None
                self._changed.wait_for(
                    lambda: self._lost is not None or (is_agreed and peers.is_saved),
                    None if is_agreed else NEWS_SECONDS,
                )
            self._defers, self._end_by = False, time.monotonic() + LEAVE_SECONDS
            return self._lost

    # ---- in the main thread, as soon as it comes back to Python

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._wanted = True
        if self._raises and not self._defers and not self._saves and self._peers is None:
            self._raises = False
            raise Stopped

    # ---- in a thread of its own

    def _watch(self) -> None:
        assert self._wakeup is not None
        while not self._closed:
            if self._peers is not None:
                self._peers.wait(TICK_SECONDS)
            else:
                select.select([self._wakeup], [], [], TICK_SECONDS)
            self._read_signals()
            if self._launcher is not None and os.getppid() != self._launcher:
                self._launcher = None
                self._want("the launcher has ended")
            if self._peers is not None:
                self._look_at_peers(self._peers)
            self._end_if_overdue()

    def _read_signals(self) -> None:
        assert self._wakeup is not None
        with suppress(BlockingIOError):
            for number in self._wakeup.recv(256):
                if number not in self._previous:
                    continue
                if number == NUDGE and self._num_nudges:
                    self._num_nudges -= 1
                    continue
                now, name = time.monotonic(), signal.Signals(number).name
                if self._signalled_at is None:
                    self._signalled_at = now
                    self._want(name)
                elif now - self._signalled_at > self._same_seconds:
                    end_now(1, f"{name}: ending at once; what was saved before is kept")

    def _want(self, reason: str) -> None:
        """Takes a request: marks it for the main thread, and passes it on."""
        with self._changed:
            self._wanted = True
            is_told, self._is_told = self._is_told, True
            if not is_told:
                self._end_by = time.monotonic() + GRACE_SECONDS
            if self._peers is not None:
                self._peers.ask_to_stop(reason)
        if not is_told and self._signalled_at is None and NUDGE in self._previous:
            self._num_nudges += 1
            signal.pthread_kill(threading.main_thread().ident or 0, NUDGE)
        if not is_told and (self._peers is None or self._peers.rank == 0):
            what = "after this step, with a checkpoint" if self._defers else "now; no step has to be saved"
            tell_at_once(f"{reason}: stopping {what}")

    def _look_at_peers(self, peers: Peers) -> None:
        with self._changed:
            peers.exchange()
            if peers.reason is not None and not self._wanted:
                self._want(peers.reason)
            if self._wanted:
                peers.freeze(self._begun)
            if peers.lost is None and (obstacle := self._exchange_error()) is not None:
                peers.leave(obstacle)
                peers.lost = obstacle
            if peers.lost is not None and self._lost is None:
                self._lost, self._lost_at = peers.lost, time.monotonic()
            self._changed.notify_all()

    def _end_if_overdue(self) -> None:
        """Ends the process where the main thread should have ended by now."""
        now = time.monotonic()
        if self._lost is not None and now - self._lost_at > (SAVING_SECONDS if self._saves else LOST_SECONDS):
            end_now(1, f"error: {self._lost}" if self._reports() else "")
        if self._failed and not self._saves and now > self._end_by:
            end_now(1, "")
        nothing_to_save = not self._defers or (self._peers is not None and self._peers.first_is_gone)
        if self._wanted and nothing_to_save and not self._saves and now > self._end_by:
            end_now(stopped_code(os.environ), "")


def stopped_code(environ: Mapping[str, str]) -> int:
    """Returns the exit code of a run that was asked to stop: 0 where a launcher would start it anew for any other."""
    restarts = environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    return 0 if restarts.isdecimal() and int(restarts) > 0 else STOPPED


def end_now(code: int, line: str) -> None:
    """Ends the process from any thread, without cleaning up."""
    if line:
        tell_at_once(line)
    os._exit(code)
