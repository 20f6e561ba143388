"""Decides how a run uses the machine: a pure function of facts, footprint and config, with reasons in plain words.

Plans are tried from the fastest to the leanest, and the first that fits is taken. What the config demands or forbids
takes rungs off that ladder and never puts one on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pixtune.config.schema import TrainConfig
from pixtune.errors import PlanError
from pixtune.hardware.facts import GIB, MEMORY_FRACTION, HardwareFacts, missing_on_host
from pixtune.plan.all_weights import Situation, choose_way, has_masters
from pixtune.plan.footprint import Footprint
from pixtune.plan.kernel_choice import Findings, choose_attention, choose_tf32
from pixtune.plan.refusals import host_lacks, nothing_fits
from pixtune.plan.rungs import (
    QUANTIZED,
    Rung,
    compute_format_of,
    count_captures,
    fit_host,
    fragmented_bytes,
    host_bytes,
    is_unified,
    ladder,
    peak_bytes,
    room_for_captures,
    with_fused_mlps,
    with_rows,
)
from pixtune.plan.text_padding import Captions, choose_text_multiple

CONTEXT_BYTES = round(0.86 * GIB)
"""Of a process outside torch's allocator: CUDA context, code of kernels and libraries, captured steps. On an H100 0.5
GiB at the start and 0.85 at the end of a run with cuDNN's attention and captured steps."""
RESERVE_BYTES = GIB // 4
"""Reserved by the allocator over what it has given out, however little that is."""
SMALL_CARD_BYTES = 30 * GIB
"""Below it 8-bit optimizer states, as the documented profile of 24 GB cards has them."""


@dataclass(frozen=True)
class TrainingPlan:
    """The decisions. Stored in every checkpoint and used again on resume."""

    compute_format: str
    """"bf16" or "fp32": of activations, and of weights that are not quantized."""
    weights_format: str
    """Of the blocks' linear layers: the same, or "fp8", "int8", "nf4"."""
    kept_transposes: bool
    """8-bit weights are kept a second time, transposed, as the backward pass reads them."""
    modulation_rows: int
    """Rows of the table in host memory that stands in for modulation layers; 0: they are loaded."""
    selective: bool
    """Norms, rotary embedding and gates are computed again, the MLP's activation is kept in 8 bits."""
    recomputed_blocks: int
    """The first so many keep only their inputs."""
    reprojected_blocks: int
    """The next so many compute queries, keys and values again."""
    offload_inputs: bool
    """Those inputs wait in host memory."""
    streamed_blocks: int
    """The weights of so many of them come from host memory each time."""
    compile: bool
    """Blocks are compiled."""
    captures: int
    """Of so many shapes, those that come up first, forward and backward pass are captured and replayed."""
    pin_memory: bool
    encoders_stay: bool
    """Text encoder and autoencoder stay on the device after encoding."""
    tf32: bool
    deterministic: bool
    loading_threads: int
    fast_loading: bool
    """Weights are read by fastsafetensors, where it is installed."""
    expandable_segments: bool
    """torch's allocator grows its segments."""
    optimizer: str
    """A name in `optim.OPTIMIZERS`."""
    expected_peak_bytes: int
    """Estimate for a training step, of torch's allocator; 0 on a CPU."""
    expected_host_bytes: int
    """Of page-locked host memory."""
    usable_bytes: int
    """What torch's allocator was taken to have; 0 on a CPU."""
    reasons: tuple[str, ...]
    plain_layers: tuple[str, ...] = ()
    """Paths of the blocks' linear layers that have the `compute_format` where the others are quantized."""
    fused_step: bool = False
    """Each weight is stepped within the backward pass, and its gradient freed."""
    states_on_host: bool = False
    """Optimizer states of all weights wait in host memory."""
    fp32_copies: bool = False
    """bf16 weights have fp32 copies, which are where the optimizer states are."""
    text_multiple: int = 1
    """Captions of training steps are padded to a multiple of so many tokens."""
    attention: str | None = None
    """A kernel of `kernel_choice`, which comes before all others; None: PyTorch's own choice, on CPUs."""
    attention_off: tuple[str, ...] = ()
    """Kernels that are never used."""

    @property
    def recompute(self) -> bool:
        """Whether any block is computed again in the backward pass."""
        return self.recomputed_blocks > 0

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


