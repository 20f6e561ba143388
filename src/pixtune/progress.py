"""Progress for a person who waits: bars on a terminal, plain lines now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pixtune.inputs.printing import lines

T = TypeVar("T")

LINE_EVERY_SECONDS = 15.0
"""Interval of the lines that are printed where no terminal can redraw a bar."""


def say(console: Console, text: str) -> None:
    """Prints a text as it is: no markup, no colours, no breaks, and nothing in it that steers the terminal."""
    console.print(lines(text), markup=False, highlight=False, soft_wrap=True)


def printer(quiet: bool = False) -> Callable[[str], None]:
    """Returns `say` on a console of its own."""
    return partial(say, Console(quiet=quiet))


def track(items: Iterable[T], description: str, total: int, console: Console) -> Iterator[T]:
    """Yields the items, with a bar that counts them."""
    with _progress(console) as progress:
        task = progress.add_task(description, total=total, figures="")
        for item in items:
            yield item
            progress.advance(task)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    return Progress(*columns, console=console, disable=not console.is_terminal)


class StepBar:
    """The bar of a training run: steps done and left, seconds per step, images per second, loss and peak memory."""

    def __init__(self, console: Console, start: int, end: int) -> None:
        self._console, self._start, self._end = console, start, end
        self._progress = _progress(console)
        self._task: TaskID | None = None
        self._figures = ""
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        self._task = self._progress.add_task("training", total=self._end, completed=self._start, figures="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, step: int) -> None:
        """Shows that step `step` is done."""
        assert self._task is not None
        self._progress.update(self._task, completed=step, figures=self._figures)
        overdue = time.monotonic() - self._last_line > LINE_EVERY_SECONDS
        if not self._console.is_terminal and self._figures and (overdue or step == self._end):
            self._console.print(f"step {step}/{self._end}  {self._figures}")
            self._last_line = time.monotonic()

    def figures(self, loss: float, seconds_per_step: float, images_per_second: float, peak_memory_gib: float) -> None:
        """Takes the figures to show from here on."""
        memory = f"  peak {peak_memory_gib:.1f} GiB" if peak_memory_gib else ""
        self._figures = f"loss {loss:.4f}  {seconds_per_step:.3f} s/step  {images_per_second:.2f} images/s{memory}"
