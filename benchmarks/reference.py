"""Measures a step of diffusers and PEFT: python benchmarks/reference.py --model flux [--compile] --json FILE

diffusers' own transformer with random weights, a LoRA of PEFT on the same layers, AdamW, gradient checkpointing, bf16,
in a bare loop: no data is read, nothing is logged. It runs eager, or with the repeated blocks compiled by diffusers'
`compile_repeated_blocks`. Nothing of pixtune takes part in the step. The LoRA has the base's format, as PEFT makes it,
which is faster than fp32. Prints the table of `pixtune bench`, and writes the same JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from architectures import ARCHITECTURES, Architecture
from rich.console import Console
from torch import Tensor, nn

from pixtune.bench.environment import describe
from pixtune.bench.flops import StepSize, read_linears, step_flops
from pixtune.bench.peaks import measure_peaks
from pixtune.bench.result import Case, Formats, Memory, Result, Timing, make_result, render
from pixtune.families import FAMILIES
from pixtune.hardware.facts import GIB
from pixtune.tracking.figures import mark_time, seconds_between

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
PIXELS_PER_TOKEN = 16
CONTROL_PIXELS = 1024
WARM_UP_STEPS = 3
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Settings:
    """One reference run."""

    architecture: Architecture
    resolution_pixels: int = 1024
    batch_size: int = 1
    num_text_tokens: int = 256
    num_controls: int = 0
    rank: int = 16
    num_steps: int = 10
    compile: bool = False
    cudnn_attention: bool = True
    recompute: bool = True
    """Whether each block is recomputed in the backward pass (gradient checkpointing)."""

    @property
    def picture_grids(self) -> list[tuple[int, int]]:
        """Rows and columns of the target's tokens, then of each control's."""
        sides = [self.resolution_pixels, *[CONTROL_PIXELS] * self.num_controls]
        return [(side // PIXELS_PER_TOKEN, side // PIXELS_PER_TOKEN) for side in sides]

    @property
    def num_image_tokens(self) -> int:
        return sum(rows * columns for rows, columns in self.picture_grids)


# ---- the step


def build_model(settings: Settings, device: torch.device) -> Any:
    """Builds the stock class with random bf16 weights on the device, and a LoRA."""
    from accelerate import init_empty_weights
    from peft import LoraConfig

    with init_empty_weights(include_buffers=False):
        config = settings.architecture.transformer
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.empty(parameter.shape, device=device, dtype=torch.bfloat16)
            if value.ndim > 1:
                value.normal_(0, 0.5 / math.sqrt(value.shape[-1]))
            else:
                value.fill_(float(name == "weight"))
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    model.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=TARGETS))
    model.train()
    if settings.recompute:
        model.enable_gradient_checkpointing()
    if settings.compile:
        model.compile_repeated_blocks()
    return model


def build_inputs(settings: Settings, model: Any, device: torch.device) -> dict[str, Any]:
    """Builds all inputs of the transformer besides noisy latents and their noise levels."""
    config, batch = model.config, settings.batch_size

    def features(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device, dtype=torch.bfloat16)

    inputs: dict[str, Any] = {"encoder_hidden_states": features(settings.num_text_tokens, config.joint_attention_dim)}
    if "pooled_projection_dim" not in config:
        return inputs | {"img_shapes": [[(1, *grid) for grid in settings.picture_grids]] * batch}
    places = []
    for number, (rows, columns) in enumerate(settings.picture_grids):
        axes = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places.append(torch.stack([torch.full_like(axes[0], min(number, 1)), *axes], dim=-1).reshape(-1, 3))
    return inputs | {
        "pooled_projections": features(config.pooled_projection_dim),
        "guidance": torch.ones(batch, device=device),
        "img_ids": torch.cat(places).to(device, torch.float32),
        "txt_ids": torch.zeros(settings.num_text_tokens, 3, device=device),
    }


def flow_matching_loss(model: Any, latents_BLC: Tensor, controls_BLC: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Computes the mean squared error of the predicted velocity, noise minus latents, at a random noise level.

    Liu et al. 2022 (arXiv 2209.03003), equation 1, with logit-normal levels (Esser et al. 2024, arXiv 2403.03206, 3.1).
    """
    noise_BLC = torch.randn_like(latents_BLC)
    sigma_B = torch.randn(len(latents_BLC), device=latents_BLC.device).sigmoid()
    mix_B11 = sigma_B[:, None, None]
    noisy_BLC = ((1 - mix_B11) * latents_BLC + mix_B11 * noise_BLC).to(torch.bfloat16)
    predicted_BLC = model(
        hidden_states=torch.cat([noisy_BLC, controls_BLC], dim=1),
        timestep=sigma_B.to(torch.bfloat16),
        return_dict=False,
        **inputs,
    )[0]
    velocity_BLC = predicted_BLC[:, : latents_BLC.shape[1]].float()
    return nn.functional.mse_loss(velocity_BLC, noise_BLC - latents_BLC)


