"""Measures full-size training steps with random weights: python benchmarks/full_size.py --steps 10 key=value ...

Writes a model folder of the full-size architecture without weights, a few pictures, and runs `pixtune train` on them
with `random_weights=true`: speed and memory are those of a real run, pictures are not. Prints JSON.

With `--held-out N` the loss of N pictures that are not trained on, at fixed noise and sigmas, is measured before the
first step and after the last. Random weights predict noise of their own, so a run that learns at all makes that loss
fall within a few steps, on pictures that it has never seen. The fall grows with learning rate times width: on a CPU,
`method=full` in bf16, five steps, it was 0.5% at a width of 3072 (one block) and 1e-5, 4.2% at 1e-4, 6.5% at 256
(60 blocks) and 5e-4, and no longer steady from a product of 0.8 on. For the full size, use `learning_rate=5e-5`.

With `--output DIR` the run is kept, and `resume_from_checkpoint=latest` resumes it. All weights of the largest model,
stopped after five steps and resumed for five more (a checkpoint has 82 GB, the model 41):

    python benchmarks/full_size.py --steps 5 --held-out 2 --output DIR method=full learning_rate=5e-5 \\
        checkpoints_total_limit=1
    python benchmarks/full_size.py --steps 10 --held-out 2 --output DIR method=full learning_rate=5e-5 \\
        checkpoints_total_limit=1 resume_from_checkpoint=latest
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from architectures import ARCHITECTURES, write_model_folder
from PIL import Image

from pixtune.bench.environment import describe
from pixtune.bench.result import Result
from pixtune.bench.synthetic import write_pictures
from pixtune.tracking.metrics import read_metrics

NUM_PICTURES = 4
"""Pictures to train on."""
MANY_SHAPES = tuple(itertools.product((1.0, 9 / 7, 7 / 9, 16 / 9), (5, 30, 55, 80, 105)))
"""Aspect ratios of pictures in several shapes, and words of their captions."""
WARM_UP_STEPS = 3


def prepare(
    folder: Path, model_name: str, size: int, num_held_out: int = 0, shapes: Sequence[tuple[float, int]] = ()
) -> None:
    """Writes model folder and pictures of a benchmark. They are equal each time, so a resumed run knows its pictures.

    Args:
        shapes: aspect ratio and words of its caption for each picture, instead of one size and one length.
    """
    model = ARCHITECTURES[model_name]
    write_model_folder(folder / "model", model)
    num_pictures = len(shapes) or NUM_PICTURES
    write_pictures(
        folder / "pictures", size, num_pictures + num_held_out, model.num_controls, num_words=model.num_text_tokens
    )
    for number, (ratio, words) in enumerate(shapes):
        path = folder / "pictures" / "images" / f"{number}.png"
        with Image.open(path) as picture:
            picture.resize((round(size * ratio**0.5), round(size / ratio**0.5))).save(path)
        path.with_suffix(".txt").write_text(" ".join(["noise"] * words))


def measure(
    folder: Path,
    output: Path,
    model_name: str,
    size: int,
    steps: int,
    overrides: Sequence[str],
    num_held_out: int = 0,
) -> Result:
    """Trains in a process of its own and reads what the run wrote about itself.

    Args:
        folder: folder that `prepare` has filled, with the same `num_held_out`.
        output: the run's folder; a run in it is resumed if an override says so.

    Raises:
        subprocess.CalledProcessError: the run failed; its output went to stderr.
    """
    pictures, model = folder / "pictures", ARCHITECTURES[model_name]
    # A share of one folder, since a resumed run may find its pictures elsewhere, but not its held-out folder.
    held_out = num_held_out / len(list((pictures / "images").glob("*.png")))
    values = {
        "data_config.img_dir": pictures / "images",
        "data_config.img_size": size,
        "data_config.max_text_tokens": model.num_text_tokens,
        "validation.held_out": held_out,
        **({"data_config.control_dir": pictures / "control_0"} if model.num_controls else {}),
    }
    command = training_command(
        folder, output, steps, [*(f"{key}={value}" for key, value in values.items()), *overrides]
    )
    subprocess.run(command, check=True, stdout=sys.stderr)
    return {
        "model": model_name,
        "overrides": list(overrides),
        "size_pixels": size,
        **read_run(output),
    }


def training_command(folder: Path, output: Path, steps: int, words: Sequence[str]) -> list[str]:
    """Writes the config of a run with random weights, and returns the command that trains it.

    Args:
        folder: folder with the model's folder; gets the config.
        words: `key=value` of the config, further ones.
    """
    config = folder / f"{output.name}.yaml"
    config.write_text(
        f"pretrained_model_name_or_path: {folder / 'model'}\noutput_dir: {output}\nrandom_weights: true\n"
        f"max_train_steps: {steps}\nlogging_steps: 1\ndata_config: {{}}\n"
    )
    return [sys.executable, "-m", "pixtune.cli", "train", "--config", str(config), *words]


def read_run(output: Path) -> Result:
    """Reads what a run wrote about itself."""
    lines = read_metrics(output / "metrics.jsonl")
    taken = [line for line in lines if line["kind"] == "step"]
    newest = max(output.glob("checkpoint-*/state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    return {
        "benchmark": "full_size",
        "seconds_per_step_median": statistics.median(line["seconds"] for line in taken[WARM_UP_STEPS:]),
        "seconds_per_step_all": [line["seconds"] for line in taken],
        "peak_memory_gib": max(line["peak_memory_gib"] for line in taken),
        "memory": [line for line in lines if line["kind"] == "memory"],
        "losses": [line["loss"] for line in taken],
        "held_out_losses": [line for line in lines if line["kind"] == "validation"],
        "plan": json.loads(newest.read_text())["record"]["plan"],
        **describe(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=ARCHITECTURES, default="qwen-image")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--size", type=int, default=1024, help="pixels")
    parser.add_argument("--held-out", type=int, default=0, help="pictures that are not trained on, to measure on")
    parser.add_argument("--output", type=Path, help="keep the run here, so that it can be resumed")
    parser.add_argument("overrides", nargs="*", help="key=value of the config")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, arguments.model, arguments.size, arguments.held_out)
        output = arguments.output or folder / "run"
        result = measure(
            folder, output, arguments.model, arguments.size, arguments.steps, arguments.overrides, arguments.held_out
        )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
