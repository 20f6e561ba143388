"""One process of `benchmarks/scaling.py`: takes a run's steps beside the others, and writes its own figures.

Started by torchrun, or alone: python benchmarks/scaling_rank.py --figures FOLDER --config FILE key=value ...
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh

from pixtune import assembly
from pixtune.assembly import assemble
from pixtune.bench.environment import describe
from pixtune.bench.peaks import measure_peaks
from pixtune.bench.steps import TimedSteps, count_flops, describe_case, formats_of
from pixtune.config import load_config
from pixtune.engine.together import Together
from pixtune.hardware.capping import read_before_cuda
from pixtune.hardware.nvidia_smi import own_gpu
from pixtune.run import Run
from pixtune.tracking.figures import StepOutcome, mark_time, seconds_between
from pixtune.train import forward_backward, run_steps

EXCHANGES = {"all_reduce": 0, "all_gather_into_tensor": 0, "reduce_scatter_tensor": 1}
"""Calls of torch that exchange, with the place of the argument that is as large as what is exchanged."""
REPEATS = 30


class Counted:
    """Counts the exchanges that this process asks for, and their bytes. Those in a replay are not asked for again."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        for name, place in EXCHANGES.items():
            setattr(distributed, name, self._counting(name, place, getattr(distributed, name)))

    def _counting(self, name: str, place: int, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def counting(*args: Any, **kwargs: Any) -> Any:
            tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            self.calls.append((name, tensors[place].nbytes))
            return call(*args, **kwargs)

        return counting


def hold_in_parts() -> None:
    """Has one process alone hold all weights as each of several holds its part, which the planner never chooses."""
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(
        backend,
        rank=0,
        world_size=1,
        store=distributed.HashStore(),  # type: ignore[attr-defined]
    )

    def build(shards: int, num_processes: int, device: torch.device) -> Together:
        return Together(init_device_mesh(device.type, (1,), mesh_dim_names=("part",)))

    setattr(assembly, "build_together", build)  # noqa: B010 - replaces what `assembly` imported


class CountedSteps(TimedSteps):
    """Timed steps, with the exchanges of the first one, which is launched kernel by kernel."""

    def __init__(self, run: Run, counted: Counted) -> None:
        super().__init__(run)
        self._counted = counted
        self.first: list[tuple[str, int]] = []

    def before_first_step(self) -> None:
        self._counted.calls.clear()
        super().before_first_step()

    def after_step(self, step: int, outcome: StepOutcome) -> None:
        if step == 1:
            self.first = [*self._counted.calls]
        super().after_step(step, outcome)


def time_exchange(num_bytes: int, device: torch.device) -> float:
    """Returns the median seconds of summing so many bytes over all processes while nothing else is done."""
    tensor, seconds = torch.zeros(num_bytes // 4, device=device), []
    for _ in range(REPEATS + 3):
        distributed.barrier()
        began = mark_time(device)
        distributed.all_reduce(tensor)
        ended = mark_time(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(seconds_between(began, ended))
    return statistics.median(seconds[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--in-parts", action="store_true", help="one process goes the way of several: all weights")
    parser.add_argument("words", nargs="*")
    arguments = parser.parse_args()
    rank, counted = int(os.environ.get("RANK", "0")), Counted()
    folder = arguments.figures / "run"  # one of all processes, as those that hold the weights together demand
    config = load_config(arguments.config, [*arguments.words, f"output_dir={folder}"])
    if arguments.in_parts:
        hold_in_parts()
    before = read_before_cuda(own_gpu(os.environ)) if torch.version.cuda is not None else None
    run, services = assemble(config, forward_backward)
    case, device = describe_case(run, services), run.accelerator.device
    timed = CountedSteps(run, counted)
    if not run_steps(run, timed).finished:
        raise SystemExit("asked to stop before all steps were timed")
    if run.accelerator.num_processes > 1:
        distributed.barrier()  # the first process has written all steps
    flops, formats = count_flops(run, services, case), formats_of(run.plan, device)
    figures = {
        "rank": rank,
        "num_processes": run.accelerator.num_processes,
        "case": asdict(case),
        "timing": asdict(timed.timing()),
        "memory": asdict(timed.memory(before)),
        "first_step_exchanges": [
            {"kind": kind, "num_bytes": num_bytes, "times": timed.first.count((kind, num_bytes))}
            for kind, num_bytes in dict.fromkeys(timed.first)
        ],
        "tflop": {"model": flops.model / 1e12, "hardware": flops.hardware / 1e12},
        "plan": run.plan.to_dict(),
        **describe(),
    }
    reduced = max((num_bytes for kind, num_bytes in timed.first if kind == "all_reduce"), default=0)
    if run.accelerator.num_processes > 1 and reduced:
        figures["exchange_seconds_alone"] = time_exchange(reduced, device)
    if rank == 0:
        figures["peak_flops"] = measure_peaks([formats.plain], device)[formats.plain]
    (arguments.figures / f"{rank}.json").write_text(json.dumps(figures, indent=1))
    if run.accelerator.num_processes > 1:
        distributed.barrier()
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
