"""Times real training steps: `pixtune train`'s own run of a config, on meaningless pictures in a temporary folder."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.console import Console

from pixtune.assembly import assemble
from pixtune.bench.environment import describe
from pixtune.bench.flops import StepFlops, StepSize, read_linears, step_flops
from pixtune.bench.peaks import measure_peaks
from pixtune.bench.result import Case, Formats, Memory, Result, Timing, make_result
from pixtune.bench.synthetic import DEFAULT_WORDS, count_controls, count_pictures, timing_words, write_pictures
from pixtune.config import load_config
from pixtune.config.folders import folders_of, largest_size
from pixtune.config.schema import TrainConfig
from pixtune.config.sections import GuardConfig
from pixtune.data.batches import Batch
from pixtune.engine.capture import PLAIN_CALLS
from pixtune.engine.quantize import codes_for
from pixtune.errors import ConfigError, TrainingError
from pixtune.families import family_of
from pixtune.families.opening import open_model
from pixtune.hardware.capping import BeforeCuda, outside_allocator_bytes, read_before_cuda
from pixtune.hardware.facts import GIB
from pixtune.hardware.machine import driver_may_spill
from pixtune.hardware.nvidia_smi import own_gpu
from pixtune.plan.rungs import QUANTIZED
from pixtune.plan.training import TrainingPlan
from pixtune.planning import footprint_of, plain_linears, targeted_linears, tensor_shapes
from pixtune.progress import StepBar, say
from pixtune.run import Run, TrainResult
from pixtune.services import Services
from pixtune.tracking.figures import StepFigures, StepOutcome, count_compiled_graphs, watch_device
from pixtune.tracking.guard import LossGuard
from pixtune.tracking.memory import STEPS
from pixtune.tracking.metrics import FILE_NAME, MetricsLog, read_metrics
from pixtune.tracking.problems import Problems
from pixtune.train import forward_backward, run_steps
from pixtune.trained.targets import adapter_of

WARM_UP_STEPS = PLAIN_CALLS + 2
"""Steps before the timed ones: the first compile and try out kernels, the next is captured and one more replayed."""
FORMAT_NAMES = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}


@dataclass(frozen=True)
class Request:
    """Options of the command line."""

    num_steps: int
    """Steps that are timed, after those that warm up."""
    resolution_pixels: int | None = None
    """Side of the pictures; None for the config's own."""
    num_text_tokens: int | None = None
    """Tokens of a caption; None for the config's `max_text_tokens`, or captions of `DEFAULT_WORDS` words."""
    num_controls: int | None = None
    """Control pictures of an example; None for `usual_controls`."""


@dataclass(frozen=True)
class TimedRun:
    """Everything that is known when the steps are over and their memory is free again."""

    case: Case
    timing: Timing
    memory: Memory
    flops: StepFlops
    formats: Formats
    plan: TrainingPlan
    device: torch.device


def measure(
    path: Path,
    overrides: Sequence[str],
    request: Request,
    check: Callable[[Case], None] = lambda case: None,
) -> Result:
    """Runs a config's steps and measures their cost. What the config names besides the model is not touched.

    Args:
        check: may refuse the case before the first step.

    Raises:
        PixtuneError: as in training.
    """
    with tempfile.TemporaryDirectory(prefix="pixtune-bench-") as name:
        config = write_case(Path(name), path, overrides, request)
        run = time_run(config, check)
    if run.device.type == "cuda":
        torch.compiler.reset()  # what was compiled holds on to weights
        gc.collect()
        torch.cuda.empty_cache()
    peaks = measure_peaks((run.formats.plain, run.formats.quantized), run.device)
    return make_result(run.case, run.timing, run.memory, run.flops, run.formats, peaks, describe(), run.plan.to_dict())


def write_case(folder: Path, path: Path, overrides: Sequence[str], request: Request) -> TrainConfig:
    """Writes pictures and captions, and returns the config that trains on them.

    Raises:
        ConfigError: the config is wrong.
    """
    config = load_config(path, overrides, folders_must_exist=False)
    data, size_pixels = config.data_config, request.resolution_pixels or largest_size(config.data_config)
    pictures = write_pictures(
        folder / "pictures",
        size_pixels,
        count_pictures(config),
        usual_controls(config) if request.num_controls is None else request.num_controls,
        request.num_text_tokens or data.max_text_tokens or DEFAULT_WORDS,
    )
    num_steps = WARM_UP_STEPS + request.num_steps
    return load_config(
        path, [*overrides, *timing_words(folder, pictures, num_steps, size_pixels, request.num_text_tokens)]
    )


def usual_controls(config: TrainConfig) -> int:
    """Counts the control pictures of an example: one a folder; one where a metadata file names them."""
    folders = count_controls(config)
    if folders or not any(folder.metadata_file for folder in folders_of(config.data_config)):
        return folders
    return min(1, family_of(open_model(config.pretrained_model_name_or_path, config.model_parts)).max_controls)


def time_run(config: TrainConfig, check: Callable[[Case], None]) -> TimedRun:
    """Times all steps of a run; nothing of it is left on the device.

    Raises:
        ConfigError: several processes were started.
        TrainingError: the run was asked to stop.
    """
    can_tell = torch.version.cuda is not None and not torch.cuda.is_initialized()
    before = read_before_cuda(own_gpu(os.environ)) if can_tell else None
    run, services = assemble(config, forward_backward)
    if run.accelerator.num_processes > 1:
        raise ConfigError(
            f"{run.accelerator.num_processes} processes were started", ["a benchmark is of one: leave the launcher out"]
        )
    case = describe_case(run, services)
    check(case)
    timed = TimedSteps(run)
    if not run_steps(run, timed).finished:
        raise TrainingError("the benchmark was asked to stop before all of its steps were timed; nothing was measured")
    return TimedRun(
        case=case,
        timing=timed.timing(),
        memory=timed.memory(before),
        flops=count_flops(run, services, case),
        formats=formats_of(run.plan, run.accelerator.device),
        plan=run.plan,
        device=run.accelerator.device,
    )


