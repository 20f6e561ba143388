"""The highest rate that this chip reaches: that of square products in each format, measured, not from a data sheet.

A chip's rate falls with its clock, which falls with its power, so the product is repeated and the median of the repeats
counts: the rate that it can sustain.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pixtune.tracking.figures import mark_time, seconds_between

SIDES = {"cuda": (4096, 8192), "cpu": (1024,)}
"""Sides of the square matrices that are tried, by kind of device; the fastest counts. Small GPUs have room for them."""
REPEATS, PRODUCTS_PER_REPEAT = 9, {"cuda": 12, "cpu": 2}
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure_peaks(formats: Iterable[str], device: torch.device) -> dict[str, float]:
    """Measures operations per second in each of these formats: "fp32", "bf16", "fp8", "int8". About a second each."""
    num_products = PRODUCTS_PER_REPEAT[device.type]

    def rate(format_name: str, side: int) -> float:
        seconds = median_seconds(build_product(format_name, side, device), device, REPEATS, num_products)
        return 2 * side**3 / seconds

    return {name: max(rate(name, side) for side in SIDES[device.type]) for name in dict.fromkeys(formats)}


def build_product(format_name: str, side: int, device: torch.device) -> Callable[[], Tensor]:
    """Builds a product of two square matrices of random values: with zeros it would take less power and run faster."""
    if format_name in FLOATS:
        a, b = (torch.randn(side, side, device=device, dtype=FLOATS[format_name]) for _ in range(2))
        return lambda: a @ b.t()
    if format_name == "int8":
        a, b = (torch.randint(-127, 128, (side, side), device=device, dtype=torch.int8) for _ in range(2))
        return lambda: torch._int_mm(a, b.t())
    a, b = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.ones(side, 1, device=device)  # a scale a row, as the blocks' layers have it
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


def median_seconds(call: Callable[[], Tensor], device: torch.device, num_repeats: int, calls_per_repeat: int) -> float:
    """Times a call: the median over the repeats of the mean within each. A first repeat loads the kernel."""
    seconds = []
    for _ in range(num_repeats + 1):
        began = mark_time(device)
        for _ in range(calls_per_repeat):
            call()
        ended = mark_time(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(seconds_between(began, ended))
    return statistics.median(seconds[1:]) / calls_per_repeat
