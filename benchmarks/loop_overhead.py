"""Measures the training loop's cost over a bare one: python benchmarks/loop_overhead.py [--steps 40] [--rounds 5]

Both run the same forward, backward and optimizer step on the shipped small model. The bare loop has its batch at
hand and does nothing else; pixtune's reads the cache, draws noise, clips, writes metrics and TensorBoard, shows
progress, and saves a checkpoint and the report at the end. Rounds alternate in one process, and the figure is the
median of their ratios. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pixtune.assembly import assemble
from pixtune.bench.environment import describe
from pixtune.config import load_config
from pixtune.objective import add_noise, example_losses, velocity_target
from pixtune.run import Run
from pixtune.train import forward_backward, run_steps

ROOT = Path(__file__).resolve().parent.parent


def settings(folder: Path, output: str, steps: int) -> list[str]:
    """Returns the words of a run of the demo's size, without validation and samples, which are extra work."""
    return [
        f"output_dir={folder / output}", f"data_config.cache_dir={folder / 'cache'}", f"max_train_steps={steps}",
        "validation.held_out_dir=null", "samples.prompts=[]", "report_to=tensorboard", "resume_from_checkpoint=null",
        f"checkpointing_steps={steps}",
    ]  # fmt: skip


def time_bare_loop(run: Run, steps: int) -> float:
    """Measures the seconds per step of forward, backward and optimizer step alone."""
    (batch,) = run.source.parts(0, run.source.order.micro_batch(0))
    optimizer = run.trained.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    start = time.perf_counter()
    for _ in range(steps):
        noisy_BCHW = add_noise(batch.latents_BCHW, batch.noise_BCHW, batch.sigma_B)
        velocity_BCHW = run.family.predict_velocity(
            run.transformer.module, noisy_BCHW, batch.sigma_B, batch.conditioning
        )
        example_losses(velocity_BCHW, velocity_target(batch.latents_BCHW, batch.noise_BCHW)).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps in each round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each loop")
    arguments = parser.parse_args()
    bare, ours = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds + 1):
            words = settings(Path(folder), str(number), arguments.steps)
            run, services = assemble(load_config(ROOT / "train_configs" / "demo.yaml", words), forward_backward)
            bare.append(time_bare_loop(run, arguments.steps))
            start = time.perf_counter()
            run_steps(run, services)
            ours.append((time.perf_counter() - start) / arguments.steps)
    bare, ours = bare[1:], ours[1:]  # the first round warms up
    result = {
        "benchmark": "loop_overhead",
        "bare_seconds_per_step": statistics.median(bare),
        "loop_seconds_per_step": statistics.median(ours),
        "ratio": statistics.median(o / b for o, b in zip(ours, bare, strict=True)),
        "ratios": [round(o / b, 4) for o, b in zip(ours, bare, strict=True)],
        **describe(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
