"""Measures the headline table in about eleven minutes on one H100: python benchmarks/headline.py --output DIR

Both models run at 1024x1024 pixels, batch 1, rank 16 on the attention projections, with full-size random weights: in
bf16 with nothing recomputed, in 8 bits, and as diffusers and PEFT train them in a bare loop (reference.py): with every
block recomputed, compiled and eager, and compiled with nothing recomputed, which takes as much memory as ours. Each
runs in a process of its own and is written at once; existing results are not measured again, so repeat a call that was
cut off. `--table` prints existing results.
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
    """Returns a model's cells; the references that the others are compared with come first."""
    return [
        StepCell(model, reference="compiled", label="reference, compiled"),
        StepCell(model, reference="compiled", recomputes=False, label="reference, compiled, nothing recomputed"),
        StepCell(model, overrides=("disable_quantization=true", NOTHING_TWICE), label="bf16"),
        StepCell(model, overrides=("quantize=true", NOTHING_TWICE), label="8 bits"),
        StepCell(model, reference="eager", label="reference, eager"),
    ]


def speed_up(result: Result, reference: Result | None) -> str:
    """Returns the ratio of speed to a reference's; empty where one of them failed, for lack of memory perhaps."""
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
    print(table_header(["times the compiled reference's speed", "times that of the one with nothing recomputed"]))
    for model in MODELS:
        cells = headline_cells(model)
        for cell in cells:
            if cell in results:
                ratios = [speed_up(results[cell], results.get(reference)) for reference in cells[:2]]
                print(table_row(cell, results[cell], ratios))


if __name__ == "__main__":
    main()