def describe_case(run: Run, services: Services) -> Case:
    """Describes the case that is about to be measured."""
    config, data = run.config, services.data
    footprint = footprint_of(config, run.family, services.folder, num_tokens=0)
    return Case(
        model=services.folder.pipeline_class,
        num_weights=footprint.num_weights,
        method=config.method,
        resolution_pixels=largest_size(config.data_config),
        num_controls=count_controls(config),
        num_image_tokens=data.most_image_tokens,
        num_text_tokens=data.most_text_tokens,
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        rank=None if config.method == "full" else config.rank,
        num_trained_weights=footprint.trained_weights,
    )


def count_flops(run: Run, services: Services, case: Case) -> StepFlops:
    """Counts the operations of one of the run's steps, as it was planned."""
    config, family, plan = run.config, run.family, run.plan
    shapes = tensor_shapes(config, family, services.folder)
    trains_all = config.method == "full"
    layers = [] if trains_all else targeted_linears(config, family, shapes)
    linears = read_linears(
        family,
        shapes,
        layers,
        adapter_of(config, layers, family.lora_presets),
        plan.weights_format in QUANTIZED,
        plain_linears(config.keep_plain, family, shapes),
    )
    size = StepSize(case.batch_size * case.gradient_accumulation_steps, case.num_image_tokens, case.num_text_tokens)
    _, width = family.block_shape(services.folder)
    return step_flops(linears, size, width, plan.recomputed_blocks, trains_all, plan.reprojected_blocks)


def formats_of(plan: TrainingPlan, device: torch.device) -> Formats:
    """Returns the formats of a plan's products. A CPU computes all of them in fp32 or as slowly."""
    if device.type != "cuda":
        return Formats("fp32", "fp32")
    plain = plan.compute_format
    eight = FORMAT_NAMES[codes_for(plan.weights_format, device)] if plan.weights_format in QUANTIZED else plain
    return Formats(plain, eight)


class TimedSteps:
    """Stand-in for `Services` in a timed run: the same figures of each step; nothing is validated, sampled or saved."""

    start_step = 0

    def __init__(self, run: Run) -> None:
        self._run = run
        self._console = Console(stderr=True)
        self._path = run.config.output_dir / FILE_NAME
        self._num_graphs = count_compiled_graphs()

    def __enter__(self) -> Self:
        config, accelerator = self._run.config, self._run.accelerator
        self._log = MetricsLog(self._path, self.start_step)
        self._bar = StepBar(self._console, self.start_step, self._run.num_steps)
        self._bar.__enter__()
        self._figures = StepFigures(
            accelerator, self._log, self._bar, config.batch_size * config.gradient_accumulation_steps, None,
            self._print, watch_device(accelerator.device, driver_may_spill()), Problems(self._print),
            LossGuard(GuardConfig(max_skipped_steps=1), list),
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)
        self._log.close()

    def before_first_step(self) -> None:
        self._run.memory.begin_steps()
        self._figures.restart_clock()

    def see_batch(self, batch: Batch) -> None:
        self._figures.see_batch(batch)

    def waited(self, seconds: float) -> None:
        self._figures.waited(seconds)

    def after_step(self, step: int, outcome: StepOutcome) -> None:
        self._figures.add(step, outcome, self._run.learning_rate_at(step - 1))
        if step % self._run.config.logging_steps == 0 or step == self._run.num_steps:
            self._figures.read_back()
        self._bar.advance(step)

    def interrupted(self, step: int, alone: bool = False) -> TrainResult:
        return TrainResult(finished=False, step=step, output_dir=self._run.config.output_dir)

    def finish(self) -> TrainResult:
        self._run.memory.end_steps()
        return TrainResult(finished=True, step=self._run.num_steps, output_dir=self._run.config.output_dir)

    def _print(self, line: str) -> None:
        say(self._console, line)

    # ---- afterwards

    def timing(self) -> Timing:
        """Returns the timing of the steps after those that warm up."""
        lines = read_metrics(self._path)
        steps = [line for line in lines if line["kind"] == "step"]
        (first,) = (line for line in lines if line["kind"] == "first_step")
        counted = steps[WARM_UP_STEPS:]
        return Timing(
            seconds=tuple(line["seconds"] for line in counted),
            num_warm_up_steps=WARM_UP_STEPS,
            first_step_seconds=first["first_step_seconds"],
            compiled_graphs=count_compiled_graphs() - self._num_graphs,
            data_wait_seconds=tuple(line["data_wait_seconds"] for line in counted),
            losses=tuple(line["loss"] for line in steps),
        )

    def memory(self, before: BeforeCuda | None) -> Memory:
        """Returns the steps' peaks. Call it while the steps' memory is still held.

        Args:
            before: the GPU before CUDA started in this process; None if unknown.
        """
        (steps,) = (row for row in self._run.memory.rows() if row["stage"] == STEPS)
        if self._run.accelerator.device.type != "cuda":
            return Memory(None, steps["host_rss_gib"])
        process = None
        if before is not None:
            process = steps["peak_reserved_gib"] + outside_allocator_bytes(before) / GIB
        return Memory(steps["peak_gib"], process, self._run.plan.expected_peak_bytes / GIB)


def case_as_json(case: Case) -> Result:
    """Returns a case as it stands in a result, with the description of this machine."""
    return {"case": asdict(case), **describe()}
