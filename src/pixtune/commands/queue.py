"""`pixtune queue`: several runs in a row on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pixtune.commands.run_words import STYLES, line_of
from pixtune.commands.runs import FILE_WIDTH
from pixtune.commands.words import HELP_OPTIONS, TAKES_KEYS, complete_words, config_and_overrides
from pixtune.errors import PixtuneError, RunError
from pixtune.inputs.printing import one_line
from pixtune.progress import in_words, say
from pixtune.queue.entries import ENDED, Entry, read_time
from pixtune.queue.starting import advance, settle, stop_entry
from pixtune.queue.store import Queue, usual_folder
from pixtune.runs.read import read_run

LOOK_SECONDS = 1.0

queue_app = typer.Typer(
    help="Run several configs in a row on this machine.\n\nWhat ends, however it does, starts the next.\n\n"
    "Example: pixtune queue add train_configs/demo.yaml && pixtune queue run",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=HELP_OPTIONS,
)

Folder = Annotated[
    Path | None,
    typer.Option(
        "--queue", metavar="FOLDER", envvar="PIXTUNE_QUEUE", show_envvar=False,
        help="Folder of the queue; default: PIXTUNE_QUEUE, or one in your state folder.",
    ),
]  # fmt: skip
Number = Annotated[int, typer.Argument(metavar="ID", help="Number that `pixtune queue list` shows.")]
NumberOrAll = Annotated[
    int | None, typer.Argument(metavar="ID", help="Number of an entry; default: the whole queue.", show_default=False)
]


def _open(folder: Path | None) -> Queue:
    return Queue(folder or usual_folder())


@queue_app.command(context_settings=TAKES_KEYS)
def add(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG KEY=VALUE",
            help="The words of `pixtune train`.",
            show_default=False,
            autocompletion=complete_words,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="The config file, where it is not the first word.")
    ] = None,
    at: Annotated[
        str | None, typer.Option(metavar="TIME", help="Earliest start: 22:30, '2026-12-24 22:30', +90min, +2h, +1d.")
    ] = None,
    first: Annotated[bool, typer.Option("--first", help="Put it at the queue's beginning.")] = False,
    queue: Folder = None,
) -> None:
    """Check a config, and put a run at the queue's end.

    The config is copied: what is changed in the file afterwards counts for later runs alone.

    Example: pixtune queue add train_configs/demo.yaml rank=32 --at 22:30
    """
    path, overrides = config_and_overrides(words, config)
    start_at = None if at is None else read_time(at, datetime.now().astimezone()).timestamp()
    opened = _open(queue)
    entry = opened.add(path, overrides, start_at)
    if first:
        entry = opened.move(entry.id, 1)
    typer.echo(f"entry {entry.id}, number {entry.place} of those that wait: {one_line(str(entry.output_dir))}")
    if opened.is_paused:
        typer.echo("the queue is paused: `pixtune queue start` lets it go on")
    elif not any(each.state == "running" for each in opened.entries()):
        typer.echo("nothing runs: `pixtune queue run` starts the queue")


@queue_app.command("list")
def list_entries(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    queue: Folder = None,
) -> None:
    """List the queue: what has ended, runs and waits.

    Example: pixtune queue list
    """
    opened = _open(queue)
    settle(opened)
    entries = opened.entries()
    if json_output:
        typer.echo(
            json.dumps({"is_paused": opened.is_paused, "entries": [each.to_dict() for each in entries]}, indent=1)
        )
        return
    if not entries:
        typer.echo("the queue is empty: `pixtune queue add CONFIG` adds a run")
        return
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=FILE_WIDTH)
    if opened.is_paused:
        typer.echo("the queue is paused: `pixtune queue start` lets it go on")
    console.print(table_of(entries))
    for entry in entries:
        if entry.state == "failed" and entry.error:
            say(console, f"entry {entry.id}: {entry.error.splitlines()[0]} (log: {opened.log_of(entry.id)})")


def table_of(entries: Sequence[Entry]) -> Table:
    """Builds the list for a terminal."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name, least in (("id", 3), ("state", 8), ("run", 12), ("how far", 12)):
        justify: Literal["left", "right"] = "right" if name == "id" else "left"
        table.add_column(name, no_wrap=True, overflow="ellipsis", min_width=least, justify=justify)
    for entry in entries:
        word = "held" if entry.is_held else entry.state
        table.add_row(
            str(entry.id), Text(word, STYLES.get(word, "")), Text(one_line(str(entry.output_dir))), Text(how_far(entry))
        )
    return table


