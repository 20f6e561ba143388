"""Runs everything around the steps: figures, held-out loss, samples, checkpoints, and the files at the end.

Every service reads weights and changes none, and every random draw has its own key, so that a service that is switched
on changes no bit of the training. Saving comes first, and is the only one whose failure ends a run: see
`tracking/problems.py`. What a run that was killed after a checkpoint had still to measure or draw there is made up for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from math import isfinite
from types import TracebackType
from typing import Self

from rich.console import Console

from pixtune.config import to_dict
from pixtune.console import printing_problem
from pixtune.data.batches import Batch
from pixtune.data.prepared import PreparedData
from pixtune.data.swapped import measure_gains, swap_warning
from pixtune.engine.pace import Pace
from pixtune.engine.relief import first_that_fits
from pixtune.errors import CheckpointError, LossError, TrainingError
from pixtune.hardware.facts import package_versions
from pixtune.hardware.machine import driver_may_spill
from pixtune.judging.validation import NUM_QUARTERS, ValidationLoss, measure
from pixtune.progress import StepBar, announced, say
from pixtune.report.results import FEW_HELD_OUT, Results, already_finished
from pixtune.run import Run, TrainResult
from pixtune.storage.checkpoint import OPTIMIZER_STEM, Checkpoint, checkpoint_path, joined, sharded
from pixtune.storage.course import Course
from pixtune.storage.model_folder import ModelFolder
from pixtune.tracking.figures import StepFigures, StepOutcome, tracker_values, watch_device
from pixtune.tracking.guard import LossGuard, ways_on
from pixtune.tracking.metrics import FILE_NAME, MetricsLog
from pixtune.tracking.opening import opening_lines
from pixtune.tracking.problems import Problems
from pixtune.tracking.samples import build_sampler
from pixtune.trained import optim
from pixtune.trained.skipped_step import spoiled_weights

SAMPLES_FOLDER = "samples"


class Services:
    """The services of one session of a run. Only the first process writes; others keep pace."""

    def __init__(self, run: Run, folder: ModelFolder, data: PreparedData, start_step: int, course: Course) -> None:
        self.run, self.folder, self.data, self.start_step, self.course = run, folder, data, start_step, course
        self.config, self.output_dir = run.config, run.config.output_dir
        self.is_main = run.accelerator.is_main_process
        self.console = Console(quiet=not self.is_main)
        self.sampler, self._between_steps = build_sampler(
            run.config, run.family, folder, run.plan, data, run.accelerator.device
        )
        facts = {**run.trained.counts(), "training examples": len(data.buckets), "held-out": len(data.held_out)}
        self.results = Results(self.config, run.trained, lambda: run.reliefs.plan, run.num_steps, facts)
        self.problems = Problems(self._print_line)
        self.guard = LossGuard(run.config.guard, partial(spoiled_weights, run.trained.parameters))
        self._pace = Pace(run.accelerator.device, run.stop.check)
        self._losses: dict[int, ValidationLoss] = {}
        self._sampled: set[str] = set()
        """Paths of the samples in the log."""
        self.saved_step = start_step
        self._stack = ExitStack()

    # ---- life

    def __enter__(self) -> Self:
        config, log = self.config, None
        if self.is_main:
            course = self.course
            for sentence in course.begin(config.checkpoints_total_limit, self.start_step < self.run.num_steps):
                self._print(sentence)
            path = self.output_dir / FILE_NAME
            log = MetricsLog(path, self.start_step, course.resumed, course.given_up, course.resumed_log)
            self.log = self.problems.metrics = log
            for sentence in log.left_out:
                self._print(f"warning: {sentence}")
            self._sampled = {line["path"] for line in log.kept if line["kind"] == "sample"}
            self._losses = {
                line["step"]: ValidationLoss(line["loss"], tuple(line["quarters"]))
                for line in log.kept
                if line["kind"] == "validation"
            }
            self.guard.held_out = {step: loss.mean for step, loss in self._losses.items() if isfinite(loss.mean)}
        accelerator = self.run.accelerator
        if config.report_to:
            with self.problems.of(f"tracker {config.report_to}", self.start_step):
                accelerator.init_trackers(config.tracker_project_name, tracker_values(to_dict(config)))
            if self.problems.is_failing(f"tracker {config.report_to}"):
                accelerator.trackers.clear()  # one that has started by half would fail at every step
        self.bar = self._stack.enter_context(StepBar(self.console, self.start_step, self.run.num_steps))
        images_per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        watch = watch_device(accelerator.device, driver_may_spill()) if self.is_main else None
        self.figures = StepFigures(
            accelerator, log, self.bar, images_per_step, config.report_to, self._print, watch, self.problems, self.guard
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        with self.problems.of(f"tracker {self.config.report_to}", self.saved_step):
            for tracker in self.run.accelerator.trackers:
                tracker.finish()
        if self.is_main and (num_lines := self.log.close()):
            self._print(f"warning: the last {num_lines} lines of {self.log.path} could not be written")
        self.problems.sum_up()
        self.run.accelerator.state.destroy_process_group()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts a checkpoint's weights and optimizer state into the run.

        Raises:
            CheckpointError: the checkpoint is of another model.
        """
        run = self.run
        try:
            states, plain = joined(checkpoint.tensors, OPTIMIZER_STEM), checkpoint.record["optimizer_plain"]
            optim.check_states(run.plan.optimizer, run.trained.parameters, states, plain)
            run.trained.load(checkpoint.tensors, plain)
        except KeyError as error:
            raise CheckpointError(f"{checkpoint.path} does not fit this model: {error.args[0]}") from error
        self.guard.restore(checkpoint.record.get("guard", {}))
        of_all = f" of {run.num_steps}" if checkpoint.step < run.num_steps else f" of {run.num_steps}, the last one"
        self._print(f"resuming after step {checkpoint.step}{of_all}, from {checkpoint.path}")
        for change in self.course.changes:
            self._print(f"changed by resume_with_changes_in: {change}")

    # ---- around the steps

    def before_first_step(self) -> None:
        self._announce()
        if self.start_step == 0:
            with self.problems.of("the check for swapped controls", 0):
                self._check_direction()
        self._look(self.start_step)
        self.run.memory.begin_steps()
        self.figures.restart_clock()

    def see_batch(self, batch: Batch) -> None:
        """Notes the batch for the step's figures."""
        self.figures.see_batch(batch)

    def waited(self, seconds: float) -> None:
        """Notes the time that the loop had to wait for a micro-batch."""
        self.figures.waited(seconds)

    def after_step(self, step: int, outcome: StepOutcome) -> None:
        config = self.config
        self.run.stop.defer()
        self.figures.add(step, outcome, self.run.learning_rate_at(step - 1))
        save_due, look_due = self._is_due(step, config.checkpointing_steps), self._is_look_due(step)
        if step % config.logging_steps == 0 or save_due or look_due:
            self._read_back(step)
        self.bar.advance(step)
        self.course.at(step)
        if save_due:
            self._save(step)
        if look_due:
            self._look(step)
        if save_due and step < self.run.num_steps:
            self._report(step)
        if save_due or look_due:
            self.figures.restart_clock()

    def _is_due(self, step: int, every: int) -> bool:
        return step == self.run.num_steps or step % every == 0

    def _is_look_due(self, step: int) -> bool:
        return self._is_due(step, self.config.validation.every) or self._is_due(step, self.config.samples.every)

    def _look(self, step: int) -> None:
        """Measures and draws what is due after a step, and has not been done before a resume."""
        if self._is_due(step, self.config.validation.every):
            with self.problems.of("the held-out loss", step):
                self._validate(step)
            if step in self._losses and step not in self.guard.held_out:
                with self._ending_well(step):
                    self.figures.see_held_out(step, self._losses[step])
        if self._is_due(step, self.config.samples.every):
            with self.problems.of("samples", step):
                self._sample(step)

    def interrupted(self, step: int) -> TrainResult:
        """Saves, so that no step is lost, and writes the report of the steps so far.

        Raises:
            TrainingError: another process of the run is gone; names it.
        """
        self._read_back(step)
        if self.saved_step != step:
            self._save(step)
            self._report(step)
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

    def finish(self) -> TrainResult:
        """Writes the files that others load, and the report.

        Raises:
            WriteError: a file could not be written; all steps are saved.
        """
        step = self.run.num_steps
        self.run.stop.defer(False)
        if self.start_step < step:
            self._compare_memory(step)
        first, last = self._losses.get(0), self._losses.get(step)
        if summary := self.guard.summary():
            self._print(summary)
        if self.is_main:
            if not self.guard.is_in_doubt(step) and self.course.trust():
                self._prune(step)
            with announced("writing the files for other programs", self._print_line):
                paths = self.results.write_weights(step)
            how = self.results.next_words(paths)
            with self.problems.of("the report", step), announced("writing the report", self._print_line):
                paths += self.results.write_report()
            self.run.stop.check()
            self._print("wrote " + "\n      ".join(str(path) for path in paths))
            self._print(how if self.start_step < step else already_finished(step, self.output_dir))
        few = len(self.data.held_out) if len(self.data.held_out) <= FEW_HELD_OUT else None
        return TrainResult(True, step, self.output_dir, first, last, self.start_step < step, few)

    def _report(self, step: int) -> None:
        """Writes the report of the steps so far."""
        if self.is_main:
            with self.problems.of("the report", step), announced("writing the report", self._print_line):
                self.results.write_report()

    def _compare_memory(self, step: int) -> None:
        self.run.memory.end_steps()
        history = self.run.forward_backward.history
        if memory := self.run.memory.compare(self.run.plan.expected_peak_bytes, history.pass_bytes):
            self._print(
                f"memory: {memory['measured_peak_gib']:.1f} GiB at the peak, {memory['expected_peak_gib']:.1f} expected"
            )
        if self.is_main:
            captures = {"planned": self.run.plan.captures, **asdict(history)}
            self.log.write("memory", step, stages=self.run.memory.rows(), captures=captures, **memory)

    # ---- the services

    def _announce(self) -> None:
        """Prints what is about to run, with the plan's reasons."""
        run, reasons = self.run, (*self.run.plan.reasons, *self._between_steps.reasons)
        for line in opening_lines(self.config, self.data, run.source, run.num_steps, run.trained.summary(), reasons):
            self._print(line)

    @contextmanager
    def _aside(self, stage: str, num_passes: int) -> Iterator[Callable[[], None]]:
        """Frees memory of captured steps, where it is needed, for work on the device between steps.

        Yields a function to be called after each of its passes, which may end the work.
        """
        self.run.forward_backward.make_room(self._between_steps.device_bytes)
        with self.run.memory.aside(stage), self.bar.aside(stage, num_passes) as count:

            def after_pass() -> None:
                count()
                self._pace()

            yield after_pass

    def _print(self, line: str) -> None:
        self._print_line(line)
        if self.is_main and (problem := printing_problem()) is not None:
            self.problems.report("printing", self.saved_step, problem)

    def _print_line(self, line: str) -> None:
        say(self.console, line)

    def _check_direction(self) -> None:
        """Asks the base model, which a new run's weights still are, whether controls and targets are swapped."""
        if not self.data.both_ways or not self.is_main:
            return
        run = self.run
        gains = measure_gains(
            run.family, run.transformer, self.data.both_ways, self.config.seed, run.accelerator.device,
            self.config.objective.guidance, self._pace,
        )  # fmt: skip
        if (warning := swap_warning(gains)) is not None:
            self._print(f"warning: {warning}")

    def _validate(self, step: int) -> None:
        if not self.data.held_out or not self.is_main or step in self._losses:
            return
        run = self.run

        batch_size, num_draws = self.config.batch_size, self.config.validation.num_draws
        num_passes = len(self.data.held_out) * -(-NUM_QUARTERS * num_draws // batch_size)
        with self._aside("held-out loss", num_passes) as after_pass:

            def measured(batch_size: int) -> ValidationLoss:
                return measure(
                    run.family, run.transformer, self.data.held_out, num_draws, self.config.seed,
                    run.accelerator.device, self.config.objective.guidance, batch_size, after_pass,
                )  # fmt: skip

            def one_by_one() -> ValidationLoss:
                run.forward_backward.release()
                return measured(batch_size=1)

            loss = first_that_fits([lambda: measured(batch_size), one_by_one], "the held-out loss")
        self._losses[step] = loss
        self.log.write("validation", step, loss=loss.mean, quarters=loss.quarters)
        self.figures.track(step, {"held_out_loss": loss.mean})
        self._print(f"step {step}: held-out loss {loss.mean:.4f}")

    def _sample(self, step: int) -> None:
        if not self.data.prompts or not self.is_main:
            return
        folder = f"{SAMPLES_FOLDER}/step-{step:06d}"
        num_samples = len(self.data.prompts) * len(self.config.samples.seeds)
        if {f"{folder}/{number:03d}.png" for number in range(num_samples)} <= self._sampled:
            return
        with self._aside("samples", num_samples * self.config.samples.num_steps) as after_step:
            for number, picture in enumerate(self.sampler.sample(self.run.transformer, after_step)):
                relative = f"{folder}/{number:03d}.png"
                picture.write(self.output_dir / relative)
                controls = [path.as_posix() for path in picture.prompt.control_paths]
                if relative not in self._sampled:
                    self.log.write(
                        "sample", step, prompt=picture.prompt.text, seed=picture.seed, path=relative, controls=controls
                    )
                    self._sampled.add(relative)

    def _read_back(self, step: int) -> None:
        """Reads the figures of all steps so far, and learns from them whether the newest checkpoint is any good."""
        with self._ending_well(step):
            self.figures.read_back()
        if self.is_main and self.guard.proves(self.saved_step) and self.course.trust():
            self._prune(step)  # what was kept beside it until a loss with its weights was known

    @contextmanager
    def _ending_well(self, step: int) -> Iterator[None]:
        """Lets losses that end the run leave good checkpoints, and say how to go on."""
        try:
            yield
        except LossError as error:
            if error.weights_are_sound and self.saved_step != step:
                self._save(step)
                self.course.trust()
            if not self.is_main:
                raise
            raise TrainingError(ways_on(error, self.course.give_up_doubtful(), self.config)) from error

    def _prune(self, step: int) -> None:
        with self.problems.of("deleting old checkpoints", step):
            for warning in self.course.prune(self.config.checkpoints_total_limit):
                self._print(f"warning: {warning}")

    def _save(self, step: int) -> None:
        if self.is_main:
            with self.run.stop.saving(), announced(f"saving step {step}", self._print_line):
                self._write_checkpoint(step)
                with self.problems.of("the files of the weights so far", step):
                    self.run.trained.export_so_far(self.output_dir, step)
            self._print(f"step {step}: saved {checkpoint_path(self.output_dir, step)}")
            self._prune(step)
        self.saved_step = step

    def _write_checkpoint(self, step: int) -> None:
        with self.run.memory.aside("checkpoint"):
            seal = None
            with self.problems.of("syncing the log", step):
                seal = self.log.sync()
            state, plain = optim.optimizer_state(self.run.trained.optimizer, self.run.trained.parameters)
            self.course.save(
                step,
                {**self.run.trained.checkpoint_files(step), **sharded(OPTIMIZER_STEM, state)},
                {
                    "plan": self.run.reliefs.plan.to_dict(),
                    "encoders": self.data.encoders.to_dict(),
                    "versions": package_versions(),
                    "optimizer_plain": plain,
                    "guard": self.guard.to_dict(),
                    "log": seal,
                },
            )
