"""Reads a run's `metrics.jsonl` as series, and sums it up in a few figures."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from pixtune.tracking.metrics import FILE_NAME, read_metrics

Point = tuple[int, float]
"""Step and value."""

MOST_POINTS = 800
"""Largest number of points of a plotted line; more cannot be told apart."""


@dataclass(frozen=True)
class Validation:
    """One measurement on held-out pictures."""

    step: int
    loss: float
    quarters: tuple[float, ...]
    """Losses by quarter of sigma: [0, 1/4), [1/4, 1/2), [1/2, 3/4), [3/4, 1]."""


@dataclass(frozen=True)
class Sample:
    """One sample; `path` is relative to the run's folder."""

    step: int
    prompt: str
    seed: int
    path: str
    controls: tuple[str, ...] = ()
    """Control pictures of an edit, as the config names them."""
    size: tuple[int, ...] = ()
    """(width, height) in pixels, where samples have several sizes."""
    negative: str | None = None
    """Negative prompt, if one was given."""
    strength: float = 1.0
    """Strength of the LoRA."""

    @property
    def index(self) -> int | None:
        """Number of the picture among those of its step, 0 for the first; None where its file has none."""
        digits = PurePosixPath(self.path).name.partition("-")[0].partition(".")[0]
        return int(digits) if digits.isdecimal() and digits.isascii() else None

    @property
    def origin(self) -> tuple[object, ...]:
        """Everything that its picture comes from, apart from the weights."""
        return self.prompt, self.seed, self.controls, self.size, self.negative

    @property
    def detail(self) -> str:
        """Words that tell it from others of the same prompt."""
        words = [f"seed {self.seed}", *(Path(control).name for control in self.controls)]
        words += ["x".join(map(str, self.size))] if self.size else []
        words += [f"not: {self.negative}"] if self.negative else []
        return ", ".join(words)


@dataclass(frozen=True)
class Strip:
    """All samples of one origin and strength, by step."""

    samples: tuple[Sample, ...]

    @property
    def prompt(self) -> str:
        return self.samples[0].prompt

    @property
    def strength(self) -> float:
        return self.samples[0].strength


@dataclass(frozen=True)
class Suspect:
    """A picture whose caption is most likely wrong; `path` of its thumbnail is relative to the run's folder."""

    name: str
    caption: str
    gain: float
    """Difference by which the logarithm of the base's loss is lower with this caption than with other pictures'."""
    path: str


@dataclass(frozen=True)
class EditDrift:
    """Drift of one step's samples from the pictures that they edit."""

    step: int
    off_pixels: float | None
    """Median distance by which points are off, of samples of which that is sure; None where it is of none."""
    color_levels: float
    """Median distance of mean colours, in levels of 255."""


@dataclass(frozen=True)
class Outcome:
    """Held-out loss at the first and the last measurement."""

    first: Validation
    last: Validation
    best: Validation

    @property
    def change(self) -> float | None:
        """Relative change from first to last, for example -0.25; None if the first is 0."""
        return self.last.loss / self.first.loss - 1 if self.first.loss else None

    def __str__(self) -> str:
        change = "" if self.change is None else f" ({self.change:+.1%})"
        return f"held-out loss {self.first.loss:.4f} -> {self.last.loss:.4f}{change}"


@dataclass(frozen=True)
class FirstStep:
    """The first step of a session, which compiles."""

    step: int
    seconds: float
    compiled_graphs: int


@dataclass(frozen=True)
class StageRow:
    """Memory of one stage of a run, GiB. Figures of the device are 0 where there is no GPU."""

    stage: str
    seconds: float
    allocated_gib: float
    """Memory at the stage's end."""
    peak_gib: float
    peak_reserved_gib: float
    host_rss_gib: float
    """Host memory of the process at the stage's end."""


@dataclass(frozen=True)
class MemoryRecord:
    """Memory of a finished run, stage by stage; the peaks are None where no GPU trained."""

    stages: Sequence[StageRow]
    expected_peak_gib: float | None = None
    measured_peak_gib: float | None = None
    """Peak of the steps."""
    reserved_peak_gib: float | None = None
    process_peak_gib: float | None = None
    """Peak of the whole process; None also where the run had no limit."""

    @property
    def on_gpu(self) -> bool:
        return any(stage.peak_reserved_gib or stage.peak_gib for stage in self.stages)


