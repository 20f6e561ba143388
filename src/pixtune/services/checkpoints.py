"""Saves and deletes a session's checkpoints, and lets losses that end the run leave good ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pixtune.errors import CheckpointError, LossError, TrainingError
from pixtune.hardware.facts import package_versions
from pixtune.plan.demands import state_options_of
from pixtune.progress import announced
from pixtune.services.session import Session
from pixtune.storage.checkpoint import OPTIMIZER_STEM, Checkpoint, Seals, joined, write_files
from pixtune.storage.checkpoint_state import checkpoint_path
from pixtune.storage.course import Course
from pixtune.storage.restart import launch_of
from pixtune.tracking.guard import LossGuard, ways_on
from pixtune.trained import optim


class Checkpoints:
    """The checkpoints of one session, and the guard of the losses that decides which of them are any good."""

    def __init__(self, session: Session, course: Course, guard: LossGuard) -> None:
        self._session, self.course, self.guard = session, course, guard
        session.together.define("write the checkpoint", self._write_part)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts a checkpoint's weights and optimizer state into the run.

        Raises:
            CheckpointError: the checkpoint is of another model.
        """
        run = self._session.run
        try:
            states, plain = joined(checkpoint.tensors, OPTIMIZER_STEM), checkpoint.record["optimizer_plain"]
            options = state_options_of(run.config)
            optim.check_states(run.plan.optimizer, run.trained.parameters, states, plain, options)
            run.trained.load(checkpoint.tensors, plain)
        except KeyError as error:
            raise CheckpointError(f"{checkpoint.path} does not fit this model: {error.args[0]}") from error
        self.guard.restore(checkpoint.record.get("guard", {}))
        of_all = f" of {run.num_steps}" if checkpoint.step < run.num_steps else f" of {run.num_steps}, the last one"
        self._session.print(f"resuming after step {checkpoint.step}{of_all}, from {checkpoint.path}")
        for change in self.course.changes:
            self._session.print(f"changed by resume_with_changes_in: {change}")

    def read_back(self, step: int) -> None:
        """Reads the figures of all steps so far, and learns from them whether the newest checkpoint is any good."""
        session = self._session
        with self.ending_well(step):
            session.figures.read_back()
        if session.is_main and self.guard.proves(session.saved_step) and self.course.trust():
            self.prune(step)  # what was kept beside it until a loss with its weights was known

    @contextmanager
    def ending_well(self, step: int) -> Iterator[None]:
        """Lets losses that end the run leave good checkpoints, and say how to go on."""
        session = self._session
        try:
            yield
        except LossError as error:
            if error.weights_are_sound and session.saved_step != step:
                self.save(step)
                self.course.trust()
            if not session.is_main:
                raise
            raise TrainingError(ways_on(error, self.course.give_up_doubtful(), session.config)) from error

    def prune(self, step: int) -> None:
        """Deletes checkpoints beyond the config's limit."""
        with self._session.problems.of("deleting old checkpoints", step):
            for warning in self.course.prune(self._session.config.checkpoints_total_limit, self.guard.held_out):
                self._session.print(f"warning: {warning}")

    def save(self, step: int) -> None:
        """Saves everything that resuming needs, and the files of the weights so far.

        Raises:
            WriteError: the checkpoint could not be written.
        """
        session = self._session
        with session.together.apart():
            if session.is_main:
                with session.run.stop.saving(), announced(f"saving step {step}", session.print_line):
                    self._write(step)
                    with session.problems.of("the files of the weights so far", step):
                        session.run.trained.export_so_far(session.output_dir, step)
                session.print(f"step {step}: saved {checkpoint_path(session.output_dir, step)}")
                self.prune(step)
        session.saved_step = step

    def _write(self, step: int) -> None:
        session, run = self._session, self._session.run
        with run.memory.aside("checkpoint"):
            seal = None
            with session.problems.of("syncing the log", step):
                seal = session.log.sync()
            _, plain = optim.optimizer_state(run.trained.optimizer, run.trained.parameters)
            self.course.save(
                step,
                partial(self._write_files, step),
                {
                    "plan": run.reliefs.plan.to_dict(),
                    "encoders": session.data.encoders.to_dict(),
                    "versions": package_versions(),
                    "optimizer_plain": plain,
                    "guard": self.guard.to_dict(),
                    "log": seal,
                    **({"launch": launch} if (launch := launch_of(os.environ)) else {}),
                },
            )

    def _write_files(self, step: int, folder: Path) -> Seals:
        """Writes the files of a checkpoint, with the other processes that hold the weights."""
        seals: list[Seals] = self._session.together.call("write the checkpoint", step, folder)
        return {name: seal for each in seals for name, seal in each.items()}

    def _write_part(self, step: int, folder: Path) -> Seals:
        session = self._session
        files = dict(session.run.trained.checkpoint_files(step))
        if session.data.stream is not None and session.is_main:
            files |= session.data.stream.files(step * session.config.gradient_accumulation_steps)
        return write_files(folder, files)
