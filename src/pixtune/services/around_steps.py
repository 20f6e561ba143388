"""The calls that the loop makes around its steps: who is told of a step, and what is due after it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Self

from pixtune.config import to_dict
from pixtune.data.batches import Batch
from pixtune.data.prepared import PreparedData
from pixtune.errors import TrainingError
from pixtune.hardware.machine import driver_may_spill
from pixtune.judging.best import end_words
from pixtune.launch.stop import Stopped
from pixtune.progress import StepBar, announced
from pixtune.report.results import FEW_HELD_OUT, Results, already_finished
from pixtune.run import Run, TrainResult
from pixtune.services.best_weights import BestWeights
from pixtune.services.captions import CaptionCheck
from pixtune.services.checkpoints import Checkpoints
from pixtune.services.edit_drift import EditDrift
from pixtune.services.held_out_loss import HeldOutLoss
from pixtune.services.learning import Learning, SavedFile
from pixtune.services.looks import Look
from pixtune.services.requests import Requests
from pixtune.services.samples import Samples
from pixtune.services.session import Session
from pixtune.services.swapped_controls import SwappedControls
from pixtune.services.training_pictures import TrainingPictures
from pixtune.storage.course import Course
from pixtune.storage.model_folder import ModelFolder
from pixtune.storage.session_note import LONGEST_ERROR, SessionNote, now_in_words
from pixtune.tracking.figures import StepFigures, StepOutcome, tracker_values, watch_device
from pixtune.tracking.guard import LossGuard
from pixtune.tracking.metrics import FILE_NAME, MetricsLog
from pixtune.tracking.opening import opening_lines
from pixtune.tracking.samples import build_sampler
from pixtune.trained.resume_point import decide_once
from pixtune.trained.skipped_step import spoiled_weights


class Services:
    """The services of one session of a run. Only the first process writes; others keep pace."""

    def __init__(self, run: Run, folder: ModelFolder, data: PreparedData, start_step: int, course: Course) -> None:
        self.run, self.folder, self.data, self.start_step, self.course = run, folder, data, start_step, course
        self.config, self.output_dir = run.config, run.config.output_dir
        self.is_main = run.accelerator.is_main_process
        sampler, self._between_steps = build_sampler(
            run.config, run.family, folder, run.plan, data, run.accelerator.device
        )
        self.session = Session(run, data, start_step, self._between_steps.device_bytes)
        self.problems, self._print = self.session.problems, self.session.print
        self.guard = LossGuard(run.config.guard, lambda: self.session.together.union(spoiled_weights(run.trained.held)))
        self.session.together.news = run.stop.news
        self.checkpoints = Checkpoints(self.session, course, self.guard)
        self.held_out_loss = HeldOutLoss(self.session, self.checkpoints)
        self.training_pictures = TrainingPictures(self.session)
        self.best_weights = BestWeights(self.session, self.held_out_loss)
        self.samples = Samples(self.session, sampler)
        self.learning = Learning(self.session, self.checkpoints)
        self.edit_drift = EditDrift(self.session)
        self.looks: Sequence[Look] = (
            SavedFile(self.session), SwappedControls(self.session), CaptionCheck(self.session), self.held_out_loss,
            self.training_pictures, self.best_weights, self.samples, self.edit_drift,
        )  # fmt: skip
        """Looks at the weights between steps, in their order."""
        facts = {**run.trained.counts(), "training examples": len(data.buckets), "held-out": len(data.held_out)}
        self.results = Results(self.config, run.trained, lambda: run.reliefs.plan, run.num_steps, facts)
        self.requests = Requests(self.session, self.checkpoints, lambda step, on: self._note(step, is_paused=on))
        self._written_note = SessionNote(
            lock=course.lock.name if course.lock else None,
            began=now_in_words(),
            start_step=start_step,
            num_steps=run.num_steps,
            config=to_dict(run.config),
        )
        self._stack = ExitStack()

    @property
    def saved_step(self) -> int:
        """Step of the newest checkpoint."""
        return self.session.saved_step

    # ---- life

    def __enter__(self) -> Self:
        config, log = self.config, None
        if self.is_main:
            course = self.course
            for sentence in course.begin(config.checkpoints_total_limit, self.start_step < self.run.num_steps):
                self._print(sentence)
            path = self.output_dir / FILE_NAME
            log = MetricsLog(path, self.start_step, course.resumed, course.given_up, course.resumed_log)
            self.session.log = self.problems.metrics = log
            for sentence in log.left_out:
                self._print(f"warning: {sentence}")
            self.samples.remember(log.kept)
            self.held_out_loss.remember(log.kept)
            self.training_pictures.remember(log.kept)
            self.edit_drift.remember(log.kept)
            with self.problems.of(self.best_weights.name, self.start_step):
                self.best_weights.agree_with_log()
        self._note(self.start_step)
        accelerator = self.run.accelerator
        if config.report_to:
            with self.problems.of(f"tracker {config.report_to}", self.start_step):
                accelerator.init_trackers(config.tracker_project_name, tracker_values(to_dict(config)))
            if self.problems.is_failing(f"tracker {config.report_to}"):
                accelerator.trackers.clear()  # one that has started by half would fail at every step
        bar = self._stack.enter_context(StepBar(self.session.console, self.start_step, self.run.num_steps))
        images_per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        watch = watch_device(accelerator.device, driver_may_spill()) if self.is_main else None
        self.session.bar, self.session.figures = (
            bar,
            StepFigures(
                accelerator, log, bar, images_per_step, config.report_to, self._print, watch, self.problems, self.guard
            ),
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run.stop.failing(error)  # before anything waits for other processes, which wait for this one
        self._stack.close()
        if isinstance(error, Stopped | KeyboardInterrupt):
            self._note(self.saved_step, outcome="stopped")
        elif error is not None:
            text = str(error) or type(error).__name__
            self._note(self.saved_step, outcome="failed", error=text[:LONGEST_ERROR])
        with self.problems.of(f"tracker {self.config.report_to}", self.saved_step):
            for tracker in self.run.accelerator.trackers:
                tracker.finish()
        if self.is_main and (num_lines := self.session.log.close()):
            self._print(f"warning: the last {num_lines} lines of {self.session.log.path} could not be written")
        self.problems.sum_up()
        if error is None or self.run.accelerator.num_processes == 1:  # it waits for all of them
            self.run.forward_backward.release()  # NCCL waits for ever for captured exchanges that could be replayed
            self.run.accelerator.state.destroy_process_group()

    # ---- around the steps

    def before_first_step(self) -> TrainResult | None:
        """Does everything that is due. Returns the run's result where it was over before this session."""
        self._announce()
        self.learning.begin()
        self._look(self.start_step)
        self.run.stop.meet("the first step")
        self.run.memory.begin_steps()
        self.session.figures.restart_clock()
        return self._end_early(self.start_step) if 0 < self.start_step < self.run.num_steps else None

    def see_batch(self, batch: Batch) -> None:
        """Notes the batch for the step's figures."""
        self.session.figures.see_batch(batch)

    def waited(self, seconds: float) -> None:
        """Notes the time that the loop had to wait for a micro-batch."""
        self.session.figures.waited(seconds)

    def after_step(self, step: int, outcome: StepOutcome) -> TrainResult | None:
        """Does everything that is due. Returns the run's result where it is over before its last step."""
        config, session = self.config, self.session
        self.run.stop.defer()
        session.figures.add(step, outcome, self.run.learning_rate_at(step - 1))
        save_due, look_due, pauses = self._due(step)
        if step % config.logging_steps == 0 or save_due or look_due:
            self.checkpoints.read_back(step)
        session.bar.advance(step)
        self.course.at(step)
        if save_due:
            self.checkpoints.save(step)
        self.learning.after_step(step)
        if look_due:
            self._look(step)
        if save_due and step < self.run.num_steps:
            self._report(step)
        self.requests.answer(step, pauses)
        if save_due or look_due:
            self.run.stop.meet(f"step {step}")  # the first process may have worked alone for long
            session.figures.restart_clock()
        return self._end_early(step) if self.held_out_loss.is_due(step) and step < self.run.num_steps else None

    def _end_early(self, step: int) -> TrainResult | None:
        """Ends the run, in all processes, where more steps no longer help; else returns None."""
        if self.config.validation.patience is None:
            return None
        if not decide_once(self.run.accelerator, lambda: self.held_out_loss.has_stalled):
            return None
        if self.saved_step != step:
            self.checkpoints.save(step)
        self._print(
            f"step {step}: the held-out loss has had no new lowest for {self.config.validation.patience} validations "
            "(validation.patience): the run ends here. To go on: resume_from_checkpoint=latest validation.patience=null"
        )
        with self.run.transformer.apart():
            for look in (self.samples, self.edit_drift):  # a last round, as after the last step
                with self.problems.of(look.name, step):
                    look.look(step)
        return self.finish(step)

    def _due(self, step: int) -> tuple[bool, bool, bool]:
        """Returns whether to save, to look and to pause after a step, which all processes then do or wait for."""
        several = self.run.accelerator.num_processes > 1
        pauses = self.requests.asks_to_pause(step)
        save = self.session.is_due(step, self.config.checkpointing_steps) or self.requests.take("save_now", step)
        due = (save or (pauses and several), any(look.is_due(step) for look in self.looks), pauses)
        if several and step % self.config.logging_steps == 0:  # when the first process looks for requests
            return decide_once(self.run.accelerator, lambda: due)
        return due

    def _look(self, step: int) -> None:
        """Measures and draws what is due after a step, and has not been done before a resume."""
        with self.run.transformer.apart():
            for look in self.looks:
                if look.is_due(step):
                    with self.problems.of(look.name, step):
                        look.look(step)
                    look.judge(step)

    def interrupted(self, step: int, alone: bool = False) -> TrainResult:
        """Saves, so that no step is lost, and writes the report of the steps so far.

        Args:
            alone: other processes may not have come here. Where they hold the weights together, nothing can be saved.

        Raises:
            TrainingError: another process of the run is gone; names it.
        """
        lost = self.run.stop.lost
        if not self.session.together.is_alone and (alone or lost is not None):
            why = (
                f"The steps after {self.saved_step} are lost, since each process holds a part of the weights: "
                "resume_from_checkpoint=latest goes on from the last checkpoint, with any number of processes"
            )
            if lost is not None:
                raise TrainingError(f"{lost} {why}")
            self._print(why)
            return TrainResult(finished=False, step=self.saved_step, output_dir=self.output_dir)
        self.checkpoints.read_back(step)
        if self.saved_step != step:
            self.checkpoints.save(step)
            self._report(step)
        self._note(step, outcome="stopped")
        lost_process = self.run.stop.after_saving()
        saved = f"stopped after step {step}; what it has learned so far is in {self.output_dir}"
        self._print(
            f"{saved}. Go on with resume_from_checkpoint=latest"
            if step
            else "stopped before the first step; nothing has to be saved"
        )
        if lost_process is not None:
            raise TrainingError(lost_process)
        return TrainResult(finished=False, step=step, output_dir=self.output_dir)

    def finish(self, step: int | None = None) -> TrainResult:
        """Writes the files that others load, and the report.

        Args:
            step: number of steps taken; None: all of the run's.

        Raises:
            WriteError: a file could not be written; all steps are saved.
        """
        step = self.run.num_steps if step is None else step
        self.run.stop.defer(False)
        if self.start_step < step:
            self._compare_memory(step)
        losses = self.held_out_loss.losses
        first, last = losses.get(0), losses.get(step)
        if summary := self.guard.summary():
            self._print(summary)
        if self.is_main and not self.guard.is_in_doubt(step) and self.course.trust():
            self.checkpoints.prune(step)
        with self.session.together.apart():
            if self.is_main:
                with announced("writing the files for other programs", self.session.print_line):
                    paths = self.results.write_weights(step)
        if self.is_main:
            how = self.results.next_words(paths)
            with self.problems.of("the report", step), announced("writing the report", self.session.print_line):
                paths += self.results.write_report()
            self.run.stop.check()
            self._print("wrote " + "\n      ".join(str(path) for path in paths))
            files = str(self.best_weights.folder) if self.best_weights.folder.is_dir() else None
            if (best := end_words(self.held_out_loss.means, step, files)) is not None:
                self._print(best)
            self._print(how if self.start_step < step else already_finished(step, self.run.num_steps, self.output_dir))
        self._note(step, outcome="finished")
        few = len(self.data.held_out) if len(self.data.held_out) <= FEW_HELD_OUT else None
        return TrainResult(True, step, self.output_dir, first, last, self.start_step < step, few)

    def _report(self, step: int) -> None:
        """Writes the report of the steps so far."""
        if self.is_main:
            with self.problems.of("the report", step), announced("writing the report", self.session.print_line):
                self.results.write_report()

    def _note(self, step: int, **changes: Any) -> None:
        """Notes in the output folder how the session goes, for whoever looks at the run from outside."""
        if not self.is_main:
            return
        ended = now_in_words() if "outcome" in changes else None
        self._written_note = replace(self._written_note, step=step, ended=ended, **changes)
        with self.problems.of("session.json", step):
            self._written_note.write(self.output_dir)

    def _compare_memory(self, step: int) -> None:
        self.run.memory.end_steps()
        history = self.run.forward_backward.history
        if memory := self.run.memory.compare(self.run.plan.expected_peak_bytes, history.pass_bytes):
            self._print(
                f"memory: {memory['measured_peak_gib']:.1f} GiB at the peak, {memory['expected_peak_gib']:.1f} expected"
            )
        if self.is_main:
            captures = {"planned": self.run.plan.captures, **asdict(history)}
            self.session.log.write("memory", step, stages=self.run.memory.rows(), captures=captures, **memory)

    def _announce(self) -> None:
        """Prints what is about to run, with the plan's reasons."""
        run, reasons = self.run, (*self.run.plan.reasons, *self._between_steps.reasons)
        for line in opening_lines(self.config, self.data, run.source, run.num_steps, run.trained.summary(), reasons):
            self._print(line)
