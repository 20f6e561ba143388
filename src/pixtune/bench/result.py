"""A benchmark's figures as JSON, and as a table for people. Imports no torch.

Keys of the JSON stay as they are, since stored results are compared: there it is "quantised".
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from pixtune.bench.flops import StepFlops

Result = dict[str, Any]
"""A result as JSON holds it."""
TERA = 10**12


@dataclass(frozen=True)
class Case:
    """The measured case. Results are compared only where all of it is equal."""

    model: str
    """Class of its pipeline."""
    num_weights: int
    """Weights of the transformer."""
    method: str
    resolution_pixels: int
    """Side of the square pictures."""
    num_controls: int
    num_image_tokens: int
    """Image tokens of one example, its controls' included."""
    num_text_tokens: int
    batch_size: int
    gradient_accumulation_steps: int
    rank: int | None
    """Rank of the LoRA; None where all weights are trained."""
    num_trained_weights: int


@dataclass(frozen=True)
class Timing:
    """Seconds of one run's steps."""

    seconds: tuple[float, ...]
    """Seconds of each step after the first few."""
    num_warm_up_steps: int
    first_step_seconds: float
    compiled_graphs: int
    data_wait_seconds: tuple[float, ...]
    """Seconds that each of the same steps waited for its pictures."""
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Memory:
    """Peak memory of the steps, GiB; None where it is not known."""

    allocated_gib: float | None
    """Peak of torch's allocator on the GPU; None without one."""
    process_gib: float | None
    """Peak of the process on the GPU, with the allocator's reserve and the CUDA context; without a GPU, on the host."""
    expected_gib: float | None = None
    """The plan's estimate of what is allocated."""


@dataclass(frozen=True)
class Formats:
    """Formats that products are computed in: "fp32", "bf16", "fp8" or "int8"."""

    plain: str
    quantized: str
    """Format of quantized layers; the same as `plain` where none is quantized."""


def make_result(
    case: Case,
    timing: Timing,
    memory: Memory,
    flops: StepFlops,
    formats: Formats,
    peaks: Mapping[str, float],
    environment: Mapping[str, Any],
    plan: Mapping[str, Any],
) -> Result:
    """Puts everything together as JSON.

    Args:
        peaks: operations per second that the chip was seen to reach, by format.
        environment: as `describe` returns it.
        plan: how the run used the machine, with its `reasons`.
    """
    parts = {name.replace("quantized", "quantised"): value / TERA for name, value in asdict(flops).items()}
    first, median, third = quartiles(timing.seconds)
    return {
        "benchmark": "training_steps",
        "case": asdict(case),
        "seconds_per_step": {
            "median": median, "first_quartile": first, "third_quartile": third, "all": list(timing.seconds),
            "num_warm_up_steps": timing.num_warm_up_steps,
        },
        "first_step_seconds": timing.first_step_seconds,
        "compiled_graphs": timing.compiled_graphs,
        "data_wait_seconds_median": statistics.median(timing.data_wait_seconds),
        "tflop": {"model": flops.model / TERA, "hardware": flops.hardware / TERA, "parts": parts},
        "tflop_per_second": {"model": flops.model / TERA / median, "hardware": flops.hardware / TERA / median},
        "peak_tflop_per_second": {name: peak / TERA for name, peak in peaks.items()},
        "share_of_peak": shares_of_peak(flops, formats, peaks, median),
        "memory": {f"peak_{name}": value for name, value in asdict(memory).items()},
        "losses": {"first": timing.losses[0], "last": timing.losses[-1]},
        "plan": dict(plan),
        **environment,
    }  # fmt: skip


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns first quartile, median and third quartile of values that are the whole population."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def shares_of_peak(
    flops: StepFlops, formats: Formats, peaks: Mapping[str, float], seconds: float
) -> dict[str, float | str]:
    """Returns the share of a step's time that its products would take at the chip's peak, each in its own format."""
    shares = {}
    for name, total, share in zip(
        ("model", "hardware"), (flops.model, flops.hardware), flops.quantized_share, strict=True
    ):
        at_peak = total * ((1 - share) / peaks[formats.plain] + share / peaks[formats.quantized])
        shares[name] = at_peak / seconds
    return {**shares, "plain_format": formats.plain, "quantised_format": formats.quantized}


# ---- for people


def render(result: Result, console: Console) -> None:
    """Prints the figures as a table."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows(result):
        table.add_row(name, value)
    console.print(table, markup=False, highlight=False)


def rows(result: Result) -> list[tuple[str, str]]:
    """Returns the table's rows: name and value."""
    case, seconds, speed = result["case"], result["seconds_per_step"], result["tflop_per_second"]
    share, tflop, peaks = result["share_of_peak"], result["tflop"], result["peak_tflop_per_second"]
    machine = result["machine"]
    spread = f"{seconds['first_quartile']:.4g} to {seconds['third_quartile']:.4g} in the middle half"
    return [
        ("model", f"{case['model']}, {case['num_weights'] / 1e9:.4g} billion weights, {in_words(case)}"),
        ("machine", f"{machine['gpu'] or machine['cpu']}, torch {result['versions']['torch']}, {result['commit']}"),
        ("s/step", f"{seconds['median']:.4g} ({spread} of {len(seconds['all'])} steps)"),
        ("first step", f"{result['first_step_seconds']:.3g} s, {result['compiled_graphs']} graphs compiled in all"),
        ("waited for data", f"{result['data_wait_seconds_median']:.3g} s a step"),
        ("operations", f"{tflop['model']:.4g} TFLOP a step, {tflop['hardware']:.4g} with what is recomputed"),
        ("speed", f"{speed['model']:.4g} TFLOP/s, {speed['hardware']:.4g} with what is recomputed"),
        ("peak", ", ".join(f"{peak:.4g} TFLOP/s in {name}" for name, peak in peaks.items()) + ", measured now"),
        ("share of peak", f"{share['model']:.1%}, {share['hardware']:.1%} with what is recomputed"),
        ("memory", memory_in_words(result["memory"])),
        *(("plan", reason) for reason in result["plan"]["reasons"]),
    ]


def in_words(case: Mapping[str, Any]) -> str:
    """Describes a case's sizes."""
    trained = "all weights" if case["rank"] is None else f"LoRA of rank {case['rank']}"
    controls = f" with {case['num_controls']} controls" if case["num_controls"] else ""
    side, batch = case["resolution_pixels"], case["batch_size"] * case["gradient_accumulation_steps"]
    tokens = f"{case['num_image_tokens']} image and {case['num_text_tokens']} text tokens"
    return f"{trained}, {batch} x {side}x{side}{controls}, {tokens}"


def memory_in_words(memory: Mapping[str, Any]) -> str:
    """Describes the known figures of `Result["memory"]`."""
    names = {"peak_allocated_gib": "allocated", "peak_process_gib": "by the process", "peak_expected_gib": "expected"}
    known = [f"{memory[key]:.2f} GiB {name}" for key, name in names.items() if memory[key] is not None]
    return ", ".join(known)
