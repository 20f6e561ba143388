"""Measures errors of LoRA gradients in 8 and 4 bits, by depth: python benchmarks/gradients.py --output DIR

Full-size transformers have random weights, a LoRA of rank 16 on the attention that changes the output already, and one
picture of 1024x1024 pixels. Every way (gradient_passes.py) has the same weights, LoRA and inputs. Errors are relative
to two passes: one in fp32 throughout, and one in bf16 by torch's own operators, whose own error beside fp32 no format
can undercut. "fp8" and "nf4" are what training runs, compiled and with its kernels; the others are launched operator by
operator with every block recomputed, and show the cost of one decision: fast accumulation, the format of gradients, a
GELU's input kept in 8 bits. The gain in time of the first two is measured on the products of one block of each kind.

    python benchmarks/gradients.py --output DIR [qwen-image] [flux] [qwen-image,fp8 ...]
    python benchmarks/gradients.py --output DIR --table

Each cell's JSON is written at once and not measured again, so repeat a call that was cut off. It has every LoRA
matrix's cosine and relative error. Needs a GPU of 80 GB.
"""

from __future__ import annotations

import argparse
import functools
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cells import check_model, failed_line, markdown_header, markdown_line, read_arguments, run_cells
from gradient_passes import BF16, E5M2, WAYS, Pass, Passes, Setting, prepare
from torch import Tensor, nn

from pixtune.bench.environment import describe
from pixtune.bench.peaks import median_seconds
from pixtune.bench.result import Result
from pixtune.commands.quantization_errors import cosine, relative_error
from pixtune.engine.quantize import FP8, can_quantize

MODELS = ("qwen-image", "flux")
SIZE_PIXELS = 1024
E4M3 = torch.float8_e4m3fn
PRODUCTS = "products"
"""Name of the cell in which products are timed."""
NUM_QUARTERS = 4
ROUNDS, PRODUCTS_PER_ROUND = 7, 10
DIGITS = 6
TOLD_OF_PLAN = ("weights_format", "kept_transposes", "selective", "recomputed_blocks", "reprojected_blocks", "compile",
                "attention")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One way of one model, or `PRODUCTS`."""

    model: str
    way: str

    @property
    def name(self) -> str:
        return f"{self.model}-{self.way}"


def parse_cells(words: Sequence[str]) -> list[Cell]:
    """Reads cells.

    Args:
        words: "MODEL" for all of its cells, or "MODEL,CELL".

    Raises:
        ValueError: there is no such model or cell.
    """
    known = [*(way.name for way in WAYS), PRODUCTS]
    cells = []
    for word in words:
        model, _, way = word.partition(",")
        check_model(model, word)
        if way and way not in known:
            raise ValueError(f"{word!r}: a cell is one of {', '.join(known)}")
        cells += [Cell(model, name) for name in ([way] if way else known)]
    return cells


# ---- gradients


class Measured:
    """Passes of one model, and the references that they are compared with, computed when they are first needed."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._passes = Passes(setting)
        self._references: dict[str, Pass] = {}

    def forget(self) -> None:
        """Frees all memory."""
        self._references = {}
        self._passes.forget()

    def compare(self, name: str) -> Result:
        """Compares one way with the references.

        Raises:
            ValueError: its weights differ from the exact pass's.
        """
        if not self._references:
            self._references = {"fp32": self._passes.run_exactly(), "bf16": self._passes.run(BF16)}
        (way,) = (way for way in WAYS if way.name == name)
        ours = self._references["bf16"] if way is BF16 else self._passes.run(way)
        plan = way.plan(self.setting.plan, len(self._passes.blocks)).to_dict()
        beside = {}
        for reference, exact in self._references.items():
            if exact is not ours:
                check_weights(ours, exact)
                beside[reference] = errors(ours, exact, self._passes.blocks)
        return {"plan": {key: plan[key] for key in TOLD_OF_PLAN}, "relative_to": beside}


def check_weights(ours: Pass, exact: Pass) -> None:
    """Checks that two passes had the same weights, going by all tensors that are plain in both.

    Raises:
        ValueError: some differ.
    """
    common = ours.fingerprint.keys() & exact.fingerprint.keys()
    other = [name for name in sorted(common) if not ours.fingerprint[name].equal(exact.fingerprint[name])]
    if other or not common:
        raise ValueError(
            f"{len(other)} of {len(common)} tensors have other weights than in the exact pass: {other[:3]}"
        )


