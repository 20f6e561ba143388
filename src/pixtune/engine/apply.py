"""The one place that carries a plan out, in its one order.

Switches of the process; the transformer loaded in its form (`load.py`); blocks that stream; then, when a LoRA is
attached, what is kept for the backward pass; last, compilation.
"""

from __future__ import annotations

import torch
from torch import nn

from pixtune.engine.activations import recompute_blocks, recompute_projections
from pixtune.engine.attention import use_attention
from pixtune.engine.compile import compile_blocks
from pixtune.engine.gelu import compact_gelus
from pixtune.engine.load import Layout
from pixtune.engine.mlp import fuse_mlps
from pixtune.engine.packing import close_gaps
from pixtune.engine.streaming import choose_streamed, stream_blocks
from pixtune.family import ModelFamily, Placement
from pixtune.plan.training import TrainingPlan

FORMATS = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""A plan's `compute_format` as torch says it."""


def apply_switches(plan: TrainingPlan) -> None:
    """Process-wide switches. Must run before the first CUDA kernel."""
    torch.set_float32_matmul_precision("high" if plan.tf32 else "highest")
    use_attention(plan.attention, plan.attention_off)
    if plan.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def placement_of(plan: TrainingPlan, device: torch.device) -> Placement:
    """Where and in which format activations and plain weights are."""
    return Placement(device, FORMATS[plan.compute_format])


def layout_of(plan: TrainingPlan, num_blocks: int) -> Layout:
    """The form in which the transformer is loaded."""
    quantized = plan.weights_format not in FORMATS
    streamed = choose_streamed(num_blocks, plan.streamed_blocks) if plan.streamed_blocks else ()
    weights_format = plan.weights_format if quantized else None
    return Layout(weights_format, plan.modulation_rows, streamed, plan.kept_transposes, plan.plain_layers)


def blocks_of(transformer: nn.Module, family: ModelFamily) -> list[nn.Module]:
    """All repeated blocks, in the order in which they run."""
    return [block for path in family.block_paths for block in transformer.get_submodule(path).children()]


def apply_to_weights(transformer: nn.Module, family: ModelFamily, plan: TrainingPlan, device: torch.device) -> None:
    """Before a LoRA is attached: blocks whose weights wait in host memory, and how the others lie on the device."""
    blocks = blocks_of(transformer, family)
    streamed = choose_streamed(len(blocks), plan.streamed_blocks)
    if streamed:
        stream = stream_blocks([blocks[number] for number in streamed], device)
        transformer.block_stream = stream  # type: ignore[assignment]
    if plan.captures:
        close_gaps([block for number, block in enumerate(blocks) if number not in streamed], device)


def apply_to_activations(
    transformer: nn.Module, family: ModelFamily, plan: TrainingPlan, sizes_vary: bool = False
) -> None:
    """After a LoRA is attached: what blocks keep for the backward pass, and their compilation.

    Args:
        sizes_vary: pictures or captions come in several sizes.
    """
    blocks = blocks_of(transformer, family)
    fuse_mlps(blocks)
    if plan.selective:
        compact_gelus(blocks)
    if plan.recomputed_blocks:
        recompute_blocks(blocks[: plan.recomputed_blocks], plan.offload_inputs)
    if plan.reprojected_blocks:
        recompute_projections(blocks[plan.recomputed_blocks :][: plan.reprojected_blocks])
    if plan.compile:
        compile_blocks(blocks, plan.selective, plan.fused_step, sizes_vary)
