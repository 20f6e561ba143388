"""Carries a plan out: the only place that does, in its one order.

First come the process's switches, then the transformer, loaded in its form (`load.py`) and its blocks put in their
places. When a LoRA has been attached, what blocks keep for the backward pass follows, and last their compilation.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from pixtune.engine.activations import recompute_blocks, recompute_projections
from pixtune.engine.attention import use_attention
from pixtune.engine.compile import compile_blocks
from pixtune.engine.gelu import compact_gelus
from pixtune.engine.load import (
    DEFAULT_READING,
    Layout,
    LoadedTransformer,
    Reading,
    load_transformer,
    random_transformer,
)
from pixtune.engine.load_sharded import load_sharded
from pixtune.engine.mlp import fuse_mlps
from pixtune.engine.packing import close_gaps
from pixtune.engine.sharded_blocks import ShardedBlocks
from pixtune.engine.sharding import keep_gathered
from pixtune.engine.streaming import choose_streamed, stream_blocks
from pixtune.engine.together import Together
from pixtune.family import ModelFamily, Placement
from pixtune.plan.sampling import SamplingPlan
from pixtune.plan.training import TrainingPlan
from pixtune.storage.model_folder import ModelFolder

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""torch's name of each `compute_format` of a plan."""


def apply_switches(plan: TrainingPlan) -> None:
    """Sets process-wide switches. Must run before the first CUDA kernel."""
    torch.set_float32_matmul_precision("high" if plan.tf32 else "highest")
    use_attention(plan.attention, plan.attention_off)
    if plan.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def placement_of(plan: TrainingPlan | SamplingPlan, device: torch.device) -> Placement:
    """Returns where activations and plain weights are, and in which format."""
    return Placement(device, COMPUTE_DTYPES[plan.compute_format])


def layout_of(plan: TrainingPlan | SamplingPlan, num_blocks: int) -> Layout:
    """Returns a plan's decisions about weights: all of them but the placement."""
    linear_format = None if plan.weights_format in COMPUTE_DTYPES else plan.weights_format
    streamed = choose_streamed(num_blocks, plan.streamed_blocks) if plan.streamed_blocks else ()
    layout = Layout(linear_format, plan.modulation_rows, streamed)
    if isinstance(plan, SamplingPlan):  # nothing runs backward or is captured
        return layout
    return replace(
        layout,
        keeps_transposes=plan.kept_transposes,
        plain_layers=plan.plain_layers,
        gapless=plan.captures > 0,
    )


def blocks_of(transformer: nn.Module, family: ModelFamily) -> list[nn.Module]:
    """Returns all repeated blocks, in the order in which they run."""
    return [block for path in family.block_paths for block in transformer.get_submodule(path).children()]


def load_planned(
    family: ModelFamily,
    folder: ModelFolder,
    plan: TrainingPlan | SamplingPlan,
    device: torch.device,
    reading: Reading = DEFAULT_READING,
    random_weights: bool = False,
    sharded: ShardedBlocks | None = None,
    together: Together | None = None,
) -> LoadedTransformer:
    """Loads a transformer as a plan has its weights. A LoRA may be attached afterwards.

    Args:
        random_weights: the folder's config alone is read.
        sharded: takes the streamed blocks apart; None: they are streamed from host memory.
        together: processes that train all weights and hold them together; None: this one holds all.

    Raises:
        WeightsError: see `load_transformer`.
        PlanError: see `stream_blocks`.
    """
    placement, layout = placement_of(plan, device), layout_of(plan, family.block_shape(folder)[0])
    take = None if sharded is None else sharded.take
    if together is not None and not together.is_alone:
        transformer = load_sharded(family, folder, placement, together, reading, random_weights)
        if isinstance(plan, TrainingPlan) and plan.keeps_gathered:
            keep_gathered(transformer.module, blocks_of(transformer.module, family))
    elif random_weights:
        config = folder.component_config("transformer")
        transformer = random_transformer(family, config, placement, layout, take=take)
    else:
        transformer = load_transformer(family, folder, placement, layout, reading, take)
    return apply_to_weights(transformer, family, layout, device, sharded)


def apply_to_weights(
    transformer: LoadedTransformer,
    family: ModelFamily,
    layout: Layout,
    device: torch.device,
    sharded: ShardedBlocks | None = None,
) -> LoadedTransformer:
    """Streams the layout's streamed blocks, places the others on the device, and fuses the MLPs of all.

    Args:
        sharded: has taken the streamed blocks; None: they go to host memory.

    Raises:
        PlanError: see `stream_blocks`.
    """
    blocks = blocks_of(transformer.module, family)
    stream = None
    if sharded is not None:
        stream = sharded.stream()
    elif layout.streamed:
        stream = stream_blocks([blocks[number] for number in layout.streamed], device)
    if layout.gapless:
        close_gaps([block for number, block in enumerate(blocks) if number not in layout.streamed], device)
    fuse_mlps(blocks)
    return replace(transformer, stream=stream)


def apply_to_activations(
    transformer: nn.Module, family: ModelFamily, plan: TrainingPlan, sizes_vary: bool = False
) -> None:
    """Applies a plan's decisions about activations, and compiles the blocks. Must run after a LoRA has been attached.

    Args:
        sizes_vary: pictures or captions come in several sizes.
    """
    blocks = blocks_of(transformer, family)
    if plan.selective:
        compact_gelus(blocks)
    if plan.recomputed_blocks:
        recompute_blocks(blocks[: plan.recomputed_blocks], plan.offload_inputs)
    if plan.reprojected_blocks:
        recompute_projections(blocks[plan.recomputed_blocks :][: plan.reprojected_blocks])
    if plan.compile:
        compile_blocks(blocks, plan.selective, plan.fused_step, sizes_vary)