def build_step(settings: Settings, model: Any, device: torch.device) -> Callable[[], Tensor]:
    """Builds a function that takes one training step and returns its loss."""
    inputs, channels = build_inputs(settings, model, device), model.config.in_channels
    num_target, num_all = math.prod(settings.picture_grids[0]), settings.num_image_tokens
    latents_BLC = torch.randn(settings.batch_size, num_target, channels, device=device)
    controls_BLC = torch.randn(settings.batch_size, num_all - num_target, channels, device=device, dtype=torch.bfloat16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=device.type == "cuda")

    def step() -> Tensor:
        loss = flow_matching_loss(model, latents_BLC, controls_BLC, inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


# ---- its figures


def time_steps(step: Callable[[], Tensor], num_steps: int, device: torch.device) -> Timing:
    """Times each step; on a GPU by its own clock, while the host runs ahead as far as it can."""
    losses, marks = [], [mark_time(device)]
    for number in range(WARM_UP_STEPS + num_steps):
        losses.append(step())
        marks.append(mark_time(device))
        if device.type == "cuda" and number < WARM_UP_STEPS:
            torch.cuda.synchronize(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = [seconds_between(before, after) for before, after in pairwise(marks)]
    return Timing(
        seconds=tuple(seconds[WARM_UP_STEPS:]),
        num_warm_up_steps=WARM_UP_STEPS,
        first_step_seconds=seconds[0],
        compiled_graphs=int(torch._dynamo.utils.counters["stats"]["unique_graphs"]),
        data_wait_seconds=(0.0,) * num_steps,
        losses=tuple(torch.stack(losses).tolist()),
    )


def measure(settings: Settings, device: torch.device) -> Result:
    """Measures a whole reference run."""
    torch.backends.cuda.enable_cudnn_sdp(settings.cudnn_attention)
    torch.manual_seed(0)
    model = build_model(settings, device)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    shapes = {
        name.replace(".base_layer", ""): tuple(p.shape) for name, p in model.named_parameters() if name not in trained
    }
    width = model.config.num_attention_heads * model.config.attention_head_dim
    num_blocks = sum(type(module).__name__ in model._repeated_blocks for module in model.modules())
    timing = time_steps(build_step(settings, model, device), settings.num_steps, device)
    memory = Memory(None, None)
    if device.type == "cuda":
        memory = Memory(torch.cuda.max_memory_allocated(device) / GIB, None)
        del model
        torch.cuda.empty_cache()
    family = next(f for f in FAMILIES.values() if settings.architecture.pipeline in f.pipeline_classes)
    targets = [name.removesuffix(".weight") for name in shapes if name.endswith(tuple(f".{t}.weight" for t in TARGETS))]
    size = StepSize(settings.batch_size, settings.num_image_tokens, settings.num_text_tokens)
    linears = read_linears(family, shapes, targets, settings.rank)
    case = Case(
        model=settings.architecture.pipeline,
        num_weights=sum(math.prod(shape) for shape in shapes.values()),
        method="lora",
        resolution_pixels=settings.resolution_pixels,
        num_controls=settings.num_controls,
        num_image_tokens=settings.num_image_tokens,
        num_text_tokens=settings.num_text_tokens,
        batch_size=settings.batch_size,
        gradient_accumulation_steps=1,
        rank=settings.rank,
        num_trained_weights=sum(trained.values()),
    )
    plain, recomputed = "bf16" if device.type == "cuda" else "fp32", num_blocks if settings.recompute else 0
    return make_result(
        case, timing, memory, step_flops(linears, size, width, recomputed, trains_all=False), Formats(plain, plain),
        measure_peaks([plain], device), describe(), plan_of(settings),
    )  # fmt: skip


def plan_of(settings: Settings) -> dict[str, Any]:
    """Describes the run in the place of a plan."""
    how = "the repeated blocks compiled" if settings.compile else "eager"
    attention = "PyTorch's own choice of attention" if settings.cudnn_attention else "attention without cuDNN"
    again = "every block" if settings.recompute else "no block"
    return {
        "reasons": [f"the reference: diffusers and PEFT in a bare loop, {again} recomputed, {how}, {attention}"],
        "weights_format": "bf16",
        "compile": settings.compile,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=ARCHITECTURES, default="qwen-image")
    parser.add_argument("--resolution", type=int, default=1024, help="side of the square pictures, pixels")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--text-tokens", type=int, default=256)
    parser.add_argument("--controls", type=int, default=0, help=f"of {CONTROL_PIXELS}x{CONTROL_PIXELS} pixels each")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help=f"to time, after {WARM_UP_STEPS} that warm up")
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks")
    parser.add_argument("--recompute-nothing", action="store_true", help="no gradient checkpointing: more memory")
    parser.add_argument("--no-cudnn-attention", action="store_true", help="where its backward pass crashes")
    parser.add_argument("--json", type=Path, help="also write what was measured")
    arguments = parser.parse_args()
    settings = Settings(
        architecture=ARCHITECTURES[arguments.model],
        resolution_pixels=arguments.resolution,
        batch_size=arguments.batch_size,
        num_text_tokens=arguments.text_tokens,
        num_controls=arguments.controls,
        rank=arguments.rank,
        num_steps=arguments.steps,
        compile=arguments.compile,
        cudnn_attention=not arguments.no_cudnn_attention,
        recompute=not arguments.recompute_nothing,
    )
    result = measure(settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    render(result, Console())


if __name__ == "__main__":
    main()
