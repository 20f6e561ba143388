"""Measures full-size steps within the memory of smaller cards: python benchmarks/card_sizes.py --output DIR [CELL ...]

A cell is a model, the process's memory limit in GiB and further keys of the config, joined by commas: `qwen-image,23.3`
or `flux,15.3,rank=64,--size=768`; with `--shapes` pictures and captions come in 20 shapes, and the median is of the
second half of its steps. Without any cell it measures the table of RESULTS.md. Each runs in a process of its own, and
its JSON is written at once; existing results are not measured again. `--table` prints them.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import check_model, failed_line, markdown_header, markdown_line, read_arguments, run_cells
from full_size import MANY_SHAPES, measure, prepare

from pixtune.bench.result import Result
from pixtune.plan.training import with_todays_names

LIMITS_GIB = {
    "qwen-image": (79, 47, 31, 23.3, 15.3, 11.4, 7.4),
    "flux": (79, 47, 31, 23.3, 15.3, 11.4, 7.4, 5.5),
}
"""Cards of 80, 48, 32, 24, 16, 12, 8 and 6 GB, less what a desktop and the driver take."""
STEPS, STEPS_OF_SHAPES = 8, 80
SHAPES = "--shapes"
COLUMNS = ("model", "limit, GiB", "plan", "s/step", "peak GiB, allocated", "planned", "error", "process GiB")


@dataclass(frozen=True)
class Cell:
    """One run."""

    model: str
    limit_gib: float
    size: int = 1024
    overrides: tuple[str, ...] = ()
    shapes: bool = False

    @property
    def name(self) -> str:
        """Stem of its file."""
        more = [f"size={self.size}"] if self.size != 1024 else []
        more += ["shapes"] if self.shapes else []
        return "-".join([self.model, f"{self.limit_gib:g}", *more, *self.overrides]).replace(".", "_")


def parse_cell(text: str) -> Cell:
    """Reads `MODEL,GIB[,key=value ...]`.

    Raises:
        ValueError: it is not written so.
    """
    model, limit, *rest = text.split(",")
    check_model(model, text)
    (size,) = [int(part.removeprefix("--size=")) for part in rest if part.startswith("--size=")] or [1024]
    overrides = tuple(part for part in rest if not part.startswith("--"))
    return Cell(model, float(limit), size, overrides, shapes=SHAPES in rest)


def run_cell(cell: Cell) -> Result:
    """Runs a cell; one that fails leaves the reason."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, cell.model, cell.size, shapes=MANY_SHAPES if cell.shapes else ())
        overrides = (f"gpu_memory_limit_gib={cell.limit_gib:g}", *cell.overrides)
        began = time.perf_counter()
        try:
            steps = STEPS_OF_SHAPES if cell.shapes else STEPS
            result = measure(folder, folder / "run", cell.model, cell.size, steps, overrides)
            if cell.shapes:
                half = result["seconds_per_step_all"][steps // 2 :]
                result |= {"shapes": True, "seconds_per_step_median": statistics.median(half)}
        except subprocess.CalledProcessError as error:
            result = {"model": cell.model, "overrides": list(overrides), "failed": str(error)}
        return result | {"limit_gib": cell.limit_gib, "wall_seconds": round(time.perf_counter() - began, 1)}


def describe_plan(plan: Mapping[str, Any]) -> str:
    """Describes how a plan holds a run in memory.

    Args:
        plan: a stored plan, with today's names.
    """
    ways = [plan["weights_format"]]
    ways += [f"modulation {plan['modulation_rows']} ahead"] if plan["modulation_rows"] else []
    ways += ["cheap recomputed"] if plan["selective"] else []
    ways += [f"{plan['recomputed_blocks']} blocks recomputed"] if plan["recomputed_blocks"] else []
    again = plan.get("reprojected_blocks", 0)  # rows of older runs have none
    ways += [f"q, k, v of {again} blocks recomputed"] if again else []
    ways += ["inputs offloaded"] if plan["offload_inputs"] else []
    ways += [f"{plan['streamed_blocks']} streamed"] if plan["streamed_blocks"] else []
    return ", ".join(ways)


def row(result: Result) -> str:
    """Formats a line of the table."""
    if "failed" in result:
        return failed_line([result["model"], f"{result['limit_gib']:g}"], result, len(COLUMNS))
    ways, memory = [describe_plan(with_todays_names(result["plan"]))], result["memory"][0]
    more = [text for text in result["overrides"] if not text.startswith("gpu_memory_limit_gib")]
    more += [f"{result['size_pixels']} pixels"] if result["size_pixels"] != 1024 else []
    more += ["20 shapes"] if result.get("shapes") else []
    figures = [
        f"{result['seconds_per_step_median']:.3f}", f"{memory['measured_peak_gib']:.2f}",
        f"{memory['expected_peak_gib']:.2f}", f"{memory['error_percent']:+.1f}%",
        f"{memory['process_peak_gib']:.2f}" if "process_peak_gib" in memory else "not measured",  # without nvidia-smi
    ]  # fmt: skip
    columns = [result["model"], f"{result['limit_gib']:g}", ", ".join(ways + more), *figures]
    return markdown_line(columns)


def main() -> None:
    arguments = read_arguments(__doc__, "MODEL,GIB[,key=value ...]")
    cells = [parse_cell(text) for text in arguments.cells] or [
        Cell(model, limit) for model, limits in LIMITS_GIB.items() for limit in limits
    ]
    print(markdown_header(COLUMNS))
    run_cells(cells, arguments, run_cell, lambda cell, result: print(row(result), flush=True))


if __name__ == "__main__":
    main()
