"""Tries whether diffusers' context parallelism trains: its gradients on several processes against those of one.

    torchrun --nproc-per-node 2 benchmarks/context_parallel_trial.py --model qwen --ways ulysses --lora --recompute

Small models with random weights, on GPUs by NCCL, else on the CPU by gloo. Prints the largest relative difference of
any gradient, summed over the processes, from the gradient of one process that has the whole sequence.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FluxTransformer2DModel, QwenImageTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn

SIDE, NUM_TEXT, WIDTH = 8, 16, 16
COMMON: dict[str, Any] = {
    "in_channels": WIDTH,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (8, 4, 4),
}


def build(name: str, lora: bool, recompute: bool) -> nn.Module:
    """Builds a stock transformer, the same in all processes."""
    torch.manual_seed(0)
    model: Any
    if name == "qwen":
        model = QwenImageTransformer2DModel(patch_size=2, out_channels=4, **COMMON)
    else:
        model = FluxTransformer2DModel(
            patch_size=1, num_single_layers=2, pooled_projection_dim=16, guidance_embeds=True, **COMMON
        )
    if lora:
        model.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    if recompute:
        model.enable_gradient_checkpointing()
    return model.train()


def gradients(name: str, model: nn.Module, image_BLC: Tensor, text_BLC: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of a loss that all positions share."""
    device = image_BLC.device
    inputs: dict[str, Any] = {"hidden_states": image_BLC, "encoder_hidden_states": text_BLC, "return_dict": False}
    inputs["timestep"] = torch.tensor([0.5], device=device)
    if name == "qwen":
        inputs["img_shapes"] = [[(1, SIDE, SIDE)]]
    else:
        ids = torch.zeros(SIDE * SIDE, 3, device=device)
        ids[:, 1], ids[:, 2] = torch.arange(SIDE * SIDE) // SIDE, torch.arange(SIDE * SIDE) % SIDE
        inputs |= {"img_ids": ids, "txt_ids": torch.zeros(NUM_TEXT, 3, device=device)}
        inputs |= {"pooled_projections": torch.ones(1, 16, device=device), "guidance": torch.ones(1, device=device)}
    model.zero_grad()
    model(**inputs)[0].float().square().mean().backward()
    return {key: each.grad.clone() for key, each in model.named_parameters() if each.grad is not None}


def main() -> None:
    """Compares, and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["qwen", "flux"], default="qwen")
    parser.add_argument("--ways", choices=["ulysses", "ring"], default="ulysses")
    parser.add_argument("--backend", default="native", help="diffusers' attention backend")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    else:
        torch.accelerator.device_count = lambda: 1  # diffusers divides by it
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    dtype = torch.float32 if args.backend == "native" else torch.bfloat16  # other kernels take no fp32
    model = build(args.model, args.lora, args.recompute).to(device, dtype)
    image_BLC = torch.randn(1, SIDE * SIDE, WIDTH).to(device, dtype)
    text_BLC = torch.randn(1, NUM_TEXT, WIDTH).to(device, dtype)
    whole = gradients(args.model, model, image_BLC, text_BLC)
    stock: Any = model
    stock.set_attention_backend(args.backend)
    stock.enable_parallelism(config=ContextParallelConfig(**{f"{args.ways}_degree": dist.get_world_size()}))
    shared = gradients(args.model, model, image_BLC, text_BLC)
    worst = 0.0
    for key, gradient in whole.items():
        dist.all_reduce(shared[key])
        worst = max(worst, float((shared[key] - gradient).norm() / gradient.norm().clamp(min=1e-12)))
    if dist.get_rank() == 0:
        what = [
            args.model,
            args.ways,
            args.backend,
            *(["LoRA"] if args.lora else []),
            *(["recomputed"] * args.recompute),
        ]
        print(f"{' '.join(what)}: gradients differ by {worst:.1e} at most, {len(whole)} tensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
