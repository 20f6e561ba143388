"""Trains while another process takes the GPU's memory at random moments: python benchmarks/memory_thief.py --output DIR

Runs of models with full-size blocks, of which there are a few, share the GPU in waves. Each setting is first run
undisturbed, twice, since kernels that add up in any order make two equal runs differ. Then, as soon as all runs of a
wave are set up, a thief begins: it takes all that is free but a random rest, holds it for a random time, gives it back
and begins again. A line for each disturbed run says whether it finished, what it gave up, and how far its losses are
from the undisturbed run's, beside how far two undisturbed ones are apart.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from architectures import ARCHITECTURES, write_model_folder

from pixtune.bench.synthetic import write_pictures
from pixtune.tracking.metrics import read_metrics

NUM_BLOCKS: Mapping[str, Mapping[str, int]] = {
    "qwen-image": {"num_layers": 6},
    "flux": {"num_layers": 3, "num_single_layers": 4},
}
SIZES = (512, 768, 1024)
NUM_PICTURES = 6
RELIEF = re.compile(r"(?:is taken again: |leaner plan|launched kernel by kernel|more memory than there is: ).*")
THIEF = """
import random, sys, time, torch
draws = random.Random(int(sys.argv[1]))
while True:
    time.sleep(draws.uniform(0.1, 1.0))
    free, _ = torch.cuda.mem_get_info()
    size = free - round(draws.uniform(0, 0.3) * 2**30)
    taken = None
    try:
        taken = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
    except RuntimeError:
        pass
    print(f"{time.time():.2f} {0 if taken is None else size / 2**30:.2f}", flush=True)
    time.sleep(draws.uniform(0.3, 3.0))
    del taken
    torch.cuda.empty_cache()
"""


@dataclass(frozen=True)
class Setting:
    """A run's settings."""

    number: int
    model: str
    size: int
    words: tuple[str, ...]
    shapes: bool
    num_steps: int


def draw_setting(seed: int, number: int, num_steps: int) -> Setting:
    """Draws a setting of runs that take so many steps."""
    draws = random.Random(f"{seed} {number}")
    model = draws.choice(tuple(NUM_BLOCKS))
    words = [
        f"train_batch_size={draws.choice((1, 2, 4))}",
        f"gradient_accumulation_steps={draws.choice((1, 1, 2))}",
        f"rank={draws.choice((8, 64, 128))}",
        f"cuda_graphs={draws.choice(('true', 'true', 'false'))}",
        draws.choice(("quantize=true", "disable_quantization=true")),
        "adam8bit=false",
        f"seed={number}",
    ]
    return Setting(number, model, draws.choice(SIZES), tuple(words), draws.random() < 0.5, num_steps)


def start(setting: Setting, folder: Path, gpu: int) -> subprocess.Popen[bytes]:
    """Starts a run in a folder of its own."""
    architecture = ARCHITECTURES[setting.model]
    small = replace(architecture, transformer={**architecture.transformer, **NUM_BLOCKS[setting.model]})
    folder.mkdir(parents=True)
    write_model_folder(folder / "model", small)
    data = write_pictures(folder / "pictures", setting.size, NUM_PICTURES, 0, num_words=40)
    if setting.shapes:
        for number in range(0, NUM_PICTURES, 2):
            (data.images / f"{number}.txt").write_text(" ".join(["noise"] * (10 + 30 * number)))
    (folder / "run.yaml").write_text(
        f"pretrained_model_name_or_path: {folder / 'model'}\noutput_dir: {folder / 'run'}\nrandom_weights: true\n"
        f"max_train_steps: {setting.num_steps}\nlogging_steps: 1\ncheckpointing_steps: 15\n"
        f"validation:\n  held_out: 0.34\n  every: 12\n"
        f"data_config:\n  img_dir: {data.images}\n  img_size: {setting.size}\n  max_text_tokens: 256\n"
    )
    command = [sys.executable, "-m", "pixtune.cli", "train", "--config", str(folder / "run.yaml"), *setting.words]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def steps_of(folder: Path) -> dict[int, float]:
    """Reads the losses of a run by step, as far as it got."""
    path = folder / "run" / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "step"}


