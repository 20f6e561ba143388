"""Finds the smallest limit of memory of each model and method, and runs it: python benchmarks/smallest_limits.py --list

The limit, to a tenth of a GiB, is found by the planner alone: one picture of 1024x1024 pixels, rank 16. On a GPU each
is then run for a few steps at that limit, and a tenth below it, where `pixtune train` has to refuse it before it loads
anything and to name what is missing.

    python benchmarks/smallest_limits.py --output DIR --seconds 400 [MODEL[,full] ...]
    python benchmarks/smallest_limits.py --output DIR --table

`MODEL,METHOD,GIB` runs at a limit that is given and not searched for, or shows that it is refused there:

    python benchmarks/smallest_limits.py --output DIR --host-gib 64 flux,full,32 flux,full,24 qwen-image,full,79
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from architectures import ARCHITECTURES
from card_sizes import describe_plan
from cells import check_model, markdown_header, markdown_line
from drawn_cell import RandomCell, plan_cell, prepare, weigh
from neighbouring_rungs import least_limit
from random_cells import REFUSED, Room, Waiting, finish, machine_facts, run_all, start

from pixtune.bench.result import Result
from pixtune.errors import PlanError
from pixtune.hardware.facts import GIB, HardwareFacts
from pixtune.plan.demands import demands_of
from pixtune.plan.situation import situation_of
from pixtune.plan.training import with_todays_names
from pixtune.storage.files import write_atomically

USUAL = ("flux", "qwen-image", "qwen-image-edit-2511", "flux,full")
STEP_GIB = 0.1
REFUSAL_SECONDS = 90.0
"""Time after which a run that should have been refused is ended."""
COLUMNS = ("model", "method", "limit, GiB", "plan", "outcome", "s/step", "peak GiB, allocated", "planned",
           "process GiB", "refused", "after, s")  # fmt: skip


def cell_of(word: str, limit_gib: float, has_8bit_adam: bool) -> RandomCell:
    """Returns the cell of `MODEL`, `MODEL,METHOD` or `MODEL,METHOD,GIB`.

    Args:
        limit_gib: limit of one that names none.

    Raises:
        ValueError: it is not written so.
    """
    model, method, given = parts_of(word)
    check_model(model, word)
    if method not in ("full", "lora"):
        raise ValueError(f"{word}: a method is lora or full")
    limit_gib = limit_gib if given is None else given
    architecture = ARCHITECTURES[model]
    adam8bit = None if has_8bit_adam or method == "full" else False
    return RandomCell(
        seed=0, number=0, model=model, limit_gib=limit_gib, method=method, rank=16, targets="attention",
        batch_size=1, accumulation=1, size=1024, shapes=((1.0, architecture.num_text_tokens),),
        num_controls=architecture.num_controls, control_size=1024, adam8bit=adam8bit,
    )  # fmt: skip


def parts_of(word: str) -> tuple[str, str, float | None]:
    """Splits a word into model, method and limit, if it names one."""
    model, method, limit = [*word.split(","), "", ""][:3]
    return model, method or "lora", float(limit) if limit else None


def search(word: str, facts: HardwareFacts, has_8bit_adam: bool) -> RandomCell:
    """Returns the cell of a model and a method at the smallest limit, by the planner; or at the one that is given."""
    cell = cell_of(word, round(facts.total_bytes / GIB), has_8bit_adam)
    if parts_of(word)[2] is not None:
        return cell
    with tempfile.TemporaryDirectory() as name:
        config, footprint = weigh(prepare(cell, Path(name)))
    situation = situation_of(facts, footprint, replace(demands_of(config), memory_limit_bytes=None))
    return replace(cell, limit_gib=least_limit(situation))


def run(cell: RandomCell, searched: bool, facts: HardwareFacts, room: Room, end: float) -> dict[str, Any]:
    """Runs a cell at its limit and, if that was searched for, a little below it; or where it is refused, that alone."""
    results = dict[str, Result]()
    with tempfile.TemporaryDirectory() as name:
        places = [Path(name) / kind for kind in ("at", "below")]
        for place in places:
            place.mkdir()
        command = command_of(cell, places[0], room)
        try:
            plan = plan_cell(command, facts)
        except PlanError:
            return {"below": refusal(cell, command, places[0])}
        waiting = Waiting(cell, plan, places[0], command)
        run_all([waiting], room, lambda: end - time.monotonic(), lambda _, result: results.update(at=result))
        if searched:
            below = replace(cell, limit_gib=round(cell.limit_gib - STEP_GIB, 1))
            results["below"] = refusal(below, command_of(below, places[1], room), places[1])
    return results


def command_of(cell: RandomCell, folder: Path, room: Room) -> tuple[str, ...]:
    """Writes a cell's model and pictures, and returns the command that trains it within the host's memory, too."""
    return (*prepare(cell, folder), f"host_memory_limit_gib={room.host_gib:g}")


class NoPlan:
    """Plan of a run that is to have none."""

    expected_host_bytes = 0

    def to_dict(self) -> dict[str, Any]:
        return {"expected_peak_bytes": 0}


def refusal(cell: RandomCell, command: tuple[str, ...], folder: Path) -> Result:
    """Starts a run that is to be refused, and ends it where it is not."""
    waiting = Waiting(cell, NoPlan(), folder, command)  # type: ignore[arg-type]
    running = start(waiting, 0, 4)
    while running.process.poll() is None and time.monotonic() - running.began < REFUSAL_SECONDS:
        time.sleep(0.2)
    return finish(running, running.process.poll() is None)


def row(word: str, values: Mapping[str, Any]) -> str:
    """Formats a line of the table."""
    model, method, _ = parts_of(word)
    columns = [model, method, f"{values['limit_gib']:g}"]
    at, refused = values.get("at"), _refused(values.get("below"))
    if at is None:
        return markdown_line([*columns, *[""] * (len(COLUMNS) - len(columns) - len(refused)), *refused])
    seconds, memory = at["seconds_per_step_all"], at["memory"]

    def gib(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    outcome = at["outcome"] + (f", short of memory {len(at['shortages'])} times" if at["shortages"] else "")
    return markdown_line([
        *columns, describe_plan(with_todays_names(at["plan"])), outcome, f"{min(seconds):.2f}" if seconds else "",
        gib(at["measured_peak_gib"]), gib(at["expected_peak_gib"]), gib(memory.get("process_peak_gib")), *refused,
    ])  # fmt: skip


def _refused(result: Result | None) -> tuple[str, str]:
    """Returns how a run ended that was to be refused, and after how many seconds."""
    if result is None:
        return "", ""
    missing = re.search(r"([0-9.]+ [GM]iB)[a-z ]* (?:is|are) missing", " ".join(result["log"]))
    words = f"refused: {missing[1] if missing else '?'} missing" if result["outcome"] == REFUSED else result["outcome"]
    return words, f"{result['wall_seconds']:.0f}"


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="MODEL[,METHOD[,GIB]]", help=f"default: {' '.join(USUAL)}")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--host-gib", type=float, default=100.0, help="host memory that runs may take")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time after which nothing is begun")
    parser.add_argument("--list", action="store_true", help="print the limits, run nothing")
    parser.add_argument("--table", action="store_true", help="print what is there")
    arguments = parser.parse_args()
    if arguments.output is None and not arguments.list:
        parser.error("--output is missing")
    print(markdown_header(COLUMNS))
    if arguments.table:
        for file in sorted(arguments.output.glob("*.json")):
            print(row(file.stem, json.loads(file.read_text())))
        return
    facts = machine_facts(arguments.host_gib)
    has_8bit_adam = importlib.util.find_spec("bitsandbytes") is not None
    for word in arguments.words or USUAL:
        cell = search(word, facts, has_8bit_adam)
        values: dict[str, Any] = {"limit_gib": cell.limit_gib, "cell": asdict(cell)}
        if not arguments.list:
            file = arguments.output / f"{word}.json"
            if not file.exists() and time.monotonic() - began + cell.seconds < arguments.seconds:
                room = Room(1, 1, arguments.host_gib)
                values |= run(cell, parts_of(word)[2] is None, facts, room, began + arguments.seconds)
                arguments.output.mkdir(parents=True, exist_ok=True)
                write_atomically(file, json.dumps(values, indent=1).encode())
        print(row(word, values), flush=True)


if __name__ == "__main__":
    main()
