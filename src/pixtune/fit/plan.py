"""Decides how a run uses the machine: a pure function of facts, sizes and config, with reasons in plain words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pixtune.config.schema import TrainConfig
from pixtune.errors import PlanError
from pixtune.hardware.facts import HardwareFacts

GIB = 2**30

ACTIVATION_BYTES_PER_UNIT = 36
"""Bytes kept for the backward pass per token, block and channel when nothing is recomputed. Measured on an H100 with
bf16 weights and a rank-16 LoRA on the attention projections: 35 for Qwen-Image, 25 for FLUX.1-dev at 1024x1024."""
INPUT_BYTES_PER_UNIT = 10
"""Besides, where all weights are trained: the inputs of the MLP's linears, 1 + 4 channel widths in bf16. Counted from
the block, not measured."""
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
    num_trained: int = 0
    """Trained weights of the transformer itself; 0 with a LoRA, whose own few are in `FIXED_BYTES`."""


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
    optimizer = "adamw_8bit" if config.adam8bit else "adamw"
    training_bytes = size.num_trained * bytes_per_trained_weight(weights_format, config.weight_update, optimizer)
    bytes_per_unit = ACTIVATION_BYTES_PER_UNIT + (INPUT_BYTES_PER_UNIT if size.num_trained else 0)
    activations = size.num_tokens * size.num_blocks * size.block_width * bytes_per_unit
    if weights_format == "fp32":
        activations *= 2
    resident = size.weight_bytes + training_bytes + FIXED_BYTES
    recompute, reason = _recompute(facts, resident, activations, config.disable_gradient_checkpointing)
    reasons.append(reason)
    # With recomputation one block's activations live at a time, besides the input of each block.
    kept = activations / max(size.num_blocks, 1) + activations / 24 if recompute else activations
    if on_gpu and size.num_trained:
        _refuse_what_cannot_fit(facts, size, round(kept) + FIXED_BYTES, config, weights_format, optimizer)
        reasons.append(f"gradients, optimizer state and copies of all weights: {training_bytes / GIB:.1f} GiB")
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
        optimizer=optimizer,
        expected_peak_bytes=round(resident + kept) if on_gpu else 0,
        reasons=tuple(reasons),
    )


def bytes_per_trained_weight(weights_format: str, weight_update: str, optimizer: str) -> int:
    """Device memory of one trained weight besides the weight: gradient, two optimizer states, fp32 copy if any."""
    states = 2 if optimizer == "adamw_8bit" else 8
    if weights_format == "fp32":
        return 4 + states
    if weight_update == "fp32_master":
        return 4 + 4 + states
    return 2 + states


def _refuse_what_cannot_fit(
    facts: HardwareFacts, size: RunSize, other_bytes: int, config: TrainConfig, weights_format: str, optimizer: str
) -> None:
    """Raises PlanError if all weights cannot be trained here, naming the way that needs least and whether it fits."""

    def needed(update: str, name: str) -> float:
        per_weight = bytes_per_trained_weight(weights_format, update, name)
        return (size.weight_bytes + size.num_trained * per_weight + other_bytes) / GIB

    usable, wanted = facts.free_bytes * USABLE_SHARE / GIB, needed(config.weight_update, optimizer)
    if wanted <= usable:
        return
    least = needed("stochastic_rounding", "adamw_8bit")
    if least <= usable:
        advice = f"weight_update=stochastic_rounding adam8bit=true needs {least:.1f} GiB and fits."
    else:
        advice = f"The least, stochastic_rounding with adam8bit=true, needs {least:.1f} GiB. Train a LoRA: method=lora."
    raise PlanError(
        f"training all weights needs about {wanted:.1f} GiB and {usable:.1f} GiB of {facts.name} are usable: "
        f"{wanted - usable:.1f} GiB are missing. {advice}"
    )


def _recompute(facts: HardwareFacts, resident: int, activations: int, disabled: bool | None) -> tuple[bool, str]:
    if disabled is not None:
        return not disabled, f"recomputation {'off' if disabled else 'on'}: disable_gradient_checkpointing says so"
    if facts.device != "cuda":
        return False, "recomputation off: host memory is enough on a CPU"
    needed, usable = resident + activations, facts.free_bytes * USABLE_SHARE
    sizes = f"about {needed / GIB:.1f} GiB without it, {usable / GIB:.1f} GiB usable"
    return needed > usable, f"recomputation {'on' if needed > usable else 'off'}: {sizes}"