def run_wave(settings: Sequence[Setting], folder: Path, gpus: int, limit: float, thief_seed: int | None) -> list[Path]:
    """Runs settings at once, spread over the GPUs, and returns their folders.

    Args:
        limit: seconds after which what still runs is ended.
        thief_seed: None: nobody disturbs them.
    """
    folders = [folder / f"{place}-{setting.number}" for place, setting in enumerate(settings)]
    began = time.monotonic()
    running = [start(s, f, place % gpus) for place, (s, f) in enumerate(zip(settings, folders, strict=True))]
    thieves: list[subprocess.Popen[bytes]] = []
    while any(process.poll() is None for process in running):
        time.sleep(0.2)
        if time.monotonic() - began > limit:
            for process in running:
                process.kill()
        logs = [f / "run" / "metrics.jsonl" for f in folders]
        ready = all(p.poll() is not None or path.exists() for p, path in zip(running, logs, strict=True))
        if thief_seed is not None and not thieves and ready:
            for gpu in range(gpus):
                with (folder / f"thief-{gpu}").open("wb") as log:
                    command = [sys.executable, "-c", THIEF, str(thief_seed + gpu)]
                    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
                    thieves.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    for thief in thieves:
        thief.kill()
        thief.wait()
    return folders


def distance(losses: Mapping[int, float], others: Mapping[int, float]) -> float | None:
    """Returns the largest relative difference of two runs' losses at a step that both have."""
    return max(
        (abs(losses[step] - others[step]) / others[step] for step in losses.keys() & others.keys()), default=None
    )


def describe(setting: Setting, folder: Path, undisturbed: Sequence[Mapping[int, float]]) -> dict[str, Any]:
    """Returns how a disturbed run went."""
    losses, log = steps_of(folder), (folder / "log").read_text(errors="replace")
    return {
        "setting": setting.number,
        "model": setting.model,
        "size_pixels": setting.size,
        "words": [*setting.words, *(["shapes"] if setting.shapes else [])],
        "steps": len(losses),
        "finished": len(losses) == setting.num_steps and (folder / "run" / "report.html").exists(),
        "largest_relative_difference": distance(losses, undisturbed[0]),
        "of_two_undisturbed": distance(*undisturbed),
        "gave_up": RELIEF.findall(log),
        "end_of_log": "" if (folder / "run" / "report.html").exists() else log[-1500:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", type=int, default=10, help="number of settings")
    parser.add_argument("--each", type=int, default=3, help="disturbed runs of each setting")
    parser.add_argument("--steps", type=int, default=100, help="steps of each run")
    parser.add_argument("--at-once", type=int, default=5, help="runs that share a GPU")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=100, help="limit of a wave")
    arguments = parser.parse_args()
    settings = [draw_setting(arguments.seed, number, arguments.steps) for number in range(arguments.settings)]
    at_once = arguments.at_once * arguments.gpus
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        undisturbed: dict[int, list[dict[int, float]]] = {setting.number: [] for setting in settings}
        twice = settings * 2
        for first in range(0, len(twice), at_once):
            wave = twice[first : first + at_once]
            folders = run_wave(wave, folder / f"undisturbed-{first}", arguments.gpus, arguments.seconds, None)
            for setting, run in zip(wave, folders, strict=True):
                undisturbed[setting.number].append(steps_of(run))
                if not (run / "run" / "report.html").exists():
                    print(f"undisturbed {setting}: {(run / 'log').read_text(errors='replace')[-1500:]}", flush=True)
        arguments.output.mkdir(parents=True, exist_ok=True)
        rest = settings * arguments.each
        for first in range(0, len(rest), at_once):
            wave = rest[first : first + at_once]
            place = folder / f"disturbed-{first}"
            folders = run_wave(wave, place, arguments.gpus, arguments.seconds, 1000 * arguments.seed + first)
            rows = [describe(s, f, undisturbed[s.number]) for s, f in zip(wave, folders, strict=True)]
            thefts = {path.name: path.read_text().splitlines() for path in sorted(place.glob("thief-*"))}
            written = {"rows": rows, "thefts": thefts}
            (arguments.output / f"wave-{first:02d}.json").write_text(json.dumps(written, indent=1))
            for row in rows:
                print(json.dumps({key: value for key, value in row.items() if key != "words"}), flush=True)


if __name__ == "__main__":
    main()
