"""Holds what the services of one session share: the run, its printed lines, log and figures, and room on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console

from pixtune.console import printing_problem
from pixtune.data.prepared import PreparedData
from pixtune.engine.pace import Pace
from pixtune.judging.validation import pace_of
from pixtune.progress import StepBar, say
from pixtune.run import Run
from pixtune.tracking.figures import StepFigures
from pixtune.tracking.metrics import MetricsLog
from pixtune.tracking.problems import Problems

USUAL_PACE = 100
"""Number of steps between two validations where the config gives none."""
MOST_TRAINING_PICTURES = 8
"""Number of training pictures that are measured beside those held out, if these are as many."""


class Session:
    """The steps that one start of the program takes, as services see them. `log`, `bar` and `figures` exist once the
    session has begun; only the first process has a log.

    Args:
        start_step: number of steps that were taken before.
        work_bytes: most device memory that work between steps needs.
    """

    log: MetricsLog
    bar: StepBar
    figures: StepFigures

    def __init__(self, run: Run, data: PreparedData, start_step: int, work_bytes: int) -> None:
        self.run, self.data, self.start_step = run, data, start_step
        self.config, self.output_dir = run.config, run.config.output_dir
        self.is_main = run.accelerator.is_main_process
        self.together = run.transformer.together
        """Processes that hold the weights together: what takes all of them is done within `apart`."""
        self.saved_step = start_step
        """Step of the newest checkpoint."""
        self.console = Console(quiet=not self.is_main)
        self.problems = Problems(self.print_line)
        self.pace = Pace(run.accelerator.device, run.stop.check)
        self._work_bytes = work_bytes
        self.validation_every = self._pace_of_validation()
        """Number of steps between two validations."""

    def is_due(self, step: int, every: int) -> bool:
        """Returns whether something is due after this step that is done each `every` steps and after the last one."""
        return step == self.run.num_steps or step % every == 0

    def _pace_of_validation(self) -> int:
        config, settings, num_pictures = self.config, self.config.validation, len(self.data.held_out)
        if settings.every is not None:
            return settings.every
        if settings.held_out != "auto" or settings.held_out_dir is not None:
            return USUAL_PACE
        examples = config.batch_size * config.gradient_accumulation_steps * self.run.accelerator.num_processes
        return pace_of(num_pictures + min(num_pictures, MOST_TRAINING_PICTURES), settings.num_draws, examples)

    @contextmanager
    def aside(self, stage: str, num_passes: int) -> Iterator[Callable[[], None]]:
        """Frees memory of captured steps, where it is needed, for work on the device between steps.

        Yields a function to be called after each of its passes, which may end the work.
        """
        self.run.forward_backward.make_room(self._work_bytes)
        with self.run.memory.aside(stage), self.bar.aside(stage, num_passes) as count:

            def after_pass() -> None:
                count()
                self.pace()

            yield after_pass

    def with_base_alone(self) -> AbstractContextManager[None]:
        """Has a new run's transformer compute as the base does until a `with` block ends, whatever its LoRA started
        from."""
        is_base = self.config.init_lora is None
        return nullcontext() if is_base else self.run.trained.result_in_place(in_training=True, strength=0.0)

    def print(self, line: str) -> None:
        """Prints a line for the user, and notes where lines can no longer be printed."""
        self.print_line(line)
        if self.is_main and (problem := printing_problem()) is not None:
            self.problems.report("printing", self.saved_step, problem)

    def print_line(self, line: str) -> None:
        """Prints a line for the user."""
        say(self.console, line)