def errors(ours: Pass, exact: Pass, blocks: Sequence[str]) -> Result:
    """Computes errors of the velocity, of all LoRA gradients together, of each block's, and of each matrix's."""
    if ours.gradients.keys() != exact.gradients.keys():
        raise ValueError(f"gradients are of other matrices: {sorted(ours.gradients.keys() ^ exact.gradients)[:4]}")
    matrices = {name: error_pair(ours.gradients[name], exact.gradients[name]) for name in exact.gradients}
    rows = []
    for block in blocks:
        names = [name for name in matrices if name.startswith(f"{block}.")]
        worst = min(names, key=lambda name: matrices[name]["cosine"])
        pair = error_pair(joined(ours.gradients, names), joined(exact.gradients, names))
        rows.append({"block": block, **pair, "worst_matrix": worst, "worst_matrix_cosine": matrices[worst]["cosine"]})
    return {
        "velocity_relative_error": round(relative_error(ours.velocity_BCHW, exact.velocity_BCHW), DIGITS),
        "all_gradients": error_pair(joined(ours.gradients, matrices), joined(exact.gradients, matrices)),
        "quarters": quarters(rows),
        "blocks": rows,
        "matrices": matrices,
    }


def error_pair(ours: Tensor, exact: Tensor) -> dict[str, float]:
    """Computes the cosine between two tensors, and the length of their difference over that of the exact one."""
    pair = {"cosine": cosine(ours, exact), "relative_error": relative_error(ours, exact)}
    return {name: round(value, DIGITS) for name, value in pair.items()}


def joined(gradients: Mapping[str, Tensor], names: Sequence[str] | Mapping[str, Any]) -> Tensor:
    return torch.cat([gradients[name].float().flatten() for name in names])


