"""Measures runs on 1 to N GPUs of one host in less than ten minutes: python benchmarks/scaling.py --output DIR

Full-size models have random weights; batch 1 a GPU, 1024x1024 pixels, rank 16. Each cell writes DIR/CELL.json at once,
and one that fails or takes too long leaves the others their time:

    a   a LoRA, the base whole on each GPU, in bf16 and 8 bits: seconds a step, efficiency, the exchange alone
    b   a LoRA, the base in parts on all GPUs under caps of 24 GiB (bf16) and 12 GiB (8 bits), beside one GPU that
        streams the base from host memory under the same cap
    c   all weights, in parts on all GPUs: seconds a step, the peak of a GPU, the share of the chip's peak
    d   saved on N GPUs, resumed on one and again on N, beside a run that was never interrupted
    f   all weights on one GPU, whole and by the way of parts: what that costs where there is nobody to gather from
    e   one process killed: seconds until all have ended, what they print, whether the checkpoint is whole

With `--device cpu` the small model takes the place of the full-size ones, and gloo that of NCCL: a try of the script.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cells import markdown_header, markdown_line
from scaling_processes import (
    ROOT,
    Bench,
    CellError,
    children_of,
    end_group,
    finish,
    is_running,
    launched,
    start_run,
    tail,
    wait_for,
)

from pixtune.bench.result import Result
from pixtune.bench.steps import WARM_UP_STEPS
from pixtune.errors import PixtuneError
from pixtune.plan.exchange_cost import lora_exchanges, sent_bytes
from pixtune.storage.checkpoint import load_checkpoint
from pixtune.storage.files import write_atomically
from pixtune.tracking.metrics import read_metrics

BF16, EIGHT_BITS = "disable_quantization=true", "quantize=true"
END_SECONDS = 60.0
"""Most seconds in which all processes have to end once one is gone."""
STEPS_BETWEEN = 2
"""Steps from one checkpoint, and one number of GPUs, to the next in cell d."""


# ---- timed steps


def time_steps(
    bench: Bench, name: str, num_processes: int, words: Sequence[str], options: Sequence[str] = ()
) -> Result:
    """Times the steps of a run; returns the figures of its slowest process, and the peaks of all.

    Args:
        options: of `scaling_rank.py`.
    """
    config, run_words = bench.config(name, "qwen-image", WARM_UP_STEPS + bench.num_steps, 2 * num_processes)
    figures, log = bench.folder / name / "figures", bench.folder / f"{name}.log"
    figures.mkdir()
    script = [str(ROOT / "benchmarks" / "scaling_rank.py"), "--figures", str(figures), "--config", str(config)]
    began = time.monotonic()
    finish(bench, start_run(bench, launched(num_processes, [*script, *options, *run_words, *words]), log), log)
    ranks = [json.loads((figures / f"{rank}.json").read_text()) for rank in range(num_processes)]
    seconds = [statistics.median(rank["timing"]["seconds"]) for rank in ranks]
    plan, peaks = ranks[0]["plan"], [rank["memory"] for rank in ranks]
    first = ranks[0]["first_step_exchanges"]
    return {
        "name": name,
        "num_processes": num_processes,
        "seconds_per_step": max(seconds),
        "seconds_per_step_of_ranks": seconds,
        "seconds_all": ranks[0]["timing"]["seconds"],
        "first_step_seconds": max(rank["timing"]["first_step_seconds"] for rank in ranks),
        "losses": ranks[0]["timing"]["losses"],
        "peak_allocated_gib": [each["allocated_gib"] for each in peaks],
        "peak_process_gib": [each["process_gib"] for each in peaks],
        "expected_gib": peaks[0]["expected_gib"],
        "exchanges": first,
        "exchanged_bytes": sum(each["num_bytes"] * each["times"] for each in first),
        "exchange_seconds_alone": ranks[0].get("exchange_seconds_alone"),
        "num_trained_weights": ranks[0]["case"]["num_trained_weights"],
        "share_of_peak": {
            kind: tflop * 1e12 / max(seconds) / ranks[0]["peak_flops"] for kind, tflop in ranks[0]["tflop"].items()
        },
        "plan": plan,
        "wall_seconds": round(time.monotonic() - began, 1),
        **{key: ranks[0][key] for key in ("machine", "versions", "commit", "date")},
    }


def with_efficiency(alone: Result, together: Result) -> Result:
    """Returns a run's figures with its efficiency beside the run of one process: each has the same work a step."""
    return together | {"efficiency": alone["seconds_per_step"] / together["seconds_per_step"]}


def data_parallel(bench: Bench) -> Iterator[Result]:
    """Cell a. Both formats; the base is whole on each GPU."""
    formats = {"fp32": BF16} if bench.on_cpu else {"bf16": BF16, "8bits": EIGHT_BITS}
    for name, word in formats.items():
        words = [word, "distributed.shards=1"]
        yield (alone := time_steps(bench, f"a-{name}-1", 1, words))
        if bench.num_processes == 1:
            continue
        together = time_steps(bench, f"a-{name}-{bench.num_processes}", bench.num_processes, words)
        arithmetic = lora_exchanges(together["num_trained_weights"], bench.num_processes)
        expected = {"expected_bytes": sum(each.num_bytes for each in arithmetic), "sent_bytes": sent_bytes(arithmetic)}
        yield with_efficiency(alone, together) | expected


