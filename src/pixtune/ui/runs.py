"""Runs on the page: what is shown of one, and what can be asked of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixtune.config.folders import folders_of
from pixtune.errors import PixtuneError
from pixtune.progress import in_words
from pixtune.runs.read import find_runs, read_run
from pixtune.runs.state import RunState
from pixtune.ui.answers import as_url
from pixtune.ui.configs import ConfigFile, list_configs
from pixtune.ui.jobs import CONSOLE, end_of
from pixtune.ui.roots import OutsideError
from pixtune.ui.turns import loading_since
from pixtune.ui.watch import Watch
from pixtune.ui.workplace import Workplace

MOST_RUNS = 200
LOADING = "Python and its libraries are being loaded"
OTHER_CONSOLES: list[Callable[[Path], Path | None]] = []
"""Further places of what a run has printed, for one that was not started by this page."""
CONSOLE_BYTES = 40_000
"""Size of the end of a console file that is shown."""


@dataclass(frozen=True)
class ListedRun:
    """A run, or the draft of one, on the first page."""

    name: str
    place: str
    url: str
    state: str
    words: str
    share: float | None
    thumb: str
    changed: float


def folder_of_config(work: Workplace, file: ConfigFile) -> Path | None:
    """Returns the real path of a config's output folder; None where it has none that the page may open."""
    if file.config is None:
        return None
    folder = Path(os.path.realpath(work.home / file.config.output_dir.expanduser()))
    return folder if work.roots.holds(folder) else None


def config_of_run(work: Workplace, folder: Path) -> ConfigFile | None:
    """Finds the config, among those of the page's own folder, whose output folder this is."""
    for file in list_configs(work):
        if folder_of_config(work, file) == folder:
            return file
    return None


def list_runs(work: Workplace, configs: Sequence[ConfigFile]) -> list[ListedRun]:
    """Lists all runs of the chosen folders and all drafts, the last changed first."""
    folders: dict[Path, None] = {}
    for root in work.roots.folders.values():
        try:
            folders |= dict.fromkeys(Path(os.path.realpath(each)) for each in find_runs(root))
        except PixtuneError:  # a root that cannot be read now
            continue
    listed = []
    for folder in [*folders][:MOST_RUNS]:
        try:
            state = read_run(folder)
        except PixtuneError:
            continue
        listed.append(_listed(work, folder, state))
    for file in configs:
        own = folder_of_config(work, file)
        if own is None or own not in folders:
            listed.append(_draft(work, file, own, own is not None and loading_since(work, own) is not None))
    return sorted(listed, key=lambda run: run.changed, reverse=True)


def _listed(work: Workplace, folder: Path, state: RunState) -> ListedRun:
    place = work.roots.place_of(folder)
    thumb = next((_thumb(work, folder / sample.path) for sample in reversed(state.samples)), "")
    shown = "paused" if state.is_paused else state.state
    return ListedRun(
        folder.name, place, f"/run/{as_url(place)}", shown, words_of(state), state.share, thumb, state.changed
    )


def _thumb(work: Workplace, path: Path) -> str:
    try:
        return f"/thumb/{as_url(work.roots.place_of(path))}"
    except OutsideError:
        return ""


def _draft(work: Workplace, file: ConfigFile, folder: Path | None, is_loading: bool) -> ListedRun:
    changed = file.path.stat().st_mtime
    if folder is not None and (is_loading or (folder / CONSOLE).is_file()):
        place = work.roots.place_of(folder)
        state = "starting" if is_loading else "failed"
        words = "loading libraries" if state == "starting" else "it ended before its first step"
        return ListedRun(file.name, file.place, f"/run/{as_url(place)}", state, words, None, "", changed)
    thumb = ""
    if file.config is not None:
        for each in folders_of(file.config.data_config):
            pictures = sorted(each.img_dir.glob("*.png"))[:1] or sorted(each.img_dir.glob("*.jpg"))[:1]
            thumb = _thumb(work, pictures[0]) if pictures else ""
    words = "not started yet" if file.config is not None else "not started yet; its YAML has problems"
    return ListedRun(file.name, file.place, f"/pictures/{as_url(file.place)}", "draft", words, None, thumb, changed)


