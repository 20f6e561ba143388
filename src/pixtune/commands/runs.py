"""`pixtune runs`, `stop` and `ask`: what runs there are, and what is asked of one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pixtune.commands.run_words import (
    STYLES,
    USUAL_ROOT,
    best_word,
    end_of,
    figure,
    find_run,
    left_word,
    state_word,
    steps_word,
)
from pixtune.commands.words import complete_run
from pixtune.errors import RunError
from pixtune.inputs.printing import one_line
from pixtune.progress import say
from pixtune.runs.read import RunReader, find_runs, read_run
from pixtune.runs.signals import ask_run, kill_run, let_go_on, stop_run
from pixtune.runs.state import RunState

RunFolder = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Output folder of a run, or its name below ./runs.",
        show_default=False,
        autocompletion=complete_run,
    ),
]
FILE_WIDTH = 160
"""Width of a table that is not printed to a terminal."""
WAIT_SECONDS = 600.0
"""Time that `pixtune stop` waits for a run to end, at most."""


def runs(
    root: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="Folder to look for runs in; default: ./runs, or the current one."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List runs: state, steps, loss, best step, time left.

    Example: pixtune runs ./runs
    """
    root = root or (USUAL_ROOT if USUAL_ROOT.is_dir() else Path())
    found, troubles = list[RunState](), list[str]()
    for folder in find_runs(root):
        try:
            found.append(read_run(folder))
        except RunError as error:
            troubles.append(str(error))
    found.sort(key=lambda run: (run.state != "running", -run.changed))
    if json_output:
        typer.echo(json.dumps([run.to_dict() for run in found], indent=1))
    elif found:
        console = Console()
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console = Console(width=FILE_WIDTH)
        console.print(table_of(found, root, console.width))
    else:
        typer.echo(f"no runs in {one_line(str(root))}: `pixtune train CONFIG` writes one into its output_dir")
    for trouble in troubles:
        typer.echo(f"warning: {trouble}", err=True)


COLUMNS: Sequence[tuple[str, int, Callable[[RunState], str]]] = (
    ("state", 0, state_word),
    ("step", 0, steps_word),
    ("loss", 50, lambda run: figure(run.smoothed_loss)),
    ("left", 62, left_word),
    ("held-out", 72, lambda run: figure(run.held_out_loss.loss if run.held_out_loss else None)),
    ("best", 92, best_word),
    ("s/step", 104, lambda run: "-" if run.seconds_per_step is None else f"{run.seconds_per_step:.3f}"),
    ("peak GiB", 116, lambda run: "-" if run.peak_memory_gib is None else f"{run.peak_memory_gib:.1f}"),
    ("began", 140, lambda run: (run.began or "-")[:16]),
)
"""Columns beside the name, with the width of the terminal from which each is shown."""


def table_of(found: Sequence[RunState], root: Path, width: int) -> Table:
    """Builds the list of runs for a terminal of this width."""
    columns = [column for column in COLUMNS if column[1] <= width]
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2 if width >= 50 else 1, 0, 0))
    table.add_column("run", overflow="ellipsis", no_wrap=True, ratio=None)
    for name, _, _ in columns:
        table.add_column(name, no_wrap=True, justify="left" if name in ("state", "began") else "right")
    for run in found:
        name = run.name if run.folder == root else str(run.folder.relative_to(root))
        cells = [Text(word(run), STYLES.get(word(run), "")) for _, _, word in columns]
        table.add_row(Text(one_line(name)), *cells)
    return table


def stop(
    run: RunFolder,
    kill: Annotated[bool, typer.Option("--kill", help="End it at once; steps that are unsaved are lost.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has ended.")] = True,
) -> None:
    """Stop a run. It saves the step that it takes, and can be resumed.

    Example: pixtune stop runs/my-style
    """
    folder = find_run(run)
    state = read_run(folder)
    typer.echo(one_line(kill_run(state) if kill else stop_run(state)))
    if not wait:
        return
    reader, deadline = RunReader(folder), time.monotonic() + WAIT_SECONDS
    while (state := reader.read()).state == "running":
        if time.monotonic() > deadline:
            raise RunError(f"{folder} is still running after {WAIT_SECONDS / 60:.0f} minutes: --kill ends it at once.")
        time.sleep(0.2)
    for line in end_of(state):
        say(Console(), line)


def ask(
    what: Annotated[
        Literal["save", "sample", "pause", "continue"],
        typer.Argument(metavar="WHAT", help="save, sample, pause or continue.", show_default=False),
    ],
    run: RunFolder,
) -> None:
    """Ask a run to save or sample now, to pause, or to continue.

    It answers after the next step that logging_steps divides. A run that pauses saves first, and keeps its memory.

    Example: pixtune ask sample runs/my-style
    """
    state = read_run(find_run(run))
    if what == "continue":
        typer.echo(one_line(let_go_on(state)))
    else:
        requests: dict[str, Literal["save_now", "sample_now", "pause"]] = {
            "save": "save_now", "sample": "sample_now", "pause": "pause",
        }  # fmt: skip
        typer.echo(one_line(ask_run(state, requests[what])))
