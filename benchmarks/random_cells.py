"""Runs full-size steps drawn by lot: python benchmarks/random_cells.py --output DIR --seed S --count N

Model, memory limit, rank, batch, sizes, targets, accumulation, controls and method of each cell are drawn from its seed
and number, and a few steps are run with random weights: enough to capture each shape. Only memory counts, so several
cells share a GPU, as many as `--parallel` allows while their limits and host memory have room, the longest first.

Cells that the planner refuses are reported and not counted: others are drawn in their place. Each cell's JSON is
written at once, and existing results are not measured again. `--seconds T` starts no cell that would hardly end in time
and ends at T those that still run. `--table` prints what is there, and the summary.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from card_sizes import describe_plan
from cells import markdown_header, markdown_line
from drawn_cell import RandomCell, draw_cell, plan_cell, prepare

from pixtune.bench.environment import describe
from pixtune.bench.result import Result
from pixtune.errors import PlanError
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB, HardwareFacts
from pixtune.hardware.read import read_facts_without_cuda
from pixtune.plan.training import TrainingPlan, with_todays_names
from pixtune.storage.files import write_atomically
from pixtune.tracking.metrics import read_metrics

GPU_GIB = 130.0
"""Sum of the limits of cells that share a GPU. An H200 has 139.8; trials of attention kernels are outside limits."""
PROCESS_HOST_GIB = 6.0
"""Host memory of a run beside what its plan counts: Python with its libraries, CUDA's own side. Assumed."""
HANGING = 3.0
"""Multiple of its assumed time after which a cell is ended."""
LOG_LINES = 40
PATH = re.compile(r"(?:/[^/\s\"']+)+/([^/\s\"']+)")
"""A path, of which results hold the last part: where things lie is nobody's business."""


SHORTAGE = re.compile(r"ran out of memory|goes on from step \d+ by a leaner plan")
"""Beginning of the lines in which a run reports that memory was short, and that it went on with less."""
REFUSED, RAN, NO_MEMORY, FAILED, UNFINISHED = "refused", "ran", "out of memory", "failed", "unfinished"
"""Outcomes of a cell."""


def outcome(return_code: int | None, log: str) -> str:
    """Returns how a run ended.

    Args:
        return_code: None: it was ended since time was up.
    """
    if return_code is None:
        return UNFINISHED
    if return_code == 0:
        return RAN
    if re.search(r"OutOfMemoryError|out of memory", log):
        return NO_MEMORY
    return REFUSED if re.search(r"error: .*\bmissing\b", log, re.DOTALL) and "Traceback" not in log else FAILED


def read_result(cell: RandomCell, plan: TrainingPlan, output: Path) -> Result:
    """Reads what a run left, as far as it came."""
    lines = read_metrics(output / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "step"]
    memory = next((line for line in lines if line["kind"] == "memory"), {})
    states = sorted(output.glob("checkpoint-*/state.json"))
    own_plan = json.loads(states[-1].read_text())["record"]["plan"] if states else plan.to_dict()
    expected_gib = own_plan["expected_peak_bytes"] / GIB
    measured_gib = memory.get("measured_peak_gib") or max((line["peak_memory_gib"] for line in steps), default=None)
    return {
        "steps_taken": len(steps),
        "seconds_per_step_all": [line["seconds"] for line in steps],
        "memory": memory,
        "plan": own_plan,
        "expected_peak_gib": round(expected_gib, 3),
        "measured_peak_gib": measured_gib,
        "error_percent": round(100 * (expected_gib / measured_gib - 1), 2) if measured_gib and steps else None,
    }


# ---- several at once


@dataclass(frozen=True)
class Waiting:
    """A cell that is prepared and fits."""

    cell: RandomCell
    plan: TrainingPlan
    folder: Path
    command: tuple[str, ...]