OLDER_NAMES = {"lean": "selective", "recordings": "captures"}
"""Fields as checkpoints of November 2026 and before call them, and what they are called here."""


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
) -> TrainingPlan:
    """Chooses what the config leaves open.

    Args:
        num_processes: that train together, on one host.
        attention: what trials of its kernels on this machine found; None: nothing was tried.
        flash_attention_3_obstacle: why it cannot be used on this machine; None: nothing is known against it.
        can_compile: torch.compile works on this machine.
        captions: None: nothing is known of them, or the family cannot pad them.

    Raises:
        PlanError: nothing fits; says how much is missing and which demand to drop.
        ConfigError: the config demands what this GPU cannot do.
    """
    on_gpu = facts.device == "cuda"
    compiled = on_gpu and can_compile
    footprint = with_fused_mlps(footprint, facts) if compiled else footprint
    footprint = replace(footprint, one_pool=on_gpu and is_unified(facts, config))
    chosen = _choose(facts, footprint, config, compiled, num_processes)
    rung, usable = chosen.rung, usable_bytes(facts, config) if on_gpu else 0
    unified = is_unified(facts, config)
    tf32, tf32_reasons = choose_tf32(facts, config)
    attending = choose_attention(facts, config, attention, flash_attention_3_obstacle)
    captures = count_captures(rung, footprint, config, compiled, usable - chosen.peak_bytes) if on_gpu else 0
    text_multiple, text_reasons = choose_text_multiple(config, captions, captures, attending.pads)
    return TrainingPlan(
        compute_format=compute_format_of(config),
        weights_format=rung.weights_format,
        modulation_rows=rung.modulation_rows,
        kept_transposes=rung.kept_transposes,
        selective=rung.selective,
        recomputed_blocks=rung.recomputed_blocks,
        reprojected_blocks=rung.reprojected_blocks,
        offload_inputs=rung.offload_inputs,
        streamed_blocks=rung.streamed_blocks,
        compile=compiled,
        captures=captures,
        pin_memory=on_gpu and not unified if config.pin_memory is None else config.pin_memory and on_gpu,
        encoders_stay=unified if config.disable_cpu_offload is None else config.disable_cpu_offload,
        tf32=tf32,
        deterministic=config.deterministic,
        loading_threads=config.fastsafetensors_num_threads,
        fast_loading=config.use_fastsafetensors,
        expandable_segments=config.expandable_segments is not False,
        optimizer=chosen.optimizer,
        expected_peak_bytes=chosen.peak_bytes,
        expected_host_bytes=chosen.host_bytes,
        usable_bytes=usable,
        reasons=(*chosen.reasons, *tf32_reasons, *attending.reasons, *text_reasons),
        plain_layers=footprint.plain_layers if rung.weights_format in QUANTIZED else (),
        fused_step=chosen.fused_step,
        states_on_host=chosen.states_on_host,
        fp32_copies=footprint.trains_all and has_masters(config),
        text_multiple=text_multiple,
        attention=attending.kernel,
        attention_off=attending.off,
    )


@dataclass(frozen=True)
class _Chosen:
    """How the run is held in memory."""

    rung: Rung
    optimizer: str
    reasons: list[str]
    peak_bytes: int = 0
    host_bytes: int = 0
    fused_step: bool = False
    states_on_host: bool = False


def _choose(
    facts: HardwareFacts, footprint: Footprint, config: TrainConfig, compiled: bool, num_processes: int
) -> _Chosen:
    optimizer, why_so = _optimizer(facts, footprint, config)
    if facts.device != "cuda":
        rung, reasons = _rung_on_cpu(footprint, config)
        return _Chosen(rung, optimizer, [*reasons, *why_so])
    slowly = [] if compiled else ["blocks are not compiled: torch.compile does not work here (see pixtune doctor)"]
    if footprint.trains_all:
        situation = Situation(facts, footprint, usable_bytes(facts, config), compiled, num_processes)
        choice = choose_way(situation, config)
        way, reasons = choice.way, [*choice.reasons, *slowly, *why_so]
        return _Chosen(
            way.rung(config), way.optimizer, reasons, choice.peak_bytes, choice.host_bytes, way.fused_step,
            way.states_on_host,
        )  # fmt: skip
    rung, reasons = _choose_rung(facts, footprint, config, optimizer, compiled, num_processes)
    peak = peak_bytes(rung, footprint, config, optimizer, compiled)
    return _Chosen(rung, optimizer, [*reasons, *slowly, *why_so], peak, host_bytes(rung, footprint))


# ---- the ladder


def _choose_rung(
    facts: HardwareFacts, footprint: Footprint, config: TrainConfig, optimizer: str, compiled: bool, num_processes: int
) -> tuple[Rung, list[str]]:
    usable = usable_bytes(facts, config)
    demanded = list(ladder(facts, footprint, config))

    def needed(rung: Rung) -> int:
        return peak_bytes(rung, footprint, config, optimizer, compiled)

    def beside(rung: Rung) -> int:
        return fragmented_bytes(rung, footprint, config, compiled) + room_for_captures(rung, config)

    fitting = [rung for rung in demanded if needed(rung) + beside(rung) <= usable]
    on_host = [num_processes * host_bytes(with_rows(rung, footprint), footprint) for rung in fitting]
    for number, wanted in enumerate(fitting):
        if rung := fit_host(wanted, footprint, facts, num_processes=num_processes):
            reasons = _reasons(rung, demanded[0], footprint, needed(demanded[0]), needed(rung), usable, config)
            return rung, [*reasons, *_passed_over(facts, max(on_host[:number], default=0))]
    if fitting:
        raise PlanError(host_lacks(facts, footprint, config, optimizer, compiled, usable, min(on_host)))
    least = min(demanded, key=needed)
    raise PlanError(nothing_fits(facts, footprint, config, optimizer, compiled, usable, least))


