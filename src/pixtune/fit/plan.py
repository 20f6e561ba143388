"""Decides how a run uses the machine: a pure function of facts, sizes and config, with reasons in plain words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pixtune.config.schema import TrainConfig
from pixtune.hardware.facts import HardwareFacts

GIB = 2**30

ACTIVATION_BYTES_PER_UNIT = 36
"""Bytes kept for the backward pass per token, block and channel when nothing is recomputed. Measured on an H100 with
bf16 weights and a rank-16 LoRA on the attention projections: 35 for Qwen-Image, 25 for FLUX.1-dev at 1024x1024."""
FIXED_BYTES = 2 * GIB
"""CUDA context, LoRA with its optimizer state, workspaces."""
USABLE_SHARE = 0.92
"""Of free memory; the rest is lost to fragmentation."""


@dataclass(frozen=True)
class RunSize:
    """What decides memory in a training step."""

    weight_bytes: int
    """Of the transformer in the format it is trained in."""
    num_tokens: int
    """Image and text tokens of the largest micro-batch of one process."""
    num_blocks: int
    block_width: int


@dataclass(frozen=True)
class MemoryPlan:
    """The decisions. Stored in every checkpoint and used again on resume."""

    weights_format: str
    """"bf16" or "fp32"."""
    recompute: bool
    """Every block's activations are computed again in the backward pass."""
    pin_memory: bool
    encoders_stay: bool
    """Text encoder and autoencoder stay on the device after encoding."""
    tf32: bool
    cudnn_attention: bool | None
    """None: PyTorch's own choice."""
    deterministic: bool
    optimizer: str
    """A name in `optim.OPTIMIZERS`."""
    expected_peak_bytes: int
    """Estimate for a training step on the device; 0 on a CPU."""
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reasons": list(self.reasons)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MemoryPlan:
        return cls(**{**values, "reasons": tuple(values["reasons"])})


def plan_memory(
    facts: HardwareFacts, size: RunSize, config: TrainConfig, cudnn_attention: tuple[bool, str] | None = None
) -> MemoryPlan:
    """Chooses what the config leaves open.

    Args:
        cudnn_attention: whether a trial of it on this machine passed, and its finding; None: not tried.
    """
    on_gpu = facts.device == "cuda"
    reasons = []
    weights_format = "bf16" if config.mixed_precision == "bf16" else "fp32"
    if not on_gpu and weights_format == "bf16":
        reasons.append("bf16 weights on a CPU, as mixed_precision asks: slower there than mixed_precision=no")
    activations = size.num_tokens * size.num_blocks * size.block_width * ACTIVATION_BYTES_PER_UNIT
    if weights_format == "fp32":
        activations *= 2
    recompute, reason = _recompute(facts, size, activations, config.disable_gradient_checkpointing)
    reasons.append(reason)
    # With recomputation one block's activations live at a time, besides the input of each block.
    kept = activations / max(size.num_blocks, 1) + activations / 24 if recompute else activations
    tf32 = config.cuda_features.enable_tf32_compute
    if tf32 is None:
        tf32 = facts.capability >= (8, 0)
        reasons.append(
            f"TF32 {'on' if tf32 else 'off'}: compute capability {facts.capability[0]}.{facts.capability[1]}"
        )
    use_cudnn = config.cuda_features.enable_cudnn_sdp
    if use_cudnn is None and cudnn_attention is not None:
        passed, finding = cudnn_attention
        use_cudnn = passed
        reasons.append(f"cuDNN attention {'allowed' if passed else 'off'}: tried on this machine, {finding}")
    pin_memory = on_gpu if config.pin_memory is None else config.pin_memory and on_gpu
    return MemoryPlan(
        weights_format=weights_format,
        recompute=recompute,
        pin_memory=pin_memory,
        encoders_stay=bool(config.disable_cpu_offload),
        tf32=tf32,
        cudnn_attention=use_cudnn,
        deterministic=config.deterministic,
        optimizer="adamw_8bit" if config.adam8bit else "adamw",
        expected_peak_bytes=round(size.weight_bytes + kept + FIXED_BYTES) if on_gpu else 0,
        reasons=tuple(reasons),
    )


def _recompute(facts: HardwareFacts, size: RunSize, activations: int, disabled: bool | None) -> tuple[bool, str]:
    if disabled is not None:
        return not disabled, f"recomputation {'off' if disabled else 'on'}: disable_gradient_checkpointing says so"
    if facts.device != "cuda":
        return False, "recomputation off: host memory is enough on a CPU"
    needed, usable = size.weight_bytes + activations + FIXED_BYTES, facts.free_bytes * USABLE_SHARE
    sizes = f"about {needed / GIB:.1f} GiB without it, {usable / GIB:.1f} GiB usable"
    return needed > usable, f"recomputation {'on' if needed > usable else 'off'}: {sizes}"
