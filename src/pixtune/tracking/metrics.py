"""Writes and reads `metrics.jsonl`, which every run has: one JSON object a line.

Lines have `kind` and `step`; figures carry their unit in the name. The kinds:

"step": loss, gradient norm, rate, seconds and peak memory of a step.
"first_step": how long the first step of a session took, compilation included. A resumed run has one for each session.
"drift": steps have become slower, with the causes that were measured ("data", "recompilation", "memory", "spill",
    "throttling") and the warning that was printed.
"validation": held-out loss, and its four quarters by sigma.
"sample": path of a generated picture, with its prompt, seed and controls.
"memory": once, at the end of a run: the memory of each stage, on a GPU the plan's estimate beside it, and how many
    captures were planned and made, what was saved for them, and why they were given up, if they were.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pixtune.storage.files import write_atomically

FILE_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends lines; a resumed run first drops those after its checkpoint, so that the log is that of one run."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if resume_step else []
        """Lines of the run so far."""
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in self.kept).encode())
        self._stream = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        self._stream.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._stream.flush()

    def sync(self) -> None:
        """Makes the lines durable. Must be called before a checkpoint, since the log must reach at least as far."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads all complete lines; a last line cut off by a crash is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # after the last newline: empty, or cut off