@dataclass
class Running:
    """A cell at work."""

    cell: RandomCell
    plan: TrainingPlan
    gpu: int
    process: subprocess.Popen[bytes]
    folder: Path
    began: float

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def has_all_steps(self) -> bool:
        """Returns whether a run that trains all weights has taken its steps. Saving them all would take minutes."""
        if self.cell.method != "full":
            return False
        metrics = self.folder / "run" / "metrics.jsonl"
        return f'"step": {self.cell.steps}, "loss"' in (metrics.read_text() if metrics.exists() else "")


@dataclass(frozen=True)
class Room:
    """What cells may take together."""

    num_gpus: int
    parallel: int
    """Cells on one GPU at once."""
    host_gib: float
    gpu_gib: float = GPU_GIB

    def gpu_for(self, limit_gib: float, host_gib: float, running: Sequence[tuple[int, float, float]]) -> int | None:
        """Returns the GPU with the most room that a cell can start on now; None: it must wait.

        Args:
            running: GPU, limit and host memory of each cell at work.
        """
        if running and sum(host for _, _, host in running) + host_gib > self.host_gib:
            return None
        taken = {gpu: [limit for other, limit, _ in running if other == gpu] for gpu in range(self.num_gpus)}
        fitting = [
            gpu for gpu, limits in taken.items()
            if len(limits) < self.parallel and (not limits or sum(limits) + limit_gib <= self.gpu_gib)
        ]  # fmt: skip
        return min(fitting, key=lambda gpu: sum(taken[gpu]), default=None)


def host_gib(plan: TrainingPlan) -> float:
    """Returns the host memory that a run takes."""
    return PROCESS_HOST_GIB + plan.expected_host_bytes / GIB


def start(waiting: Waiting, gpu: int, threads: int) -> Running:
    """Starts a prepared cell on a GPU."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": visible[gpu] if gpu < len(visible) else str(gpu),
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
    }
    with (waiting.folder / "log").open("wb") as log:
        process = subprocess.Popen(waiting.command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    return Running(waiting.cell, waiting.plan, gpu, process, waiting.folder, time.monotonic())


def finish(run: Running, ended_early: bool) -> Result:
    """Returns the result of a cell that has ended, or ends it; its folder is removed."""
    has_all_steps = run.has_all_steps()
    if run.process.poll() is None:
        run.process.kill()
    return_code = run.process.wait()
    log = run.log.read_text(errors="replace")
    how = RAN if has_all_steps else outcome(None if ended_early else return_code, log)
    result = {
        "cell": asdict(run.cell),
        "outcome": how,
        "wall_seconds": round(time.monotonic() - run.began, 1),
        **read_result(run.cell, run.plan, run.folder / "run"),
        "shortages": [line for line in log.splitlines() if SHORTAGE.search(line)],
        "log": [PATH.sub(r"\1", line) for line in log.splitlines()[-LOG_LINES:]],
        **describe(),
    }
    shutil.rmtree(run.folder)
    return result


def run_all(
    waiting: Sequence[Waiting],
    room: Room,
    seconds_left: Callable[[], float],
    keep: Callable[[RandomCell, Result], None],
) -> list[RandomCell]:
    """Runs cells, several at once and the longest first, and hands over each result at once.

    Returns:
        The cells that were not started in time.
    """
    left = sorted(waiting, key=lambda each: -each.cell.seconds)
    threads = max(1, (os.cpu_count() or 1) // (room.num_gpus * room.parallel))
    running: list[Running] = []
    try:
        while left or running:
            for run in list(running):
                late = seconds_left() <= 0 or time.monotonic() - run.began > HANGING * run.cell.seconds
                if late or run.process.poll() is not None or run.has_all_steps():
                    running.remove(run)
                    keep(run.cell, finish(run, late and run.process.poll() is None))
            for each in list(left):
                taken = [(run.gpu, run.cell.limit_gib, host_gib(run.plan)) for run in running]
                gpu = room.gpu_for(each.cell.limit_gib, host_gib(each.plan), taken)
                if gpu is not None and each.cell.seconds < seconds_left():
                    left.remove(each)
                    running.append(start(each, gpu, threads))
            if not running and all(each.cell.seconds >= seconds_left() for each in left):
                break
            time.sleep(0.5)
    finally:
        for run in running:
            run.process.kill()
    return [each.cell for each in left]


def prepare_all(
    seed: int, count: int, output: Path, scratch: Path, facts: HardwareFacts, has_8bit_adam: bool
) -> Iterator[Waiting]:
    """Draws cells until `count` of them fit, and yields those that have no result yet; refusals are written at once."""
    num_fitting = 0
    for number in itertools.count():
        cell = draw_cell(seed, number, has_8bit_adam)
        file = output / f"{cell.name}.json"
        if file.exists():
            num_fitting += json.loads(file.read_text())["outcome"] != REFUSED
        else:
            folder = scratch / cell.name
            folder.mkdir(parents=True)
            command = prepare(cell, folder)
            try:
                plan = plan_cell(command, facts)
            except PlanError as error:
                shutil.rmtree(folder)
                result = {"cell": asdict(cell), "outcome": REFUSED, "log": str(error).splitlines()}
                write_atomically(file, json.dumps(result, indent=1).encode())
            else:
                num_fitting += 1
                yield Waiting(cell, plan, folder, tuple(command))
        if num_fitting == count:
            return


# ---- the table

COLUMNS = ("cell", "model", "limit, GiB", "drawn", "plan", "outcome", "captured", "peak GiB, allocated", "planned",
           "error", "reserved", "process GiB")  # fmt: skip


def captured(result: Result) -> str:
    """Describes what happened to a cell's captures."""
    history = result.get("memory", {}).get("captures")
    if not history or not history["planned"]:
        return "not planned" if result["outcome"] == RAN else ""
    if history["stopped"]:
        return f"no: {history['stopped'][:80]}"
    saved = f", {'; '.join(history['savings'])}" if history["savings"] else ""
    return (f"{history['made']}" if history["made"] else "none") + saved


