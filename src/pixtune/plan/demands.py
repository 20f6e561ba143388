"""Meaning of the config's keys on memory, in positive words: what a run demands, forbids or leaves to the planner.

Several of those keys are negations, and one wins over another. `demands_of` resolves that once; all of planning reads
`Demands`. Messages name the config's own keys, since those are what the user typed.
"""

from __future__ import annotations

from dataclasses import dataclass

from pixtune.config.schema import TrainConfig
from pixtune.hardware.facts import GIB, MEMORY_FRACTION, HardwareFacts
from pixtune.plan.optimizers import EXACT, SMALL, StateOptions


@dataclass(frozen=True)
class Demands:
    """Demands of a run on how it uses memory. Of three states True demands, False forbids, None leaves it open."""

    compute_format: str
    """"bf16" or "fp32": of activations, and of weights that are not quantized."""
    quantize: bool | None
    """Frozen weights of 8 bits."""
    fp8: bool | None
    """float8 as the format of 8 bits; False: int8."""
    may_quantize_encoders: bool
    """Text encoders may have fewer bits where they do not fit otherwise."""
    recompute: bool | None
    """Recomputation of every block; False: of none."""
    optimizer: str | None
    """Name in `plan.optimizers`; None: the planner chooses by the memory there is."""
    unified: bool | None
    """One pool of memory for CPU and GPU; None: as the GPU says of itself."""
    encoders_stay: bool | None
    """Encoders on the device after encoding; None: only where memory is unified."""
    captures: bool
    """A GPU's steps are captured. Training all weights may step each in its backward pass, so none is captured."""
    accumulates: bool
    """Gradients are summed over several micro-batches."""
    clips: bool
    """Gradients are clipped by their global norm."""
    fp32_copies: bool
    """bf16 weights that are all trained have fp32 copies."""
    memory_limit_bytes: int | None
    """Device memory that the whole process may take, CUDA context included; None: no limit."""
    host_limit_bytes: int | None
    """Host memory that all processes of the run on a machine may take together; None: no limit."""
    memory_fraction: float
    """Largest share of a unified pool that the run takes."""
    shards: int | None = None
    """Processes that hold one copy of the weights together; None: the planner chooses."""
    notices: tuple[str, ...] = ()
    """Keys that others win over, in words for the user."""

    def is_unified(self, facts: HardwareFacts) -> bool:
        """Returns whether CPU and GPU are treated as one pool of memory."""
        return facts.integrated if self.unified is None else self.unified

    def keeps_encoders(self, unified: bool) -> bool:
        """Returns whether encoders stay on the device after encoding."""
        return unified if self.encoders_stay is None else self.encoders_stay


def _optimizer(config: TrainConfig) -> str | None:
    if config.optimizer != EXACT:
        return config.optimizer
    return None if config.adam8bit is None else SMALL if config.adam8bit else EXACT


def demands_of(config: TrainConfig) -> Demands:
    """Returns the meaning of a config's keys on memory."""
    fp8, limit_gib = config.cuda_features.enable_fp8_training, config.gpu_memory_limit_gib
    disabled, host_gib = config.disable_gradient_checkpointing, config.host_memory_limit_gib
    notices = []
    if config.disable_quantization and (config.quantize or fp8):
        notices.append("not quantized: disable_quantization wins over quantize and enable_fp8_training")
    return Demands(
        compute_format="bf16" if config.mixed_precision == "bf16" else "fp32",
        quantize=False if config.disable_quantization else config.quantize,
        fp8=fp8,
        may_quantize_encoders=not config.disable_quantization,
        recompute=None if disabled is None else not disabled,
        optimizer=_optimizer(config),
        unified=config.unified_memory,
        encoders_stay=config.disable_cpu_offload,
        captures=config.cuda_graphs and config.method != "full",
        accumulates=config.gradient_accumulation_steps > 1,
        clips=config.max_grad_norm > 0,
        fp32_copies=config.method == "full"
        and config.weight_update == "fp32_master"
        and config.mixed_precision == "bf16",
        memory_limit_bytes=None if limit_gib is None else round(limit_gib * GIB),
        host_limit_bytes=None if host_gib is None else round(host_gib * GIB),
        memory_fraction=config.memory_fraction or MEMORY_FRACTION,
        shards=config.distributed.shards,
        notices=tuple(notices),
    )


def state_options_of(config: TrainConfig) -> StateOptions:
    """Returns the keys of a config that decide the sizes of an optimizer's states."""
    return StateOptions(config.prodigy.slice, config.adafactor.momentum is not None)
