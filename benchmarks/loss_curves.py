"""Measures whether faster steps learn the same: python benchmarks/loss_curves.py --output results/loss_curves

The shipped small models learn the demo's style in bf16 launched operator by operator, with three seeds; and with the
first of them compiled, and in 8-bit formats. Held-out losses are given as shares of the loss before the first step,
since another seed also draws other noise for the evaluation. The distance of a faster run from the plain one of its
seed is given in units of the spread of seeds. Each run's JSON is written at once; existing results are not measured
again.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cells import markdown_header, markdown_line, read_arguments, run_cells

from pixtune.assembly import assemble
from pixtune.bench.environment import describe
from pixtune.config import load_config
from pixtune.engine.apply import blocks_of
from pixtune.engine.compile import compile_blocks
from pixtune.tracking.metrics import read_metrics
from pixtune.train import forward_backward, run_steps

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"qwen-image": "demo.yaml", "flux": "demo_flux.yaml"}
SEEDS = (42, 43, 44)
WAYS: dict[str, tuple[str, ...]] = {
    "eager": (),
    "compiled": (),
    "fp8": ("quantize=true", "cuda_features.enable_fp8_training=true"),
    "int8": ("quantize=true",),
}
"""Changes of each way in the config; "compiled" changes the run."""
EVALUATIONS = 10


@dataclass(frozen=True)
class Cell:
    """One run."""

    model: str
    way: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.way}-{self.seed}"


CELLS = [Cell(model, "eager", seed) for model in CONFIGS for seed in SEEDS] + [
    Cell(model, way, SEEDS[0]) for model in CONFIGS for way in WAYS if way != "eager"
]


def run_cell(cell: Cell, steps: int) -> dict[str, Any]:
    """Trains, and reads what the run wrote about itself.

    Raises:
        RuntimeError: the run was asked to stop before its end.
    """
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [
            f"output_dir={folder / 'run'}", f"data_config.cache_dir={folder / 'cache'}", f"seed={cell.seed}",
            f"max_train_steps={steps}", f"validation.every={steps // EVALUATIONS}", "mixed_precision=bf16",
            "samples.prompts=[]", "resume_from_checkpoint=null", f"checkpointing_steps={steps}", "report_to=null",
            *WAYS[cell.way],
        ]  # fmt: skip
        run, services = assemble(load_config(ROOT / "train_configs" / CONFIGS[cell.model], words), forward_backward)
        if cell.way == "compiled":
            compile_blocks(blocks_of(run.transformer.module, run.family), selective=True)
        began = time.perf_counter()
        run_steps(run, services)
        lines = read_metrics(folder / "run" / "metrics.jsonl")
    held_out = {line["step"]: line["loss"] for line in lines if line["kind"] == "validation"}
    if steps not in held_out:
        raise RuntimeError(f"{cell.name} was stopped before step {steps}; run this again")
    return {
        "benchmark": "loss_curves",
        "model": cell.model,
        "way": cell.way,
        "seed": cell.seed,
        "weights_format": run.plan.weights_format,
        "held_out": held_out,
        "losses": [line["loss"] for line in lines if line["kind"] == "step"],
        "seconds": round(time.perf_counter() - began, 1),
        **describe(),
    }


def shares(result: dict[str, Any]) -> dict[int, float]:
    """Returns the held-out loss by step, as a share of that before the first step."""
    losses = {int(step): loss for step, loss in result["held_out"].items()}
    return {step: loss / losses[0] for step, loss in losses.items() if step}


def table(results: dict[Cell, dict[str, Any]], model: str) -> str:
    """Formats a line an evaluation: each seed, their spread, and each faster way's distance in spreads."""
    curves = {cell: shares(result) for cell, result in results.items() if cell.model == model}
    plain = [curves[Cell(model, "eager", seed)] for seed in SEEDS]
    fast = {way: curves[Cell(model, way, SEEDS[0])] for way in WAYS if way != "eager"}
    lines = [markdown_header([f"{model}: step", *(f"seed {seed}" for seed in SEEDS), "spread", *fast])]
    for step in plain[0]:
        seeds = [curve[step] for curve in plain]
        spread = max(seeds) - min(seeds)
        apart = [f"{curve[step]:.4f} ({abs(curve[step] - seeds[0]) / spread:.2f} spreads)" for curve in fast.values()]
        lines.append(markdown_line([str(step), *(f"{loss:.4f}" for loss in seeds), f"{spread:.4f}", *apart]))
    return "\n".join(lines)


def main() -> None:
    arguments = read_arguments(__doc__, steps=500)
    results: dict[Cell, dict[str, Any]] = {}

    def show(cell: Cell, result: dict[str, Any]) -> None:
        results[cell] = result
        print(f"{cell.name}: {list(shares(result).values())[-1]:.4f} of the loss at the start", flush=True)

    left = run_cells(CELLS, arguments, lambda cell: run_cell(cell, arguments.steps), show)
    for model in CONFIGS:
        if not any(cell.model == model for cell in left):
            print(f"\n{table(results, model)}")


if __name__ == "__main__":
    main()
