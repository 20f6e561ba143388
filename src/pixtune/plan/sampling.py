"""Plan of sampling without a run: the ladder of a LoRA run without what only a backward pass needs. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pixtune.errors import PlanError
from pixtune.hardware.facts import GIB, HardwareFacts, missing_on_host
from pixtune.plan.demands import demands_of
from pixtune.plan.encoders import decoding_bytes, fitting_tile
from pixtune.plan.footprint import ELEMENT_BYTES, Footprint
from pixtune.plan.rungs import Rung, fit_host, ladder, transformer_bytes, with_rows
from pixtune.plan.situation import Situation, situation_of

if TYPE_CHECKING:
    from pixtune.config.schema import TrainConfig

PASS_FIXED_BYTES = round(0.35 * GIB)
"""Memory that is not counted one by one: workspaces, latents and conditioning. Not measured."""


@dataclass(frozen=True)
class SampleSizes:
    """Sizes of what is sampled, as far as memory depends on them."""

    pixels: int
    """Pixels of the largest picture."""
    num_passes: int
    """Passes of the transformer for one picture."""
    autoencoder_bytes: int


@dataclass(frozen=True)
class SamplingPlan:
    """Decision on how pictures are sampled."""

    compute_format: str
    """"bf16" or "fp32"."""
    weights_format: str
    """Format of the blocks' linear layers: the same, or "fp8", "int8", "nf4"."""
    modulation_rows: int
    """Rows of the table in host memory that stands in for modulation layers; 0: they are loaded."""
    streamed_blocks: int
    """Number of blocks whose weights come from host memory in each pass."""
    decode_last: bool
    """Pictures are decoded when all are sampled and the transformer has left the device."""
    tile_pixels: int | None
    """Side of the tiles in which pictures are decoded; None: whole."""
    expected_peak_bytes: int
    """Estimate for torch's allocator; 0 on a CPU."""
    expected_host_bytes: int
    """Estimate for page-locked host memory."""
    reasons: tuple[str, ...] = ()


def plan_sampling(facts: HardwareFacts, footprint: Footprint, config: TrainConfig, sizes: SampleSizes) -> SamplingPlan:
    """Chooses the fastest way to sample that fits.

    Args:
        footprint: `num_tokens` of one pass; `trained_weights` of a LoRA that is put on, 0 without one.
        config: brings formats, demands and limits; nothing is trained.

    Raises:
        PlanError: nothing fits; names how much is missing.
        ConfigError: the config demands what this GPU cannot do.
    """
    demands = demands_of(config)
    plain = demands.compute_format
    if facts.device != "cuda":
        return SamplingPlan(plain, "int8" if demands.quantize else plain, 0, 0, False, None, 0, 0)
    situation = situation_of(facts, footprint, demands, compiled=False, num_tables=1)
    footprint, usable = situation.footprint, situation.usable_bytes
    rungs = sampling_ladder(situation, sizes.num_passes)
    fitting = [rung for rung in rungs if pass_peak_bytes(rung, situation) <= usable]
    rung = next(filter(None, (fit_host(rung, situation) for rung in fitting)), None)
    if rung is None:
        raise PlanError(_refuse(situation, config, sizes, fitting or rungs))
    beside = _held_bytes(rung, situation) + sizes.autoencoder_bytes
    decode_last = beside + decoding_bytes(sizes.pixels) > usable
    tile = fitting_tile(sizes.pixels, usable - sizes.autoencoder_bytes, decoding_bytes) if decode_last else None
    decoding = decoding_bytes(sizes.pixels, tile) + (sizes.autoencoder_bytes if decode_last else beside)
    plan = SamplingPlan(
        compute_format=plain,
        weights_format=rung.weights_format,
        modulation_rows=rung.modulation_rows,
        streamed_blocks=rung.streamed_blocks,
        decode_last=decode_last,
        tile_pixels=tile,
        expected_peak_bytes=max(pass_peak_bytes(rung, situation), decoding),
        expected_host_bytes=situation.on_host(rung),
    )
    return replace(plan, reasons=(_reason(plan, situation),))


def sampling_ladder(situation: Situation, num_passes: int) -> tuple[Rung, ...]:
    """Returns the rungs of a LoRA run with what only a backward pass needs taken away, fastest first.

    A modulation table needs no more rows than a picture has passes, and one to spare.
    """
    rungs = (
        Rung(rung.weights_format, min(rung.modulation_rows, num_passes + 1), streamed_blocks=rung.streamed_blocks)
        for rung in ladder(situation)
    )
    return tuple(dict.fromkeys(rungs))


def pass_peak_bytes(rung: Rung, situation: Situation) -> int:
    """Returns the peak of what torch's allocator gives out while the transformer runs without gradients."""
    footprint, compute_format = situation.footprint, situation.demands.compute_format
    quantized = rung.weights_format != compute_format
    units = max(k.units.passing_quantized if quantized else k.units.passing for k in footprint.kinds)
    activations = units * footprint.num_tokens * footprint.width * ELEMENT_BYTES[compute_format]
    return round(_held_bytes(rung, situation) + PASS_FIXED_BYTES + activations)


def _held_bytes(rung: Rung, situation: Situation) -> int:
    """Returns the bytes of the transformer, and of a LoRA that is not trained: its fp32 weights alone."""
    footprint = situation.footprint
    return transformer_bytes(rung, footprint, situation.demands.compute_format) + 4 * footprint.trained_weights


# ---- words


def _reason(plan: SamplingPlan, situation: Situation) -> str:
    ways = [f"base weights in {plan.weights_format}"]
    if plan.modulation_rows:
        ways.append("modulations computed ahead")
    if plan.streamed_blocks:
        num_blocks = situation.footprint.num_blocks
        ways.append(f"{plan.streamed_blocks} of {num_blocks} blocks from host memory in each pass")
    if plan.decode_last:
        ways.append(
            "pictures decoded at the end" + (f" in tiles of {plan.tile_pixels} pixels" if plan.tile_pixels else "")
        )
    peak_gib, usable_gib = plan.expected_peak_bytes / GIB, situation.usable_bytes / GIB
    return f"{', '.join(ways)}: about {peak_gib:.1f} GiB at the peak, and {usable_gib:.1f} GiB are usable"


def _refuse(situation: Situation, config: TrainConfig, sizes: SampleSizes, rungs: Sequence[Rung]) -> str:
    """Returns why none of the rungs can be taken, and what could be; those that fit the GPU lack host memory."""
    facts, usable = situation.facts, situation.usable_bytes
    needed = min(pass_peak_bytes(rung, situation) for rung in rungs)
    if needed > usable:
        lack = (
            f"sampling needs about {needed / GIB:.1f} GiB, and {usable / GIB:.1f} GiB of {facts.name} are usable: "
            f"{(needed - usable) / GIB:.1f} GiB are missing."
        )
    else:
        on_host = min(situation.on_host(with_rows(rung, situation.footprint)) for rung in rungs)
        lack = (
            f"sampling needs {on_host / GIB:.1f} GiB of host memory beside {facts.name}: "
            f"{missing_on_host(facts, on_host) / GIB:.1f} GiB are missing."
        )
    if situation.demands.quantize is None:
        return f"{lack} Sample smaller pictures."
    free = config.model_copy(update={"quantize": None, "disable_quantization": False})
    try:
        plan = plan_sampling(facts, situation.footprint, free, sizes)
    except PlanError:
        return f"{lack} Fewer bits would not do either: sample smaller pictures."
    return f"{lack} Without a demand for or against quantization it fits: {plan.reasons[0]}."
