"""Measures whether a plan is the fastest way within its limit: python benchmarks/neighbours.py --output DIR --seed S

For each model a size, batch size and rank are drawn by lot, and for it limits of memory between the least that the
planner accepts and what the fastest way needs. For each limit the plan is run, and so are its neighbours: rungs that
the planner holds for a little too large (a block or two less recomputed or streamed), other ways that fit, and weights
of more and of fewer bits (neighbouring_rungs.py). Each rung runs once, under the smallest limit that wants it; rungs
that differ only in what is recomputed or offloaded share one loaded and compiled transformer with random weights. A
rung that had to give something up under its limit did not fit, and is tried under the next larger one.

    python benchmarks/neighbours.py --output DIR --seed 1 --seconds 400
    python benchmarks/neighbours.py --output DIR --table
    python benchmarks/neighbours.py --seed 1 --list              # what would run; needs no GPU

A file for each model is written after each rung, and what it holds is not measured again. The table gives for each
limit the plan's time over the best of the same or more bits, and over the best of any. On a CPU `--tiny` shows that it
works, with the small models.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from architectures import ARCHITECTURES, write_model_folder
from neighbouring_rungs import (
    Build,
    Candidate,
    Job,
    candidates,
    jobs_of,
    least_limit,
    limit_of_the_fastest,
    one_of_each_way,
    with_limit,
)
from neighbours_table import counted, describe_rung, print_table
from random_cells import machine_facts

from pixtune.assembly import assemble, build_exchange, build_pass
from pixtune.bench.environment import describe
from pixtune.bench.result import Result
from pixtune.bench.steps import Request, TimedSteps, write_case
from pixtune.config.schema import TrainConfig
from pixtune.engine.activations import recompute_blocks, recompute_projections
from pixtune.engine.apply import blocks_of
from pixtune.engine.forwards import WrappedForward
from pixtune.engine.relief import drop_frames, first_line, free_unused, lacks_memory
from pixtune.errors import MemoryShortage, PixtuneError
from pixtune.families import family_of
from pixtune.hardware.capping import cap_device_memory
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB, HardwareFacts
from pixtune.launch.stop import StopRequest
from pixtune.plan.choice import Choice
from pixtune.plan.demands import demands_of
from pixtune.plan.rungs import Rung, count_captures
from pixtune.plan.seconds import step_seconds
from pixtune.plan.situation import Situation, situation_of
from pixtune.plan.training import TrainingPlan
from pixtune.planning import footprint_of
from pixtune.run import Run
from pixtune.services import Services
from pixtune.storage.files import write_atomically
from pixtune.storage.model_folder import open_model_folder
from pixtune.train import forward_backward, run_steps
from pixtune.trained.base import Base

MODELS = ("flux", "qwen-image")
TINY = {"flux": "tiny-flux", "qwen-image": "tiny-qwen-image"}
ASSETS = Path(__file__).resolve().parents[1] / "assets"
SIZES, BATCH_SIZES, RANKS = (512, 640, 768, 896, 1024), (1, 1, 2), (8, 16, 32, 64)
MOST_TOKENS = 5200
"""Tokens of a micro-batch, so that a step takes less than half a second and ten cells a few minutes."""
LIMITS = {"flux": 6, "qwen-image": 4}
"""Limits of each model. FLUX.1-dev is built and compiled faster."""
TIMED_STEPS = 4
BUILD_SECONDS = 25.0
"""Time that a build takes before its first rung is measured, at most; less than that left, none is begun."""


@dataclass(frozen=True)
class Case:
    """What was drawn for a model."""

    model: str
    size: int
    batch_size: int
    rank: int
    places: tuple[float, ...]
    """Places of the limits between the least and the one that the fastest way needs, in their logarithm."""

    @property
    def words(self) -> list[str]:
        """Words of its config. States of 32 bits, so that all limits train the same."""
        return [f"rank={self.rank}", f"train_batch_size={self.batch_size}", "adam8bit=false"]


def draw_case(seed: int, model: str, num_limits: int) -> Case:
    """Draws a case; equal arguments give equal cases."""
    dice = random.Random(f"{seed} {model}")
    places = tuple((number + dice.random()) / num_limits for number in range(num_limits))
    while True:
        size, batch_size = dice.choice(SIZES), dice.choice(BATCH_SIZES)
        if batch_size * (size**2 // 256 + ARCHITECTURES[model].num_text_tokens) <= MOST_TOKENS:
            return Case(model, size, batch_size, dice.choice(RANKS), places)


# ---- planning


@dataclass(frozen=True)
class Weighed:
    """A case that is written, and what is to be measured of it."""

    config: TrainConfig
    situation: Situation
    wanted: Mapping[float, Sequence[Candidate]]
    """Candidates of each limit in GiB, the plan first."""


def write(case: Case, folder: Path, tiny: bool) -> TrainConfig:
    """Writes model folder, pictures and config of a case."""
    model = ASSETS / TINY[case.model] if tiny else folder / "model"
    if not tiny:
        write_model_folder(model, ARCHITECTURES[case.model])
    values = {
        "pretrained_model_name_or_path": str(model), "output_dir": str(folder / "run"), "random_weights": True,
        "max_train_steps": 1, "mixed_precision": "bf16", "data_config": {"img_dir": str(folder)},
    }  # fmt: skip
    path = folder / "case.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    tokens = 32 if tiny else ARCHITECTURES[case.model].num_text_tokens
    return write_case(folder, path, case.words, Request(TIMED_STEPS, 64 if tiny else case.size, tokens))


def weigh(case: Case, config: TrainConfig, facts: HardwareFacts, tiny: bool) -> Weighed:
    """Plans a case at each of its limits."""
    folder = open_model_folder(config.pretrained_model_name_or_path)
    family, size = family_of(folder), 64 if tiny else case.size
    image_tokens = (size // family.pixel_multiple(folder)) ** 2
    num_tokens = case.batch_size * (image_tokens + (config.data_config.max_text_tokens or 0))
    situation = situation_of(facts, footprint_of(config, family, folder, num_tokens), demands_of(config))
    least, most = least_limit(situation), 1.1 * limit_of_the_fastest(situation)
    limits = {round(least * (most / least) ** place, 2 if tiny else 1) for place in case.places}
    choose = one_of_each_way if tiny else candidates  # all ways of a small model fit
    wanted = {limit: choose(with_limit(situation, limit)) for limit in sorted(limits)}
    return Weighed(config, situation, {limit: found for limit, found in wanted.items() if found})


# ---- measuring


@dataclass(frozen=True)
class Built:
    """A run on a loaded and compiled transformer, whose blocks may be recomputed in other ways."""

    run: Run
    base: Base


def build(weighed: Weighed, rung: Rung, limit_gib: float) -> Built:
    """Assembles a run on a rung, whatever the planner would choose."""

    def forced(situation: Situation, config: TrainConfig) -> Choice:
        return Choice(
            rung, situation.optimizer, ("measured beside its neighbours",), situation.peak(rung),
            rung.host_bytes(situation), micro_batch_seconds=step_seconds(rung, situation),
        )  # fmt: skip

    capped = {"gpu_memory_limit_gib": limit_gib} if torch.cuda.is_available() else {}
    with mock.patch("pixtune.plan.training.choose_rung", forced):
        run, services = assemble(weighed.config.model_copy(update=capped), forward_backward)
    assert isinstance(services, Services)
    return Built(run, Base(services.folder, run.family, run.transformer))


def plan_of(built: Built, rung: Rung, situation: Situation) -> TrainingPlan:
    """Returns the plan of a rung on what is built."""
    plan, peak_bytes = built.run.plan, situation.peak(rung)
    on_gpu = built.run.accelerator.device.type == "cuda"
    return replace(
        plan,
        recomputed_blocks=rung.recomputed_blocks,
        reprojected_blocks=rung.reprojected_blocks,
        offload_inputs=rung.offload_inputs,
        expected_peak_bytes=peak_bytes,
        usable_bytes=situation.usable_bytes if on_gpu else 0,
        captures=count_captures(rung, situation, peak_bytes) if on_gpu else 0,
    )


def put_activations(built: Built, plan: TrainingPlan) -> None:
    """Has the blocks recompute what a plan says, and nothing of what they did before."""
    blocks = blocks_of(built.base.module, built.run.family)
    for block in blocks:
        while isinstance(block.forward, WrappedForward) and block.forward.recomputes:
            block.forward = block.forward.inner
        for module in block.modules():
            processor: Any = getattr(module, "processor", None)
            if hasattr(processor, "recomputes_projections"):
                processor.recomputes_projections = False
    recompute_blocks(blocks[: plan.recomputed_blocks], plan.offload_inputs)
    recompute_projections(blocks[plan.recomputed_blocks :][: plan.reprojected_blocks])


def measure(built: Built, rung: Rung, situation: Situation, limit_gib: float) -> Result:
    """Times a rung's steps under a limit."""
    run, plan = built.run, plan_of(built, rung, situation)
    device = run.accelerator.device
    if device.type == "cuda":
        cap_device_memory(limit_gib, None, device)
    put_activations(built, plan)
    for parameter in run.trained.parameters.values():
        parameter.grad = None
    free_unused()
    stop = StopRequest()
    passes, reliefs = build_pass(run.config, forward_backward, plan, built.base, run.trained, stop)
    exchange = build_exchange(run.accelerator, run.trained, passes)
    run = replace(run, plan=plan, forward_backward=passes, exchange=exchange, reliefs=reliefs, stop=stop)
    timed, began = TimedSteps(run), time.monotonic()
    result: Result = {
        "rung": asdict(rung), "limit_gib": limit_gib, "expected_peak_gib": round(plan.expected_peak_bytes / GIB, 3),
        "expected_seconds": step_seconds(rung, situation),
    }  # fmt: skip
    try:
        run_steps(run, timed)
    except MemoryShortage as shortage:
        result["ran_out"] = shortage.obstacle
        drop_frames(shortage)
    else:
        steps, seconds = run.memory.stages.stages[-1], timed.timing().seconds
        result |= {
            "seconds": statistics.median(seconds), "seconds_all": list(seconds),
            "peak_gib": round(max(steps.peak_gib, steps.allocated_gib + passes.history.pass_bytes / GIB), 3),
            "reserved_gib": round(steps.peak_reserved_gib, 3),
        }  # fmt: skip
    gave_up = [*passes.history.savings, *([passes.history.stopped] if passes.history.stopped else [])]
    gave_up += ["leaner than planned"] if reliefs.plan != plan else []
    passes.release()
    free_unused()
    return result | {"gave_up": gave_up, "wall_seconds": round(time.monotonic() - began, 1)}


