"""Measures the headline table within ten minutes on one H100: python benchmarks/headline.py --output DIR

Both models run at 1024x1024 pixels, batch 1, rank 16 on the attention projections, with full-size random weights: in
bf16 with nothing recomputed, in 8 bits, and as diffusers and PEFT train them in a bare loop with every block
recomputed, compiled and eager (reference.py). Each runs in a process of its own and is written at once; existing
results are not measured again, so repeat a call that was cut off. `--table` prints existing results.
"""

from __future__ import annotations

from cells import StepCell, measure_steps, median_seconds, read_arguments, run_cells, table_header, table_row

from pixtune.bench.result import Result

MODELS = ("qwen-image", "flux")
NOTHING_TWICE = "disable_gradient_checkpointing=true"
STEPS = 12
MOST_SECONDS = 240
"""Longest time of a cell, so that one that hangs leaves time for the others."""


def headline_cells(model: str) -> list[StepCell]:
    """Returns a model's cells; the reference that the others are compared with comes first."""
    return [
        StepCell(model, reference="compiled", label="reference, compiled"),
        StepCell(model, overrides=("disable_quantization=true", NOTHING_TWICE), label="bf16"),
        StepCell(model, overrides=("quantize=true", NOTHING_TWICE), label="8 bits"),
        StepCell(model, reference="eager", label="reference, eager"),
    ]


def speed_up(result: Result, reference: Result | None) -> str:
    """Returns the ratio of speed to the compiled reference's."""
    seconds, of_reference = median_seconds(result), median_seconds(reference) if reference else None
    return f"{of_reference / seconds:.2f}" if seconds and of_reference else ""


def main() -> None:
    arguments = read_arguments(__doc__, steps=STEPS)
    results: dict[StepCell, Result] = {}

    def show(cell: StepCell, result: Result) -> None:
        results[cell] = result
        print(f"{cell.name}: {median_seconds(result) or result['failed']}", flush=True)

    run_cells(
        [cell for model in MODELS for cell in headline_cells(model)],
        arguments,
        lambda cell: measure_steps(cell, arguments.output, arguments.steps, MOST_SECONDS),
        show,
    )
    print(table_header(["times the compiled reference's speed"]))
    for model in MODELS:
        cells = headline_cells(model)
        for cell in cells:
            if cell in results:
                print(table_row(cell, results[cell], [speed_up(results[cell], results.get(cells[0]))]))


if __name__ == "__main__":
    main()
