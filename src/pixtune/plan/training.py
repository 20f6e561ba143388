"""Plan of a run: how it uses the machine, as a pure function of facts, footprint and config. No torch.

Rungs are tried from the fastest to the leanest, and the first that fits is taken. What the config demands or forbids
takes rungs off that ladder and never puts one on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from pixtune.config.schema import TrainConfig
from pixtune.errors import ConfigError
from pixtune.hardware.facts import HardwareFacts
from pixtune.hardware.gpu_links import GpuLinks
from pixtune.plan.choice import choose_rung
from pixtune.plan.demands import Demands, demands_of
from pixtune.plan.footprint import BYTES_PER_WEIGHT, ELEMENT_BYTES, Footprint
from pixtune.plan.kernel_choice import NAMES, Findings, choose_attention, choose_tf32
from pixtune.plan.optimizers import KERNEL, OPTIMIZERS, SEPARATE, SMALL, STEP_FORMS
from pixtune.plan.rungs import QUANTIZED, count_captures
from pixtune.plan.situation import situation_of
from pixtune.plan.text_padding import Captions, choose_text_multiple


@dataclass(frozen=True)
class TrainingPlan:
    """Decisions on how a run uses the machine. Stored in every checkpoint and used again on resume."""

    compute_format: str = field(metadata={"choices": tuple(ELEMENT_BYTES)})
    """"bf16" or "fp32": of activations, and of weights that are not quantized."""
    weights_format: str = field(metadata={"choices": tuple(BYTES_PER_WEIGHT)})
    """Format of the blocks' linear layers: the same, or "fp8", "int8", "nf4"."""
    kept_transposes: bool
    """8-bit weights are kept a second time, transposed, as the backward pass reads them."""
    modulation_rows: int
    """Rows of the table in host memory that stands in for modulation layers; 0: they are loaded."""
    selective: bool
    """Norms, rotary embedding and gates are recomputed; the MLP's activation is kept in 8 bits."""
    recomputed_blocks: int
    """Number of leading blocks that are recomputed from their inputs."""
    reprojected_blocks: int
    """Number of blocks, following the recomputed ones, that recompute queries, keys and values."""
    offload_inputs: bool
    """Inputs of recomputed blocks wait in host memory."""
    streamed_blocks: int
    """Number of blocks whose weights come from host memory each time."""
    compile: bool
    """Blocks are compiled."""
    captures: int
    """Number of shapes, those that come up first, whose steps are captured and replayed."""
    pin_memory: bool
    """Batches are in page-locked host memory."""
    encoders_stay: bool
    """Text encoder and autoencoder stay on the device after encoding."""
    tf32: bool
    """Products of fp32 numbers may be computed in TF32."""
    deterministic: bool
    """Kernels whose results vary are not used."""
    loading_threads: int
    """Threads that read weights."""
    fast_loading: bool
    """Weights are read by fastsafetensors, where it is installed."""
    expandable_segments: bool
    """torch's allocator grows its segments."""
    optimizer: str = field(metadata={"choices": tuple(OPTIMIZERS)})
    """Name in `plan.optimizers.OPTIMIZERS`."""
    expected_peak_bytes: int
    """Estimate of the peak in torch's allocator during a training step; 0 on a CPU."""
    expected_host_bytes: int
    """Estimate of page-locked host memory."""
    usable_bytes: int
    """Device memory that torch's allocator may use; 0 on a CPU."""
    reasons: tuple[str, ...]
    """Reasons of the decisions, in words for the user."""
    plain_layers: tuple[str, ...] = ()
    """Paths of the blocks' linear layers that have the `compute_format` where the others are quantized."""
    fused_step: bool = False
    """Each weight is stepped within the backward pass, and its gradient freed."""
    states_on_host: bool = False
    """Optimizer states of all weights wait in host memory."""
    fp32_copies: bool = False
    """bf16 weights have fp32 copies, in the same memory as the optimizer states."""
    text_multiple: int = 1
    """Number of tokens to whose multiple captions of training steps are padded."""
    attention: str | None = field(default=None, metadata={"choices": tuple(NAMES)})
    """Kernel of `kernel_choice` that is preferred to all others; None: PyTorch's own choice."""
    attention_off: tuple[str, ...] = ()
    """Attention kernels that are never used."""
    micro_batch_seconds: float = 0.0
    """Estimate of the time of a micro-batch; 0: there is none (a CPU, or all weights are trained)."""
    micro_batch_parts: int = 1
    """Number of parts in which each micro-batch is computed, one after the other; see `engine/relief.py`."""
    shards: int = 1
    """Number of processes that hold one copy of the weights together. With more than 1, `streamed_blocks` lie in parts
    on their GPUs, and are gathered each time; with all weights trained, everything does."""
    keeps_gathered: bool = False
    """Trained blocks that lie in parts stay whole from their forward to their backward pass."""
    step_form: str | None = field(default=None, metadata={"choices": STEP_FORMS})
    """Form of a step over all weights, and with it what rounding draws; None: a LoRA's run, or one that is older."""

    @property
    def recompute(self) -> bool:
        """Whether any block is recomputed in the backward pass."""
        return self.recomputed_blocks > 0

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plain values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def facts_of_plan(plan: TrainingPlan) -> dict[str, str]:
    """Returns the plan's decisions, in which all processes of a run must be alike, by names for people."""
    return {f"the plan's {name}": json.dumps(value) for name, value in plan.to_dict().items() if name != "reasons"}


