"""Device memory of a run's other phases: captions encoded, pictures encoded, samples drawn; and drawing without a run.

A run's plan is made for the training step. The phases come before it or between steps, and none of them may need more
than the step does without being said. `pixtune sample` trains nothing and has a plan of its own: the ladder of a run
without what only a backward pass needs. Numbers alone, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pixtune.errors import PlanError
from pixtune.hardware.facts import GIB, HardwareFacts, missing_on_host
from pixtune.plan.all_weights import states_on_device
from pixtune.plan.encoders import (
    ON_CPU,
    EncoderPlan,
    EncoderSizes,
    decoding_bytes,
    encoding_bytes,
    fitting_tile,
    text_peak_bytes,
    text_weight_bytes,
)
from pixtune.plan.footprint import Footprint
from pixtune.plan.rungs import (
    QUANTIZED,
    Rung,
    compute_format_of,
    fit_host,
    host_bytes,
    is_unified,
    ladder,
    table_bytes,
    weight_bytes,
    with_rows,
)
from pixtune.plan.training import TrainingPlan, usable_bytes

if TYPE_CHECKING:
    from pixtune.config.schema import TrainConfig

PASS_FIXED_BYTES = round(0.35 * GIB)
"""Besides: workspaces, latents and conditioning. Not measured."""


@dataclass(frozen=True)
class Surroundings:
    """What a run works with besides the transformer."""

    sizes: EncoderSizes
    encoders: EncoderPlan
    sample_pixels: int = 0
    """Of a sample picture; 0: none is drawn."""
    sample_tokens: int = 0
    """Image, control and text tokens of one pass for it."""
    text_in_loop: bool = False
    """Captions are encoded while training, so their encoder stays."""
    pictures_in_loop: bool = False


@dataclass(frozen=True)
class Phase:
    """A stretch of a run and the most that torch's allocator holds in it."""

    name: str
    holds: str
    """What is on the device, in plain words."""
    device_bytes: int


def phases_of(plan: TrainingPlan, footprint: Footprint, around: Surroundings) -> tuple[Phase, ...]:
    """All phases of a run on a GPU, in their order."""
    sizes, encoders = around.sizes, around.encoders
    text_stays = _staying_text_bytes(plan, around)
    autoencoder_stays = sizes.autoencoder_bytes if plan.encoders_stay or around.pictures_in_loop else 0
    phases = list(encoding_phases(sizes, encoders, text_stays)) if sizes.text_bytes else []
    staying = _beside(text_stays, "text encoder") + _beside(autoencoder_stays, "autoencoder")
    phases.append(
        Phase(
            "training step",
            "transformer, what is trained, activations" + staying,
            plan.expected_peak_bytes + text_stays + autoencoder_stays,
        )
    )
    if around.sample_pixels:
        tile = sampling_tile(plan, footprint, around)
        held = "transformer, what is trained, autoencoder" + (f" in tiles of {tile} pixels" if tile else "")
        phases.append(Phase("samples drawn", held, sampling_bytes(plan, footprint, around, tile) + text_stays))
    return tuple(phases)


def encoding_phases(sizes: EncoderSizes, encoders: EncoderPlan, text_stays_bytes: int = 0) -> tuple[Phase, Phase]:
    """Captions, then pictures.

    Args:
        text_stays_bytes: of the text encoder, where it is still on the device when pictures are encoded.
    """
    captions = text_peak_bytes(sizes, encoders.text_format, encoders.caption_batch)
    coding = encoders.picture_batch * encoding_bytes(sizes, sizes.picture_pixels, encoders.tile_pixels)
    tiled = f", tiles of {encoders.tile_pixels} pixels" if encoders.tile_pixels else ""
    beside = _beside(text_stays_bytes, "text encoder")
    return (
        Phase("captions encoded", _text_encoder(encoders), captions),
        Phase("pictures encoded", f"autoencoder{tiled}{beside}", text_stays_bytes + sizes.autoencoder_bytes + coding),
    )


def sampling_tile(plan: TrainingPlan, footprint: Footprint, around: Surroundings) -> int | None:
    """Side of the tiles in which a sample's picture is decoded between steps; None: whole."""
    beside = idle_bytes(plan, footprint) + _staying_text_bytes(plan, around) + around.sizes.autoencoder_bytes
    return fitting_tile(around.sample_pixels, plan.usable_bytes - beside, decoding_bytes)


