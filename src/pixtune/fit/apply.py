"""The one place that carries a plan out, in its one order."""

from __future__ import annotations

import torch
from torch import nn

from pixtune.fit.plan import MemoryPlan

FORMATS = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""A plan's `weights_format` as torch says it."""


def apply_switches(plan: MemoryPlan) -> None:
    """Process-wide switches. Must run before the first CUDA kernel."""
    torch.set_float32_matmul_precision("high" if plan.tf32 else "highest")
    if plan.cudnn_attention is not None:
        torch.backends.cuda.enable_cudnn_sdp(plan.cudnn_attention)
    if plan.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def apply_plan(transformer: nn.Module, plan: MemoryPlan) -> nn.Module:
    """Changes a loaded transformer in place, before the LoRA is attached."""
    if plan.recompute:
        transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    return transformer