class Record:
    """What was measured of a case, in its file."""

    def __init__(self, path: Path, case: Case, wanted: Mapping[float, Sequence[Candidate]]) -> None:
        self._path = path
        self.values: dict[str, Any] = {
            "benchmark": "neighbours", "case": asdict(case), "results": [], "failed": [],
            "limits": {
                f"{limit:g}": [asdict(candidate) for candidate in found] for limit, found in wanted.items()
            },
        }  # fmt: skip
        if path.exists():
            before = json.loads(path.read_text())
            if before["limits"] == json.loads(json.dumps(self.values["limits"])):
                self.values["results"] = before["results"]

    def add(self, kind: str, value: Result) -> None:
        self.values[kind].append(value)
        write_atomically(self._path, json.dumps(self.values | describe(), indent=1).encode())

    def of(self, rung: Rung, limit_gib: float) -> Result | None:
        """Returns what counts for a rung under a limit, if anything does."""
        return counted(self.values["results"], asdict(rung), limit_gib)


def measure_case(case: Case, weighed: Weighed, record: Record, end: float) -> None:
    """Measures the rungs of a case that have no result yet, as long as there is time."""
    for parts, jobs in jobs_of(weighed.wanted).items():
        missing = [job for job in jobs if any(record.of(job.rung, limit) is None for limit in job.limits_gib)]
        if not missing or time.monotonic() + BUILD_SECONDS > end:
            continue
        began = time.monotonic()
        try:
            measure_build(missing, weighed, record, end)
        except (PixtuneError, RuntimeError) as error:
            if not isinstance(error, PixtuneError) and not lacks_memory(error):
                raise
            record.add("failed", {"build": asdict(parts), "reason": first_line(error)})
            print(f"{case.model}: {describe_build(parts)}: {first_line(error)}", file=sys.stderr, flush=True)
            drop_frames(error)
        torch.compiler.reset()  # what was compiled holds on to weights
        free_unused()
        print(f"{case.model}: {describe_build(parts)}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def measure_build(jobs: Sequence[Job], weighed: Weighed, record: Record, end: float) -> None:
    """Measures rungs that share a transformer, each under the smallest limit that wants it and that it fits."""
    built = build(weighed, jobs[0].rung, max(limit for job in jobs for limit in job.limits_gib))
    for job in jobs:
        for limit_gib in sorted(job.limits_gib):
            if record.of(job.rung, limit_gib) is None and time.monotonic() < end:
                result = measure(built, job.rung, with_limit(weighed.situation, limit_gib), limit_gib)
                record.add("results", result)
                print(
                    json.dumps({key: result[key] for key in result if key not in ("rung", "seconds_all")}), flush=True
                )


def describe_build(parts: Build) -> str:
    more = ["transposes kept"] if parts.kept_transposes else []
    more += ["cheap recomputed"] if parts.selective else []
    more += [f"{parts.streamed_blocks} streamed"] if parts.streamed_blocks else []
    return ", ".join([parts.weights_format, *more])


# ---- the command line


def print_list(case: Case, weighed: Weighed) -> None:
    """Prints what would be measured."""
    print(f"{case.model}: {case.size} px, batch {case.batch_size}, rank {case.rank}")
    for limit, found in weighed.wanted.items():
        situation = with_limit(weighed.situation, limit)
        for each in found:
            size, seconds = situation.needed(each.rung) / GIB, step_seconds(each.rung, situation)
            what = describe_rung(asdict(each.rung))
            print(f"  {limit:g} GiB: {each.relation} ({each.why}): {what}: {size:.2f} GiB, {seconds:.3f} s")
    builds = jobs_of(weighed.wanted)
    print(f"  {sum(map(len, builds.values()))} rungs on {len(builds)} builds")


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--limits", type=int, help="limits of each model; default: 6 of FLUX, 4 of Qwen-Image")
    parser.add_argument("--host-gib", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=600.0, help="time after which nothing is begun")
    parser.add_argument("--list", action="store_true", help="print what would be measured")
    parser.add_argument("--table", action="store_true", help="print what is there")
    parser.add_argument("--tiny", action="store_true", help="the small models, planned as for an H200")
    arguments = parser.parse_args()
    if not arguments.table:
        if arguments.output is None and not arguments.list:
            parser.error("--output is missing")
        facts = facts_as("H200") if arguments.tiny else machine_facts(arguments.host_gib)
        for model in arguments.models:
            case = draw_case(arguments.seed, model, arguments.limits or LIMITS[model])
            with tempfile.TemporaryDirectory() as name:
                weighed = weigh(case, write(case, Path(name), arguments.tiny), facts, arguments.tiny)
                if arguments.list:
                    print_list(case, weighed)
                    continue
                arguments.output.mkdir(parents=True, exist_ok=True)
                record = Record(arguments.output / f"{arguments.seed}-{model}.json", case, weighed.wanted)
                measure_case(case, weighed, record, began + arguments.seconds)
    if not arguments.list:
        print_table(arguments.output)


if __name__ == "__main__":
    main()