@dataclass(frozen=True)
class RunRecord:
    """Everything that the log holds, in order of steps. Values that are not finite are left out."""

    steps: Sequence[dict[str, Any]]
    validations: Sequence[Validation]
    strips: Sequence[Strip]
    first_steps: Sequence[FirstStep] = ()
    """First steps, one a session."""
    drifts: Sequence[str] = ()
    """Warnings about steps that became slower."""
    losses: Sequence[str] = ()
    """Sentences on steps that were skipped, and on losses that exploded."""
    problems: Sequence[str] = ()
    """Warnings about services that failed."""
    memory: MemoryRecord | None = None
    """Memory by stage; None while a run has not finished."""
    training_pictures: Sequence[Validation] = ()
    """Measurements of some training pictures, with fixed noise as those held out."""
    edit_drifts: Sequence[EditDrift] = ()
    """Drift of samples from their controls, step by step."""
    suspects: Sequence[Suspect] = ()
    """Pictures whose captions are most likely wrong, the worst first."""

    def series(self, name: str) -> list[Point]:
        """Returns one figure of every step."""
        return [(line["step"], line[name]) for line in self.steps if is_finite(line.get(name))]

    @property
    def last_step(self) -> int:
        """Number of the last step that anything was logged of; 0 if there is none."""
        steps = [line["step"] for line in self.steps[-1:]] + [v.step for v in self.validations[-1:]]
        return max(steps + [strip.samples[-1].step for strip in self.strips], default=0)

    @property
    def outcome(self) -> Outcome | None:
        """First, last and best held-out loss; None unless it was measured twice."""
        if len(self.validations) < 2:
            return None
        return Outcome(self.validations[0], self.validations[-1], min(self.validations, key=lambda v: v.loss))

    @property
    def pairs(self) -> list[tuple[Sample, Sample]]:
        """Samples before training and after the last sampled step, of each origin, at the strength nearest to 1."""
        last = max((strip.samples[-1].step for strip in self.strips), default=0)
        usual = min((strip.strength for strip in self.strips), key=lambda strength: abs(strength - 1), default=1.0)
        ends = [(strip.samples[0], strip.samples[-1]) for strip in self.strips if strip.strength == usual]
        return [(first, end) for first, end in ends if first.step == 0 and end.step == last > 0]

    @property
    def total_seconds(self) -> float:
        """Time in training steps, of all sessions of a resumed run."""
        return math.fsum(seconds for _, seconds in self.series("seconds"))

    @property
    def median_seconds(self) -> float | None:
        """Median time of a step; the first steps, which may compile, hardly move it."""
        seconds = [seconds for _, seconds in self.series("seconds")]
        return statistics.median(seconds) if seconds else None

    @property
    def peak_memory_gib(self) -> float:
        """Peak device memory of all steps; 0 without a GPU."""
        return max((peak for _, peak in self.series("peak_memory_gib")), default=0.0)


def read_sample(line: Mapping[str, Any]) -> Sample:
    """Reads a sample's line. A size or strength that is none, as somebody else's log may have it, is left out."""
    size, strength = line.get("size") or (), line.get("strength", 1.0)
    return Sample(
        line["step"], line["prompt"], line["seed"], line["path"], tuple(line.get("controls") or ()),
        tuple(size) if all(type(side) is int for side in size) else (), line.get("negative"),
        float(strength) if is_finite(strength) else 1.0,
    )  # fmt: skip


