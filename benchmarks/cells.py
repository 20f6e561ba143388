"""Runs a list of measurements, each in a process of its own; results are written at once and never measured twice."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from architectures import ARCHITECTURES, write_model_folder

from pixtune.bench.result import Result
from pixtune.storage.files import write_atomically

WITHOUT_CUDNN = ("flux", "flux-kontext")
"""Models whose stock strides make cuDNN's backward pass read where it must not (docs/experiments.md)."""
BEGAN = time.monotonic()


class Named(Protocol):
    """A measurement."""

    @property
    def name(self) -> str:
        """Stem of its file."""


CellT = TypeVar("CellT", bound=Named)


def read_arguments(
    description: str,
    cells: str | None = None,
    steps: int | None = None,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> argparse.Namespace:
    """Reads the command line of a script that runs cells.

    Args:
        cells: how a cell is written; None if the script takes none.
        steps: default number of steps to time in each cell; None if the script takes none.
        add_options: adds options that this script alone has.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--no-later-than", type=float, default=float("inf"), help="seconds after which no cell starts")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps, help="to time in each cell")
    if cells is not None:
        parser.add_argument("cells", nargs="*", help=cells)
    add_options(parser)
    return parser.parse_args()


def run_cells(
    cells: Iterable[CellT],
    arguments: argparse.Namespace,
    measure: Callable[[CellT], Result],
    show: Callable[[CellT, Result], None],
) -> list[CellT]:
    """Measures the cells that have no result yet, and shows all results.

    Args:
        arguments: as `read_arguments` returns them.

    Returns:
        The cells that still have no result, which are also named on stderr.
    """
    arguments.output.mkdir(parents=True, exist_ok=True)
    left = []
    for cell in cells:
        file = arguments.output / f"{cell.name}.json"
        in_time = time.monotonic() - BEGAN < arguments.no_later_than
        if not file.exists() and not arguments.table and in_time:
            write_atomically(file, json.dumps(measure(cell), indent=1).encode())
        if file.exists():
            show(cell, json.loads(file.read_text()))
        else:
            left.append(cell)
    if left:
        print(f"not run yet: {', '.join(cell.name for cell in left)}", file=sys.stderr)
    return left


def check_model(model: str, cell: str, known: Iterable[str] = ARCHITECTURES) -> None:
    """Checks the model that a cell names.

    Raises:
        ValueError: it is not among the known ones.
    """
    if model not in known:
        raise ValueError(f"{cell!r}: the model is one of {', '.join(known)}")


@dataclass(frozen=True)
class StepCell:
    """Training steps of a full-size model with random weights, or of its reference."""

    model: str
    resolution_pixels: int = 1024
    batch_size: int = 1
    num_controls: int = 0
    overrides: tuple[str, ...] = ()
    """`key=value` words of the config; a reference has none."""
    reference: str | None = None
    """"eager" or "compiled" for a run of `reference.py`."""
    recomputes: bool = True
    """A reference recomputes every block; otherwise none, which takes more memory."""
    label: str = ""
    """Name in the table and of the file, besides its sizes."""

    @property
    def name(self) -> str:
        sizes = [f"{self.resolution_pixels}px", f"batch{self.batch_size}"]
        sizes += [f"{self.num_controls}controls"] if self.num_controls else []
        words = "-".join([self.model, *sizes, *([self.label] if self.label else [])])
        return re.sub(r"[^a-z0-9=-]+", "_", words)

    @property
    def num_text_tokens(self) -> int:
        return ARCHITECTURES[self.model].num_text_tokens


def measure_steps(cell: StepCell, output: Path, num_steps: int, most_seconds: float | None = None) -> Result:
    """Runs a cell; one that fails leaves its last line. All that it prints goes to NAME.log."""
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), output / f"{cell.name}.log"
        file = folder / "result.json"
        command = reference_command(cell) if cell.reference else bench_command(cell, folder)
        command += ["--steps", str(num_steps)]
        return run_in_process(command, file, log, most_seconds) | {"cell": cell.name}


def run_in_process(command: Sequence[str], file: Path, log: Path, most_seconds: float | None = None) -> Result:
    """Runs a command and returns what it wrote to `--json FILE`, or why it failed, with the seconds that it took.

    Args:
        log: file for all that it prints.
    """
    began, failure = time.monotonic(), ""
    with log.open("w") as stream:
        try:
            subprocess.run(
                [*command, "--json", str(file)],
                check=True, stdout=stream, stderr=subprocess.STDOUT, timeout=most_seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            failure = f"took more than {most_seconds:g} s"
        except subprocess.CalledProcessError as error:
            failure = f"exit code {error.returncode}: {last_line(log)}"
    result = {"failed": failure} if failure else json.loads(file.read_text())
    return result | {"wall_seconds": round(time.monotonic() - began, 1)}


def bench_command(cell: StepCell, folder: Path) -> list[str]:
    """Returns the command line of `pixtune bench` on a model folder without weights, which is written for it."""
    write_model_folder(folder / "model", ARCHITECTURES[cell.model])
    config = folder / "bench.yaml"
    values = {
        "pretrained_model_name_or_path": str(folder / "model"),
        "output_dir": str(folder / "run"),
        "random_weights": True,
        "max_train_steps": 1,
        "train_batch_size": cell.batch_size,
        "data_config": {"img_dir": str(folder), "max_text_tokens": cell.num_text_tokens},
    }
    config.write_text(json.dumps(values))  # JSON is YAML
    return [
        sys.executable, "-m", "pixtune.cli", "bench", str(config), *cell.overrides,
        "--resolution", str(cell.resolution_pixels), "--controls", str(cell.num_controls),
    ]  # fmt: skip


def reference_command(cell: StepCell) -> list[str]:
    """Returns the command line of `reference.py` for the same sizes."""
    return [
        sys.executable, str(Path(__file__).parent / "reference.py"), "--model", cell.model,
        "--resolution", str(cell.resolution_pixels), "--batch-size", str(cell.batch_size),
        "--text-tokens", str(cell.num_text_tokens), "--controls", str(cell.num_controls),
        *(["--compile"] if cell.reference == "compiled" else []),
        *([] if cell.recomputes else ["--recompute-nothing"]),
        *(["--no-cudnn-attention"] if cell.model in WITHOUT_CUDNN else []),
    ]  # fmt: skip


def last_line(log: Path) -> str:
    """Returns the last line that a process printed; empty if it printed none."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def median_seconds(result: Result) -> float | None:
    """Returns the median seconds per step; None if the cell failed."""
    return None if "failed" in result else result["seconds_per_step"]["median"]


# ---- the table


def markdown_line(columns: Sequence[str]) -> str:
    """Formats a line of a Markdown table."""
    return f"| {' | '.join(columns)} |"


def markdown_header(columns: Sequence[str]) -> str:
    """Formats the first two lines of a Markdown table."""
    return f"{markdown_line(columns)}\n|{'---|' * len(columns)}"


def failed_line(columns: Sequence[str], result: Result, num_columns: int) -> str:
    """Formats the line of a cell that failed, with the reason after its first columns."""
    empty = [""] * (num_columns - len(columns) - 1)
    return markdown_line([*columns, f"failed: {result['failed'][:160]}", *empty])


COLUMNS = ("model", "", "s/step", "middle half", "model TFLOP/s", "hardware TFLOP/s", "of peak (hardware)",
           "GiB allocated", "GiB process", "first step, s")  # fmt: skip


def table_header(more: Sequence[str]) -> str:
    """Formats the header of `table_row`'s table, with further columns."""
    return markdown_header([*COLUMNS, *more])


def table_row(cell: StepCell, result: Result, more: Sequence[str]) -> str:
    """Formats a cell's line of the table, with further columns."""
    way = ", ".join([text for text in (describe_sizes(cell), cell.label) if text])
    if "failed" in result:
        return failed_line([cell.model, way], result, len(COLUMNS) + len(more))
    seconds, speed, memory = result["seconds_per_step"], result["tflop_per_second"], result["memory"]
    gib = ["" if memory[key] is None else f"{memory[key]:.1f}" for key in ("peak_allocated_gib", "peak_process_gib")]
    figures = [
        f"{seconds['median']:.4f}", f"{seconds['first_quartile']:.4f} to {seconds['third_quartile']:.4f}",
        f"{speed['model']:.0f}", f"{speed['hardware']:.0f}", f"{result['share_of_peak']['hardware']:.0%}", *gib,
        f"{result['first_step_seconds']:.0f}",
    ]  # fmt: skip
    return markdown_line([cell.model, way, *figures, *more])


def describe_sizes(cell: StepCell) -> str:
    """Describes a cell's sizes as far as they differ from one picture of 1024x1024 pixels without controls."""
    words = [f"{cell.resolution_pixels} pixels"] if cell.resolution_pixels != 1024 else []
    words += [f"batch {cell.batch_size}"] if cell.batch_size != 1 else []
    words += [f"{cell.num_controls} controls"] if cell.num_controls else []
    return ", ".join(words)
