"""The state of a run, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pixtune.report.record import Point, Sample, Validation
from pixtune.storage.output_lock import Holder
from pixtune.storage.requests import Request

State = Literal["running", "stopped", "finished", "failed", "killed"]


@dataclass(frozen=True)
class Best:
    """The step with the lowest held-out loss."""

    step: int
    loss: float
    folder: Path | None
    """Folder with the files of its weights, or its checkpoint; None where neither is there."""


@dataclass(frozen=True)
class SavedStep:
    """A checkpoint, by its name alone."""

    step: int
    path: Path


@dataclass(frozen=True)
class RunState:
    """A run as its folder shows it at one moment."""

    folder: Path
    state: State
    """"running": its process is alive. "killed": its last session has ended without a word. "stopped": by request, or,
    for a run of a version without `session.json`, before its last step for a reason that is not known."""
    is_paused: bool
    step: int
    """Number of steps that are known to be taken; the log lags behind by up to `logging_steps`."""
    num_steps: int | None
    """Optimizer steps of the whole run; None where no file tells it yet."""
    loss: float | None
    """Loss of the last step whose loss is a number."""
    smoothed_loss: float | None
    """Mean loss of the last `MEAN_OF_STEPS` such steps."""
    first_loss: Validation | None
    """Held-out loss of the base model."""
    held_out_loss: Validation | None
    """The last held-out loss."""
    best: Best | None
    seconds_per_step: float | None
    """Median of the last `MEAN_OF_STEPS` steps."""
    seconds_left: float | None
    """Time that the steps left will take, without samples and validations; None unless it runs."""
    peak_memory_gib: float | None
    """Peak device memory of all steps; None without a GPU."""
    checkpoints: tuple[SavedStep, ...]
    """Checkpoints in the folder, the newest step last."""
    samples: tuple[Sample, ...]
    """Samples whose pictures lie in the folder, in the order in which they were drawn."""
    warnings: tuple[str, ...]
    """Warnings of steps and services, the newest last; at most `MOST_WARNINGS`."""
    error: str | None
    """The error that ended the last session."""
    began: str | None
    """Start of the last session, with the offset of its time zone."""
    ended: str | None
    """Time at which it ended, if it did so by itself."""
    changed: float
    """Time of the last change of any of these files, in seconds since 1970."""
    process: Holder | None
    """The process that is alive."""
    requests: tuple[Request, ...]
    """Requests that it has not answered yet."""
    report: Path | None
    """The page of the run's report."""
    losses: tuple[Point, ...] = ()
    """Step and mean loss along the run, at most `curve.MOST_POINTS`; only of a `RunReader` with a curve."""
    validations: tuple[Validation, ...] = ()
    """All held-out losses, by step."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The run's config, nested; empty where no file holds it."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name or str(self.folder)

    @property
    def share(self) -> float | None:
        """Share of the run that is done; None where its length is not known."""
        return min(self.step / self.num_steps, 1.0) if self.num_steps else None

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON values, with its name; without the config, which may be long."""
        values = {"name": self.name, **asdict(self)}
        del values["config"]
        samples = [{**asdict(sample), "index": sample.index} for sample in self.samples]
        return _plain({**values, "samples": samples, "share": self.share})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
