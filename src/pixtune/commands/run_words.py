"""The figures of a run in words, for lists and for watching it."""

from __future__ import annotations

from pathlib import Path

from pixtune.errors import RunError
from pixtune.progress import in_words
from pixtune.runs.read import is_run
from pixtune.runs.state import RunState

USUAL_ROOT = Path("runs")
"""Folder that the shipped configs put their output folders into."""
STYLES = {
    "running": "green",
    "paused": "yellow",
    "finished": "bold",
    "stopped": "yellow",
    "failed": "red",
    "killed": "red",
}
EXIT_CODES = {"finished": 0, "running": 0, "stopped": 130, "failed": 1, "killed": 1}
"""Exit codes of `pixtune watch`, by what became of the run."""


def find_run(name: Path) -> Path:
    """Returns the folder that a word means: a path, or a name below `runs`.

    Raises:
        RunError: neither is there.
    """
    if name.exists():
        return name
    if not name.is_absolute() and is_run(USUAL_ROOT / name):
        return USUAL_ROOT / name
    raise RunError(f"there is no folder {name}, nor {USUAL_ROOT / name} of a run. `pixtune runs` lists what there is.")


def state_word(run: RunState) -> str:
    """Returns a run's state in a word."""
    return "paused" if run.is_paused else run.state


def steps_word(run: RunState) -> str:
    """Returns the steps done, of how many."""
    return f"{run.step:,}" + (f"/{run.num_steps:,}" if run.num_steps is not None else "")


def figure(value: float | None) -> str:
    """Returns a loss or a time, or "-" where there is none."""
    return "-" if value is None else f"{value:.4f}"


def left_word(run: RunState) -> str:
    """Returns how long the run will take from now."""
    return "-" if run.seconds_left is None or run.is_paused else in_words(run.seconds_left)


def best_word(run: RunState) -> str:
    """Returns the best step with its held-out loss."""
    return "-" if run.best is None else f"{run.best.loss:.4f} at {run.best.step:,}"


def line_of(run: RunState) -> str:
    """Sums a run up in one line."""
    words = [f"step {steps_word(run)}", state_word(run)]
    words += [] if run.smoothed_loss is None else [f"loss {run.smoothed_loss:.4f}"]
    words += [] if run.held_out_loss is None else [f"held-out {run.held_out_loss.loss:.4f}"]
    words += [] if run.seconds_per_step is None else [f"{run.seconds_per_step:.3f} s/step"]
    words += [] if run.seconds_left is None or run.is_paused else [f"{in_words(run.seconds_left)} left"]
    return "  ".join(words)


def end_of(run: RunState) -> list[str]:
    """Returns what became of a run, and what to do next."""
    folder = run.folder
    go_on = "go on with resume_from_checkpoint=latest"
    if run.state == "finished":
        best = f"; best step: {best_word(run)}" if run.best else ""
        return [f"finished after {run.step:,} steps{best}", *([f"report: {run.report}"] if run.report else [])]
    saved = f"saved up to step {run.checkpoints[-1].step:,}" if run.checkpoints else "nothing is saved"
    if run.state == "failed":
        return [f"failed at step {run.step:,}; {saved}", *(run.error or "").splitlines()]
    if run.state == "killed":
        return [f"killed after step {run.step:,}; {saved}" + (f": {go_on}" if run.checkpoints else f" in {folder}")]
    return [f"stopped after step {run.step:,}; {saved}" + (f": {go_on}" if run.checkpoints else "")]
