"""Full-size training steps with random weights: python benchmarks/full_size.py --steps 10 key=value ...

Writes a model folder of the full-size architecture without weights, a few pictures, and runs `pixtune train` on them
with `random_weights=true`: speed and memory are those of a real run, pictures are not. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from environment import describe
from PIL import Image

from pixtune.metrics import read_metrics

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256, "base_shift": 0.5,
    "max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02, "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}  # fmt: skip
"""Of Qwen/Qwen-Image."""
NUM_PICTURES = 4
WARM_UP_STEPS = 3


def write_model_folder(folder: Path) -> None:
    """Qwen-Image's folders with configs and no weights; the classes' defaults are the full size."""
    configs = {
        "model_index.json": {"_class_name": "QwenImagePipeline"},
        "transformer/config.json": default_config(QwenImageTransformer2DModel),
        "vae/config.json": default_config(AutoencoderKLQwenImage),
        "scheduler/scheduler_config.json": SCHEDULER,
        "text_encoder/config.json": {},
        "tokenizer/tokenizer_config.json": {},
    }
    for name, config in configs.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config))


def default_config(model_class: type) -> dict[str, object]:
    """A diffusers model's default arguments."""
    import inspect

    parameters = inspect.signature(model_class.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def write_pictures(folder: Path, size: int) -> None:
    folder.mkdir()
    for number in range(NUM_PICTURES):
        Image.effect_noise((size, size), 60).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("noise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--size", type=int, default=1024, help="pixels")
    parser.add_argument("overrides", nargs="*", help="key=value of the config")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model_folder(folder / "model")
        write_pictures(folder / "pictures", arguments.size)
        (folder / "run.yaml").write_text(
            f"pretrained_model_name_or_path: {folder / 'model'}\noutput_dir: {folder / 'run'}\nrandom_weights: true\n"
            f"max_train_steps: {arguments.steps}\nlogging_steps: 1\n"
            f"data_config: {{img_dir: {folder / 'pictures'}, img_size: {arguments.size}}}\n"
        )
        command = [sys.executable, "-m", "pixtune.cli", "train", "--config", str(folder / "run.yaml")]
        subprocess.run([*command, *arguments.overrides], check=True, stdout=sys.stderr)
        steps = [line for line in read_metrics(folder / "run" / "metrics.jsonl") if line["kind"] == "step"]
        plan = json.loads(next((folder / "run").glob("checkpoint-*/state.json")).read_text())["record"]["plan"]
    seconds = [line["seconds"] for line in steps[WARM_UP_STEPS:]]
    result = {
        "benchmark": "full_size",
        "overrides": arguments.overrides,
        "size_pixels": arguments.size,
        "seconds_per_step_median": statistics.median(seconds),
        "seconds_per_step_all": [line["seconds"] for line in steps],
        "peak_memory_gib": max(line["peak_memory_gib"] for line in steps),
        "losses": [line["loss"] for line in steps],
        "plan": plan,
        **describe(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