def sampling_bytes(plan: TrainingPlan, footprint: Footprint, around: Surroundings, tile_pixels: int | None) -> int:
    """Most while a sample is drawn between steps: a pass without gradients, or its picture being decoded."""
    one_pass = compiled_pass_bytes(plan, footprint, around.sample_tokens)
    decoding = around.sizes.autoencoder_bytes + decoding_bytes(around.sample_pixels, tile_pixels)
    return idle_bytes(plan, footprint) + max(one_pass, decoding)


def compiled_pass_bytes(plan: TrainingPlan, footprint: Footprint, num_tokens: int) -> int:
    """Most that is alive in a run's own pass without gradients."""
    quantized = plan.weights_format in QUANTIZED
    units = max(k.units.forward_quantized if quantized else k.units.forward for k in footprint.kinds)
    return round(units * num_tokens * footprint.width * (4 if plan.compute_format == "fp32" else 2))


def idle_bytes(plan: TrainingPlan, footprint: Footprint) -> int:
    """What a run holds between its steps: the transformer and what is trained, without the encoders."""
    rung = Rung(plan.weights_format, plan.modulation_rows, streamed_blocks=plan.streamed_blocks)
    # Between steps the gradients are gone: the weights that are trained and two optimizer states remain.
    trained = footprint.trained_weights * (4 + (2 if plan.optimizer == "adamw_8bit" else 8))
    if footprint.trains_all:
        trained = round(states_on_device(plan.optimizer, plan.states_on_host, plan.fp32_copies, footprint))
    return transformer_bytes(rung, footprint, plan.compute_format) + trained


def transformer_bytes(rung: Rung, footprint: Footprint, compute_format: str) -> int:
    """The transformer with the table that stands in for its modulation layers."""
    return weight_bytes(rung, footprint, compute_format) + table_bytes(rung, footprint, compute_format)


def _staying_text_bytes(plan: TrainingPlan, around: Surroundings) -> int:
    stays = plan.encoders_stay or around.text_in_loop
    return text_weight_bytes(around.sizes, around.encoders.text_format) if stays else 0


def _text_encoder(encoders: EncoderPlan) -> str:
    if encoders.text_format == ON_CPU:
        return "nothing: the text encoder works on the CPU"
    return f"text encoder in {encoders.text_format}" if encoders.text_format else "text encoder"


def _beside(num_bytes: int, name: str) -> str:
    return f", {name}" if num_bytes else ""


# ---- drawing without a run


@dataclass(frozen=True)
class SampleSizes:
    """What is drawn, as far as memory depends on it."""

    pixels: int
    """Of the largest picture."""
    num_passes: int
    """Of the transformer, for one picture."""
    autoencoder_bytes: int


@dataclass(frozen=True)
class SamplingPlan:
    """How pictures are drawn."""

    compute_format: str
    """"bf16" or "fp32"."""
    weights_format: str
    """Of the blocks' linear layers: the same, or "fp8", "int8", "nf4"."""
    modulation_rows: int
    """Rows of the table in host memory that stands in for modulation layers; 0: they are loaded."""
    streamed_blocks: int
    decode_last: bool
    """Pictures are decoded when all are drawn and the transformer has left the device."""
    tile_pixels: int | None
    """They are decoded in tiles of this side; None: whole."""
    expected_peak_bytes: int
    """Of torch's allocator; 0 on a CPU."""
    expected_host_bytes: int
    """Of page-locked host memory."""
    reasons: tuple[str, ...] = ()


def plan_sampling(facts: HardwareFacts, footprint: Footprint, config: TrainConfig, sizes: SampleSizes) -> SamplingPlan:
    """The fastest way to draw that fits. `config` brings formats, demands and limits; nothing is trained.

    Args:
        footprint: `num_tokens` of one pass; `trained_weights` of a LoRA that is put on, 0 without one.

    Raises:
        PlanError: nothing fits; says how much is missing.
        ConfigError: the config demands what this GPU cannot do.
    """
    plain = compute_format_of(config)
    if facts.device != "cuda":
        eight_bits = config.quantize and not config.disable_quantization
        return SamplingPlan(plain, "int8" if eight_bits else plain, 0, 0, False, None, 0, 0)
    usable = usable_bytes(facts, config)
    footprint = replace(footprint, one_pool=is_unified(facts, config))
    rungs = sampling_ladder(facts, footprint, config, sizes.num_passes)
    fitting = [rung for rung in rungs if pass_peak_bytes(rung, footprint, plain) <= usable]
    rung = next(filter(None, (fit_host(rung, footprint, facts, num_tables=1) for rung in fitting)), None)
    if rung is None:
        raise PlanError(_cannot_sample(facts, footprint, config, sizes, fitting or rungs))
    beside = transformer_bytes(rung, footprint, plain) + lora_bytes(footprint) + sizes.autoencoder_bytes
    decode_last = beside + decoding_bytes(sizes.pixels) > usable
    tile = fitting_tile(sizes.pixels, usable - sizes.autoencoder_bytes, decoding_bytes) if decode_last else None
    decoding = decoding_bytes(sizes.pixels, tile) + (sizes.autoencoder_bytes if decode_last else beside)
    peak = max(pass_peak_bytes(rung, footprint, plain), decoding)
    return SamplingPlan(
        compute_format=plain,
        weights_format=rung.weights_format,
        modulation_rows=rung.modulation_rows,
        streamed_blocks=rung.streamed_blocks,
        decode_last=decode_last,
        tile_pixels=tile,
        expected_peak_bytes=peak,
        expected_host_bytes=host_bytes(rung, footprint, num_tables=1),
        reasons=_sampling_reasons(rung, footprint, peak, usable, decode_last, tile),
    )


