"""Counts the rungs of recorded cells by today's planner: python benchmarks/recount.py [FOLDER]

What random_cells.py has recorded holds the peak that each cell's plan was expected to have then. This counts the same
rung again as the planner counts today, and prints how far that is from the measured peak: by kinds of cells, in all,
and each cell beyond `--beyond` percent. It needs no GPU, and half a minute. A change of the planner's constants is
judged by the two outputs before and after it.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cells import markdown_header, markdown_line
from drawn_cell import cell_of, prepare, weigh

from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB
from pixtune.plan.demands import demands_of
from pixtune.plan.footprint import Footprint
from pixtune.plan.rungs import Rung
from pixtune.plan.situation import situation_of
from pixtune.plan.training import with_todays_names

RECORDED = Path(__file__).parent / "results" / "random_cells_h200"
MOST_MICRO_BATCHES = 2
"""Micro-batches of a step up to which a measured peak counts: with more a step is captured before the optimizer has
states, and torch counts none of what a replay uses."""


@dataclass(frozen=True)
class Recounted:
    """A recorded cell, counted anew."""

    name: str
    rung: Rung
    footprint: Footprint
    planned_gib: float
    measured_gib: float

    @property
    def error_percent(self) -> float:
        return 100 * (self.planned_gib / self.measured_gib - 1)

    @property
    def kind(self) -> tuple[str, str, str, str]:
        """Model, format, how much is recomputed, and what is trained."""
        count, blocks = self.rung.recomputed_blocks, self.footprint.num_blocks
        again = "all blocks" if count == blocks else "some blocks" if count else "no block"
        model = "FLUX" if len(self.footprint.kinds) > 1 else "Qwen-Image"
        return model, self.rung.weights_format, again, "MLPs, too" if self.footprint.trains_mlp else "attention"


def recount(path: Path, folder: Path) -> Recounted | None:
    """Counts a recorded cell; None: nothing was measured, or not all.

    Args:
        path: its JSON.
        folder: an empty folder for its pictures and the model's config.
    """
    result: dict[str, Any] = json.loads(path.read_text())
    cell = cell_of(result)
    if result["outcome"] in ("refused", "unfinished") or cell.accumulation > MOST_MICRO_BATCHES:
        return None
    config, footprint = weigh(prepare(cell, folder))
    plan = with_todays_names(result["plan"])
    rung = Rung(**{field.name: plan[field.name] for field in fields(Rung) if field.name in plan})
    situation = situation_of(facts_as("H200"), footprint, replace(demands_of(config), optimizer=plan["optimizer"]))
    return Recounted(path.stem, rung, footprint, situation.peak(rung) / GIB, result["measured_peak_gib"])


def summary(cells: Sequence[Recounted]) -> str:
    """Returns how far plans are from what was measured."""
    errors = sorted(abs(each.error_percent) for each in cells)
    signed = [each.error_percent for each in cells]
    return (
        f"{len(cells)} cells: median {errors[len(errors) // 2]:.1f}%, 95th percentile "
        f"{errors[math.ceil(0.95 * len(errors)) - 1]:.1f}%, from {min(signed):+.1f} to {max(signed):+.1f}%"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=RECORDED)
    parser.add_argument("--beyond", type=float, default=3.0, help="percent from which on a cell is named")
    parser.add_argument("--without", nargs="*", default=(), help="beginnings of cells' names that are left out")
    arguments = parser.parse_args()
    cells: list[Recounted] = []
    for path in sorted(arguments.folder.glob("*.json")):
        with tempfile.TemporaryDirectory() as name:
            if not path.stem.startswith(tuple(arguments.without)) and (found := recount(path, Path(name))):
                cells.append(found)
    kinds: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for each in cells:
        kinds[each.kind].append(each.error_percent)
    print(markdown_header(("model", "format", "recomputed", "LoRA on", "cells", "mean", "least", "most")))
    for kind, errors in sorted(kinds.items()):
        figures = (f"{value:+.1f}%" for value in (sum(errors) / len(errors), min(errors), max(errors)))
        print(markdown_line([*kind, str(len(errors)), *figures]))
    print(f"\n* {summary(cells)}")
    for each in sorted(cells, key=lambda each: each.error_percent):
        if abs(each.error_percent) > arguments.beyond:
            print(f"* {each.name}: {each.planned_gib:.2f} planned, {each.measured_gib:.2f} measured, "
                  f"{each.error_percent:+.1f}%")  # fmt: skip


if __name__ == "__main__":
    main()
