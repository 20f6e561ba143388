"""Measures all weights of diffusers' transformer in parts: torchrun --nproc-per-node 2 benchmarks/full_reference.py

The stock class with random bf16 weights, divided by torch's FSDP2 a block at a time, each block recomputed in the
backward pass, torch's fused AdamW with states in bf16, gradients clipped, in a bare loop: no data is read, nothing is
logged. It runs eager, or with the blocks compiled (--compile). Nothing of pixtune takes part in the step. The first
process writes the figures, the share of the chip's peak as `scaling.py` counts it among them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from architectures import ARCHITECTURES
from reference import WARM_UP_STEPS, Settings, build_inputs, flow_matching_loss, time_steps
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from pixtune.bench.environment import describe
from pixtune.bench.flops import StepSize, read_linears, step_flops
from pixtune.bench.peaks import measure_peaks
from pixtune.families import FAMILIES
from pixtune.hardware.facts import GIB

LEARNING_RATE = 1e-5


def build_model(settings: Settings, mesh: DeviceMesh, device: torch.device) -> Any:
    """Builds the stock class in parts, each process's drawn by itself."""
    config = settings.architecture.transformer
    with init_empty_weights(include_buffers=False):
        model = getattr(diffusers, config["_class_name"]).from_config(config).to(torch.bfloat16)
    for blocks in (each for each in model.children() if isinstance(each, nn.ModuleList)):
        for number, block in enumerate(blocks):
            if type(block).__name__ not in model._repeated_blocks:
                continue
            if settings.compile:
                block.compile()
            blocks[number] = checkpoint_wrapper(block) if settings.recompute else block
            fully_shard(blocks[number], mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            local = torch.empty(parameter.to_local().shape, device=device, dtype=torch.bfloat16)
            if parameter.ndim > 1:
                local.normal_(0, 0.5 / math.sqrt(parameter.shape[-1]))
            else:
                local.fill_(float(name == "weight"))
            whole = torch.distributed.tensor.DTensor.from_local(
                local, mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride(), run_check=False
            )
            module.register_parameter(name, nn.Parameter(whole))
    return model.train()


def build_step(settings: Settings, model: Any, device: torch.device) -> Callable[[], Tensor]:
    """Builds a function that takes one training step and returns its loss."""
    inputs, channels = build_inputs(settings, model, device), model.config.in_channels
    latents_BLC = torch.randn(settings.batch_size, settings.num_image_tokens, channels, device=device)
    none_BLC = latents_BLC[:, :0].to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=device.type == "cuda")

    def step() -> Tensor:
        loss = flow_matching_loss(model, latents_BLC, none_BLC, inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(settings: Settings, device: torch.device) -> dict[str, Any]:
    """Measures this process's steps; the loop has no wait but those of the first steps and the last."""
    torch.backends.cuda.enable_cudnn_sdp(settings.cudnn_attention)
    torch.manual_seed(distributed.get_rank())
    model = build_model(settings, init_device_mesh(device.type, (distributed.get_world_size(),)), device)
    shapes = {name.replace("_checkpoint_wrapped_module.", ""): p.shape for name, p in model.named_parameters()}
    width = model.config.num_attention_heads * model.config.attention_head_dim
    timing = time_steps(build_step(settings, model, device), settings.num_steps, device)
    seconds = statistics.median(timing.seconds)
    peak_gib = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
    family = next(f for f in FAMILIES.values() if settings.architecture.pipeline in f.pipeline_classes)
    size = StepSize(settings.batch_size, settings.num_image_tokens, settings.num_text_tokens)
    flops = step_flops(read_linears(family, shapes, [], 1), size, width, 0, trains_all=True)
    plain = "bf16" if device.type == "cuda" else "fp32"
    return {
        "num_processes": distributed.get_world_size(),
        "compile": settings.compile,
        "seconds_per_step": seconds,
        "seconds_all": timing.seconds,
        "peak_allocated_gib": peak_gib,
        "losses": timing.losses,
        "share_of_peak": flops.model / seconds / measure_peaks([plain], device)[plain],
        **describe(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=ARCHITECTURES, default="qwen-image")
    parser.add_argument("--resolution", type=int, default=1024, help="side of the square pictures, pixels")
    parser.add_argument("--text-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8, help=f"to time, after {WARM_UP_STEPS} that warm up")
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    settings = Settings(
        ARCHITECTURES[arguments.model], arguments.resolution, num_text_tokens=arguments.text_tokens,
        num_steps=arguments.steps, compile=arguments.compile,
    )  # fmt: skip
    found = measure(settings, device)
    if distributed.get_rank() == 0:
        arguments.json.write_text(json.dumps(found, indent=1))
        peak = f", {found['peak_allocated_gib']:.1f} GiB allocated" if on_gpu else ""
        print(f"{found['seconds_per_step']:.4f} s a step{peak}, {found['share_of_peak']:.1%} of the peak", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
