"""Measures how the cost grows: python benchmarks/sweep.py --output DIR --no-later-than 480 [CELL ...]

Resolutions, batch sizes, edit models with one and two controls, and the memory of smaller cards vary one at a time
around 1024x1024 pixels and batch 1. Cells run as in headline.py, and existing results are not measured again: about
four calls of ten minutes on one H100 measure all. Each call first measures the compiled reference of each model that it
comes to, since machines differ; a cell's last column is its model TFLOP/s over those of its own call's reference.

A cell is written as MODEL,SIZE,BATCH,CONTROLS[,key=value ...]: `qwen-image,2048,1,0`.
"""

from __future__ import annotations

import json
from pathlib import Path

from architectures import ARCHITECTURES
from card_sizes import LIMITS_GIB
from cells import StepCell, check_model, measure_steps, read_arguments, run_cells, table_header, table_row

from pixtune.bench.result import Result
from pixtune.storage.files import write_atomically

BASES = {name: "flux" if name.startswith("flux") else "qwen-image" for name in ARCHITECTURES}
"""Model whose reference each model is compared with."""
RESOLUTIONS_PIXELS = (512, 1024, 1328, 1536, 2048)
BATCH_SIZES = (2, 4)
EDIT_MODEL, NUM_CONTROLS = "qwen-image-edit-2509", (1, 2)
STEPS = 10
MOST_SECONDS = 420


def sweep_cells() -> list[StepCell]:
    """Returns all cells, model by model, so that a call needs few references."""
    cells = []
    for model, limits in LIMITS_GIB.items():
        cells += [StepCell(model, resolution) for resolution in RESOLUTIONS_PIXELS]
        cells += [StepCell(model, batch_size=size) for size in BATCH_SIZES]
        if BASES[EDIT_MODEL] == model:
            cells += [StepCell(EDIT_MODEL, num_controls=number) for number in NUM_CONTROLS]
        cells += [labelled(StepCell(model, overrides=(f"gpu_memory_limit_gib={limit:g}",))) for limit in limits]
    return cells


def labelled(cell: StepCell) -> StepCell:
    """Returns a cell that is named after its overrides."""
    return StepCell(
        cell.model, cell.resolution_pixels, cell.batch_size, cell.num_controls, cell.overrides,
        label=", ".join(cell.overrides),
    )  # fmt: skip


def parse_cell(text: str) -> StepCell:
    """Reads `MODEL,SIZE,BATCH,CONTROLS[,key=value ...]`.

    Raises:
        ValueError: it is not written so.
    """
    model, resolution, batch_size, num_controls, *overrides = text.split(",")
    check_model(model, text)
    return labelled(StepCell(model, int(resolution), int(batch_size), int(num_controls), tuple(overrides)))


class CallReferences:
    """The compiled reference of each model, measured once in this call, beside those of earlier ones."""

    def __init__(self, output: Path, num_steps: int) -> None:
        self._output, self._num_steps = output, num_steps
        self._results: dict[str, Result] = {}

    def of(self, model: str) -> Result:
        """Returns a model's reference, measured when it is first asked for."""
        base = BASES[model]
        if base not in self._results:
            number = 1 + len(list(self._output.glob(f"{base}-*reference_of_call_*.json")))
            cell = StepCell(base, reference="compiled", label=f"reference of call {number}")
            result = measure_steps(cell, self._output, self._num_steps, MOST_SECONDS)
            write_atomically(self._output / f"{cell.name}.json", json.dumps(result, indent=1).encode())
            self._results[base] = result
        return self._results[base]


def measure_beside_reference(cell: StepCell, references: CallReferences, output: Path, num_steps: int) -> Result:
    """Measures a cell, and adds the main figures of its call's reference."""
    reference = references.of(cell.model)
    result = measure_steps(cell, output, num_steps, MOST_SECONDS)
    if "failed" in reference:
        return result | {"reference": {"cell": reference["cell"], "failed": reference["failed"]}}
    return result | {
        "reference": {
            "cell": reference["cell"],
            "seconds_per_step_median": reference["seconds_per_step"]["median"],
            "model_tflop_per_second": reference["tflop_per_second"]["model"],
        }
    }


def over_reference(result: Result) -> str:
    """Formats the ratio of model TFLOP/s to those of the call's reference."""
    if "failed" in result or "failed" in result["reference"]:
        return ""
    return f"{result['tflop_per_second']['model'] / result['reference']['model_tflop_per_second']:.2f}"


def main() -> None:
    arguments = read_arguments(__doc__, "MODEL,SIZE,BATCH,CONTROLS[,key=value ...]", STEPS)
    references = CallReferences(arguments.output, arguments.steps)
    print(table_header(["times its reference's TFLOP/s"]))
    run_cells(
        [parse_cell(text) for text in arguments.cells] or sweep_cells(),
        arguments,
        lambda cell: measure_beside_reference(cell, references, arguments.output, arguments.steps),
        lambda cell, result: print(table_row(cell, result, [over_reference(result)]), flush=True),
    )


if __name__ == "__main__":
    main()