def read_record(output_dir: Path) -> RunRecord:
    """Reads `metrics.jsonl`. Where a step occurs twice, as after a crash, the later line counts."""
    steps: dict[int, dict[str, Any]] = {}
    validations: dict[int, Validation] = {}
    strips: dict[tuple[object, ...], dict[float, dict[int, Sample]]] = {}
    first_steps: dict[int, FirstStep] = {}
    drifts: dict[int, str] = {}
    losses: dict[tuple[int, str], str] = {}
    problems: list[str] = []
    memory: MemoryRecord | None = None
    training: dict[int, Validation] = {}
    suspects: list[Suspect] = []
    edit_drifts: dict[int, dict[str, dict[str, Any]]] = {}
    for line in read_metrics(output_dir / FILE_NAME):
        step = line["step"]
        if line["kind"] == "step":
            steps[step] = line
        elif line["kind"] == "validation" and all(map(is_finite, (line["loss"], *line["quarters"]))):
            validations[step] = Validation(step, line["loss"], tuple(line["quarters"]))
        elif line["kind"] == "training_pictures" and all(map(is_finite, (line["loss"], *line["quarters"]))):
            training[step] = Validation(step, line["loss"], tuple(line["quarters"]))
        elif line["kind"] == "edit_drift" and is_finite(line["off_pixels"]) and is_finite(line["color_levels"]):
            edit_drifts.setdefault(step, {})[str(line.get("path"))] = line
        elif line["kind"] == "captions":
            suspects = [suspect for entry in line["suspects"] if (suspect := read_suspect(entry)) is not None]
        elif line["kind"] == "sample":
            sample = read_sample(line)
            strips.setdefault(sample.origin, {}).setdefault(sample.strength, {})[step] = sample
        elif line["kind"] == "first_step":
            first_steps[step] = FirstStep(step, line["first_step_seconds"], line["compiled_graphs"])
        elif line["kind"] == "drift":
            drifts[step] = line["message"]
        elif line["kind"] in ("skipped", "exploded"):
            losses[step, line["kind"]] = line["message"]
        elif line["kind"] == "problem":
            problems.append(line["message"])
        elif line["kind"] == "memory":
            memory = read_memory(line)
    return RunRecord(
        steps=[steps[step] for step in sorted(steps)],
        validations=[validations[step] for step in sorted(validations)],
        strips=[
            Strip(tuple(samples[step] for step in sorted(samples)))
            for by_strength in strips.values()
            for _, samples in sorted(by_strength.items())
        ],
        first_steps=[first_steps[step] for step in sorted(first_steps)],
        drifts=[drifts[step] for step in sorted(drifts)],
        losses=[losses[key] for key in sorted(losses)],
        problems=problems,
        memory=memory,
        training_pictures=[training[step] for step in sorted(training)],
        suspects=suspects,
        edit_drifts=[sum_up_drift(step, [*edit_drifts[step].values()]) for step in sorted(edit_drifts)],
    )


def sum_up_drift(step: int, lines: Sequence[Mapping[str, Any]]) -> EditDrift:
    """Sums up the drift of one step's samples."""
    sure = [line["off_pixels"] for line in lines if line["is_sure"]]
    off = statistics.median(sure) if sure else None
    return EditDrift(step, off, statistics.median(line["color_levels"] for line in lines))


def read_suspect(entry: object) -> Suspect | None:
    """Reads an entry of the line on captions; None where it is of another form."""
    if not isinstance(entry, Mapping) or not is_finite(entry.get("gain")):
        return None
    texts = [entry.get(name) for name in ("name", "caption", "path")]
    if not all(isinstance(text, str) for text in texts):
        return None
    return Suspect(str(texts[0]), str(texts[1]), float(entry["gain"]), str(texts[2]))


def read_memory(line: Mapping[str, Any]) -> MemoryRecord:
    """Reads a line of the kind "memory"; it may hold more than is shown."""
    stages = [StageRow(**{each.name: row[each.name] for each in fields(StageRow)}) for row in line["stages"]]
    names = [each.name for each in fields(MemoryRecord) if each.name != "stages"]
    return MemoryRecord(stages, **{name: line.get(name) for name in names})


def is_finite(value: object) -> bool:
    """Returns whether a logged value can be plotted."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def thin(points: Sequence[Point], limit: int = MOST_POINTS) -> list[Point]:
    """Selects at most `limit` points that plot the same line: both ends, and the extremes of each stretch."""
    if len(points) <= limit:
        return list(points)
    inner, num_stretches = range(1, len(points) - 1), limit // 2 - 1
    kept = {0, len(points) - 1}
    for number in range(num_stretches):
        stretch = inner[number * len(inner) // num_stretches : (number + 1) * len(inner) // num_stretches]
        kept.add(min(stretch, key=lambda index: points[index][1]))
        kept.add(max(stretch, key=lambda index: points[index][1]))
    return [points[index] for index in sorted(kept)]


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Computes a moving mean of `window` (odd) points around each, cut at the ends. An exponential mean would lag."""
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smoothed = []
    for index, (step, _) in enumerate(points):
        start, stop = max(index - window // 2, 0), min(index + window // 2 + 1, len(points))
        smoothed.append((step, (sums[stop] - sums[start]) / (stop - start)))
    return smoothed


def smoothing_window(num_points: int) -> int:
    """Returns a tenth of the run, at most 201, odd; 1 (no smoothing) where there is too little to smooth."""
    return min(num_points // 20 * 2 + 1, 201) if num_points >= 20 else 1
