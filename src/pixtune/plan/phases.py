"""Device memory of a run's phases: captions encoded, pictures encoded, the training step, samples. No torch.

A run's plan is made for the training step. The other phases come before it or between steps, and none of them may need
more than there is without being reported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pixtune.config.optimizing import SCHEDULE_FREE
from pixtune.plan.all_weights import gathered_bytes, states_on_device
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
from pixtune.plan.footprint import ELEMENT_BYTES, Footprint
from pixtune.plan.passes import Passes, PassPlan, choose_passes, needed_bytes, ways_of_passing
from pixtune.plan.rungs import MOST_CAPTURES, Rung, transformer_bytes
from pixtune.plan.training import TrainingPlan


@dataclass(frozen=True)
class Surroundings:
    """Parts of a run besides the transformer, as far as they take device memory."""

    sizes: EncoderSizes
    encoders: EncoderPlan
    sample_pixels: int = 0
    """Pixels of a sample; 0: there are none."""
    sample_tokens: int = 0
    """Image, control and text tokens of one pass for a sample."""
    sample_shapes: int = 1
    """Number of shapes that passes for samples have at most."""
    may_join_passes: bool = False
    """A sampler step has two passes that can be one batch."""
    text_in_loop: bool = False
    """Captions are encoded while training, so their encoder stays."""
    pictures_in_loop: bool = False
    """Pictures are encoded while training, so the autoencoder stays."""
    between_steps: bool = False
    """Encoders work between steps, beside the idle transformer, and leave before the next one."""


@dataclass(frozen=True)
class Phase:
    """Stretch of a run, and the peak of what torch's allocator holds in it."""

    name: str
    holds: str
    """Contents of the device, in words."""
    device_bytes: int


def phases_of(plan: TrainingPlan, footprint: Footprint, around: Surroundings) -> tuple[Phase, ...]:
    """Returns all phases of a run on a GPU, in their order."""
    sizes, encoders = around.sizes, around.encoders
    text_stays = _staying_text_bytes(plan, around)
    autoencoder_stays = sizes.autoencoder_bytes if plan.encoders_stay or around.pictures_in_loop else 0
    phases = list(encoding_phases(sizes, encoders, text_stays)) if sizes.text_bytes else []
    if around.between_steps:
        idle = idle_bytes(plan, footprint)
        phases = [
            replace(each, holds=f"idle transformer, {each.holds}", device_bytes=idle + each.device_bytes)
            for each in phases
        ]
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
        way = sampling_passes(plan, footprint, around, tile)
        held = "transformer, what is trained, autoencoder" + (f" in tiles of {tile} pixels" if tile else "")
        sampling = idle_bytes(plan, footprint) + sampling_bytes(plan, footprint, around, way, tile)
        phases.append(Phase("sampling", held, sampling + text_stays))
    return tuple(phases)


def encoding_phases(sizes: EncoderSizes, encoders: EncoderPlan, text_stays_bytes: int = 0) -> tuple[Phase, Phase]:
    """Returns the phases of encoding captions and pictures.

    Args:
        text_stays_bytes: bytes of the text encoder, where it is still on the device when pictures are encoded.
    """
    captions = text_peak_bytes(sizes, encoders.text_format)
    coding = encoding_bytes(sizes, sizes.picture_pixels, encoders.tile_pixels)
    tiled = f", tiles of {encoders.tile_pixels} pixels" if encoders.tile_pixels else ""
    beside = _beside(text_stays_bytes, "text encoder")
    return (
        Phase("captions encoded", _text_encoder(encoders), captions),
        Phase("pictures encoded", f"autoencoder{tiled}{beside}", text_stays_bytes + sizes.autoencoder_bytes + coding),
    )


def sampling_tile(plan: TrainingPlan, footprint: Footprint, around: Surroundings) -> int | None:
    """Returns the side of the tiles in which a sample is decoded between steps; None: whole."""
    beside = idle_bytes(plan, footprint) + _staying_text_bytes(plan, around) + around.sizes.autoencoder_bytes
    return fitting_tile(around.sample_pixels, plan.usable_bytes - beside, decoding_bytes)