def row(result: Result) -> str:
    """Formats a line of the table."""
    cell = result["cell"]
    drawn = [
        f"{cell['size']} px",
        "all weights" if cell["method"] == "full" else f"rank {cell['rank']} {cell['targets']}",
    ]
    drawn += [f"batch {cell['batch_size']}"] if cell["batch_size"] > 1 else []
    drawn += [f"x {cell['accumulation']}"] if cell["accumulation"] > 1 else []
    drawn += [f"{cell['num_controls']} controls of {cell['control_size']} px"] if cell["num_controls"] else []
    drawn += [f"{len(cell['shapes'])} shapes"] if len(cell["shapes"]) > 1 else []
    start = [str(cell["number"]), cell["model"], f"{cell['limit_gib']:g}", ", ".join(drawn)]
    if result["outcome"] == REFUSED:
        missing = re.search(r"([0-9.]+ [GM]iB)[a-z ]* (?:is|are) missing", " ".join(result["log"]))
        return markdown_line([*start, "", f"refused: {missing[1] if missing else '?'} missing", *[""] * 6])
    memory = result["memory"]

    def gib(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    figures = [
        gib(result["measured_peak_gib"]), gib(result["expected_peak_gib"]),
        "" if result["error_percent"] is None else f"{result['error_percent']:+.1f}%",
        gib(memory.get("reserved_peak_gib")), gib(memory.get("process_peak_gib")),
    ]  # fmt: skip
    plan = describe_plan(with_todays_names(result["plan"]))
    short = result["shortages"]
    how = result["outcome"] + (f", short of memory {len(short)} times" if short else "")
    return markdown_line([*start, plan, how, captured(result), *figures])


def summary(results: Sequence[Result]) -> list[str]:
    """Returns sentences on all results: what fitted, what was captured, and how near the estimates were."""
    counts = {
        how: sum(result["outcome"] == how for result in results)
        for how in (RAN, NO_MEMORY, FAILED, UNFINISHED, REFUSED)
    }
    ended = [result for result in results if result["outcome"] in (RAN, NO_MEMORY, FAILED)]
    lines = [", ".join(f"{count} {how}" for how, count in counts.items() if count)]
    if ended:
        short = sum(bool(result["shortages"]) and result["outcome"] == RAN for result in ended)
        lines.append(
            f"ended without out-of-memory: {len(ended) - counts[NO_MEMORY]} of {len(ended)}, {short} of them went on "
            "with less after memory was short"
        )
    histories = [result["memory"]["captures"] for result in results if result.get("memory", {}).get("captures")]
    planned = [history for history in histories if history["planned"]]
    if planned:
        whole = sum(history["made"] > 0 and history["stopped"] is None for history in planned)
        saved = sum(bool(history["savings"]) for history in planned)
        lines.append(f"captured where planned: {whole} of {len(planned)}, {saved} of them after saving memory")
    errors = sorted(abs(result["error_percent"]) for result in results if result.get("error_percent") is not None)
    if errors:
        nearly_all = errors[math.ceil(0.95 * len(errors)) - 1]
        lines.append(
            f"planned peak against measured, {len(errors)} cells: median {errors[len(errors) // 2]:.1f}%, "
            f"95th percentile {nearly_all:.1f}%, worst {errors[-1]:.1f}%"
        )
    known = [result for result in results if result.get("memory", {}).get("process_peak_gib")]
    if known:
        within = sum(result["memory"]["process_peak_gib"] <= result["cell"]["limit_gib"] for result in known)
        most = max(result["memory"]["process_peak_gib"] / result["cell"]["limit_gib"] for result in known)
        lines.append(f"process within its limit: {within} of {len(known)}, at most {most:.1%} of it")
    return lines


def print_table(output: Path, seed: int | None) -> None:
    """Prints all results of a folder, or those of one seed, and their summary."""
    results = [json.loads(file.read_text()) for file in sorted(output.glob("*.json"))]
    results = [result for result in results if seed is None or result["cell"]["seed"] == seed]
    print(markdown_header(COLUMNS))
    for result in results:
        print(row(result))
    print()
    for line in summary(results):
        print(f"* {line}")


def machine_facts(room_gib: float) -> HardwareFacts:
    """Returns the facts of this machine's GPU, or an H200's where there is none, with the given host memory."""
    facts = read_facts_without_cuda() or facts_as("H200")
    memory = round(room_gib * GIB)
    return replace(facts, free_bytes=facts.total_bytes, host_total_bytes=memory, host_available_bytes=memory)


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seed", type=int, help="of the draw; with --table of the results to print, all by default")
    parser.add_argument("--count", type=int, default=20, help="cells that are not refused")
    parser.add_argument("--parallel", type=int, default=1, help="cells on one GPU at once")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--host-gib", type=float, default=100.0, help="host memory of all cells together")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time after which nothing runs any more")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    arguments = parser.parse_args()
    output: Path = arguments.output
    if arguments.table:
        print_table(output, arguments.seed)
        return
    if arguments.seed is None:
        parser.error("--seed is missing")
    output.mkdir(parents=True, exist_ok=True)

    def keep(cell: RandomCell, result: Result) -> None:
        write_atomically(output / f"{cell.name}.json", json.dumps(result, indent=1).encode())
        print(f"{time.monotonic() - began:.0f} s: {row(result)}", flush=True)

    facts = machine_facts(arguments.host_gib)
    has_8bit_adam = importlib.util.find_spec("bitsandbytes") is not None
    with tempfile.TemporaryDirectory() as name:
        waiting = list(prepare_all(arguments.seed, arguments.count, output, Path(name), facts, has_8bit_adam))
        print(f"{time.monotonic() - began:.0f} s: {len(waiting)} cells to run", flush=True)
        room = Room(arguments.gpus, arguments.parallel, arguments.host_gib)
        left = run_all(waiting, room, lambda: began + arguments.seconds - time.monotonic(), keep)
    if left:
        print(f"not run yet: {', '.join(cell.name for cell in left)}", file=sys.stderr)
    print_table(output, arguments.seed)


if __name__ == "__main__":
    main()