def sharded_base(bench: Bench) -> Iterator[Result]:
    """Cell b. One GPU that streams first, then all of them under the same cap."""
    num = bench.num_processes
    cases = {"fp32": (BF16, None)} if bench.on_cpu else {"bf16": (BF16, 24), "8bits": (EIGHT_BITS, 12)}
    for name, (word, cap_gib) in cases.items():
        cap = [] if cap_gib is None else [f"gpu_memory_limit_gib={cap_gib}"]
        yield (alone := time_steps(bench, f"b-{name}-streamed-1", 1, [word, *cap]))
        if num == 1:
            continue
        together = time_steps(bench, f"b-{name}-shards-{num}", num, [word, *cap, f"distributed.shards={num}"])
        yield with_efficiency(alone, together)


def all_weights(bench: Bench) -> Iterator[Result]:
    """Cell c. One process can hold them only where the model is small."""
    words = ["method=full", "learning_rate=1e-5", "lora_targets=null"]
    num = bench.num_processes
    yield time_steps(bench, f"c-shards-{num}", num, [*words, f"distributed.shards={num}"])


def one_in_parts(bench: Bench) -> Iterator[Result]:
    """Cell f. One process, whose weights are gathered from itself."""
    words = ["method=full", "learning_rate=1e-5", "lora_targets=null", "distributed.shards=1"]
    yield (whole := time_steps(bench, "f-whole-1", 1, words))
    yield with_efficiency(whole, time_steps(bench, "f-in-parts-1", 1, words, ["--in-parts"]))


# ---- a run that is interrupted


def train(bench: Bench, name: str, num_processes: int, config: Path, words: Sequence[str]) -> None:
    """Trains as a user would. Raises CellError where that fails."""
    log = bench.folder / f"{name}.log"
    command = launched(num_processes, ["-m", "pixtune.cli", "train", "--config", str(config), *words])
    finish(bench, start_run(bench, command, log), log)


def losses_of(output: Path) -> list[float]:
    """Reads the loss of each step."""
    return [line["loss"] for line in read_metrics(output / "metrics.jsonl") if line["kind"] == "step"]


def other_numbers(bench: Bench) -> Iterator[Result]:
    """Cell d. Batches of all processes together stay the same size, so the losses of each step are to be the same."""
    num, last = several(bench), 3 * STEPS_BETWEEN
    config, words = bench.config("d", "flux", last, 4 * num)
    words += [EIGHT_BITS] if not bench.on_cpu else []
    words += [f"checkpointing_steps={STEPS_BETWEEN}", "lr_scheduler=constant", "resume_from_checkpoint=latest"]
    began = time.monotonic()
    outputs = {"uninterrupted": bench.folder / "d" / "whole", "resumed": bench.folder / "d" / "parts"}
    train(bench, "d-whole", num, config, [*words, f"output_dir={outputs['uninterrupted']}", "train_batch_size=1"])
    for part, processes in enumerate((num, 1, num), 1):
        part_words = [f"output_dir={outputs['resumed']}", f"train_batch_size={num // processes}"]
        part_words.append(f"max_train_steps={part * STEPS_BETWEEN}")
        train(bench, f"d-part-{part}-on-{processes}", processes, config, [*words, *part_words])
    losses = {name: losses_of(output) for name, output in outputs.items()}
    differences = [abs(a - b) / abs(a) for a, b in zip(*losses.values(), strict=True)]
    yield {
        "name": f"d-{num}-1-{num}",
        "num_processes": num,
        "losses": losses,
        "largest_relative_difference": max(differences),
        "wall_seconds": round(time.monotonic() - began, 1),
    }


def one_is_killed(bench: Bench) -> Iterator[Result]:
    """Cell e. The last process is killed while steps are taken."""
    num = several(bench)
    config, words = bench.config("e", "flux", 1_000_000, 4 * num)
    output, log = bench.folder / "e" / "run", bench.folder / "e.log"
    words += [EIGHT_BITS] if not bench.on_cpu else []
    words += [f"output_dir={output}", "checkpointing_steps=2", "checkpoints_total_limit=2"]
    process = start_run(bench, launched(num, ["-m", "pixtune.cli", "train", "--config", str(config), *words]), log)
    try:
        wait_for(bench, lambda: len(list(output.glob("checkpoint-*"))) >= 2, process, log)
        ranks = children_of(process.pid)
        if num - 1 not in ranks:
            raise CellError(f"the launcher has processes {ranks}\n{tail(log)}")
        taken = len(losses_of(output))
        began = time.monotonic()
        os.kill(ranks[num - 1], signal.SIGKILL)
        while left := [rank for rank, each in ranks.items() if is_running(each)] or process.poll() is None:
            if time.monotonic() - began > 2 * END_SECONDS:
                raise CellError(f"after {2 * END_SECONDS:.0f} s {left} still ran\n{tail(log)}")
            time.sleep(0.05)
        end_seconds = time.monotonic() - began
    finally:
        end_group(process)
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    yield {
        "name": f"e-killed-of-{num}",
        "num_processes": num,
        "seconds_until_all_ended": end_seconds,
        "exit_code": process.returncode,
        "steps_before": taken,
        "checkpoint_step": load_checkpoint(newest).step,
        "printed": tail(log, 80),
        "named": [line for line in tail(log, 400).splitlines() if f"process {num - 1} of {num}" in line],
    }


