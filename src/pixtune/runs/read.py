"""Reads the state of a run from its folder, and finds the folders of runs."""

from __future__ import annotations

import os
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pixtune.errors import CheckpointError, RunError
from pixtune.judging.best import best_step
from pixtune.report.record import Sample, Validation, is_finite, read_sample
from pixtune.runs.curve import Curve
from pixtune.runs.log import LogFollower
from pixtune.runs.state import Best, RunState, SavedStep, State
from pixtune.storage import output_lock, session_note
from pixtune.storage.checkpoint_state import NAME, find_checkpoints, read_state
from pixtune.storage.output_lock import Holder, is_alive, read_holder
from pixtune.storage.requests import REQUESTS, is_asked
from pixtune.storage.session_note import SessionNote
from pixtune.tracking import metrics
from pixtune.tracking.metrics import MEAN_OF_STEPS, parse_line

MOST_WARNINGS = 20
MOST_SAMPLES, LONGEST_PROMPT = 20_000, 4000
LARGEST_FIGURE = 1e100
STEP_LINE = b'{"kind": "step", '
"""Beginning of nearly all lines of a log. Only the last of them are parsed, so that long logs are read fast."""
BEST_FOLDER, REPORT_FILE = "best", "report.html"
MARKS = (session_note.FILE_NAME, metrics.FILE_NAME, output_lock.FILE_NAME)
"""Files by which the folder of a run is recognized, beside checkpoints."""
MOST_FOLDERS = 20_000
"""Number of folders that are looked into for runs, at most."""


def read_run(folder: Path) -> RunState:
    """Reads a run's state once.

    Raises:
        RunError: there is no run in the folder, or its files cannot be read.
    """
    return RunReader(folder).read()


def is_run(folder: Path) -> bool:
    """Returns whether a run has written to a folder."""
    try:
        names = {entry.name for entry in os.scandir(folder)}
    except OSError:
        return False
    return not names.isdisjoint(MARKS) or any(NAME.fullmatch(name) for name in names)


def find_runs(root: Path, most_levels: int = 3) -> list[Path]:
    """Finds the folders of runs: `root` itself, or those below it. Links are not followed, nor hidden folders.

    Args:
        most_levels: number of levels of folders that are looked into below `root`.

    Raises:
        RunError: `root` is no folder, or cannot be read.
    """
    try:
        os.scandir(root).close()
    except OSError as error:
        raise RunError(
            f"{root} cannot be searched for runs ({error.strerror or error}). Name the folder that holds your runs' "
            "output folders: pixtune runs FOLDER."
        ) from error
    if is_run(root):
        return [root]
    found, level, num_left = list[Path](), [root], MOST_FOLDERS
    for _ in range(most_levels):
        below = [child for folder in level for child in _folders_in(folder)][:num_left]
        num_left -= len(below)
        runs = [child for child in below if is_run(child)]
        found += runs
        level = [child for child in below if child not in set(runs)]
    return sorted(found)


def _folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
            ]
    except OSError:  # another user's, for example: what can be seen is listed
        return []


