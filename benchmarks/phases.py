"""Measures caching and sampling of full-size models within the memory of smaller cards.

    python benchmarks/phases.py --output results --folder /dev/shm/models [MODEL,GIB ...]

Training within a limit is no use if captions, pictures or samples need more, so each limit is put on those phases, too:
`caching` is what `pixtune train` does before its first step, `sampling` is `pixtune sample`. Weights are random and of
full size; they are written to `--folder` once a model (58 GB for Qwen-Image, 34 for FLUX.1-dev) and removed when its
cells are done. Each cell runs in a process of its own, and its JSON is written at once; existing results are not
measured again. `--table` prints them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from architectures import ARCHITECTURES
from cells import check_model, failed_line, markdown_header, markdown_line, read_arguments, run_cells, run_in_process
from random_folders import write_random_model

from pixtune.bench.result import Result
from pixtune.errors import WriteError

PHASES = ("caching", "sampling")
LIMITS_GIB = {"qwen-image": (79, 23.3, 15.3, 11.4, 7.4), "flux": (79, 23.3, 11.4, 7.4, 5.5)}
"""Limits of card_sizes.py at which the way of a phase changes."""
STEPS = 24
"""Sampler steps: enough that passes are compiled and captured."""
MOST_SECONDS = 300


@dataclass(frozen=True)
class Cell:
    """One phase of one model on one card."""

    model: str
    limit_gib: float
    phase: str
    size: int = 1024

    @property
    def name(self) -> str:
        """Stem of its file."""
        more = [f"size={self.size}"] if self.size != 1024 else []
        return "-".join([self.model, f"{self.limit_gib:g}", self.phase, *more]).replace(".", "_")


def parse_cells(texts: Sequence[str], phases: Sequence[str]) -> list[Cell]:
    """Reads cells, a model's together, so that its weights are written once; caching first, which needs less of them.

    Raises:
        ValueError: a cell is not `MODEL,GIB[,PIXELS]`, or there is no such model or phase.
    """
    if unknown := [phase for phase in phases if phase not in PHASES]:
        raise ValueError(f"{unknown[0]}: a phase is one of {', '.join(PHASES)}")
    wanted = [parse_cell(text) for text in texts]
    wanted = wanted or [(model, limit, 1024) for model, limits in LIMITS_GIB.items() for limit in limits]
    models = dict.fromkeys(model for model, *_ in wanted)
    return [
        Cell(model, limit, phase, size)
        for model in models
        for phase in PHASES
        if phase in phases
        for of_model, limit, size in wanted
        if of_model == model
    ]


def parse_cell(text: str) -> tuple[str, float, int]:
    """Reads model, limit in GiB and side of the pictures in pixels."""
    model, limit, *size = text.split(",")
    check_model(model, text, [name for name, architecture in ARCHITECTURES.items() if architecture.text_encoders])
    return model, float(limit), int(size[0]) if size else 1024


@dataclass
class Weights:
    """Folders of models with random weights, one model at a time."""

    place: Path
    keep: bool
    """Whether written folders stay for the next call."""
    _current: str | None = field(default=None, init=False)

    def provide(self, model: str, with_transformer: bool) -> Path:
        """Returns the model's folder, and writes it if it is missing.

        Raises:
            WriteError: there is no room for it.
        """
        if self._current != model:
            self.remove()
        self._current = model
        began = time.perf_counter()
        written = write_random_model(self.place / model, ARCHITECTURES[model], with_transformer)
        if written:
            print(f"{model}: {written / 1e9:.1f} GB written in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        return self.place / model

    def hashes(self, model: str) -> Path:
        """Returns the folder of a model's hashes, which is removed with the model's."""
        return self.place / f"{model}-hashes"

    def remove(self) -> None:
        """Removes the current model's folders."""
        if self._current is not None and not self.keep:
            for folder in (self.place / self._current, self.hashes(self._current)):
                if folder.exists():
                    shutil.rmtree(folder)
        self._current = None


def run_cell(cell: Cell, weights: Weights, output: Path, steps: int) -> Result:
    """Runs a cell; one that fails leaves its last line, and all lines in NAME.log."""
    model_folder = weights.provide(cell.model, with_transformer=cell.phase == "sampling")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        command = [
            sys.executable, str(Path(__file__).parent / "phase_worker.py"), cell.phase, "--model", str(model_folder),
            "--scratch", str(scratch), "--hashes", str(weights.hashes(cell.model)), "--size", str(cell.size),
            "--steps", str(steps), "--limit-gib", f"{cell.limit_gib:g}",
        ]  # fmt: skip
        result = run_in_process(command, scratch / "result.json", output / f"{cell.name}.log", MOST_SECONDS)
    return {"benchmark": "phases", "model": cell.model, "limit_gib": cell.limit_gib, "phase": cell.phase,
            "size_pixels": cell.size, **result}  # fmt: skip


# ---- the table

COLUMNS = ("model", "limit, GiB", "phase", "stage", "on the device", "planned GiB", "peak GiB, allocated", "reserved",
           "process GiB", "within", "speed")  # fmt: skip


def rows(result: Result) -> list[str]:
    """Formats a line for each stage of a cell."""
    begin = [result["model"], f"{result['limit_gib']:g}", result["phase"]]
    if "failed" in result:
        return [failed_line(begin, result, len(COLUMNS))]
    outside, speeds = result["outside_allocator_gib"], speed_of_stages(result)
    lines = []
    for stage in result["stages"]:
        process = None if outside is None else stage["peak_reserved_gib"] + outside
        within = "" if process is None else "yes" if process <= result["limit_gib"] else "NO"
        gib = [stage["planned_gib"], stage["peak_gib"], stage["peak_reserved_gib"], process]
        figures = ["" if value is None else f"{value:.2f}" for value in gib]
        speed = speeds.get(stage["stage"], "")
        lines.append(markdown_line([*begin, stage["stage"], stage["holds"], *figures, within, speed]))
    return lines


def speed_of_stages(result: Result) -> dict[str, str]:
    """Describes the speed of stages, by their names."""
    if result["phase"] == "sampling":
        return {"pictures drawn": f"{result['seconds_per_step']:.3f} s/step"}
    return {
        stage: f"{rate['per_second']:.2f}/s"
        for stage, rate in (("text encoding", result["captions"]), ("image encoding", result["pictures"]))
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this script alone."""
    parser.add_argument("--folder", type=Path, help="place of models' folders; a fast disk, or memory: /dev/shm/models")
    parser.add_argument("--phases", default=",".join(PHASES), help="phases to measure, joined by commas")
    parser.add_argument("--keep", action="store_true", help="leave the models' folders for the next call")


def main() -> None:
    arguments = read_arguments(__doc__, "MODEL,GIB[,PIXELS]", STEPS, add_options)
    with tempfile.TemporaryDirectory() as temporary:
        weights = Weights(arguments.folder or Path(temporary), arguments.keep)
        print(markdown_header(COLUMNS))
        try:
            run_cells(
                parse_cells(arguments.cells, arguments.phases.split(",")),
                arguments,
                lambda cell: run_cell(cell, weights, arguments.output, arguments.steps),
                lambda cell, result: print("\n".join(rows(result)), flush=True),
            )
        finally:
            weights.remove()


if __name__ == "__main__":
    try:
        main()
    except WriteError as error:
        sys.exit(str(error))