def how_far(entry: Entry) -> str:
    """Returns what is to be known of an entry in its state."""
    if entry.state == "waiting":
        at = "" if entry.start_at is None else f", not before {datetime.fromtimestamp(entry.start_at):%Y-%m-%d %H:%M}"
        return f"number {entry.place}{at}"
    if entry.state == "running":
        try:
            return line_of(read_run(entry.output_dir))
        except RunError:
            return "starting"
    took = "" if entry.began is None or entry.ended is None else f"after {in_words(entry.ended - entry.began)}"
    return took + ("" if entry.exit_code in (None, 0, 130) else f", exit code {entry.exit_code}")


@queue_app.command()
def move(
    number: Number,
    place: Annotated[str, typer.Argument(metavar="PLACE", help="Number among those that wait, first, or last.")],
    queue: Folder = None,
) -> None:
    """Move a run that waits to another place.

    Example: pixtune queue move 7 first
    """
    places = {"first": 1, "last": 2**31}
    if place not in places and not (place.isdecimal() and place.isascii() and 0 < int(place) < 2**31):
        raise typer.BadParameter(f"{place!r} is no place: give 1 for the next, or first, or last")
    entry = _open(queue).move(number, places.get(place) or int(place))
    typer.echo(f"entry {entry.id} is number {entry.place} of those that wait")


@queue_app.command()
def remove(
    numbers: Annotated[list[int] | None, typer.Argument(metavar="ID", help="Numbers of entries.")] = None,
    ended: Annotated[bool, typer.Option("--ended", help="All that have ended.")] = False,
    queue: Folder = None,
) -> None:
    """Take runs out of the queue. Their output folders stay.

    Example: pixtune queue remove 7
    """
    opened = _open(queue)
    settle(opened)
    if not numbers and not ended:
        raise typer.BadParameter("name the entries to remove, or give --ended")
    all_ended = [each.id for each in opened.entries() if each.state in ENDED] if ended else []
    for number in dict.fromkeys([*(numbers or []), *all_ended]):
        typer.echo(f"removed entry {number}: {one_line(str(opened.remove(number).output_dir))} stays as it is")


@queue_app.command()
def pause(number: NumberOrAll = None, queue: Folder = None) -> None:
    """Start no further run, or not one of them. What runs goes on.

    Example: pixtune queue pause
    """
    _open(queue).pause(number)
    typer.echo("paused: no further run is started" if number is None else f"entry {number} waits until it is started")


@queue_app.command()
def start(number: NumberOrAll = None, queue: Folder = None) -> None:
    """End a pause, or let one run start as soon as its turn comes.

    One that failed, was stopped or killed waits again, and goes on from its checkpoint.

    Example: pixtune queue start 7
    """
    opened = _open(queue)
    settle(opened)
    opened.start(number)
    typer.echo("runs are started again" if number is None else f"entry {number} is number {opened.entry(number).place}")


@queue_app.command()
def stop(number: Number, queue: Folder = None) -> None:
    """Stop a run of the queue. It saves the step that it takes; the next one starts.

    Example: pixtune queue stop 7
    """
    typer.echo(one_line(stop_entry(_open(queue), number)))


@queue_app.command()
def run(
    until_done: Annotated[bool, typer.Option("--until-done", help="End once nothing runs or can be started.")] = False,
    queue: Folder = None,
) -> None:
    """Start what is due, and go on doing so.

    Runs are processes of their own: they go on when this ends, and each starts the next one at its end. Needed to
    begin, and for start times. The exit code with --until-done is 1 where a run has failed.

    Example: pixtune queue run
    """
    opened, console = _open(queue), Console()
    attendants = list[subprocess.Popen[bytes]]()
    told = {each.id: each.state for each in opened.entries()}
    failed, trouble = False, ""
    try:
        while True:
            try:
                attendants = [each for each in (*attendants, *advance(opened)) if each.poll() is None]
                trouble = ""
            except PixtuneError as error:  # a full disk may have room again
                if str(error) != trouble:
                    say(console, f"warning: {error}")
                trouble = str(error)
            entries = [] if trouble else opened.entries()
            for entry in entries:
                if told.get(entry.id) != entry.state:
                    told[entry.id] = entry.state
                    failed |= entry.state in ("failed", "killed")
                    say(console, f"{datetime.now():%H:%M:%S} entry {entry.id} is {entry.state}: {entry.output_dir}")
            starts = not opened.is_paused
            is_busy = any(
                each.state == "running" or (starts and each.state == "waiting" and not each.is_held) for each in entries
            )
            if until_done and not trouble and not is_busy:
                raise typer.Exit(1 if failed else 0)
            time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        runs_on = any(each.state == "running" for each in opened.entries())
        words = "the run goes on, and starts the next one at its end; `pixtune queue pause` keeps it from that"
        say(console, words if runs_on else "nothing is running")
        raise typer.Exit(0) from None
