"""Decides whether what a session printed and left is right, by rules that share no code with what is judged."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAVED = re.compile(r"^step (\d+): saved ", re.MULTILINE)
RESUMED = re.compile(r"^resuming after step (\d+) from ", re.MULTILINE)
EXCUSES = ("could not be written", "damaged lines", "failed at step", "has no lines on")
"""Parts of warnings after which the log may lack lines."""
CHANGED = "is not what was written up to the checkpoint"
"""Part of the warning after which the log may have other figures."""
COMPARED = ("step", "validation", "sample")
"""Kinds of lines of the log that are the same however often a run was interrupted."""
OF_THE_CLOCK = re.compile(r".*(seconds|gib|bytes|per_second)")
SLOW_SECONDS = 60.0
"""Time to end after a signal that is a failure. The promise is 5 s and a step, on a machine that nobody else uses."""
LEFTOVERS = ("*.tmp", ".checkpoint-*", "run.lock", ".run.lock*", ".writable*")


@dataclass
class Course:
    """A plain model of what a run may go on from: the steps that were reported as saved, cut where it went back."""

    steps: list[int] = field(default_factory=list)
    damaged: set[int] = field(default_factory=set)

    def floor(self, on_disk: Sequence[int]) -> int:
        """Returns the step from which the run must go on at least; 0 where it may begin anew."""
        return max((step for step in self.steps if step in on_disk and step not in self.damaged), default=0)

    def read(self, printed: str, set_back_to: int | None = None) -> None:
        """Follows a session by what it printed."""
        resumed = RESUMED.search(printed)
        if resumed or set_back_to is not None:
            start = int(resumed[1]) if resumed else set_back_to or 0
            self.steps = [step for step in self.steps if step <= start]
        for match in SAVED.finditer(printed):
            step = int(match[1])
            self.steps = [each for each in self.steps if each < step] + [step]
            self.damaged.discard(step)


@dataclass(frozen=True)
class Ended:
    """How a session ended."""

    code: int
    printed: str
    seconds: float
    signalled: tuple[str, ...] = ()
    """Signals that reached it."""
    fault: str = ""
    """The call that failed, if one did."""
    seconds_after_signal: float = 0.0
    by_launcher: bool = False
    num_orphans: int = 0
    """Processes of it that did not end by themselves."""

    @property
    def outcome(self) -> str:
        """One of finished, stopped, killed, refused."""
        if self.code == 0:
            return "finished"
        if "SIGKILL" in self.signalled and (self.by_launcher or self.code < 0):
            return "killed"
        if self.signalled and (
            self.by_launcher or self.code == 130 or self.code < 0 or "ending at once" in self.printed
        ):
            return "stopped"
        return "refused"


def faults_of(ended: Ended, causes: Sequence[str]) -> Iterator[str]:
    """Yields what is wrong about how a session ended.

    Args:
        causes: what may make it refuse to go on.
    """
    tracebacks = re.findall(r"Traceback \(most recent.*?(?=\n\S|\Z)", ended.printed, re.DOTALL)
    if any(not ended.by_launcher or re.search(r"/(src|site-packages)/pixtune/", text) for text in tracebacks):
        yield "a traceback"
    if ended.num_orphans:
        yield f"left {ended.num_orphans} processes behind"
    if ended.outcome == "refused":
        if not causes:
            yield f"refused (exit code {ended.code}) although nothing had happened"
        errors = re.findall(r"^error: ", ended.printed, re.MULTILINE)
        if len(errors) != 1 and not ended.by_launcher:
            yield f"ended with code {ended.code} and {len(errors)} error lines in place of one"
    if ended.outcome == "finished" and ended.fault and not re.search("^(warning|error):", ended.printed, re.M | re.I):
        yield f"an I/O error was silent: {ended.fault}"
    if ended.seconds_after_signal > SLOW_SECONDS:
        yield f"took {ended.seconds_after_signal:.0f} s to end after {', '.join(ended.signalled)}"


def log_of(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a log that are compared, without what the clock and the memory allocator decide."""
    lines = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line.get("kind") in COMPARED:
            lines.append({key: value for key, value in line.items() if not OF_THE_CLOCK.fullmatch(key)})
    return lines


def differing_log(want: Sequence[dict[str, Any]], got: Sequence[dict[str, Any]], printed: str) -> Iterator[str]:
    """Yields how a log differs from the uninterrupted run's; lines may be missing where a warning has said so."""
    extra = [line for line in got if line not in want]
    if extra and CHANGED not in printed:
        yield f"the log has lines that the uninterrupted run's has not: {extra[:3]}"
    missing = [line for line in want if line not in got]
    if missing and not any(excuse in printed for excuse in (*EXCUSES, CHANGED)):
        yield f"the log lacks lines, and nobody was told: {missing[:3]}"
    if len({json.dumps(line, sort_keys=True) for line in got}) < len(got):
        yield "the log has lines twice"
    if not extra and [line for line in want if line in got] != list(got):
        yield "the log has its lines in another order"


def differing_files(want: Path, got: Path, names: Sequence[str]) -> Iterator[str]:
    """Yields the files whose tensors, pixels or texts are not the same bit for bit."""
    from safetensors import safe_open

    def content(path: Path) -> object:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:  # bf16 is no numpy type: bytes are compared
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                header = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
            data = path.read_bytes()
            return header, data[8 + int.from_bytes(data[:8], "little") :]
        return path.read_bytes()

    for name in names:
        if not (got / name).is_file():
            yield f"{name} is missing"
        elif content(want / name) != content(got / name):
            yield f"{name} differs"


def private_words(paths: Sequence[Path], words: Sequence[str]) -> Iterator[str]:
    """Yields the exported files that hold one of the words, for example the path of the run."""
    for path in paths:
        data = path.read_bytes()
        yield from (f"{path.name} holds {word!r}" for word in words if word.encode() in data)


def leftovers(output: Path) -> Iterator[str]:
    """Yields temporary files in a folder in which no run is at work."""
    for pattern in LEFTOVERS:
        yield from (f"{path.relative_to(output)} was left behind" for path in output.rglob(pattern))
