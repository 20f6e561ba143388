"""Progress for a person who waits: bars on a terminal, plain lines now and then in a log file.

Whatever takes more than a second says what it does, and in the end how long it took.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from pixtune.inputs.printing import lines

LINE_EVERY_SECONDS = 15.0
"""Interval of the lines that are printed where no terminal can redraw a bar."""
SILENT_SECONDS = 1.0
"""Time that work may take without a word."""


def say(console: Console, text: str) -> None:
    """Prints a text as it is: no markup, no colours, no breaks, and nothing in it that steers the terminal."""
    console.print(lines(text), markup=False, highlight=False, soft_wrap=True)


def printer(quiet: bool = False) -> Callable[[str], None]:
    """Returns `say` on a console of its own."""
    return partial(say, Console(quiet=quiet))


def in_words(seconds: float) -> str:
    """Formats a time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def announced(what: str, show: Callable[[str], object]) -> Iterator[None]:
    """Prints what is done within the block once that has taken a second, and at its end how long it took.

    Args:
        what: the work, for example "loading the transformer".
        show: prints a line; is called from another thread, too.
    """
    began = time.monotonic()
    timer = threading.Timer(SILENT_SECONDS, show, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (seconds := time.monotonic() - began) > SILENT_SECONDS:
        show(f"{what}: {in_words(seconds)}")


class Counter:
    """Counts work that is done, in a bar on a terminal or by a line now and then.

    Args:
        what: the work, for example "drawing samples".
        total: number of its parts.
    """

    def __init__(self, progress: Progress, console: Console, what: str, total: int) -> None:
        self._progress, self._console, self._what, self._total = progress, console, what, total
        self._task = progress.add_task(what, total=total, figures="")
        self._done, self._began = 0, time.monotonic()
        self._last_line = self._began

    def __call__(self) -> None:
        """Counts one more part."""
        self.reach(self._done + 1)

    def reach(self, done: int) -> None:
        """Shows that this many parts are done."""
        self._done = done
        self._progress.update(self._task, completed=done)
        now = time.monotonic()
        if not self._console.is_terminal and self._done < self._total and now - self._last_line > LINE_EVERY_SECONDS:
            self._last_line = now
            left = (now - self._began) * (self._total - self._done) / self._done
            say(self._console, f"{self._what}: {self._done}/{self._total}, about {in_words(left)} left")

    def end(self) -> None:
        """Takes the bar away, and prints how long the work took."""
        self._progress.remove_task(self._task)
        if (seconds := time.monotonic() - self._began) > SILENT_SECONDS:
            say(self._console, f"{self._what}: {in_words(seconds)}")


@contextmanager
def counted(what: str, total: int, console: Console) -> Iterator[Counter]:
    """Counts the parts of some work in a bar of its own. The block must call the counter after each."""
    with _progress(console) as progress:
        counter = Counter(progress, console, what, total)
        yield counter
        counter.end()


def _progress(console: Console) -> Progress:
    fixed = partial(Column, no_wrap=True)
    columns = (
        TextColumn("{task.description}", table_column=fixed(min_width=13)),
        BarColumn(bar_width=10, table_column=fixed(min_width=10)),
        MofNCompleteColumn(table_column=fixed(min_width=9)),
        TimeRemainingColumn(table_column=fixed(min_width=7)),
        TextColumn("{task.fields[figures]}", table_column=fixed(overflow="ellipsis", ratio=1)),  # cut at 80 columns
    )
    return Progress(*columns, console=console, disable=not console.is_terminal, expand=True)


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

    @contextmanager
    def aside(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """Counts the parts of work between steps, in a bar below the steps' own."""
        counter = Counter(self._progress, self._console, what, total)
        try:
            yield counter
        finally:
            counter.end()

    def figures(
        self,
        loss: float,
        seconds_per_step: float,
        images_per_second: float,
        peak_memory_gib: float,
        num_steps: int = 1,
        estimates: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Takes the figures to show from here on.

        Args:
            loss: mean over the last `num_steps` steps.
            estimates: what the optimizer estimates of itself.
        """
        memory = f"  peak {peak_memory_gib:.1f} GiB" if peak_memory_gib else ""
        of = f" (last {num_steps})" if num_steps > 1 else ""
        found = "".join(f"  {name} {value:.3g}" for name, value in estimates.items())
        self._figures = (
            f"loss {loss:.4f}{of}{found}  {seconds_per_step:.3f} s/step{memory}  {images_per_second:.2f} images/s"
        )
