"""Device memory of a run's other phases: captions encoded, pictures encoded, samples drawn.

A plan is made for the training step. These come before it or between steps, and none of them may need more than the
step does without being said. Numbers alone, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from pixtune.fit.footprint import Footprint
from pixtune.fit.plan import MemoryPlan
from pixtune.fit.rungs import Rung, weight_bytes
from pixtune.hardware.facts import GIB

AUTOENCODER_BYTES_PER_PIXEL = 2600
"""Of a picture on its way through an autoencoder in bf16, besides the weights. Counted from the widest layers at full
size of the stock decoders (256 channels in, two copies of them in a normalisation, 128 out), not measured."""
TEXT_WORKSPACE_BYTES = GIB // 2
"""Hidden states of all layers and logits of a batch of captions. Counted for 4 captions of 512 tokens, not measured."""


@dataclass(frozen=True)
class Surroundings:
    """What a run works with besides the transformer, in bytes and pixels."""

    text_encoder_bytes: int
    """In the run's own number format, all encoders together; 0: the run has none."""
    autoencoder_bytes: int
    encoded_pixels: int
    """Of the pictures that are encoded together."""
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
    text_stays = around.text_encoder_bytes if plan.encoders_stay or around.text_in_loop else 0
    autoencoder_stays = around.autoencoder_bytes if plan.encoders_stay or around.pictures_in_loop else 0
    phases = []
    if around.text_encoder_bytes:
        captions = around.text_encoder_bytes + TEXT_WORKSPACE_BYTES
        pictures = text_stays + around.autoencoder_bytes + coding_bytes(around.encoded_pixels)
        phases.append(Phase("captions encoded", "text encoder", captions))
        phases.append(Phase("pictures encoded", "autoencoder" + _beside(text_stays, "text encoder"), pictures))
    encoders = _beside(text_stays, "text encoder") + _beside(autoencoder_stays, "autoencoder")
    phases.append(
        Phase(
            "training step",
            "transformer, what is trained, activations" + encoders,
            plan.expected_peak_bytes + text_stays + autoencoder_stays,
        )
    )
    if around.drawn_pixels:
        drawing = drawing_bytes(plan, footprint, around) + text_stays
        phases.append(Phase("samples drawn", "transformer, what is trained, autoencoder", drawing))
    return tuple(phases)


def coding_bytes(num_pixels: int) -> int:
    """Working memory of encoding or decoding so many pixels at once."""
    return num_pixels * AUTOENCODER_BYTES_PER_PIXEL


def drawing_bytes(plan: MemoryPlan, footprint: Footprint, around: Surroundings) -> int:
    """Most while a sample is drawn between steps: a pass without gradients, or its picture being decoded."""
    rung = Rung(
        plan.weights_format, plan.modulation_rows, plan.lean, plan.recomputed_blocks, plan.offload_inputs,
        plan.streamed_blocks,
    )  # fmt: skip
    table = 2 * plan.modulation_rows * sum(kind.count * kind.modulation_outputs for kind in footprint.kinds)
    # Between steps the gradients are gone: the weights that are trained and two optimizer states remain.
    own = 0 if footprint.trains_all else 4
    states = footprint.trained_weights * (own + (2 if plan.optimizer == "adamw_8bit" else 8))
    element = 4 if plan.compute_format == "fp32" else 2
    one_pass = max(kind.units.forward for kind in footprint.kinds) * around.drawn_tokens * footprint.width * element
    decoding = around.autoencoder_bytes + coding_bytes(around.drawn_pixels)
    resident = weight_bytes(rung, footprint, plan.compute_format) + table + states
    return round(resident + max(one_pass, decoding))


def _beside(num_bytes: int, name: str) -> str:
    return f", {name}" if num_bytes else ""
