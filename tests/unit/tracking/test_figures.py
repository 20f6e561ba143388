"""Figures of steps: each step's own seconds, the first step told apart, and slower steps noticed with their cause."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pixtune.config.sections import GuardConfig
from pixtune.data.batches import Batch, timed
from pixtune.hardware.sensors import GpuSensors
from pixtune.tracking import figures
from pixtune.tracking.figures import (
    DriftWatch,
    PacedSensors,
    PendingStep,
    StepFigures,
    StepOutcome,
    count_compiled_graphs,
    size_in_words,
)
from pixtune.tracking.guard import LossGuard
from pixtune.tracking.metrics import MetricsLog, read_metrics
from pixtune.tracking.problems import Problems
from pixtune.tracking.steptime import BASELINE_STEPS, WINDOW_STEPS, Drift, StepTimeWatch

CPU = torch.device("cpu")
OUTCOME = StepOutcome(torch.tensor([0.5, 2.0]), torch.tensor(0.5), torch.tensor([0.25, 0.25]))


class Clock:
    """A clock that a test moves on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self, device: torch.device | None = None) -> float:
        return self.now


class Bar:
    """Remembers what it was told to show."""

    def __init__(self) -> None:
        self.shown: list[tuple[float, ...]] = []

    def figures(self, *values: float) -> None:
        self.shown.append(values)


class Scene:
    """`StepFigures` on a clock of its own, with all that comes out of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.bar, self.said = Clock(), Bar(), list[str]()
        monkeypatch.setattr(figures, "mark_time", self.clock)
        self.log = MetricsLog(folder / "metrics.jsonl", 0)
        watch = DriftWatch(StepTimeWatch(), PacedSensors(lambda: None), lambda: (None, 0))
        accelerator: Any = SimpleNamespace(device=CPU, num_processes=1)
        bar: Any = self.bar
        self.figures = StepFigures(
            accelerator,
            self.log,
            bar,
            2,
            None,
            self.said.append,
            watch,
            Problems(self.said.append),
            LossGuard(GuardConfig(), list),
        )

    def steps(self, first: int, last: int, seconds: float, waited: float = 0.0) -> None:
        for step in range(first, last + 1):
            self.figures.waited(waited)
            self.figures.see_batch(batch_of(2))
            self.clock.now += seconds
            self.figures.add(step, OUTCOME, 1e-3)

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in read_metrics(self.log.path) if line["kind"] == kind]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def batch_of(num_examples: int, height: int = 16, width: int = 16, controls: Sequence[tuple[int, int]] = ()) -> Batch:
    latents = torch.zeros(num_examples, 4, height, width)
    return Batch(
        latents, latents, torch.zeros(num_examples), {},
        tuple(torch.zeros(num_examples, 4, *size) for size in controls), ["a.png"] * num_examples,
    )  # fmt: skip


def test_each_step_has_its_own_seconds(scene: Scene) -> None:
    scene.steps(1, 2, 0.5)
    scene.steps(3, 3, 2.0, waited=1.5)
    scene.figures.read_back()
    scene.steps(4, 4, 0.25)
    scene.figures.read_back()
    lines = scene.lines("step")
    assert [line["seconds"] for line in lines] == pytest.approx([0.5, 0.5, 2.0, 0.25])
    assert [line["data_wait_seconds"] for line in lines] == [0, 0, 1.5, 0]
    assert scene.bar.shown[0][1:3] == pytest.approx((1.0, 2.0)), "the bar shows the mean and pictures a second"


def test_the_bar_shows_a_mean_loss(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step's loss follows its noise level: 60 steps of 0 and 2 in turn show 1, a mean of the last 50."""
    for step in range(1, 61):
        scene.clock.now += 0.1
        scene.figures.see_batch(batch_of(2))
        loss = torch.tensor([2.0 * (step % 2), 2.0])
        scene.figures.add(step, StepOutcome(loss, OUTCOME.grad_norm, OUTCOME.losses_B), 1e-3)
    scene.figures.read_back()
    assert scene.bar.shown[-1][0] == pytest.approx(1.0) and scene.bar.shown[-1][-2] == 50
    assert [line["loss"] for line in scene.lines("step")][:2] == [2.0, 0.0], "the log keeps each step's own"


def test_what_happens_between_steps_is_in_none_of_them(scene: Scene) -> None:
    scene.steps(1, 1, 0.5)
    scene.figures.read_back()
    scene.clock.now += 60.0
    scene.figures.restart_clock()
    scene.steps(2, 2, 0.5)
    scene.figures.read_back()
    assert [line["seconds"] for line in scene.lines("step")] == pytest.approx([0.5, 0.5])


def test_the_first_step_is_told_at_once_and_only_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    before = figures.count_compiled_graphs()  # other tests compile in this process
    graphs = iter([before + 6] * 3)
    monkeypatch.setattr(figures, "count_compiled_graphs", lambda: next(graphs))
    scene.steps(1, 1, 74.2)
    assert scene.said == ["first step: 74.20 s, with 6 graphs compiled once for all later steps"]
    scene.steps(2, 2, 0.5)
    assert len(scene.said) == 1
    assert scene.lines("first_step") == [
        {"kind": "first_step", "step": 1, "first_step_seconds": 74.2, "compiled_graphs": 6}
    ]