def sampling_passes(
    plan: TrainingPlan, footprint: Footprint, around: Surroundings, tile_pixels: int | None
) -> PassPlan:
    """Chooses how the passes of samples run between steps.

    Captured steps stay if passes fit beside them in any way; where they have to go in any case, the fastest way is
    taken that fits without them.
    """
    passes, decoding = _passes_of(plan, footprint, around), _decoding_bytes(around, tile_pixels)
    staying = _staying_text_bytes(plan, around)
    without_captures = plan.usable_bytes - idle_bytes(plan, footprint) - staying
    beside_captures = plan.usable_bytes - plan.expected_peak_bytes - staying
    return choose_passes(
        ways_of_passing(
            around.may_join_passes and passes.can_be_joined,
            min(around.sample_shapes, MOST_CAPTURES) if plan.captures else 0,
            plan.usable_bytes,
        ),
        lambda way: needed_bytes(way, passes, decoding),
        [beside_captures, without_captures] if plan.captures else [without_captures],
    )


def sampling_bytes(
    plan: TrainingPlan, footprint: Footprint, around: Surroundings, way: PassPlan, tile_pixels: int | None
) -> int:
    """Returns what samples need between steps, in addition to what the run holds then: passes and decoding."""
    return needed_bytes(way, _passes_of(plan, footprint, around), _decoding_bytes(around, tile_pixels))


def compiled_pass_bytes(plan: TrainingPlan, footprint: Footprint, num_tokens: int) -> int:
    """Returns the peak of activations in a run's own pass without gradients."""
    tokens = replace(footprint, num_tokens=num_tokens)
    return Passes(tokens, plan.compute_format, plan.weights_format, plan.compile).activation_bytes()


def _passes_of(plan: TrainingPlan, footprint: Footprint, around: Surroundings) -> Passes:
    of_samples = replace(footprint, num_tokens=around.sample_tokens)
    return Passes(of_samples, plan.compute_format, plan.weights_format, plan.compile)


def _decoding_bytes(around: Surroundings, tile_pixels: int | None) -> int:
    return around.sizes.autoencoder_bytes + decoding_bytes(around.sample_pixels, tile_pixels)


def idle_bytes(plan: TrainingPlan, footprint: Footprint) -> int:
    """Returns what a run holds between its steps: the transformer and what is trained, without the encoders.

    Captured steps hold more, and give it back where it is needed.
    """
    rung = Rung(
        plan.weights_format,
        plan.modulation_rows,
        streamed_blocks=plan.streamed_blocks,
        kept_transposes=plan.kept_transposes,
        shards=plan.shards,
    )
    # Between steps there are no gradients: the trained weights and their optimizer states remain.
    if footprint.trains_all:
        trained = states_on_device(plan.optimizer, plan.states_on_host, plan.fp32_copies, footprint, plan.shards)
        if plan.shards > 1:
            whole = transformer_bytes(replace(rung, shards=1), footprint, plan.compute_format)
            return whole // plan.shards + gathered_bytes(footprint, plan.compute_format) + trained
    else:
        # What a schedule-free optimizer averages has its place, and is kept, while that is looked at.
        exchanged = 4 if plan.optimizer in SCHEDULE_FREE else 0
        trained = footprint.trained_weights * (4 + exchanged) + footprint.state_bytes(plan.optimizer)
        trained += footprint.average_bytes + footprint.frozen_weights * ELEMENT_BYTES[plan.compute_format]
    return transformer_bytes(rung, footprint, plan.compute_format) + round(trained)


def _staying_text_bytes(plan: TrainingPlan, around: Surroundings) -> int:
    stays = plan.encoders_stay or around.text_in_loop
    return text_weight_bytes(around.sizes, around.encoders.text_format) if stays else 0


def _text_encoder(encoders: EncoderPlan) -> str:
    if encoders.text_format == ON_CPU:
        return "nothing: the text encoder works on the CPU"
    return f"text encoder in {encoders.text_format}" if encoders.text_format else "text encoder"


def _beside(num_bytes: int, name: str) -> str:
    return f", {name}" if num_bytes else ""
