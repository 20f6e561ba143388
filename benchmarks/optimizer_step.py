"""Times the optimizer's step of all weights in one call: python benchmarks/optimizer_step.py [--output FILE]

The weights are those of some blocks of Qwen-Image, 0.34 billion each, random and in bf16, with gradients in bf16. A
step is what `FullWeights.step` does: the norm of all gradients, clipping, every weight. Each way gets the same ones:

    older      every operation by its own kernels, rounding drawn from torch's generator: up to November 2026
    separate   the same, but for rounding, which is one kernel with noise by a number's place
    kernel     one kernel for each weight
    library    bitsandbytes' or torch's own step upon bf16 weights, rounded to the nearest; without norm and clipping

Bytes per weight are what a step has to move where every operation is a pass of its own, by hand; the bandwidth is that
of a large copy, measured in the same call. `--sweep` times the kernel's variants upon one large matrix. On a CPU, which
has no kernel, `--width 64` tries the script.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.bench.environment import describe
from pixtune.bench.peaks import median_seconds
from pixtune.plan.optimizers import EXACT, KERNEL, SEPARATE, SMALL
from pixtune.trained import adamw_step, optim
from pixtune.trained.optimizers import BUILDERS
from pixtune.trained.skipped_step import is_spoiled
from pixtune.trained.step_trial import step_obstacle
from pixtune.trained.weight_update import WeightUpdate

Result = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
WIDTH = 3072
ROUNDS = 7
SETTINGS: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "weight_decay": 0.01, "eps": 1e-8}
MAX_NORM = 1.0
NORM_BYTES = 2
WAYS = [  # form of the step, optimizer, fp32 copies, bytes per weight: by hand, the norm of 2 left out
    ("older", SMALL, False, 164),
    (SEPARATE, SMALL, False, 102),
    (KERNEL, SMALL, False, 10.06),
    (KERNEL, SMALL, True, 16.06),
    ("library", SMALL, False, 10.06),
    ("older", EXACT, False, 116),
    (KERNEL, EXACT, False, 22),
    (KERNEL, EXACT, True, 28),
    ("library", EXACT, False, 14),
]
"""Counted in docs/experiments.md, "The optimizer's step of all weights"."""


def block_shapes(width: int, number: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields names and shapes of the tensors of one of Qwen-Image's blocks."""
    layers = {
        **dict.fromkeys(("img_mod", "txt_mod"), (6 * width, width)),
        **{f"to_{name}": (width, width) for name in ("q", "k", "v", "out", "add_q", "add_k", "add_v", "add_out")},
        **dict.fromkeys(("img_mlp.in", "txt_mlp.in"), (4 * width, width)),
        **dict.fromkeys(("img_mlp.out", "txt_mlp.out"), (width, 4 * width)),
    }
    for name, shape in layers.items():
        yield f"{number}.{name}.weight", shape
        yield f"{number}.{name}.bias", shape[:1]
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        yield f"{number}.{name}.weight", (128,)


def random_tensors(shapes: Shapes, size: float, device: torch.device) -> dict[str, Tensor]:
    return {name: size * torch.randn(shape, device=device, dtype=torch.bfloat16) for name, shape in shapes.items()}


def build_step(
    form: str, optimizer: str, has_masters: bool, weights: dict[str, nn.Parameter], gradients: dict[str, Tensor],
    clips: bool = True,
) -> Callable[[], Any]:  # fmt: skip
    """Returns a function that takes one step; unless it clips, without the norm of the gradients."""
    if form == "library":
        for name, weight in weights.items():
            weight.grad = gradients[name]
        if optimizer == EXACT:
            return torch.optim.AdamW(weights.values(), fused=True, **SETTINGS).step
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit([*weights.values()], **SETTINGS).step

    def build(_: str, parameters: Any) -> optim.Optimizer:
        return BUILDERS[optimizer](parameters, **SETTINGS)

    update = WeightUpdate(weights, build, 0, 0, has_masters, form=None if form == "older" else form)
    loss = torch.zeros((), device=next(iter(gradients.values())).device)

    def step() -> None:
        norm = optim.global_norm([optim.norm_of(gradient) for gradient in gradients.values()]) if clips else loss
        factor, spoiled = optim.clipping_factor(norm, MAX_NORM if clips else 0), is_spoiled(loss, norm)
        update.begin_step()
        update.step_weights(gradients, factor, spoiled)
        update.end_step()

    return step