def several(bench: Bench) -> int:
    """Returns the number of processes. Raises CellError where it is one, which shows nothing here."""
    if bench.num_processes == 1:
        raise CellError("needs at least two GPUs")
    return bench.num_processes


# ---- cells and their table

CELLS: dict[str, Callable[[Bench], Iterator[Result]]] = {
    "a": data_parallel, "d": other_numbers, "e": one_is_killed, "b": sharded_base, "c": all_weights,
    "f": one_in_parts,
}  # fmt: skip
"""Cells in the order in which they run."""


def run_cell(cell: str, bench: Bench, output: Path) -> Result:
    """Runs a cell, and writes what it has found after each of its runs, or why one failed."""
    result: Result = {"cell": cell, "runs": []}
    began = time.monotonic()

    def write() -> None:
        result["wall_seconds"] = round(time.monotonic() - began, 1)
        write_atomically(output / f"{cell}.json", json.dumps(result, indent=1).encode())

    try:
        for run in CELLS[cell](bench):
            result["runs"].append(run)
            write()
    except (CellError, OSError, ValueError, KeyError, PixtuneError) as error:
        result["failed"] = f"{type(error).__name__}: {error}"
        write()
    return result


STEP_COLUMNS = ("run", "GPUs", "s/step", "efficiency", "GiB a GPU (process)", "exchanges, MB a step",
                "the exchange alone, ms", "of peak (model, hardware)")  # fmt: skip


def step_row(run: Result) -> str:
    """Formats the line of timed steps."""
    peak = max((each for each in run["peak_process_gib"] if each is not None), default=0)
    times = sum(each["times"] for each in run["exchanges"])
    alone = run["exchange_seconds_alone"]
    share = run["share_of_peak"]
    return markdown_line(
        [
            run["name"], str(run["num_processes"]), f"{run['seconds_per_step']:.4f}",
            f"{run['efficiency']:.1%}" if "efficiency" in run else "", f"{peak:.1f}" if peak else "",
            f"{times}: {run['exchanged_bytes'] / 1e6:.3f}" if times else "none",
            "" if alone is None else f"{1000 * alone:.2f}", f"{share['model']:.0%}, {share['hardware']:.0%}",
        ]
    )  # fmt: skip


def in_words(result: Result) -> list[str]:
    """Formats a cell's results as lines."""
    cell, runs, lines = result["cell"], result["runs"], []
    if cell == "d":
        for run in runs:
            lines.append(f"{run['name']}: losses differ by {run['largest_relative_difference']:.1e} at most")
            lines += [f"  {name}: {' '.join(f'{loss:.6f}' for loss in each)}" for name, each in run["losses"].items()]
    elif cell == "e":
        for run in runs:
            lines.append(
                f"{run['name']}: all ended {run['seconds_until_all_ended']:.1f} s after the kill at step "
                f"{run['steps_before']}; the checkpoint of step {run['checkpoint_step']} is whole"
            )
            lines += [f"  {line}" for line in run["named"] or ["nothing printed names the process that was killed"]]
    elif runs:
        lines += [markdown_header(STEP_COLUMNS), *map(step_row, runs)]
    if "failed" in result:
        lines.append(f"{cell} failed after {result['wall_seconds']:.0f} s: {result['failed']}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "scaling")
    parser.add_argument("--cells", default="a,d,e,b,c,f", help="letters, separated by commas")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--processes", type=int, help="GPUs to use; all by default, 2 on a CPU")
    parser.add_argument("--steps", type=int, default=12, help="to time in each run")
    parser.add_argument("--most-seconds", type=float, default=200.0, help="of one run")
    parser.add_argument("--all-seconds", type=float, default=580.0, help="of everything")
    arguments = parser.parse_args()
    num_processes = arguments.processes or (2 if arguments.device == "cpu" else count_gpus())
    if num_processes < 1:
        raise SystemExit("there is no GPU here; --device cpu tries the script with the small model")
    if unknown := set(arguments.cells.split(",")) - CELLS.keys():
        raise SystemExit(f"there are no cells {sorted(unknown)}; known: {', '.join(sorted(CELLS))}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pixtune-scaling-") as name:
        bench = Bench(
            Path(name), arguments.device, num_processes, arguments.steps, arguments.most_seconds,
            time.monotonic() + arguments.all_seconds,
        )  # fmt: skip
        for cell in (cell for cell in CELLS if cell in arguments.cells.split(",")):
            result = run_cell(cell, replace(bench, folder=bench.folder / cell), arguments.output)
            print("\n".join(in_words(result)), flush=True)


def count_gpus() -> int:
    """Counts the GPUs that this process may use, without starting CUDA in it."""
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    main()