def sampling_ladder(
    facts: HardwareFacts, footprint: Footprint, config: TrainConfig, num_passes: int
) -> tuple[Rung, ...]:
    """The rungs of a run with what only a backward pass needs taken away, fastest first.

    A modulation table needs no more rows than a picture has passes, and one to spare.
    """
    rungs = (
        replace(
            rung,
            modulation_rows=min(rung.modulation_rows, num_passes + 1),
            selective=False,
            recomputed_blocks=0,
            reprojected_blocks=0,
            kept_transposes=False,
            offload_inputs=False,
        )
        for rung in ladder(facts, footprint, config)
    )
    return tuple(dict.fromkeys(rungs))


def lora_bytes(footprint: Footprint) -> int:
    """Of a LoRA that is not trained: its fp32 weights alone."""
    return 4 * footprint.trained_weights


def pass_peak_bytes(rung: Rung, footprint: Footprint, compute_format: str) -> int:
    """Most that torch's allocator holds while the transformer runs without gradients."""
    quantized = rung.weights_format != compute_format
    units = max(k.units.passing_quantized if quantized else k.units.passing for k in footprint.kinds)
    activations = units * footprint.unit_bytes * (2 if compute_format == "fp32" else 1)
    held = transformer_bytes(rung, footprint, compute_format) + lora_bytes(footprint)
    return round(held + PASS_FIXED_BYTES + activations)


def _sampling_reasons(
    rung: Rung, footprint: Footprint, peak: int, usable: int, decode_last: bool, tile: int | None
) -> tuple[str, ...]:
    ways = [f"base weights in {rung.weights_format}"]
    if rung.modulation_rows:
        ways.append("modulation computed ahead")
    if rung.streamed_blocks:
        ways.append(f"{rung.streamed_blocks} of {footprint.num_blocks} blocks from host memory at each pass")
    if decode_last:
        ways.append("pictures decoded at the end" + (f" in tiles of {tile} pixels" if tile else ""))
    return (f"{', '.join(ways)}: about {peak / GIB:.1f} GiB at the peak, {usable / GIB:.1f} GiB usable",)


def _cannot_sample(
    facts: HardwareFacts, footprint: Footprint, config: TrainConfig, sizes: SampleSizes, rungs: Sequence[Rung]
) -> str:
    """Why none of the rungs can be taken, and what could be; those that fit the GPU lack host memory."""
    plain, usable = compute_format_of(config), usable_bytes(facts, config)
    least = min(rungs, key=lambda rung: pass_peak_bytes(rung, footprint, plain))
    needed = pass_peak_bytes(least, footprint, plain)
    if needed > usable:
        lack = (
            f"drawing needs about {needed / GIB:.1f} GiB and {usable / GIB:.1f} GiB of {facts.name} are usable: "
            f"{(needed - usable) / GIB:.1f} GiB are missing."
        )
    else:
        on_host = min(host_bytes(with_rows(rung, footprint), footprint, num_tables=1) for rung in rungs)
        lack = (
            f"drawing needs {on_host / GIB:.1f} GiB of host memory beside {facts.name}: "
            f"{missing_on_host(facts, on_host) / GIB:.1f} GiB are missing."
        )
    if config.disable_quantization or config.quantize is not None:
        free = config.model_copy(update={"quantize": None, "disable_quantization": False})
        try:
            plan = plan_sampling(facts, footprint, free, sizes)
        except PlanError:
            return f"{lack} Fewer bits would not do either: draw smaller pictures."
        return f"{lack} Without a demand for or against quantizing, {plan.reasons[0]}."
    return f"{lack} Draw smaller pictures."
