"""Answers what a run is asked for from outside by files in its output folder: to save, to pause, to stop."""

from __future__ import annotations

import time
from collections.abc import Callable

from pixtune.launch.stop import Stopped
from pixtune.services.checkpoints import Checkpoints
from pixtune.services.session import Session
from pixtune.storage.requests import Request, is_asked, withdraw

LOOK_SECONDS = 0.2
"""Interval at which a paused run looks whether it may go on."""


class Requests:
    """The requests to one session, which the first process alone looks for, after steps whose losses are logged.

    `sample_now` is answered by the samples' own look.

    Args:
        note_pause: notes for others that the run waits, or no longer.
    """

    def __init__(self, session: Session, checkpoints: Checkpoints, note_pause: Callable[[int, bool], None]) -> None:
        self._session, self._checkpoints, self._note_pause = session, checkpoints, note_pause
        self._ignored: set[Request] = set()
        """Requests that cannot be deleted, and would be answered again and again."""

    def take(self, request: Request, step: int) -> bool:
        """Returns whether something was asked for, and deletes the file."""
        return self._is_asked(request, step) and self._withdraw(request)

    def asks_to_pause(self, step: int) -> bool:
        """Returns whether the run is asked to pause after a step that is not its last."""
        return self._is_asked("pause", step) and step < self._session.run.num_steps

    def answer(self, step: int, pauses: bool) -> None:
        """Waits as long as the run is asked to pause, and ends it where it is asked to stop.

        Args:
            pauses: whether it was, when all processes agreed on what is due.
        """
        if pauses and self._session.is_main:
            self._pause(step)
        self._stop_if_asked(step)

    def _stop_if_asked(self, step: int) -> None:
        if self.take("stop_now", step):
            self._session.run.stop.ask("stop_now")

    def _is_asked(self, request: Request, step: int) -> bool:
        session = self._session
        is_looked_for = session.is_main and step % session.config.logging_steps == 0 and request not in self._ignored
        return is_looked_for and is_asked(session.output_dir, request)

    def _withdraw(self, request: Request) -> bool:
        path = self._session.output_dir / request
        try:
            withdraw(self._session.output_dir, request)
        except OSError as error:
            self._ignored.add(request)
            self._session.print(f"warning: {path} cannot be deleted ({error.strerror or error}): it is ignored")
            return False
        return True

    def _pause(self, step: int) -> None:
        """Saves, so that a paused run may be killed, and waits."""
        session, path = self._session, self._session.output_dir / "pause"
        if path.is_dir():
            self._ignored.add("pause")
            session.print(f"warning: {path} is a folder, and no request: it is ignored")
            return
        if session.saved_step != step:
            self._checkpoints.save(step)
        session.print(f"step {step}: paused, with its memory kept; it goes on when {path} is deleted")
        self._note_pause(step, True)
        while is_asked(session.output_dir, "pause"):
            self._stop_if_asked(step)
            try:
                session.run.stop.check()
            except Stopped:  # the loop asks for it next
                break
            time.sleep(LOOK_SECONDS)
        self._note_pause(step, False)
        session.figures.restart_clock()
