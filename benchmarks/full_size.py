"""Full-size training steps with random weights: python benchmarks/full_size.py --steps 10 key=value ...

Writes a model folder of the full-size architecture without weights, a few pictures, and runs `pixtune train` on them
with `random_weights=true`: speed and memory are those of a real run, pictures are not. Prints JSON.

With `--output DIR` the run is kept, and `resume_from_checkpoint=latest` goes on with it. All weights of the largest
model, stopped after five steps and resumed for five more (a checkpoint has 82 GB, the model 41):

    python benchmarks/full_size.py --steps 5 --output DIR method=full checkpoints_total_limit=1
    python benchmarks/full_size.py --steps 10 --output DIR method=full checkpoints_total_limit=1 \\
        resume_from_checkpoint=latest
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
from environment import describe
from PIL import Image

from pixtune.metrics import read_metrics

QWEN_SCHEDULER = {
    "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02,
    "time_shift_type": "exponential", "use_dynamic_shifting": True,
}  # fmt: skip
FLUX_SCHEDULER = {
    "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15, "shift": 3.0,
    "use_dynamic_shifting": True,
}  # fmt: skip
"""Of the models on the hub."""


@dataclass(frozen=True)
class Architecture:
    """What a full-size model's folder says; the classes' own defaults are the full size, but for a few values."""

    pipeline: str
    transformer: str
    autoencoder: str
    scheduler: dict[str, object]
    num_controls: int = 0
    transformer_values: dict[str, object] = field(default_factory=dict)
    autoencoder_values: dict[str, object] = field(default_factory=dict)


QWEN = ("QwenImageTransformer2DModel", "AutoencoderKLQwenImage", QWEN_SCHEDULER)
FLUX = ("FluxTransformer2DModel", "AutoencoderKL", FLUX_SCHEDULER)
FLUX_VALUES: dict[str, dict[str, object]] = {
    "transformer_values": {"guidance_embeds": True},
    "autoencoder_values": {
        "latent_channels": 16, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
    },
}  # fmt: skip
ARCHITECTURES = {
    "qwen-image": Architecture("QwenImagePipeline", *QWEN),
    "qwen-image-edit": Architecture("QwenImageEditPipeline", *QWEN, 1),
    "qwen-image-edit-2509": Architecture("QwenImageEditPlusPipeline", *QWEN, 1),
    "qwen-image-edit-2511": Architecture("QwenImageEditPlusPipeline", *QWEN, 1, {"zero_cond_t": True}),
    "flux": Architecture("FluxPipeline", *FLUX, **FLUX_VALUES),
    "flux-kontext": Architecture("FluxKontextPipeline", *FLUX, 1, **FLUX_VALUES),
}
Result = dict[str, Any]
NUM_PICTURES = 4
WARM_UP_STEPS = 3


def write_model_folder(folder: Path, model: Architecture) -> None:
    """The model's folders with configs and no weights."""
    configs = {
        "model_index.json": {"_class_name": model.pipeline},
        "transformer/config.json": default_config(model.transformer) | model.transformer_values,
        "vae/config.json": default_config(model.autoencoder) | model.autoencoder_values,
        "scheduler/scheduler_config.json": model.scheduler,
    }
    for part in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "processor"):
        configs[f"{part}/config.json"] = {}
    for name, config in configs.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config))


def default_config(model_class: str) -> dict[str, object]:
    """A diffusers model's default arguments."""
    parameters = inspect.signature(getattr(diffusers, model_class).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def write_pictures(folder: Path, size: int) -> None:
    """Captioned pictures, and controls of the same names."""
    for number in range(NUM_PICTURES):
        for part in ("images", "control"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            # The same ones each time: a run that goes on knows its pictures by their content.
            pixels = random.Random(number).randbytes(3 * size * size)
            Image.frombytes("RGB", (size, size), pixels).save(folder / part / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text("noise")


def prepare(folder: Path, model_name: str, size: int) -> None:
    """Model folder and pictures of a benchmark."""
    write_model_folder(folder / "model", ARCHITECTURES[model_name])
    write_pictures(folder / "pictures", size)


def measure(folder: Path, output: Path, model_name: str, size: int, steps: int, overrides: Sequence[str]) -> Result:
    """Trains in a process of its own and reads what the run wrote about itself.

    Args:
        folder: of `prepare`.
        output: the run's folder; what is in it already is gone on with if an override says so.

    Raises:
        subprocess.CalledProcessError: the run failed; its words went to stderr.
    """
    config = folder / f"{output.name}.yaml"
    pictures = folder / "pictures"
    config.write_text(
        f"pretrained_model_name_or_path: {folder / 'model'}\noutput_dir: {output}\nrandom_weights: true\n"
        f"max_train_steps: {steps}\nlogging_steps: 1\n"
        f"data_config:\n  img_dir: {pictures / 'images'}\n  img_size: {size}\n"
        + (f"  control_dir: {pictures / 'control'}\n" if ARCHITECTURES[model_name].num_controls else "")
    )
    command = [sys.executable, "-m", "pixtune.cli", "train", "--config", str(config), *overrides]
    subprocess.run(command, check=True, stdout=sys.stderr)
    lines = read_metrics(output / "metrics.jsonl")
    taken = [line for line in lines if line["kind"] == "step"]
    newest = max(output.glob("checkpoint-*/state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    return {
        "benchmark": "full_size",
        "model": model_name,
        "overrides": list(overrides),
        "size_pixels": size,
        "seconds_per_step_median": statistics.median(line["seconds"] for line in taken[WARM_UP_STEPS:]),
        "seconds_per_step_all": [line["seconds"] for line in taken],
        "peak_memory_gib": max(line["peak_memory_gib"] for line in taken),
        "memory": [line for line in lines if line["kind"] == "memory"],
        "losses": [line["loss"] for line in taken],
        "plan": json.loads(newest.read_text())["record"]["plan"],
        **describe(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=ARCHITECTURES, default="qwen-image")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--size", type=int, default=1024, help="pixels")
    parser.add_argument("--output", type=Path, help="keep the run here, so that it can be gone on with")
    parser.add_argument("overrides", nargs="*", help="key=value of the config")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, arguments.model, arguments.size)
        output = arguments.output or folder / "run"
        result = measure(folder, output, arguments.model, arguments.size, arguments.steps, arguments.overrides)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
