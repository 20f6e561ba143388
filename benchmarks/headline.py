"""The headline table, inside ten minutes on one H100: python benchmarks/headline.py --output DIR

Both models at 1024x1024 pixels, batch 1, rank 16 on the attention projections, full-size random weights: in bf16 with
nothing recomputed, in 8 bits, and what diffusers and PEFT do in a bare loop with every block recomputed, compiled and
eager (reference.py). Each runs in a process of its own and is written at once; what is there already is not run again,
so a call that was cut off is repeated. `--table` prints what is there.
"""

from __future__ import annotations

from cells import Result, StepCell, measure_steps, median_seconds, read_arguments, run_cells, table_header, table_row

MODELS = ("qwen-image", "flux")
NOTHING_TWICE = "disable_gradient_checkpointing=true"
STEPS = 12
MOST_SECONDS = 240
"""For a cell, so that one that hangs leaves time to the others."""


def headline_cells(model: str) -> list[StepCell]:
    """The reference that the others are compared with comes first."""
    return [
        StepCell(model, reference="compiled", label="reference, compiled"),
        StepCell(model, overrides=("disable_quantization=true", NOTHING_TWICE), label="bf16"),
        StepCell(model, overrides=("quantize=true", NOTHING_TWICE), label="8 bits"),
        StepCell(model, reference="eager", label="reference, eager"),
    ]


def speed_up(result: Result, reference: Result | None) -> str:
    """How many times as fast as the compiled reference."""
    seconds, of_reference = median_seconds(result), median_seconds(reference) if reference else None
    return f"{of_reference / seconds:.2f}" if seconds and of_reference else ""


def main() -> None:
    arguments = read_arguments(__doc__, steps=STEPS)
    results: dict[StepCell, Result] = {}

    def show(cell: StepCell, result: Result) -> None:
        results[cell] = result
        print(f"{cell.name}: {median_seconds(result) or result['failed']}", flush=True)

    left = run_cells(
        [cell for model in MODELS for cell in headline_cells(model)],
        arguments.output,
        lambda cell: measure_steps(cell, arguments.output, arguments.steps, MOST_SECONDS),
        show,
        arguments.no_later_than,
        arguments.table,
    )
    print(table_header(["times the compiled reference's speed"]))
    for model in MODELS:
        cells = headline_cells(model)
        for cell in cells:
            if cell in results:
                print(table_row(cell, results[cell], [speed_up(results[cell], results.get(cells[0]))]))
    if left:
        print(f"not run yet: {', '.join(cell.name for cell in left)}")


if __name__ == "__main__":
    main()