def quarters(rows: Sequence[Result]) -> list[Result]:
    """Finds the worst block of each quarter of the depth, and the worst matrix in it."""
    found = []
    for number in range(NUM_QUARTERS):
        start, end = (len(rows) * edge // NUM_QUARTERS for edge in (number, number + 1))
        if start == end:
            continue
        worst = min(rows[start:end], key=lambda row: row["cosine"])
        matrix = min(rows[start:end], key=lambda row: row["worst_matrix_cosine"])
        found.append(worst | {key: matrix[key] for key in ("worst_matrix", "worst_matrix_cosine")})
    return found


# ---- time of products


@dataclass(frozen=True)
class Product:
    """Shape of a product `(M, K) @ (N, K).T`."""

    rows: int
    summed: int
    columns: int

    @property
    def backward(self) -> Product:
        """Shape of the product for the input's gradient."""
        return Product(self.rows, self.columns, self.summed)


def block_products(setting: Setting) -> dict[str, list[Product]]:
    """Lists the forward products of the 8-bit layers of one block of each kind."""
    family, inputs = setting.family, setting.inputs
    model = family.build_transformer(setting.transformer_config)
    found = {}
    for path in family.block_paths:
        linears = {
            name: module
            for name, module in next(model.get_submodule(path).children()).named_modules()
            if isinstance(module, nn.Linear) and not name.endswith(family.modulation_layers)
        }
        has_text_layers = any(name.endswith(family.text_layers) for name in linears)
        found[path] = [
            Product(
                inputs.num_text_tokens if name.endswith(family.text_layers)
                else inputs.num_image_tokens + (0 if has_text_layers else inputs.num_text_tokens),
                linear.in_features, linear.out_features,
            )
            for name, linear in linears.items() if can_quantize(linear, FP8)
        ]  # fmt: skip
    return found


def time_products(setting: Setting) -> Result:
    """Measures the milliseconds of a block's 8-bit products, one after the other, by their way of computation."""

    def total_ms(products: Sequence[Product], codes: torch.dtype, fast: bool) -> float:
        return round(sum(product_ms(product, codes, fast, setting.device) for product in products), 4)

    kinds = []
    for path, forward in block_products(setting).items():
        backward = [product.backward for product in forward]
        kinds.append({
            "blocks": path,
            "num_products": len(forward),
            "forward_ms": {"fast sums": total_ms(forward, E4M3, True), "exact sums": total_ms(forward, E4M3, False)},
            "backward_ms": {
                "fast sums": total_ms(backward, E4M3, True),
                "exact sums": total_ms(backward, E4M3, False),
                "e5m2, fast sums": total_ms(backward, E5M2, True),
                "e5m2, exact sums": total_ms(backward, E5M2, False),
            },
        })  # fmt: skip
    return {"kinds": kinds}


@functools.cache
def product_ms(product: Product, codes: torch.dtype, fast: bool, device: torch.device) -> float:
    """Measures the milliseconds of a product.

    Args:
        codes: format of the first factor; the second one's is e4m3.
    """
    a = torch.randn(product.rows, product.summed, device=device).to(codes)
    b = torch.randn(product.columns, product.summed, device=device).to(E4M3)
    a_scale, b_scale = torch.ones(product.rows, 1, device=device), torch.ones(1, product.columns, device=device)

    def multiply() -> Tensor:
        return torch._scaled_mm(
            a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    return 1000 * median_seconds(multiply, device, ROUNDS, PRODUCTS_PER_ROUND)


# ---- cells and table


class Models:
    """Measures cells; one model at a time is on the device."""

    def __init__(self, size_pixels: int) -> None:
        self._size_pixels = size_pixels
        self._model = ""
        self._measured: Measured | None = None

    def measure(self, cell: Cell) -> Result:
        """Measures a cell; one that fails leaves the reason: an old torch may lack a product, a GPU the memory."""
        began = time.monotonic()
        measured = self._measure(cell.model)
        try:
            result = time_products(measured.setting) if cell.way == PRODUCTS else measured.compare(cell.way)
        except RuntimeError as error:
            result = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        return {
            "benchmark": "gradients", "model": cell.model, "way": cell.way, "size_pixels": self._size_pixels,
            **result, "wall_seconds": round(time.monotonic() - began, 1), **describe(),
        }  # fmt: skip

    def _measure(self, model: str) -> Measured:
        if self._measured is None or model != self._model:
            if self._measured is not None:
                self._measured.forget()
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self._model, self._measured = model, Measured(prepare(model, self._size_pixels, device))
        return self._measured


COLUMNS = ["model", "way", "relative to", "velocity: error", "all LoRA gradients: cosine, error",
           *(f"quarter {number + 1}: worst block" for number in range(NUM_QUARTERS)), "worst matrix"]  # fmt: skip


def table_rows(cell: Cell, result: Result) -> list[str]:
    """Formats a line of the table for each reference, or a sentence for each kind of block with timed products."""
    if "failed" in result:
        return [failed_line([cell.model, cell.way], result, len(COLUMNS))]
    if cell.way == PRODUCTS:
        return [f"{cell.model}, {products_sentence(kind)}" for kind in result["kinds"]]
    rows = []
    for reference, found in result["relative_to"].items():
        all_gradients, worst = (
            found["all_gradients"],
            min(found["quarters"], key=lambda row: row["worst_matrix_cosine"]),
        )
        cells = [
            f"{row['cosine']:.4f}, {row['relative_error']:.1%} ({short(row['block'])})" for row in found["quarters"]
        ]
        cells += [""] * (NUM_QUARTERS - len(cells))
        figures = [
            f"{found['velocity_relative_error']:.2%}",
            f"{all_gradients['cosine']:.4f}, {all_gradients['relative_error']:.1%}", *cells,
            f"{worst['worst_matrix_cosine']:.4f} ({short(worst['worst_matrix'])})",
        ]  # fmt: skip
        rows.append(markdown_line([cell.model, cell.way, reference, *figures]))
    return rows


def products_sentence(kind: Result) -> str:
    """Describes the time of a block's products."""
    parts = [
        f"{direction} " + ", ".join(f"{way} {ms:.3f}" for way, ms in kind[f"{direction}_ms"].items())
        for direction in ("forward", "backward")
    ]
    return f"8-bit products of one of {kind['blocks']}, ms: {'; '.join(parts)}"


def short(path: str) -> str:
    """Shortens a path by what all names have in common."""
    path = re.sub(r"\.default\.weight$|\.attn(?=\.)", "", path)
    return re.sub(r"^(single_)?transformer_blocks\.", lambda match: "s" if match[1] else "", path)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=SIZE_PIXELS, help="side of the picture, pixels")


def main() -> None:
    arguments = read_arguments(__doc__, "MODEL for all of its cells, or MODEL,CELL", add_options=add_options)
    models = Models(arguments.size)
    print(markdown_header(COLUMNS), flush=True)
    run_cells(
        parse_cells(arguments.cells or MODELS),
        arguments,
        models.measure,
        lambda cell, result: print("\n".join(table_rows(cell, result)), flush=True),
    )


if __name__ == "__main__":
    main()
