"""Prints the table of neighbours.py: how each limit's plan does beside the best rung that was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from card_sizes import describe_plan
from cells import markdown_header, markdown_line
from neighbouring_rungs import CHOSEN, FEWER_BITS

from pixtune.bench.result import Result

GOAL = 1.1
"""Time of a plan over the best one's that is aimed at."""
COLUMNS = ("model", "limit, GiB", "plan", "s/step", "estimated", "best of the same or more bits", "s/step", "plan/best",
           "best of fewer bits", "s/step", "plan/best", "tried")  # fmt: skip


def rows(values: Mapping[str, Any]) -> list[tuple[list[str], float | None]]:
    """Returns the lines of a case's table, and the plan's time over the best one's of the same or more bits."""
    case, lines = values["case"], []
    for limit, found in values["limits"].items():
        of = [
            (each["relation"], each["rung"], counted(values["results"], each["rung"], float(limit))) for each in found
        ]
        ran = [(relation, rung, result) for relation, rung, result in of if result is not None and fits(result)]
        plan = next((result for relation, _, result in of if relation == CHOSEN and result), None)
        seconds = (plan or {}).get("seconds")
        text, ratio = [case["model"], limit, describe_rung(found[0]["rung"])], None
        text += ["" if seconds is None else f"{seconds:.3f}", "" if plan is None else f"{plan['expected_seconds']:.3f}"]
        for fewer in (False, True):
            of_these = [each for each in ran if (each[0] == FEWER_BITS) == fewer]
            best = min(of_these, key=lambda each: each[2]["seconds"], default=None)
            if best is None or seconds is None:
                text += ["none fits" if fewer else "", "", ""]
                continue
            over = seconds / best[2]["seconds"]
            ratio = ratio if fewer else over
            name = "the plan" if best[0] == CHOSEN else describe_rung(best[1])
            text += [name, f"{best[2]['seconds']:.3f}", f"{over:.3f}"]
        lines.append(([*text, f"{sum(result is not None for _, _, result in of)} of {len(of)}, {len(ran)} fit"], ratio))
    return lines


def counted(results: Sequence[Result], rung: Mapping[str, Any], limit_gib: float) -> Result | None:
    """Returns what counts for a rung under a limit: it was measured there, or fitted a smaller one."""
    known = [each for each in results if each["rung"] == rung]
    fitted = [each for each in known if fits(each) and each["limit_gib"] <= limit_gib]
    return next(iter(fitted), next((each for each in known if each["limit_gib"] == limit_gib), None))


def describe_rung(rung: Mapping[str, Any]) -> str:
    return describe_plan(rung) + (", transposes kept" if rung["kept_transposes"] else "")


def print_table(output: Path) -> None:
    """Prints the table of all files in a folder, and how many plans reach the goal."""
    every = [json.loads(path.read_text()) for path in sorted(output.glob("*.json"))]
    print(markdown_header(COLUMNS))
    lines = [line for values in every for line in rows(values)]
    for text, _ in lines:
        print(markdown_line(text))
    ratios = [ratio for _, ratio in lines if ratio is not None]
    if ratios:
        print(
            f"\n* {sum(ratio <= GOAL for ratio in ratios)} of {len(ratios)} plans are at most 10% slower than the best "
            f"of the same or more bits, worst {max(ratios):.3f}"
        )


def fits(result: Result) -> bool:
    """Returns whether a rung ran as it is, with its captures."""
    return "seconds" in result and not result["gave_up"]
