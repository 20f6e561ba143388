"""`pixtune watch`: a run's figures and curve in the terminal while it trains, or a line now and then in a file."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pixtune.commands.chart import draw_chart
from pixtune.commands.run_words import (
    EXIT_CODES,
    STYLES,
    best_word,
    end_of,
    figure,
    find_run,
    left_word,
    line_of,
    state_word,
    steps_word,
)
from pixtune.commands.runs import RunFolder
from pixtune.inputs.printing import one_line
from pixtune.launch.stop import STOPPED
from pixtune.progress import LINE_EVERY_SECONDS, say
from pixtune.report.record import smooth, smoothing_window
from pixtune.runs.read import RunReader
from pixtune.runs.state import RunState

LOOK_SECONDS = 1.0
MOST_ROWS = 16
"""Height of the chart, at most."""
FIGURE_ROWS = 8
"""Rows that everything beside the chart needs."""


def watch(
    run: RunFolder,
    once: Annotated[bool, typer.Option("--once", help="Show the run as it is now, and end.")] = False,
) -> None:
    """Watch a run: its curve and figures, until it ends.

    Ctrl-C ends the watching alone, with 130. The exit code is 0 where the run finishes, 130 where it is stopped, 1
    where it fails or is killed. Into a file or pipe it prints a line now and then.

    Example: pixtune watch runs/my-style
    """
    folder, console = find_run(run), Console()
    reader = RunReader(folder, with_curve=True)
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            last = _watch_live(reader, console, once)
        else:
            last = _watch_by_lines(reader, console, once)
    except KeyboardInterrupt:
        typer.echo("no longer watching; the run goes on", err=True)
        raise typer.Exit(STOPPED) from None
    if last.state != "running":
        for line in end_of(last):
            say(console, line)
    raise typer.Exit(0 if once else EXIT_CODES[last.state])


def _watch_live(reader: RunReader, console: Console, once: bool) -> RunState:
    state = reader.read()
    if once or state.state != "running":
        console.print(screen_of(state, console))
        return state
    with Live(screen_of(state, console), console=console, auto_refresh=False, transient=False) as live:
        while state.state == "running":
            time.sleep(LOOK_SECONDS)
            state = reader.read()
            live.update(screen_of(state, console), refresh=True)
    return state


def _watch_by_lines(reader: RunReader, console: Console, once: bool) -> RunState:
    """Prints a line where something has changed, at most every `LINE_EVERY_SECONDS`, and each warning once."""
    told, told_at, told_warnings = "", -LINE_EVERY_SECONDS, list[str]()
    while True:
        state = reader.read()
        line, is_over = line_of(state), once or state.state != "running"
        for warning in state.warnings:
            if warning not in told_warnings:
                say(console, f"warning: {warning}")
        told_warnings = [*state.warnings]
        if line != told and (is_over or time.monotonic() - told_at >= LINE_EVERY_SECONDS):
            say(console, line)
            told, told_at = line, time.monotonic()
        if is_over:
            return state
        time.sleep(LOOK_SECONDS)


def screen_of(run: RunState, console: Console) -> RenderableType:
    """Builds the whole picture for a console of its size."""
    width, height = console.width, console.height
    ascii_only = console.options.ascii_only
    rows = list[RenderableType]()
    word = state_word(run)
    rows.append(Text.assemble((one_line(run.name), "bold"), "  ", (word, STYLES.get(word, "")), no_wrap=True))
    if run.num_steps:
        bar = Table.grid(padding=(0, 1), expand=False)
        steps = Text(steps_word(run))
        bar.add_row(ProgressBar(total=run.num_steps, completed=run.step, width=max(width - len(steps) - 2, 4)), steps)
        rows.append(bar)
    else:
        rows.append(Text(f"step {steps_word(run)}"))
    rows.append(_figures(run, width))
    losses = smooth(run.losses, smoothing_window(len(run.losses)))
    marks = [(each.step, each.loss) for each in run.validations]
    last_step = max([run.num_steps or 0, run.step, *(step for step, _ in losses[-1:])])
    chart = draw_chart(losses, marks, width, min(height - FIGURE_ROWS - 2, MOST_ROWS), last_step, ascii_only)
    if chart:
        title = Text("training loss" + (", smoothed" if len(run.losses) >= 20 else ""), style="cyan")
        if marks:
            title.append("   o held-out", "bold yellow")
        rows += [title, *chart]
    elif not run.losses:
        rows.append(Text("no step is logged yet: loading, or encoding pictures and captions", style="dim"))
    for warning in run.warnings[-1:]:
        rows.append(_cut(f"warning: {one_line(warning)}", "yellow"))
    if run.samples:
        rows.append(_cut(f"newest sample: {run.folder / run.samples[-1].path}", "dim"))
    if run.requests:
        rows.append(_cut(f"asked for: {', '.join(run.requests)}", "dim"))
    return Group(*rows)


def _figures(run: RunState, width: int) -> RenderableType:
    """Returns the figures side by side, as many as there is room for in three rows."""
    figures = [("loss", figure(run.smoothed_loss))]
    figures += [("left", left_word(run))] if run.state == "running" else []
    figures += [("held-out", figure(run.held_out_loss.loss))] if run.held_out_loss else []
    figures += [("best", best_word(run))] if run.best else []
    figures += [] if run.seconds_per_step is None else [("s/step", f"{run.seconds_per_step:.3f}")]
    figures += [] if run.peak_memory_gib is None else [("peak", f"{run.peak_memory_gib:.1f} GiB")]
    figures += [("saved", f"step {run.checkpoints[-1].step:,}")] if run.checkpoints else []
    text = Text()
    for name, value in figures:
        if text.plain and len(text.plain.rpartition("\n")[2]) + len(name) + len(value) + 4 > width:
            text.append("\n")
        elif text.plain:
            text.append("   ")
        text.append(f"{name} ", "dim").append(value)
    return text


def _cut(words: str, style: str) -> Text:
    return Text(one_line(words), style=style, overflow="crop", no_wrap=True)
