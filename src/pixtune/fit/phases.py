"""Device memory of a run's other phases: captions encoded, pictures encoded, samples drawn.

A plan is made for the training step. These come before it or between steps, and none of them may need more than the
step does without being said. Numbers alone, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from pixtune.fit.encoders import (
    ON_CPU,
    EncoderPlan,
    EncoderSizes,
    coding_bytes,
    fitting_tile,
    text_peak_bytes,
    text_weight_bytes,
)
from pixtune.fit.footprint import Footprint
from pixtune.fit.plan import MemoryPlan
from pixtune.fit.rungs import Rung, weight_bytes


@dataclass(frozen=True)
class Surroundings:
    """What a run works with besides the transformer."""

    sizes: EncoderSizes
    encoders: EncoderPlan
    drawn_pixels: int = 0
    """Of a sample picture; 0: none is drawn."""
    drawn_tokens: int = 0
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


def phases_of(plan: MemoryPlan, footprint: Footprint, around: Surroundings) -> tuple[Phase, ...]:
    """All phases of a run on a GPU, in their order."""
    sizes, encoders = around.sizes, around.encoders
    text_stays = _staying_text_bytes(plan, around)
    autoencoder_stays = sizes.autoencoder_bytes if plan.encoders_stay or around.pictures_in_loop else 0
    phases = []
    if sizes.text_bytes:
        captions = text_peak_bytes(sizes, encoders.text_format, encoders.caption_batch)
        coding = encoders.picture_batch * coding_bytes(sizes.picture_pixels, encoders.tile_pixels)
        pictures = text_stays + sizes.autoencoder_bytes + coding
        tiled = f", tiles of {encoders.tile_pixels} pixels" if encoders.tile_pixels else ""
        beside = _beside(text_stays, "text encoder")
        phases.append(Phase("captions encoded", _text_encoder(encoders), captions))
        phases.append(Phase("pictures encoded", f"autoencoder{tiled}{beside}", pictures))
    staying = _beside(text_stays, "text encoder") + _beside(autoencoder_stays, "autoencoder")
    phases.append(
        Phase(
            "training step",
            "transformer, what is trained, activations" + staying,
            plan.expected_peak_bytes + text_stays + autoencoder_stays,
        )
    )
    if around.drawn_pixels:
        tile = drawing_tile(plan, footprint, around)
        held = "transformer, what is trained, autoencoder" + (f" in tiles of {tile} pixels" if tile else "")
        phases.append(Phase("samples drawn", held, drawing_bytes(plan, footprint, around, tile) + text_stays))
    return tuple(phases)


def drawing_tile(plan: MemoryPlan, footprint: Footprint, around: Surroundings) -> int | None:
    """Side of the tiles in which a sample's picture is decoded between steps; None: whole."""
    beside = idle_bytes(plan, footprint) + _staying_text_bytes(plan, around) + around.sizes.autoencoder_bytes
    return fitting_tile(around.drawn_pixels, plan.usable_bytes - beside)


def drawing_bytes(plan: MemoryPlan, footprint: Footprint, around: Surroundings, tile_pixels: int | None) -> int:
    """Most while a sample is drawn between steps: a pass without gradients, or its picture being decoded."""
    element = 4 if plan.compute_format == "fp32" else 2
    one_pass = max(kind.units.forward for kind in footprint.kinds) * around.drawn_tokens * footprint.width * element
    decoding = around.sizes.autoencoder_bytes + coding_bytes(around.drawn_pixels, tile_pixels)
    return idle_bytes(plan, footprint) + round(max(one_pass, decoding))


def idle_bytes(plan: MemoryPlan, footprint: Footprint) -> int:
    """What a run holds between its steps: the transformer and what is trained, without the encoders."""
    rung = Rung(
        plan.weights_format, plan.modulation_rows, plan.lean, plan.recomputed_blocks, plan.offload_inputs,
        plan.streamed_blocks,
    )  # fmt: skip
    table = 2 * plan.modulation_rows * sum(kind.count * kind.modulation_outputs for kind in footprint.kinds)
    # Between steps the gradients are gone: the weights that are trained and two optimizer states remain.
    own = 0 if footprint.trains_all else 4
    states = footprint.trained_weights * (own + (2 if plan.optimizer == "adamw_8bit" else 8))
    return weight_bytes(rung, footprint, plan.compute_format) + table + states


def _staying_text_bytes(plan: MemoryPlan, around: Surroundings) -> int:
    stays = plan.encoders_stay or around.text_in_loop
    return text_weight_bytes(around.sizes, around.encoders.text_format) if stays else 0


def _text_encoder(encoders: EncoderPlan) -> str:
    if encoders.text_format == ON_CPU:
        return "nothing: the text encoder works on the CPU"
    return f"text encoder in {encoders.text_format}" if encoders.text_format else "text encoder"


def _beside(num_bytes: int, name: str) -> str:
    return f", {name}" if num_bytes else ""
