"""Collects loss, rate, speed and memory of each step, and reads them back from the device only now and then."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from pixtune.data.batches import Batch
from pixtune.hardware.monitor import get_memory_stats
from pixtune.hardware.sensors import GpuSensors, read_sensors
from pixtune.judging.validation import ValidationLoss
from pixtune.progress import StepBar
from pixtune.storage.resume import flatten
from pixtune.tracking.guard import ExampleLoss, LossGuard, SkippedStep
from pixtune.tracking.metrics import MEAN_OF_STEPS, MetricsLog
from pixtune.tracking.problems import Problems
from pixtune.tracking.steptime import Drift, StepTimeWatch, StepTiming

SENSORS_EVERY_SECONDS = 60.0
"""Shortest time between two readings: nvidia-smi takes tens of milliseconds."""

Moment = float | torch.cuda.Event
"""Seconds of the host's clock; on a GPU an event among the device's work, since the host runs ahead of it."""


@dataclass(frozen=True)
class StepOutcome:
    """Figures of a step that has been launched, on the device."""

    totals_2: Tensor
    """The loss, a mean over all examples of all processes, and that of a model that predicts no velocity at all."""
    grad_norm: Tensor
    """The gradient's norm before clipping."""
    losses_B: Tensor
    """Contributions of this process's examples to the loss, shape (B,)."""
    estimates: Mapping[str, Tensor] = field(default_factory=dict)
    """Estimates of the optimizer, by name: scalars."""

    @property
    def figures_3(self) -> Tensor:
        """Both totals and the norm as one tensor."""
        return torch.cat((self.totals_2, self.grad_norm.float().view(1)))


@dataclass(frozen=True)
class PendingStep:
    """A step whose figures are still on the device."""

    step: int
    outcome: StepOutcome
    learning_rate: float
    examples: Sequence[tuple[Sequence[str], Tensor]]
    """Names and sigmas of each batch, to be named if their losses are no numbers."""
    size: str
    data_wait_seconds: float
    compiled_graphs: int
    """Number of graphs that were compiled during this step."""
    end: Moment