def measure(
    way: tuple[str, str, bool, float], shapes: Shapes, gradients: dict[str, Tensor],
    bytes_per_second: float, device: torch.device,
) -> Result:  # fmt: skip
    """Times one way; one that fails leaves the reason."""
    form, optimizer, has_masters, moved = way
    moved += 0 if form == "library" else NORM_BYTES
    count = sum(gradient.numel() for gradient in gradients.values())
    told = {"form": form, "optimizer": optimizer, "fp32_copies": has_masters, "bytes_per_weight": moved}
    try:
        weights = {name: nn.Parameter(tensor) for name, tensor in random_tensors(shapes, 0.02, device).items()}
        step = build_step(form, optimizer, has_masters, weights, gradients)
        for _ in range(2):
            step()
        peak = {}
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        began = time.perf_counter()
        step()
        host = time.perf_counter() - began
        if device.type == "cuda":
            torch.cuda.synchronize()
            peak = {"temporary_mib": round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)}
        seconds = median_seconds(step, device, ROUNDS, 1)
    except (RuntimeError, ImportError) as error:
        return {**told, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {
        **told, "seconds": round(seconds, 5), "host_seconds": round(host, 5), **peak,
        "picoseconds_per_weight": round(1e12 * seconds / count, 3),
        "share_of_bandwidth": round(moved * count / seconds / bytes_per_second, 3),
        "seconds_of_20.4e9_weights": round(seconds * 20.4e9 / count, 4),
    }  # fmt: skip


def sweep(device: torch.device, bytes_per_second: float) -> list[Result]:
    """Times the kernel's variants upon one large matrix."""
    shape = {"matrix": (4 * WIDTH, WIDTH)}
    found = []
    kept = adamw_step.ROWS, adamw_step.WARPS
    for optimizer, rows, warps in itertools.product((SMALL, EXACT), (1, 2, 4, 8, 16), (1, 2, 4, 8)):
        if rows * 256 < warps * 32:
            continue
        adamw_step.ROWS, adamw_step.WARPS = rows, warps
        weights = {name: nn.Parameter(tensor) for name, tensor in random_tensors(shape, 0.02, device).items()}
        (gradient,) = random_tensors(shape, 1e-3, device).values()
        step = build_step(KERNEL, optimizer, False, weights, {"matrix": gradient}, clips=False)
        seconds = median_seconds(step, device, ROUNDS, 20)
        moved = 10.06 if optimizer == SMALL else 22
        found.append({
            "optimizer": optimizer, "rows": rows, "warps": warps,
            "microseconds": round(1e6 * seconds, 2),
            "share_of_bandwidth": round(moved * gradient.numel() / seconds / bytes_per_second, 3),
        })  # fmt: skip
        print(json.dumps(found[-1]), flush=True)
    adamw_step.ROWS, adamw_step.WARPS = kept
    return found


def copy_bytes_per_second(device: torch.device) -> float:
    """Measures the bytes that a large copy reads and writes per second."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**20, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, ROUNDS, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6, help="number of Qwen-Image's blocks")
    parser.add_argument("--width", type=int, default=WIDTH, help="width of the model")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--sweep", action="store_true", help="times the kernel's variants as well")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    numbers = range(arguments.blocks)
    shapes = dict(itertools.chain.from_iterable(block_shapes(arguments.width, number) for number in numbers))
    gradients = random_tensors(shapes, 1e-3, device)
    bytes_per_second = copy_bytes_per_second(device)
    result: Result = {
        "benchmark": "optimizer_step", "weights": sum(gradient.numel() for gradient in gradients.values()),
        "tensors": len(gradients), "copy_bytes_per_second": round(bytes_per_second, -9),
        "kernel_obstacle": step_obstacle(device), **describe(), "ways": [], "sweep": [],
    }  # fmt: skip
    print(json.dumps(result), flush=True)
    for way in WAYS:
        if way[0] == KERNEL and result["kernel_obstacle"] is not None:
            continue
        result["ways"].append(measure(way, shapes, gradients, bytes_per_second, device))
        print(json.dumps(result["ways"][-1]), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if arguments.sweep and result["kernel_obstacle"] is None:
        result["sweep"] = sweep(device, bytes_per_second)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