def check_parts(demands: Demands) -> None:
    """Checks that the optimizer can step the parts of weights that processes hold together.

    Raises:
        ConfigError: it needs whole matrices.
    """
    if demands.shards in (None, 1) or demands.optimizer is None or OPTIMIZERS[demands.optimizer].by_number:
        return
    able = ", ".join(name for name, needs in OPTIMIZERS.items() if needs.by_number and name != SMALL)
    raise ConfigError(
        f"distributed.shards is {demands.shards}",
        [
            f"with method=full, each process then steps a part of each weight, and "
            f"{OPTIMIZERS[demands.optimizer].title} needs whole ones. Possible: optimizer={able}, with or "
            "without adam8bit; or distributed.shards=1, where each process has all weights"
        ],
    )


def refuse_dora_in_parts(shards: int) -> NoReturn:
    """Refuses a DoRA on a base in parts.

    Its files hold lengths of the base's rows, which the first process would gather while the others are elsewhere.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        'adapter.kind is "dora"',
        [
            f"{shards} processes would hold the frozen weights together, and a DoRA's files are written from whole "
            "ones. Possible: adapter.kind=lora or lokr, or distributed.shards=1, which streams the base from host "
            "memory where a GPU cannot hold it"
        ],
    )


OLDER_NAMES = {"lean": "selective", "recordings": "captures"}
"""Names of fields in checkpoints up to November 2026, and their names today."""


def with_todays_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the fields of a stored plan that have other names today."""
    return {OLDER_NAMES.get(name, name): value for name, value in values.items()}


def plan_training(
    facts: HardwareFacts,
    footprint: Footprint,
    config: TrainConfig,
    attention: Findings | None = None,
    can_compile: bool = True,
    num_processes: int = 1,
    flash_attention_3_obstacle: str | None = None,
    captions: Captions | None = None,
    num_hosts: int = 1,
    links: GpuLinks | None = None,
    step_form: str | None = KERNEL,
) -> TrainingPlan:
    """Chooses what the config leaves open.

    Args:
        attention: results of its kernels' trials on this machine; None: nothing was tried.
        can_compile: torch.compile works on this machine.
        num_processes: processes that train together on one host.
        flash_attention_3_obstacle: why it cannot be used on this machine; None: no reason is known.
        captions: lengths of captions; None: nothing is known of them, or the family cannot pad them.
        num_hosts: hosts with as many processes each.
        links: links between the GPUs; None: nothing is known of them.
        step_form: how this machine can step all weights; None: as the run did that goes on, which knows no form.

    Raises:
        PlanError: nothing fits; names how much is missing and which demand to drop.
        ConfigError: the config demands what this GPU cannot do.
    """
    on_gpu, demands = facts.device == "cuda", demands_of(config)
    if footprint.trains_all:
        check_parts(demands)
    if step_form is not None and not on_gpu:
        step_form = SEPARATE
    situation = situation_of(
        facts, footprint, demands, on_gpu and can_compile, num_processes, num_hosts=num_hosts, links=links,
        step_form=step_form,
    )  # fmt: skip
    chosen = choose_rung(situation, config)
    rung = chosen.rung
    if rung.shards > 1 and not footprint.trains_all and config.adapter.kind == "dora":
        refuse_dora_in_parts(rung.shards)
    tf32, tf32_reasons = choose_tf32(facts, config)
    attending = choose_attention(facts, config, attention, flash_attention_3_obstacle)
    captures = count_captures(rung, situation, chosen.peak_bytes) if on_gpu else 0
    text_multiple, text_reasons = choose_text_multiple(config, captions, captures, attending.pads)
    return TrainingPlan(
        compute_format=demands.compute_format,
        weights_format=rung.weights_format,
        modulation_rows=rung.modulation_rows,
        kept_transposes=rung.kept_transposes,
        selective=rung.selective,
        recomputed_blocks=rung.recomputed_blocks,
        reprojected_blocks=rung.reprojected_blocks,
        offload_inputs=rung.offload_inputs,
        streamed_blocks=rung.streamed_blocks,
        compile=situation.compiled,
        captures=captures,
        pin_memory=on_gpu and (not situation.unified if config.pin_memory is None else config.pin_memory),
        encoders_stay=demands.keeps_encoders(situation.unified),
        tf32=tf32,
        deterministic=config.deterministic,
        loading_threads=config.fastsafetensors_num_threads,
        fast_loading=config.use_fastsafetensors,
        expandable_segments=config.expandable_segments is not False,
        optimizer=chosen.optimizer,
        expected_peak_bytes=chosen.peak_bytes,
        expected_host_bytes=chosen.host_bytes,
        usable_bytes=situation.usable_bytes if on_gpu else 0,
        reasons=(*chosen.reasons, *footprint.notes, *tf32_reasons, *attending.reasons, *text_reasons),
        plain_layers=footprint.plain_layers if rung.weights_format in QUANTIZED else (),
        fused_step=chosen.fused_step,
        states_on_host=chosen.states_on_host,
        fp32_copies=demands.fp32_copies,
        text_multiple=text_multiple,
        attention=attending.kernel,
        attention_off=attending.off,
        micro_batch_seconds=chosen.micro_batch_seconds,
        shards=rung.shards,
        keeps_gathered=rung.keeps_gathered,
        step_form=step_form if footprint.trains_all else None,
    )
