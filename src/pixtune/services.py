"""Runs everything around the steps: figures, held-out loss, samples, checkpoints, and the files at the end.

Every service reads weights and changes none, and every random draw has its own key, so that a service that is switched
on changes no bit of the training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from torch import Tensor

from pixtune.config import to_dict
from pixtune.data.batches import Batch
from pixtune.data.prepared import PreparedData
from pixtune.data.swapped import measure_gains, swap_warning
from pixtune.engine.apply import placement_of
from pixtune.engine.padded_attention import padding_obstacle
from pixtune.errors import CheckpointError
from pixtune.hardware.facts import package_versions
from pixtune.hardware.machine import driver_may_spill
from pixtune.hardware.read import read_facts
from pixtune.planning import SamplesBetween, plan_between_steps
from pixtune.progress import StepBar
from pixtune.report import write_report
from pixtune.run import Run, TrainResult
from pixtune.sampler import PromptSampler, SamplerSettings
from pixtune.storage.checkpoint import (
    OPTIMIZER_STEM,
    Checkpoint,
    checkpoint_path,
    sharded,
)
from pixtune.storage.course import Course
from pixtune.storage.model_folder import ModelFolder
from pixtune.storage.resume import flatten
from pixtune.tracking.figures import StepFigures, watch_device
from pixtune.tracking.metrics import FILE_NAME, MetricsLog
from pixtune.trained import optim
from pixtune.validation import ValidationLoss, measure

SAMPLES_FOLDER = "samples"


class Services:
    """The services of one session of a run. Only the first process writes; others keep pace."""

    def __init__(self, run: Run, folder: ModelFolder, data: PreparedData, start_step: int, course: Course) -> None:
        self.run, self.folder, self.data, self.start_step, self.course = run, folder, data, start_step, course
        self.config, self.output_dir = run.config, run.config.output_dir
        self.is_main = run.accelerator.is_main_process
        self.console = Console(quiet=not self.is_main)
        num_tokens = data.micro_batch_tokens(run.config.batch_size, run.plan.text_multiple)
        device, transformer = run.accelerator.device, folder.component_config("transformer")
        samples = SamplesBetween(
            data.sample_pixels, len(data.prompts), run.config.samples.guidance_scale,
            can_pad=padding_obstacle(device, transformer["attention_head_dim"]) is None,
        )  # fmt: skip
        self._between_steps = plan_between_steps(
            run.config, run.family, folder, run.plan, data.encoders, samples, num_tokens, read_facts(device)
        )
        self.sampler = PromptSampler(
            run.family,
            folder,
            data.prompts,
            SamplerSettings(run.config.samples.seeds, run.config.samples.num_steps, run.config.samples.guidance_scale),
            placement_of(run.plan, run.accelerator.device),
            keep_autoencoder=run.plan.encoders_stay,
            tile_pixels=self._between_steps.tile_pixels,
            passes=self._between_steps.passes,
        )
        self._losses: dict[int, ValidationLoss] = {}
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
            log = self.log = MetricsLog(path, self.start_step, course.resumed, course.given_up)
            if log.left_out:
                self._print(f"warning: {log.left_out}")
            self._stack.callback(log.close)
            self._losses = {
                line["step"]: ValidationLoss(line["loss"], tuple(line["quarters"]))
                for line in log.kept
                if line["kind"] == "validation"
            }
        accelerator = self.run.accelerator
        if config.report_to:
            accelerator.init_trackers(config.tracker_project_name, tracker_values(to_dict(config)))
        self.bar = self._stack.enter_context(StepBar(self.console, self.start_step, self.run.num_steps))
        images_per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        watch = watch_device(accelerator.device, driver_may_spill()) if self.is_main else None
        self.figures = StepFigures(
            accelerator, log, self.bar, images_per_step, bool(config.report_to), self._print, watch
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self.run.accelerator.end_training()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts a checkpoint's weights and optimizer state into the run.

        Raises:
            CheckpointError: the checkpoint is of another model.
        """
        run = self.run
        try:
            run.trained.load(checkpoint.tensors, checkpoint.record["optimizer_plain"])
        except KeyError as error:
            raise CheckpointError(f"{checkpoint.path} does not fit this model: {error.args[0]}") from error
        self._print(f"resuming after step {checkpoint.step} from {checkpoint.path}")
        for change in self.course.changes:
            self._print(f"changed by resume_with_changes_in: {change}")

    # ---- around the steps

    def before_first_step(self) -> None:
        self._announce()
        if self.start_step == 0:
            self._check_direction()
            self._validate(0)
            self._sample(0)
        self.run.memory.begin_steps()
        self.figures.restart_clock()

    def see_batch(self, batch: Batch) -> None:
        """Notes the batch for the step's figures."""
        self.figures.see_batch(batch)

    def waited(self, seconds: float) -> None:
        """Notes the time that the loop had to wait for a micro-batch."""
        self.figures.waited(seconds)

    def after_step(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        config, last = self.config, step == self.run.num_steps
        self.figures.add(step, loss, grad_norm, self.run.learning_rate_at(step - 1))
        validation_due = last or step % config.validation.every == 0
        samples_due = last or step % config.samples.every == 0
        save_due = last or step % config.checkpointing_steps == 0
        if step % config.logging_steps == 0 or validation_due or samples_due or save_due:
            self.figures.read_back()
        self.bar.advance(step)
        self.course.at(step)
        if validation_due:
            self._validate(step)
        if samples_due:
            self._sample(step)
        if save_due:
            self._save(step)
        if validation_due or samples_due or save_due:
            self.figures.restart_clock()

    def interrupted(self, step: int) -> TrainResult:
        """Saves, so that no step is lost."""
        self.figures.read_back()
        if self.saved_step != step:
            self._save(step)
        self._print(f"stopped after step {step}; resume with resume_from_checkpoint=latest")
        return TrainResult(finished=False, step=step, output_dir=self.output_dir)

    def finish(self) -> TrainResult:
        """Writes the files that others load, and the report."""
        step = self.run.num_steps
        if self.start_step < step:
            self._compare_memory(step)
        first, last = self._losses.get(0), self._losses.get(step)
        if self.is_main:
            paths = self.run.trained.export(self.output_dir, step)
            report = write_report(
                self.output_dir,
                config=to_dict(self.config),
                plan=self.run.reliefs.plan.to_dict(),
                versions=package_versions(),
                facts={
                    **self.run.trained.counts(),
                    "training examples": len(self.data.buckets),
                    "held-out examples": len(self.data.held_out),
                },
            )
            self._print("wrote " + "\n      ".join(str(path) for path in [*paths, report]))
        return TrainResult(True, step, self.output_dir, first, last)

    def _compare_memory(self, step: int) -> None:
        self.run.memory.end_steps()
        if memory := self.run.memory.compare(self.run.plan.expected_peak_bytes):
            self._print(
                f"memory: {memory['measured_peak_gib']:.1f} GiB at the peak, {memory['expected_peak_gib']:.1f} expected"
            )
        if self.is_main:
            captures = {"planned": self.run.plan.captures, **asdict(self.run.forward_backward.history)}
            self.log.write("memory", step, stages=self.run.memory.rows(), captures=captures, **memory)

    # ---- the services

    def _announce(self) -> None:
        """Prints what is about to run, with the plan's reasons."""
        sizes = len({size for variants in self.data.buckets for size in variants})
        self._print(f"data: {len(self.data.buckets)} examples in {sizes} sizes, {len(self.data.held_out)} held out")
        self._print(self.run.trained.summary())
        for reason in (*self.run.plan.reasons, *self._between_steps.reasons):
            self._print(f"plan: {reason}")
        if warning := optim.check_schedule(self.config, self.run.num_steps):
            self._print(f"warning: {warning}")

    @contextmanager
    def _aside(self, stage: str) -> Iterator[None]:
        """Frees memory of captured steps, where it is needed, for work on the device between steps."""
        self.run.forward_backward.make_room(self._between_steps.device_bytes)
        with self.run.memory.aside(stage):
            yield

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _check_direction(self) -> None:
        """Asks the base model, which a new run's weights still are, whether controls and targets are swapped."""
        if not self.data.both_ways or not self.is_main:
            return
        run = self.run
        gains = measure_gains(
            run.family, run.transformer, self.data.both_ways, self.config.seed, run.accelerator.device,
            self.config.objective.guidance,
        )  # fmt: skip
        if (warning := swap_warning(gains)) is not None:
            self._print(f"warning: {warning}")

    def _validate(self, step: int) -> None:
        if not self.data.held_out or not self.is_main or step in self._losses:
            return
        run = self.run
        with self._aside("held-out loss"):
            loss = measure(
                run.family, run.transformer, self.data.held_out, self.config.validation.num_draws, self.config.seed,
                run.accelerator.device, self.config.objective.guidance, self.config.batch_size,
            )  # fmt: skip
        self._losses[step] = loss
        self.log.write("validation", step, loss=loss.mean, quarters=loss.quarters)
        self.figures.track(step, {"held_out_loss": loss.mean})
        self._print(f"step {step}: held-out loss {loss.mean:.4f}")

    def _sample(self, step: int) -> None:
        if not self.data.prompts or not self.is_main:
            return
        with self._aside("samples"):
            for number, picture in enumerate(self.sampler.sample(self.run.transformer)):
                path = self.output_dir / SAMPLES_FOLDER / f"step-{step:06d}" / f"{number:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.image.save(path)
                relative = path.relative_to(self.output_dir).as_posix()
                controls = [path.as_posix() for path in picture.prompt.control_paths]
                self.log.write(
                    "sample", step, prompt=picture.prompt.text, seed=picture.seed, path=relative, controls=controls
                )

    def _save(self, step: int) -> None:
        if self.is_main:
            self._write_checkpoint(step)
            self._print(f"step {step}: saved {checkpoint_path(self.output_dir, step)}")
        self.saved_step = step

    def _write_checkpoint(self, step: int) -> None:
        with self.run.memory.aside("checkpoint"):
            self.log.sync()
            state, plain = optim.optimizer_state(self.run.trained.optimizer, self.run.trained.parameters)
            self.course.save(
                step,
                {**self.run.trained.checkpoint_files(step), **sharded(OPTIMIZER_STEM, state)},
                {
                    "plan": self.run.reliefs.plan.to_dict(),
                    "encoders": self.data.encoders.to_dict(),
                    "versions": package_versions(),
                    "optimizer_plain": plain,
                },
            )
            for warning in self.course.prune(self.config.checkpoints_total_limit):
                self._print(f"warning: {warning}")


def tracker_values(config: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Converts a config to dotted names and plain values, as trackers take it."""
    return {
        key: value if isinstance(value, str | int | float | bool) else str(value)
        for key, value in flatten(config).items()
    }