class StepFigures:
    """Collects steps and hands their figures to the log, the bar and the tracker; warns when steps become slower.

    Args:
        log: log of the run; None in all processes but the first.
        images_per_step: number of examples in a step of all processes together.
        tracker: name of the config's tracker; None if there is none.
        print_line: prints a line for the user.
        watch: watch over the steps' speed; None in all processes but the first.
        problems: takes what goes wrong with the log and the tracker.
        guard: watch over the losses; the same in all processes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        log: MetricsLog | None,
        bar: StepBar,
        images_per_step: int,
        tracker: str | None,
        print_line: Callable[[str], None],
        watch: DriftWatch | None,
        problems: Problems,
        guard: LossGuard,
    ) -> None:
        self._accelerator, self._log, self._bar, self._guard = accelerator, log, bar, guard
        self._images_per_step, self._tracker = images_per_step, tracker
        self._print_line, self._watch, self._problems = print_line, watch, problems
        self._pending: list[PendingStep] = []
        self._batches: list[Batch] = []
        self._waited_seconds = 0.0
        self._first_is_reported = False
        self._losses: deque[float] = deque(maxlen=MEAN_OF_STEPS)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves the time since the last step out of the next one's seconds."""
        self._began = mark_time(self._accelerator.device)
        self._num_graphs = count_compiled_graphs()

    def see_batch(self, batch: Batch) -> None:
        """Adds a batch to the current step."""
        self._batches.append(batch)

    def waited(self, seconds: float) -> None:
        """Adds time that the current step spent waiting for a batch."""
        self._waited_seconds += seconds

    def add(self, step: int, outcome: StepOutcome, learning_rate: float) -> None:
        """Adds a step that has been launched. Waits for the first one of a session only, to report its time."""
        num_graphs = count_compiled_graphs()
        entry = PendingStep(
            step, outcome, learning_rate, [(batch.names, batch.sigma_B) for batch in self._batches],
            size_in_words(self._batches), self._waited_seconds, num_graphs - self._num_graphs,
            mark_time(self._accelerator.device),
        )  # fmt: skip
        self._pending.append(entry)
        self._batches, self._waited_seconds, self._num_graphs = [], 0.0, num_graphs
        if not self._first_is_reported:
            self._report_first_step(entry)

    def read_back(self) -> None:
        """Reads the figures of all steps since the last call, and is the one place that waits for the device.

        Raises:
            LossError: the run is to end, since too many steps were skipped, or the loss has exploded.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        losses, of_nothing, norms = torch.stack([entry.outcome.figures_3 for entry in pending]).T.tolist()
        seconds = [seconds_between(*ends) for ends in pairwise([self._began, *(entry.end for entry in pending)])]
        memory = get_memory_stats()["max_allocated_gb"]
        skipped = self._find_skipped(pending, losses, norms)
        for entry, loss, norm, own_seconds in zip(pending, losses, norms, seconds, strict=True):
            if self._log:
                self._log.write(
                    "step", entry.step, loss=number(loss), grad_norm=number(norm), learning_rate=entry.learning_rate,
                    **{name: float(estimate) for name, estimate in entry.outcome.estimates.items()},
                    seconds=round(own_seconds, 5), data_wait_seconds=round(entry.data_wait_seconds, 5),
                    peak_memory_gib=round(memory, 3), **({"skipped": True} if entry.step in skipped else {}),
                )  # fmt: skip
        step = pending[-1].step
        if self._log and (error := self._log.take_problem()) is not None:
            self._problems.report("metrics.jsonl", step, error, "Lines wait until it can be written again")
        with self._problems.of("the watch for slow steps", step):
            for drift in self._watch.look_at(pending, seconds) if self._watch else ():
                self._report_drift(drift)
        for entry, loss, nothing in zip(pending, losses, of_nothing, strict=True):
            self._judge(entry.step, loss, nothing, skipped.get(entry.step))
        self._guard.check()
        mean_seconds = statistics.fmean(seconds)
        self._losses.extend(filter(math.isfinite, losses))
        loss = statistics.fmean(self._losses or losses[-1:])
        estimates = {name: float(estimate) for name, estimate in pending[-1].outcome.estimates.items()}
        self._bar.figures(
            loss, mean_seconds, self._images_per_step / mean_seconds, memory, len(self._losses), estimates
        )
        values = {**estimates, "loss": losses[-1], "grad_norm": norms[-1], "learning_rate": pending[-1].learning_rate}
        values |= {"seconds_per_step": mean_seconds, "peak_memory_gib": memory}
        self.track(step, {name: value for name, value in values.items() if math.isfinite(value)})
        self.restart_clock()

    def _find_skipped(
        self, pending: Sequence[PendingStep], losses: Sequence[float], norms: Sequence[float]
    ) -> dict[int, SkippedStep]:
        """Returns the steps that changed nothing, by number, with the examples of all processes."""
        skipped = {}
        for entry, loss, norm in zip(pending, losses, norms, strict=True):
            if math.isfinite(loss) and math.isfinite(norm):
                continue
            names = [name for names, _ in entry.examples for name in names]
            sigmas = [sigma for _, sigma_B in entry.examples for sigma in sigma_B.tolist()]
            own_losses = (entry.outcome.losses_B * len(names)).tolist()
            own = [ExampleLoss(*each) for each in zip(names, sigmas, own_losses, strict=True)]
            examples = own
            if self._accelerator.num_processes > 1:  # all of them are here, since they have the same loss and norm
                with self._problems.of("naming the examples of other processes", entry.step):
                    examples = gather_object(own)
            skipped[entry.step] = SkippedStep(entry.step, loss, norm, examples)
        return skipped

    def _judge(self, step: int, loss: float, loss_of_nothing: float, skipped: SkippedStep | None) -> None:
        """Hands a step's losses to the guard, and shows what it warns of."""
        if skipped is None:
            self._warn_exploded(step, self._guard.see(step, loss, loss_of_nothing))
            return
        if self._log:
            examples = [{**asdict(each), "loss": number(each.loss)} for each in skipped.culprits]
            self._log.write("skipped", step, message=skipped.message, examples=examples)
        if (warning := self._guard.see_skipped(skipped)) is not None:
            self._print_line(f"warning: {warning}")

    def see_held_out(self, step: int, loss: ValidationLoss) -> None:
        """Hands the held-out loss to the guard.

        Raises:
            LossError: the run is to end, since it is no number, or has exploded.
        """
        self._warn_exploded(step, self._guard.see_held_out(step, loss.mean, loss.culprits))
        self._guard.check()

    def _warn_exploded(self, step: int, warning: str | None) -> None:
        if warning is not None:
            self._print_line(f"warning: {warning}")
            if self._log:
                self._log.write("exploded", step, message=warning)

    def track(self, step: int, values: Mapping[str, float]) -> None:
        """Hands values to the config's tracker, if there is one."""
        if self._tracker is not None:
            with self._problems.of(f"tracker {self._tracker}", step):
                self._accelerator.log(dict(values), step=step)

    def _report_first_step(self, entry: PendingStep) -> None:
        self._first_is_reported = True
        if isinstance(entry.end, torch.cuda.Event):
            entry.end.synchronize()
        seconds, graphs = seconds_between(self._began, entry.end), entry.compiled_graphs
        if self._log:
            self._log.write("first_step", entry.step, first_step_seconds=round(seconds, 3), compiled_graphs=graphs)
        compiled = f", with {graphs} graphs compiled once for all later steps" if graphs else ""
        self._print_line(f"first step: {seconds:.2f} s{compiled}")

    def _report_drift(self, drift: Drift) -> None:
        self._print_line(f"warning: {drift.message}")
        if self._log:
            self._log.write(
                "drift", drift.step, ratio=round(drift.ratio, 3), causes=list(drift.causes), message=drift.message
            )