def test_a_drift_is_printed_once_and_logged_with_its_cause(scene: Scene) -> None:
    scene.steps(1, BASELINE_STEPS, 1.0)
    scene.figures.read_back()
    for start in range(100, 100 + 3 * WINDOW_STEPS, 10):
        scene.steps(start, start + 9, 2.0, waited=1.0)
        scene.figures.read_back()
    warnings = [line for line in scene.said if line.startswith("warning: ")]
    (logged,) = scene.lines("drift")
    assert len(warnings) == 1 and "waiting for data" in warnings[0]
    assert logged["causes"] == ["data"] and logged["ratio"] == 2.0
    assert warnings[0] == f"warning: {logged['message']}" and logged["step"] == 100 + WINDOW_STEPS - 1


def test_steady_steps_are_no_drift(scene: Scene) -> None:
    scene.steps(1, 200, 1.0, waited=0.9)
    scene.figures.read_back()
    assert not scene.lines("drift") and len(scene.said) == 1


# ---- evidence


def pending(step: int, size: str = "8 latents of 16x16", graphs: int = 0) -> PendingStep:
    return PendingStep(step, OUTCOME, 1e-3, [], size, 0.0, graphs, 0.0)


def drifts_of(watch: DriftWatch, seconds: Sequence[float]) -> list[Drift]:
    """Steps read back ten at a time."""
    found = []
    for start in range(0, len(seconds), 10):
        part = seconds[start : start + 10]
        found += watch.look_at([pending(start + number) for number in range(len(part))], part)
    return found


SLOWER = [1.0] * 20 + [2.0] * 40


def test_a_lower_clock_is_found_although_the_card_is_rarely_asked() -> None:
    clock, asked = Clock(), []

    def read() -> GpuSensors:
        asked.append(clock.now)
        return GpuSensors(1980.0 if len(asked) == 1 else 1200.0, 70.0)

    sensors = PacedSensors(read, clock)
    watch = DriftWatch(StepTimeWatch(), sensors, lambda: (0.5, 0))
    assert not drifts_of(watch, SLOWER[:20])
    clock.now += 3600
    assert not drifts_of(watch, SLOWER[:10]) and len(asked) == 1, "steady steps ask nothing"
    (drift,) = drifts_of(watch, SLOWER[20:])
    assert drift.causes == ("throttling",) and "1200 MHz" in drift.message and len(asked) == 2


def test_sensors_are_asked_at_most_once_a_minute_and_only_if_wanted() -> None:
    clock = Clock()
    answers: list[GpuSensors | None] = [GpuSensors(1.0, 1.0), None, GpuSensors(3.0, 3.0)]
    sensors = PacedSensors(lambda: answers.pop(0), clock)
    assert sensors.reading(wanted=False) is None and len(answers) == 3
    assert [sensors.reading(wanted=wanted) for wanted in (True, True, False)] == [GpuSensors(1.0, 1.0)] * 3
    clock.now += 61
    assert sensors.reading(wanted=False) is None and len(answers) == 2, "an old answer says nothing of now"
    assert sensors.reading(wanted=True) is None and sensors.reading(wanted=True) is None and len(answers) == 1


@pytest.mark.parametrize(
    ("retries_a_call", "free_share", "spills", "causes"),
    [(0, 0.5, True, ()), (1, 0.5, True, ("memory",)), (0, 0.01, True, ("spill",)), (0, 0.01, False, ())],
)
def test_what_the_driver_says_of_memory_reaches_the_drift(
    retries_a_call: int, free_share: float, spills: bool, causes: tuple[str, ...]
) -> None:
    calls = iter(range(1000))
    watch = DriftWatch(
        StepTimeWatch(spills), PacedSensors(lambda: None), lambda: (free_share, 7 + retries_a_call * next(calls))
    )
    (drift,) = drifts_of(watch, SLOWER)
    assert drift.causes == causes


def test_retries_are_differences_between_calls() -> None:
    totals = iter([50, 52, 52, 55])
    samples = []

    class Recorder(StepTimeWatch):
        def add(self, sample: Any) -> Drift | None:
            samples.append(sample.allocation_retries)
            return None

    watch = DriftWatch(Recorder(), PacedSensors(lambda: None), lambda: (None, next(totals)))
    drifts_of(watch, [1.0] * 30)
    assert samples == [0] * 9 + [2] + [0] * 19 + [3]


def test_compiling_is_counted() -> None:
    @torch.compile(backend="eager", dynamic=False)
    def double(values: torch.Tensor) -> torch.Tensor:
        return values * 2

    before = count_compiled_graphs()
    counts = []
    for length in (3, 3, 4):
        double(torch.ones(length))
        counts.append(count_compiled_graphs() - before)
    assert counts == [1, 1, 2]


# ---- small parts


def test_waiting_is_told_for_each_item_and_leaves_out_what_is_done_with_it() -> None:
    def make() -> Any:
        for number in range(3):
            time.sleep(0.02 * number)
            yield number

    told: list[float] = []
    got = []
    for item in timed(make(), told.append):
        got.append(item)
        time.sleep(0.1)
    assert got == [0, 1, 2] and len(told) == 3
    assert told[0] < 0.02 <= told[1] < told[2] < 0.1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: [batch_of(8)], "8 latents of 16x16"),
        (lambda: [batch_of(1), batch_of(1)], "2 latents of 16x16"),
        (lambda: [batch_of(2), batch_of(1, 8, 24)], "2 latents of 16x16 and 1 latents of 8x24"),
        (lambda: [batch_of(1, controls=[(8, 8)])], "1 latents of 16x16+8x8"),
    ],
)
def test_sizes_in_words(make: Callable[[], list[Batch]], words: str) -> None:
    assert size_in_words(make()) == words
