"""Plan of sampling without a run: the ladder of a LoRA run without what only a backward pass needs. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pixtune.errors import PlanError
from pixtune.hardware.facts import GIB, HardwareFacts, missing_on_host
from pixtune.plan.demands import demands_of
from pixtune.plan.encoders import decoding_bytes, fitting_tile
from pixtune.plan.footprint import Footprint
from pixtune.plan.passes import (
    COMPILED_FROM_STEPS,
    FIRST_PASS,
    PLAIN_PASSES,
    Abilities,
    Passes,
    PassPlan,
    choose_passes,
    pass_bytes,
    ways_of_passing,
)
from pixtune.plan.rungs import MOST_CAPTURES, Rung, fit_host, ladder, transformer_bytes, with_rows
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
    num_steps: int
    """Sampler steps of one picture."""
    autoencoder_bytes: int
    num_prompts: int = 1
    """Prompts, each of which may have a shape of its own."""
    num_pictures: int = 1
    """Pictures of all prompts together."""
    passes_per_step: int = 1
    """Passes of the transformer in a step: two with classifier-free guidance."""
    pads_text: bool = False
    """Prompts of different lengths can be padded to one batch (`ModelFamily.pads_text`)."""


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
    compile: bool = False
    """Blocks are compiled."""
    passes: PassPlan = PLAIN_PASSES


def plan_sampling(
    facts: HardwareFacts,
    footprint: Footprint,
    config: TrainConfig,
    sizes: SampleSizes,
    abilities: Abilities | None = None,
) -> SamplingPlan:
    """Chooses the fastest way to sample that fits. The fastest format comes first, then how its passes run.

    Args:
        footprint: `num_tokens` of one pass of one picture; `trained_weights` of a LoRA that is put on, 0 without one.
        config: brings formats, demands and limits; nothing is trained.
        abilities: what was tried on this machine; None: everything is taken to work.

    Raises:
        PlanError: nothing fits; names how much is missing.
        ConfigError: the config demands what this GPU cannot do.
    """
    demands = demands_of(config)
    plain = demands.compute_format
    if facts.device != "cuda":
        return SamplingPlan(plain, "int8" if demands.quantize else plain, 0, 0, False, None, 0, 0)
    abilities = abilities or Abilities()
    pays = sizes.num_steps * sizes.num_pictures >= COMPILED_FROM_STEPS
    compiled = pays and abilities.compiles
    situation = situation_of(facts, footprint, demands, compiled, num_tables=1)
    footprint, usable = situation.footprint, situation.usable_bytes
    rungs = sampling_ladder(situation, sizes.num_steps)
    fitting = [rung for rung in rungs if pass_peak_bytes(rung, situation) <= usable]
    captures = min(sizes.num_prompts * sizes.passes_per_step, MOST_CAPTURES) if demands.captures and pays else 0
    # A format is worth more than captures, but captures are worth more than a block that is not streamed.
    fitting = [
        rung for rung in fitting if not rung.streamed_blocks or captured_fits(rung, situation, captures)
    ] or fitting
    rung = next(filter(None, (fit_host(rung, situation) for rung in fitting)), None)
    if rung is None:
        raise PlanError(_refuse(situation, config, sizes, fitting or rungs))
    held = _held_bytes(rung, situation)
    beside = held + sizes.autoencoder_bytes
    decode_last = beside + decoding_bytes(sizes.pixels) > usable
    tile = fitting_tile(sizes.pixels, usable - sizes.autoencoder_bytes, decoding_bytes) if decode_last else None
    decoding = sizes.autoencoder_bytes + decoding_bytes(sizes.pixels, tile)
    planned = planned_passes(rung, situation)
    joins = sizes.passes_per_step > 1 and sizes.pads_text and abilities.pads and planned.can_be_joined
    captures = min(sizes.num_prompts * sizes.passes_per_step, MOST_CAPTURES) if demands.captures and pays else 0
    meanwhile = 0 if decode_last else decoding
    passes = choose_passes(
        ways_of_passing(joins, captures, usable),
        lambda way: pass_bytes(way, planned) + (meanwhile if way.captures_stay else 0),
        [usable - held - PASS_FIXED_BYTES],
    )
    pass_peak = held + PASS_FIXED_BYTES + planned.activation_bytes(2 if passes.together else 1)
    plan = SamplingPlan(
        compute_format=plain,
        weights_format=rung.weights_format,
        modulation_rows=rung.modulation_rows,
        streamed_blocks=rung.streamed_blocks,
        decode_last=decode_last,
        tile_pixels=tile,
        expected_peak_bytes=max(pass_peak, decoding if decode_last else held + decoding),
        expected_host_bytes=situation.on_host(rung),
        compile=compiled,
        passes=passes,
    )
    return replace(plan, reasons=(_reason(plan, situation), *([FIRST_PASS] if compiled else [])))


def sampling_ladder(situation: Situation, num_steps: int) -> tuple[Rung, ...]:
    """Returns the rungs of a LoRA run with what only a backward pass needs taken away, fastest first.

    A modulation table needs no more rows than a picture has steps, and one to spare.
    """
    rungs = (
        Rung(rung.weights_format, min(rung.modulation_rows, num_steps + 1), streamed_blocks=rung.streamed_blocks)
        for rung in ladder(situation)
    )
    return tuple(dict.fromkeys(rungs))


def pass_peak_bytes(rung: Rung, situation: Situation) -> int:
    """Returns the peak of what torch's allocator gives out while one picture passes the transformer, not captured."""
    return _held_bytes(rung, situation) + PASS_FIXED_BYTES + planned_passes(rung, situation).activation_bytes()


def captured_fits(rung: Rung, situation: Situation, captures: int) -> bool:
    """Returns whether passes of one picture can be captured."""
    pool = planned_passes(rung, situation).pool_bytes(1, captures)
    return _held_bytes(rung, situation) + PASS_FIXED_BYTES + pool <= situation.usable_bytes


def planned_passes(rung: Rung, situation: Situation) -> Passes:
    """Returns the passes of a rung."""
    return Passes(situation.footprint, situation.demands.compute_format, rung.weights_format, situation.compiled)


def _held_bytes(rung: Rung, situation: Situation) -> int:
    """Returns the bytes of the transformer, and of a LoRA that is not trained: its fp32 weights alone."""
    footprint = situation.footprint
    return round(transformer_bytes(rung, footprint, situation.demands.compute_format) + 4 * footprint.trained_weights)


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
    ways += [*(["blocks compiled"] if plan.compile else []), *plan.passes.in_words]
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