# ---- evidence of what makes steps slower


class PacedSensors:
    """Clock and temperature of a GPU, read at most once in `SENSORS_EVERY_SECONDS`; until then a reading is reused."""

    def __init__(
        self, read: Callable[[], GpuSensors | None], clock_seconds: Callable[[], float] = time.monotonic
    ) -> None:
        self._read, self._clock_seconds = read, clock_seconds
        self._answer: GpuSensors | None = None
        self._asked_at = -math.inf

    def reading(self, wanted: bool) -> GpuSensors | None:
        """Returns the last reading, or takes one if it is wanted and the last is old; None where there is none."""
        now = self._clock_seconds()
        is_recent = now - self._asked_at < SENSORS_EVERY_SECONDS
        if not is_recent and wanted:
            self._asked_at, self._answer, is_recent = now, self._read(), True
        return self._answer if is_recent else None


class DriftWatch:
    """Gives `StepTimeWatch` the seconds of each step, with the measurements that may explain them.

    Figures that cost a call of the driver are read once for all steps that are read back together: allocation retries
    count for the last of them, free memory for each.

    Args:
        read_gpu_memory: returns the free share of the device's memory and the number of allocation retries so far.
    """

    def __init__(
        self, times: StepTimeWatch, sensors: PacedSensors, read_gpu_memory: Callable[[], tuple[float | None, int]]
    ) -> None:
        self._times, self._sensors, self._read_gpu_memory = times, sensors, read_gpu_memory
        self._retries = read_gpu_memory()[1]

    def look_at(self, steps: Sequence[PendingStep], seconds: Sequence[float]) -> list[Drift]:
        """Returns the drifts that have begun in these steps, at most one unless sizes differ much."""
        free_share, retries = self._read_gpu_memory()
        drifts = []
        for entry, own_seconds in zip(steps, seconds, strict=True):
            sensors = self._sensors.reading(self._times.wants_clock(entry.size, own_seconds))
            timing = StepTiming(
                entry.step, own_seconds, entry.size, entry.data_wait_seconds, entry.compiled_graphs,
                retries - self._retries if entry is steps[-1] else 0, free_share,
                sensors.clock_mhz if sensors else None, sensors.temperature_celsius if sensors else None,
            )  # fmt: skip
            if (drift := self._times.add(timing)) is not None:
                drifts.append(drift)
        self._retries = retries
        return drifts


def watch_device(device: torch.device, spills_to_host: bool) -> DriftWatch:
    """Builds the watch over a run on this device. On a CPU only data and other programs can slow a run down."""
    times = StepTimeWatch(spills_to_host)
    if device.type != "cuda":
        return DriftWatch(times, PacedSensors(lambda: None), lambda: (None, 0))

    def read_gpu_memory() -> tuple[float, int]:
        free, total = torch.cuda.mem_get_info(device)
        return free / total, torch.cuda.memory_stats(device).get("num_alloc_retries", 0)

    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return DriftWatch(times, PacedSensors(lambda: read_sensors(uuid)), read_gpu_memory)


def mark_time(device: torch.device) -> Moment:
    """Returns the current time, or on a GPU the moment at which it will have finished its work so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(before: Moment, after: Moment) -> float:
    """Returns the seconds between two moments of one device, both past."""
    if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
        return before.elapsed_time(after) / 1000
    assert isinstance(before, float) and isinstance(after, float)
    return after - before


def count_compiled_graphs() -> int:
    """Counts the graphs that torch.compile has built in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # importing it takes seconds, which runs without compilation save
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0


def size_in_words(batches: Iterable[Batch]) -> str:
    """Describes a step's batches: "8 latents of 16x16" (height by width), controls after a plus."""
    counts: Counter[str] = Counter()
    for batch in batches:
        shapes = [tensor.shape for tensor in (batch.latents_BCHW, *batch.controls)]
        counts["+".join(f"{height}x{width}" for *_, height, width in shapes)] += len(batch.names)
    return " and ".join(f"{count} latents of {size}" for size, count in sorted(counts.items()))


def number(value: float) -> float | None:
    """Returns a value as JSON can hold it: None where it is no finite number."""
    return value if math.isfinite(value) else None


def tracker_values(config: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Converts a config to dotted names and plain values, as trackers take it."""
    return {
        key: value if isinstance(value, str | int | float | bool) else str(value)
        for key, value in flatten(config).items()
    }