def _rung_on_cpu(footprint: Footprint, config: TrainConfig) -> tuple[Rung, list[str]]:
    plain = compute_format_of(config)
    wants = config.quantize and not config.disable_quantization and not footprint.trains_all
    formats = ("fp8" if config.cuda_features.enable_fp8_training else "int8") if wants else plain
    count = footprint.num_blocks if config.disable_gradient_checkpointing is False else 0
    reasons = ["recomputation off: host memory is enough on a CPU"] if not count else []
    if plain == "bf16":
        reasons.append("bf16 on a CPU, as mixed_precision asks: slower there than mixed_precision=no")
    if wants:
        reasons.append("8-bit weights on a CPU, as quantize asks: they save memory there and cost time")
        reasons += _kept_plain(footprint)
    return Rung(formats, recomputed_blocks=count), reasons


def usable_bytes(facts: HardwareFacts, config: TrainConfig) -> int:
    """What torch's allocator may use."""
    usable = facts.free_bytes
    if is_unified(facts, config):
        usable = min(usable, round(facts.total_bytes * (config.memory_fraction or MEMORY_FRACTION)))
    if config.gpu_memory_limit_gib is not None:
        usable = min(usable, round(config.gpu_memory_limit_gib * GIB) - CONTEXT_BYTES)
    return max(usable - RESERVE_BYTES, 0)


# ---- words


def _optimizer(facts: HardwareFacts, footprint: Footprint, config: TrainConfig) -> tuple[str, list[str]]:
    if config.adam8bit is not None:
        return "adamw_8bit" if config.adam8bit else "adamw", []
    size_gib = min(facts.total_bytes / GIB, config.gpu_memory_limit_gib or float("inf"))
    if facts.device != "cuda" or size_gib * GIB > SMALL_CARD_BYTES or footprint.trains_all:
        return "adamw", []
    return "adamw_8bit", [f"8-bit optimizer states: {size_gib:.0f} GiB are the run's at most"]


def _reasons(
    rung: Rung, first: Rung, footprint: Footprint, first_bytes: int, bytes_: int, usable: int, config: TrainConfig
) -> list[str]:
    """Why this rung and not the first one, and what it means."""
    have = f"{usable / GIB:.1f} GiB usable"
    reasons = [f"about {bytes_ / GIB:.1f} GiB at the peak of a step, {have}"]
    if config.disable_quantization and (config.quantize or config.cuda_features.enable_fp8_training):
        reasons.append("not quantized: disable_quantization wins over quantize and enable_fp8_training")
    if rung != first:
        reasons.append(f"the fastest way would need {first_bytes / GIB:.1f} GiB, so memory is saved:")
    if rung.weights_format in QUANTIZED:
        bits = "4-bit (nf4)" if rung.weights_format == "nf4" else f"8-bit ({rung.weights_format})"
        reasons.append(f"{bits} frozen weights, products on 8-bit tensor cores forward and backward")
        reasons += _kept_plain(footprint)
    if rung.kept_transposes:
        reasons.append("8-bit weights kept transposed, too: there is room, and the backward pass reads them so")
    if rung.modulation_rows:
        weights = sum(kind.count * kind.modulation_weights for kind in footprint.kinds)
        reasons.append(
            f"modulation computed {rung.modulation_rows} draws ahead: its {weights / 1e9:.1f} billion weights stay in "
            "their file"
        )
    if rung.selective:
        reasons.append("norms, rotary embedding and gates computed twice, GELU's input kept in 8 bits")
    if rung.recomputed_blocks:
        reasons.append(f"recomputation on for {rung.recomputed_blocks} of {footprint.num_blocks} blocks")
    else:
        reasons.append("recomputation off: no block is computed twice")
    if rung.reprojected_blocks:
        reasons.append(f"queries, keys and values computed twice in {rung.reprojected_blocks} blocks")
    if rung.offload_inputs:
        reasons.append("the inputs of recomputed blocks wait in host memory")
    if rung.streamed_blocks:
        reasons.append(f"the weights of {rung.streamed_blocks} blocks come from host memory at each pass")
    return reasons


def _passed_over(facts: HardwareFacts, on_host: int) -> list[str]:
    """That faster ways which fit the GPU keep too much in host memory; nothing where they do not."""
    missing = missing_on_host(facts, on_host)
    if not missing:
        return []
    return [
        f"faster ways would keep up to {on_host / GIB:.1f} GiB in host memory, {missing / GIB:.1f} GiB more than may "
        "be taken there"
    ]


def _kept_plain(footprint: Footprint) -> list[str]:
    count = len(footprint.plain_layers)
    return [f"{count} linear layers are not quantized, as keep_plain asks"] if count else []