class RunReader:
    """Reads a run's state again and again; each time only what was added to its log.

    Args:
        with_curve: whether to keep the loss curve, for which every line is parsed once.
    """

    def __init__(self, folder: Path, with_curve: bool = False) -> None:
        self.folder, self._with_curve = folder, with_curve
        self._log = LogFollower(folder / metrics.FILE_NAME)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._recent: deque[bytes] = deque(maxlen=MEAN_OF_STEPS)
        self._curve = Curve()
        self._validations: dict[int, Validation] = {}
        self._samples: dict[str, Sample] = {}
        self._warnings: deque[str] = deque(maxlen=MOST_WARNINGS)
        self._finished_at: int | None = None

    def read(self) -> RunState:
        """Reads the state as it is now.

        Raises:
            RunError: there is no run in the folder, or its files cannot be read.
        """
        folder = self.folder
        if not is_run(folder):
            why = "holds no run" if folder.is_dir() else "is no folder"
            raise RunError(f"{folder} {why}: name the output_dir of one. `pixtune runs` lists those below a folder.")
        try:
            self._log.read(self._begin_anew, self._take)
        except OSError as error:
            raise RunError(f"{self._log.path} cannot be read ({error.strerror or error}).") from error
        note, holder = SessionNote.read(folder), read_holder(folder)
        alive = holder if holder is not None and is_alive(holder, folder) else None
        checkpoints = tuple(_saved_steps(folder))
        length, config = _length_and_config(note, checkpoints)
        steps = [line for raw in self._recent if (line := parse_line(raw)) is not None]
        step = max(
            [line["step"] for line in steps[-1:]]
            + ([note.step] if note else [saved.step for saved in checkpoints[-1:]])
            + ([alive.step] if alive and note and alive.name == note.lock else []),
            default=0,
        )
        losses, seconds = _figures(steps, "loss"), _figures(steps, "seconds")
        peak = max(_figures(steps, "peak_memory_gib"), default=0.0)
        pace = statistics.median(seconds) if seconds else None
        is_paused = alive is not None and note is not None and note.is_paused and note.lock == alive.name
        validations = tuple(self._validations[step] for step in sorted(self._validations))
        is_over = self._finished_at is not None and self._finished_at >= step
        state = _state(alive, holder, note, is_over or (length is not None and step >= length))
        return RunState(
            folder=folder,
            state=state,
            is_paused=is_paused,
            step=step,
            num_steps=length,
            loss=losses[-1] if losses else None,
            smoothed_loss=statistics.fmean(losses) if losses else None,
            first_loss=self._validations.get(0),
            held_out_loss=validations[-1] if validations else None,
            best=_best(folder, self._validations, checkpoints),
            seconds_per_step=pace,
            seconds_left=pace * max(length - step, 0) if pace is not None and length and alive else None,
            peak_memory_gib=peak or None,
            checkpoints=checkpoints,
            samples=tuple(self._samples.values()),
            warnings=tuple(self._warnings),
            error=note.error if note and state == "failed" else None,
            began=alive.since if alive else note.began if note else None,
            ended=note.ended if note and state != "running" else None,
            changed=_last_change(folder),
            process=alive,
            requests=tuple(request for request in REQUESTS if is_asked(folder, request)),
            report=path if (path := folder / REPORT_FILE).is_file() else None,
            losses=self._curve.points() if self._with_curve else (),
            validations=validations,
            config=config,
        )

    def _take(self, raw: bytes) -> None:
        """Takes a line of the log."""
        if raw.startswith(STEP_LINE):
            self._recent.append(raw)
            if self._with_curve and (line := parse_line(raw)) is not None and is_plausible(line.get("loss")):
                self._curve.add(line["step"], line["loss"])
            return
        if (line := parse_line(raw)) is None:
            return
        kind, step = line["kind"], line["step"]
        if kind == "validation" and all(map(is_plausible, (line["loss"], *line["quarters"]))):
            self._validations[step] = Validation(step, line["loss"], tuple(line["quarters"]))
        elif kind == "sample" and is_inside(line["path"]) and len(self._samples) < MOST_SAMPLES:
            self._samples[line["path"]] = read_sample({**line, "prompt": line["prompt"][:LONGEST_PROMPT]})
        elif kind in ("skipped", "exploded", "drift", "problem"):
            self._warnings.append(line["message"])
        elif kind == "memory":
            self._finished_at = step


def is_inside(path: str) -> bool:
    """Returns whether a path that a log names lies within the run's folder, by its words."""
    parts = PurePosixPath(path)
    return bool(parts.parts) and not parts.is_absolute() and ".." not in parts.parts and "\0" not in path


def _figures(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(line[name]) for line in lines if is_plausible(line.get(name))]


def is_plausible(value: object) -> bool:
    """Returns whether a logged figure is a number that sums and charts bear: anybody may have written the log."""
    return is_finite(value) and isinstance(value, int | float) and abs(value) < LARGEST_FIGURE


def _state(alive: Holder | None, holder: Holder | None, note: SessionNote | None, is_over: bool) -> State:
    """Decides on a run's state.

    Args:
        holder: who the lock's file names; it is there although nobody is alive where a session was killed.
        is_over: whether its last step is known to be taken, for runs without a note.
    """
    if alive is not None:
        return "running"
    if note is not None and (holder is None or holder.name == note.lock):
        return note.outcome or "killed"
    if holder is not None:
        return "killed"
    return "finished" if is_over else "stopped"


def _saved_steps(folder: Path) -> list[SavedStep]:
    return [SavedStep(int(path.name.rpartition("-")[2]), path) for path in find_checkpoints(folder)]


def _length_and_config(note: SessionNote | None, saved: Sequence[SavedStep]) -> tuple[int | None, Mapping[str, Any]]:
    """Returns the run's number of steps and its config, from the note or else from the newest whole checkpoint."""
    if note is not None:
        return note.num_steps, note.config
    for each in reversed(saved):
        try:
            record = read_state(each.path)["record"]
        except CheckpointError:  # whoever resumes is told; here the one before serves as well
            continue
        length, config = record.get("num_steps"), record.get("config")
        return (length if type(length) is int else None), (config if isinstance(config, dict) else {})
    return None, {}


def _best(folder: Path, validations: Mapping[int, Validation], saved: Sequence[SavedStep]) -> Best | None:
    step = best_step({step: validation.loss for step, validation in validations.items()})
    if step is None:
        return None
    places = [folder / BEST_FOLDER, *(each.path for each in saved if each.step == step)]
    return Best(step, validations[step].loss, next((place for place in places if place.is_dir()), None))


def _last_change(folder: Path) -> float:
    times = [path.stat().st_mtime for name in (*MARKS, ".") if (path := folder / name).exists()]
    return max(times, default=0.0)
