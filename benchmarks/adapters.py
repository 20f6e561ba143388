"""Times a training step with each kind of adapter: python benchmarks/adapters.py --json FILE [KIND[,FORMAT] ...]

A full-size transformer with random weights takes steps on one picture of 1024x1024 pixels, with a LoRA of rank 16, a
LoKr of factor 16 and a DoRA of rank 16 on the attention, each planned as `pixtune train` plans it: in 8 bits, or in
bf16 with `KIND,bf16`. Everything runs in one process, so that the three take under four minutes on an H200; the file is
written after each. On a CPU `--model tiny` shows in seconds that it works.

    python benchmarks/adapters.py --json adapters.json
    python benchmarks/adapters.py --json adapters-flux.json --model flux lora lokr dora lora,bf16 dora,bf16
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, write_model_folder
from cells import markdown_header, markdown_line

from pixtune.bench.environment import describe
from pixtune.bench.result import Result
from pixtune.bench.steps import Request, measure
from pixtune.engine.relief import drop_frames, free_unused
from pixtune.errors import PixtuneError
from pixtune.storage.files import write_atomically

TINY = "tiny"
TINY_MODEL = Path(__file__).resolve().parents[1] / "assets" / "tiny-qwen-image"
KINDS = {
    "lora": (),
    "lokr": ("adapter.kind=lokr",),
    "lokr-4": ("adapter.kind=lokr", "adapter.lokr_factor=4"),
    "dora": ("adapter.kind=dora",),
}
"""Words of the config of each kind; `lokr-4` has a larger second matrix."""
FORMATS = {"8bit": ("quantize=true",), "bf16": ("disable_quantization=true",)}
USUAL = ("lora", "lokr", "dora")


@dataclass(frozen=True)
class Cell:
    """A kind of adapter on weights of a format."""

    kind: str
    format: str = "8bit"

    @property
    def name(self) -> str:
        return f"{self.kind},{self.format}"


def parse_cell(word: str) -> Cell:
    """Reads `KIND` or `KIND,FORMAT`.

    Raises:
        argparse.ArgumentTypeError: there is no such kind or format.
    """
    kind, _, weights_format = word.partition(",")
    if kind not in KINDS or (weights_format or "8bit") not in FORMATS:
        raise argparse.ArgumentTypeError(
            f"{word!r}: a kind is one of {', '.join(KINDS)}, and a format of {', '.join(FORMATS)}"
        )
    return Cell(kind, weights_format or "8bit")


def measure_cell(cell: Cell, model: str, num_steps: int, folder: Path) -> Result:
    """Times a cell's steps; one that fails says why.

    Args:
        folder: folder with the model's folder.
    """
    config, began = folder / "bench.yaml", time.monotonic()
    tokens = 32 if model == TINY else ARCHITECTURES[model].num_text_tokens
    values: Mapping[str, Any] = {
        "pretrained_model_name_or_path": str(TINY_MODEL if model == TINY else folder / "model"),
        "output_dir": str(folder / "run"),
        "random_weights": True,
        "max_train_steps": 1,
        "rank": 16,
        "data_config": {"img_dir": str(folder), "max_text_tokens": tokens},
    }
    config.write_text(json.dumps(values))  # JSON is YAML
    request = Request(num_steps, resolution_pixels=64 if model == TINY else 1024)
    try:
        result = measure(config, [*KINDS[cell.kind], *FORMATS[cell.format]], request)
    except (PixtuneError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        drop_frames(error)
        result = {"failed": reason}
    torch.compiler.reset()
    free_unused()
    return {**result, "wall_seconds": round(time.monotonic() - began, 1)}


def summary(results: Mapping[Cell, Result]) -> list[dict[str, Any]]:
    """Returns what the table shows of each cell, with its time in parts of the LoRA's in the same format."""
    rows = []
    for cell, result in results.items():
        row: dict[str, Any] = {"kind": cell.kind, "format": cell.format, "wall_seconds": result["wall_seconds"]}
        if "failed" in result:
            rows.append(row | {"failed": result["failed"]})
            continue
        of_lora = results.get(Cell("lora", cell.format), {"failed": ""})
        median = result["seconds_per_step"]["median"]
        rows.append(
            row
            | {
                "ms_per_step": round(1000 * median, 2),
                "times_lora": None if "failed" in of_lora else round(median / of_lora["seconds_per_step"]["median"], 3),
                "trained_weights": result["case"]["num_trained_weights"],
                "first_step_seconds": round(result["first_step_seconds"], 1),
                **{key: result["memory"][key] for key in ("peak_allocated_gib", "peak_expected_gib")},
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the summary as a Markdown table."""
    columns = ("kind", "format", "ms_per_step", "times_lora", "trained_weights", "peak_allocated_gib",
               "peak_expected_gib", "first_step_seconds", "wall_seconds", "failed")  # fmt: skip
    lines = [markdown_line([str(row[name]) if row.get(name) is not None else "" for name in columns]) for row in rows]
    return "\n".join([markdown_header(columns), *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file of the figures")
    parser.add_argument("--model", choices=[*ARCHITECTURES, TINY], default="qwen-image")
    parser.add_argument("--steps", type=int, default=10, help="to time in each cell")
    parser.add_argument("cells", nargs="*", type=parse_cell, help="KIND or KIND,FORMAT; default: lora lokr dora")
    arguments = parser.parse_args()
    results: dict[Cell, Result] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.model != TINY:
            write_model_folder(folder / "model", ARCHITECTURES[arguments.model])
        for cell in arguments.cells or [Cell(kind) for kind in USUAL]:
            results[cell] = measure_cell(cell, arguments.model, arguments.steps, folder)
            rows = summary(results)
            whole = {
                "benchmark": "adapters",
                "model": arguments.model,
                "rows": rows,
                "cells": {cell.name: result for cell, result in results.items()},
                **describe(),
            }
            write_atomically(arguments.json, json.dumps(whole, indent=1).encode())
            print(json.dumps(rows[-1]), flush=True)
    print(table(summary(results)))


if __name__ == "__main__":
    main()
