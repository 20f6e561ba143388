"""Writes and reads `metrics.jsonl`, which every run has: one JSON object a line.

Lines have `kind` and `step`; figures carry their unit in the name. The kinds:

"step": loss, gradient norm, rate, seconds and peak memory of a step; with Prodigy also d, its estimate, which times the
    rate is the size of its steps. A step that was skipped has "skipped": true. What was no finite number is null.
"skipped": the examples of a skipped step whose losses were no numbers, with their sigmas, and the message.
"exploded": the loss, or the held-out loss, has exploded, with the warning that was printed.
"first_step": how long the first step of a session took, compilation included. A resumed run has one for each session.
"drift": steps have become slower, with the causes that were measured ("data", "recompilation", "memory", "spill",
    "throttling") and the warning that was printed.
"validation": held-out loss, and its four quarters by sigma.
"training_pictures": the same of some pictures that are trained on; beside the held-out loss it shows over-fitting.
"captions": how much better captions fit their own pictures than others, by the base model, the most suspicious first,
    and those that are most likely wrong, with their thumbnails.
"sample": path of a generated picture, with its prompt, seed and controls, and where they are not the usual ones the
    LoRA's strength, the negative prompt and (width, height).
"edit_drift": how a sample lies to its control: pixels off, scale, whether these are sure, and distance of mean colours.
"problem": a service (samples, held-out loss, tracker, ...) has failed, with the warning that was printed.
"memory": once, at the end of a run: the memory of each stage, on a GPU the plan's estimate beside it, and how many
    captures were planned and made, what was saved for them, and why they were given up, if they were.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixtune.errors import WriteError
from pixtune.inputs import reading
from pixtune.storage.files import file_digest, write_atomically
from pixtune.tracking.lines import has_form

FILE_NAME = "metrics.jsonl"

LARGEST_FILE_BYTES, LONGEST_LINE_BYTES, MOST_LINES = 1024 * reading.MEBIBYTE, reading.MEBIBYTE, 4_000_000
"""Bounds of a log that is read: one of a million steps has a quarter of the lines and of the size."""
MEAN_OF_STEPS = 50
"""Number of steps whose mean loss is shown: that of one step depends on its noise level more than on the weights."""
MOST_NAMED = 11
"""Number of damaged lines that are counted; ten are named."""


class MetricsLog:
    """Appends lines; a resumed run first drops those after its checkpoint, so that the log is that of one run."""

    def __init__(
        self,
        path: Path,
        resume_step: int,
        resumed: str | None = None,
        given_up: str | None = None,
        seal: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the log at `path`, from which a new run (`resume_step` 0) drops all lines.

        Args:
            resumed: name of the checkpoint that is resumed, whose log may have been set aside.
            given_up: name of a checkpoint that the run is set back from; the log is set aside for it.
            seal: what `sync` returned when that checkpoint was saved.

        Raises:
            WriteError: it cannot be read or written.
        """
        self.path = path
        self._unwritten = b""
        """Lines, the first of which may be written in part."""
        self._problem: OSError | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if given_up is not None and path.is_file():
                shutil.copyfile(path, set_aside(path, given_up))
            own = set_aside(path, resumed) if resumed is not None else path
            lines, damaged = read_lines(own if own.is_file() else path) if resume_step else ([], [])
            self.left_out: list[str] = []
            """Sentences on lines that could not be read, or are not there."""
            if damaged:
                kept = set_aside(path, "damaged")
                shutil.copyfile(path, kept)
                numbers = ", ".join(map(str, damaged[:10])) + (" and more" if len(damaged) > 10 else "")
                self.left_out.append(
                    f"{path} has damaged lines (number {numbers}), which are left out; as it was, it is kept as "
                    f"{kept.name}"
                )
            self.kept = [line for line in lines if line["step"] <= resume_step]
            """Lines of the run so far."""
            steps = {line["step"] for line in self.kept if line["kind"] == "step"}
            if missing := [step for step in range(1, resume_step + 1) if step not in steps]:
                self.left_out.append(
                    f"{path} has no lines on {len(missing)} of the {resume_step} steps so far, the first of them step "
                    f"{missing[0]}: these figures are lost, and the run goes on without them"
                )
            elif resume_step and seal and not damaged and not _holds(own if own.is_file() else path, seal):
                self.left_out.append(
                    f"{path} is not what was written up to the checkpoint of step {resume_step}: figures in it may be "
                    "wrong. Was it edited, is the disk damaged, or was the run set back from there? No step reads it"
                )
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in self.kept).encode())
            self._stream = path.open("ab", buffering=0)
        except WriteError:
            raise
        except OSError as error:
            raise WriteError(
                f"{path} cannot be read or written ({error.strerror or error}). Make it a file that this user may "
                "write to, or move it away: only its figures would be missing."
            ) from error

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends a line. Where that fails, it waits in memory for the next one; see `take_problem`."""
        self._unwritten += (json.dumps({"kind": kind, "step": step, **values}) + "\n").encode()
        self._flush()

    def _flush(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._stream.write(self._unwritten) or 0 :]
        except OSError as error:
            self._problem = error

    def take_problem(self) -> OSError | None:
        """Returns why a line could not be written at once, if that has happened since the last call."""
        problem, self._problem = self._problem, None
        return problem

    def sync(self) -> dict[str, Any]:
        """Makes the lines durable. Must be called before a checkpoint, since the log must reach at least as far.

        Returns:
            The file's size and SHA-256, for the checkpoint to record: a later session drops no line before that.

        Raises:
            OSError: the disk cannot.
        """
        os.fsync(self._stream.fileno())
        return {"bytes": self.path.stat().st_size, "sha256": file_digest(self.path)}

    def close(self) -> int:
        """Closes the file, and returns the number of lines that could not be written."""
        self._flush()
        self._stream.close()
        return self._unwritten.count(b"\n")


def set_aside(path: Path, name: str) -> Path:
    """Returns the path of a log that is kept beside the one in use."""
    return path.with_name(f"{path.stem}.{name}{path.suffix}")


def _holds(path: Path, seal: Mapping[str, Any]) -> bool:
    """Returns whether a log begins with what it was when it was sealed."""
    return hashlib.sha256(path.read_bytes()[: seal["bytes"]]).hexdigest() == seal["sha256"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads all complete lines; damaged ones, and a last line cut off by a crash, are left out."""
    return read_lines(path)[0] if path.is_file() else []


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Reads all complete lines, and the numbers (1 for the first) of the first `MOST_NAMED` that are damaged.

    Raises:
        OSError: the file cannot be read.
    """
    if not os.path.lexists(path):
        return [], []
    lines: list[dict[str, Any]] = []
    damaged: list[int] = []
    for number, text in enumerate(reading.read_lines(path, LARGEST_FILE_BYTES, LONGEST_LINE_BYTES), 1):
        if text is not None and not text.endswith(b"\n"):
            break  # cut off
        line = None if text is None else parse_line(text)
        if line is not None:
            lines.append(line)
        elif len(damaged) < MOST_NAMED:
            damaged.append(number)
        if number >= MOST_LINES:
            raise OSError(errno.EFBIG, f"it has more than {MOST_LINES:,} lines, the most that are read", str(path))
    return lines, damaged


def parse_line(text: bytes) -> dict[str, Any] | None:
    """Reads a line; None where it is none of ours."""
    try:
        line = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    return line if has_form(line) else None