def words_of(state: RunState) -> str:
    """Returns a run in a few words: steps, loss, time left."""
    steps = f"step {state.step:,}" + (f" of {state.num_steps:,}" if state.num_steps else "")
    parts = [steps]
    if state.held_out_loss is not None and state.first_loss is not None and state.held_out_loss.step > 0:
        parts.append(f"held-out loss {state.first_loss.loss:.4f} → {state.held_out_loss.loss:.4f}")
    elif state.smoothed_loss is not None:
        parts.append(f"loss {state.smoothed_loss:.4f}")
    if state.best is not None:
        parts.append(f"best at step {state.best.step:,}")
    if state.seconds_left:
        parts.append(f"{in_words(state.seconds_left)} left")
    return " · ".join(parts)


def console_end(folder: Path, most_bytes: int = CONSOLE_BYTES) -> str:
    """Reads the end of what a run has printed; "" where it was started elsewhere."""
    path = folder / CONSOLE
    if not path.is_file():
        path = next((found for find in OTHER_CONSOLES if (found := find(folder)) is not None), path)
    return end_of(path, most_bytes)


def view_of(watch: Watch, since: float | None) -> dict[str, Any]:
    """Returns what changes on a run's page, as plain values.

    Args:
        since: time since which its process is loading; see `turns.loading_since`.
    """
    state, folder, version = watch.state, watch.folder, watch.version
    is_starting = since is not None and (state is None or (state.process is None and state.changed < since))
    if state is None:
        return {
            "version": version,
            "state": "starting" if is_starting else "failed" if (folder / CONSOLE).is_file() else "not started",
            "is_alive": is_starting,
            "words": LOADING if is_starting else "it has not begun its first step",
            "step": 0, "num_steps": None, "share": None, "loss": None, "held_out": None, "best_step": None,
            "best_loss": None, "seconds_per_step": None, "left": None, "peak_memory_gib": None, "requests": [],
            "error": None if is_starting else _last_error(folder), "warnings": [], "num_samples": 0,
            "can_resume": False, "has_report": False, "age": None, "gpu": None,
        }  # fmt: skip
    return {
        "version": version,
        "state": "starting" if is_starting else "paused" if state.is_paused else state.state,
        "is_alive": is_starting or state.process is not None,
        "words": f"{LOADING}; it goes on after step {state.step:,}" if is_starting else words_of(state),
        "step": state.step,
        "num_steps": state.num_steps,
        "share": state.share,
        "loss": state.smoothed_loss,
        "held_out": state.held_out_loss.loss if state.held_out_loss else None,
        "best_step": state.best.step if state.best else None,
        "best_loss": state.best.loss if state.best else None,
        "seconds_per_step": state.seconds_per_step,
        "left": in_words(state.seconds_left) if state.seconds_left else None,
        "peak_memory_gib": state.peak_memory_gib,
        "requests": list(state.requests),
        "error": None if is_starting else state.error,
        "warnings": list(state.warnings),
        "num_samples": len(state.samples),
        "can_resume": not is_starting
        and state.process is None
        and bool(state.checkpoints)
        and state.step < (state.num_steps or 1 << 62),
        "has_report": state.report is not None,
        "gpu": watch.gpu,
        "age": round(time.time() - state.changed),
    }


def _last_error(folder: Path) -> str | None:
    lines = console_end(folder, 4000).strip().split("\n")
    start = next((n for n, line in enumerate(lines) if line.startswith("error:")), None)
    return "\n".join(lines[start:] if start is not None else lines[-5:]) or None


def steps_of(config_place: str | None, run_place: str | None) -> list[dict[str, str | None]]:
    """Returns the four steps of a run with their addresses."""
    config, run = (as_url(place) if place else None for place in (config_place, run_place))
    return [
        {"id": "pictures", "title": "Pictures", "url": f"/pictures/{config}" if config else None},
        {"id": "plan", "title": "Plan", "url": f"/plan/{config}" if config else None},
        {"id": "run", "title": "Run", "url": f"/run/{run}" if run else None},
        {"id": "result", "title": "Result", "url": f"/result/{run}" if run else None},
    ]


def steps_of_config(work: Workplace, file: ConfigFile) -> list[dict[str, str | None]]:
    """Returns the four steps of a config; the last two lead nowhere before its run has begun."""
    folder = folder_of_config(work, file)
    begun = folder is not None and (folder.is_dir() or work.jobs.find("run", folder) is not None)
    return steps_of(file.place, work.roots.place_of(folder) if folder is not None and begun else None)
