"""A benchmark's figures as JSON, and as a table for people. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from pixtune.bench.flops import StepFlops

Result = dict[str, Any]
"""As JSON holds it."""
TERA = 10**12


@dataclass(frozen=True)
class Case:
    """What was measured. Results are compared only where all of it is equal."""

    model: str
    """Class of its pipeline."""
    num_weights: int
    """Of the transformer."""
    method: str
    resolution_pixels: int
    """Side of the square pictures."""
    num_controls: int
    num_image_tokens: int
    """Of one example, its controls' included."""
    num_text_tokens: int
    batch_size: int
    gradient_accumulation_steps: int
    rank: int | None
    """None where all weights are trained."""
    num_trained_weights: int


@dataclass(frozen=True)
class Timing:
    """Seconds of one run's steps."""

    seconds: tuple[float, ...]
    """Of each step after the first few."""
    num_warm_up_steps: int
    first_step_seconds: float
    compiled_graphs: int
    data_wait_seconds: tuple[float, ...]
    """How long each of the same steps had to wait for its pictures."""
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Memory:
    """Most that the steps took, GiB; None: not known."""

    allocated_gib: float | None
    """By torch's allocator on the GPU; None without one."""
    process_gib: float | None
    """On the GPU, with what the allocator holds in reserve and the CUDA context; without a GPU, of host memory."""
    expected_gib: float | None = None
    """The plan's estimate of what is allocated."""


@dataclass(frozen=True)
class Formats:
    """What products are computed in: "fp32", "bf16", "fp8" or "int8"."""

    plain: str
    quantised: str
    """Of quantised layers; the same as `plain` where none is."""


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
    """Everything as JSON.

    Args:
        peaks: operations per second that the chip was seen to reach, by format.
        environment: of `describe`.
        plan: how the run used the machine, with its `reasons`.
    """
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
        "tflop": {"model": flops.model / TERA, "hardware": flops.hardware / TERA,
                  "parts": {name: value / TERA for name, value in asdict(flops).items()}},
        "tflop_per_second": {"model": flops.model / TERA / median, "hardware": flops.hardware / TERA / median},
        "peak_tflop_per_second": {name: peak / TERA for name, peak in peaks.items()},
        "share_of_peak": shares_of_peak(flops, formats, peaks, median),
        "memory": {f"peak_{name}": value for name, value in asdict(memory).items()},
        "losses": {"first": timing.losses[0], "last": timing.losses[-1]},
        "plan": dict(plan),
        **environment,
    }  # fmt: skip


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile, of values that are all there are."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def shares_of_peak(
    flops: StepFlops, formats: Formats, peaks: Mapping[str, float], seconds: float
) -> dict[str, float | str]:
    """How much of a step's time its products would take at the chip's peak, each in its own format."""
    shares = {}
    for name, total, share in zip(
        ("model", "hardware"), (flops.model, flops.hardware), flops.quantised_share, strict=True
    ):
        at_peak = total * ((1 - share) / peaks[formats.plain] + share / peaks[formats.quantised])
        shares[name] = at_peak / seconds
    return {**shares, "plain_format": formats.plain, "quantised_format": formats.quantised}


# ---- for people


def render(result: Result, console: Console) -> None:
    """The figures as a table."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows(result):
        table.add_row(name, value)
    console.print(table, markup=False, highlight=False)


def rows(result: Result) -> list[tuple[str, str]]:
    """What the table shows: name and value."""
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
        ("operations", f"{tflop['model']:.4g} TFLOP a step, {tflop['hardware']:.4g} with what is computed twice"),
        ("speed", f"{speed['model']:.4g} TFLOP/s, {speed['hardware']:.4g} with what is computed twice"),
        ("peak", ", ".join(f"{peak:.4g} TFLOP/s in {name}" for name, peak in peaks.items()) + ", measured now"),
        ("share of peak", f"{share['model']:.1%}, {share['hardware']:.1%} with what is computed twice"),
        ("memory", memory_in_words(result["memory"])),
        *(("plan", reason) for reason in result["plan"]["reasons"]),
    ]


def in_words(case: Mapping[str, Any]) -> str:
    """A case's sizes."""
    trained = "all weights" if case["rank"] is None else f"LoRA of rank {case['rank']}"
    controls = f" with {case['num_controls']} controls" if case["num_controls"] else ""
    side, batch = case["resolution_pixels"], case["batch_size"] * case["gradient_accumulation_steps"]
    tokens = f"{case['num_image_tokens']} image and {case['num_text_tokens']} text tokens"
    return f"{trained}, {batch} x {side}x{side}{controls}, {tokens}"


def memory_in_words(memory: Mapping[str, Any]) -> str:
    """Known figures of `Result["memory"]`."""
    names = {"peak_allocated_gib": "allocated", "peak_process_gib": "by the process", "peak_expected_gib": "expected"}
    known = [f"{memory[key]:.2f} GiB {name}" for key, name in names.items() if memory[key] is not None]
    return ", ".join(known)
