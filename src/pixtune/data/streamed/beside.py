"""Plans the encoders of a stream, which work between steps beside the idle transformer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from pixtune.config.folders import folders_of
from pixtune.config.schema import TrainConfig
from pixtune.family import ModelFamily
from pixtune.hardware.read import read_facts
from pixtune.plan.demands import demands_of
from pixtune.plan.encoders import (
    PIXELS_PER_VISION_TOKEN,
    PLAINLY,
    EncoderPlan,
    EncoderSizes,
    encoding_bytes,
    text_peak_bytes,
)
from pixtune.plan.phases import idle_bytes
from pixtune.plan.text_padding import Captions
from pixtune.planning import encoder_sizes, footprint_of, plan_encoders_of, plan_on_this_machine
from pixtune.storage.model_folder import ModelFolder


@dataclass(frozen=True)
class BesideTransformer:
    """Largest items of a stream, before any of its rows is read."""

    image_tokens: int
    """Image tokens of an example, its control pictures included."""
    text_tokens: int
    picture_pixels: int
    """Pixels of the largest picture that is encoded."""
    num_controls: int = 0

    def micro_batch_tokens(self, batch_size: int, text_multiple: int = 1) -> int:
        """Counts image and text tokens of a process's micro-batch; see `PreparedData`."""
        return batch_size * (self.image_tokens + -(-self.text_tokens // text_multiple) * text_multiple)


def sizes_of(config: TrainConfig, family: ModelFamily, folder: ModelFolder, largest: BesideTransformer) -> EncoderSizes:
    """Returns the sizes of a stream's encoders and of the largest items that they encode."""
    tokens = largest.text_tokens
    if family.controls_in_text:
        side = max(own.img_size for own in folders_of(config.data_config))
        width, height = family.vision_size((side, side), config.data_config.control_size)
        tokens += largest.num_controls * (width * height // PIXELS_PER_VISION_TOKEN)
    return encoder_sizes(config, family, folder, tokens, largest.picture_pixels)


def encoding_room(sizes: EncoderSizes, plan: EncoderPlan) -> int:
    """Returns the device memory that encoding a window needs at its peak, beside the transformer."""
    pictures = sizes.autoencoder_bytes + encoding_bytes(sizes, sizes.picture_pixels, plan.tile_pixels)
    return max(text_peak_bytes(sizes, plan.text_format), pictures)


def plan_encoders_beside(
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    accelerator: Accelerator,
    largest: BesideTransformer,
    sizes: EncoderSizes,
) -> EncoderPlan:
    """Plans the encoders for the memory that the run leaves between its steps; the first process decides for all.

    Raises:
        PlanError: see `plan_encoders` and `plan_training`.
    """
    if accelerator.device.type != "cuda":
        return PLAINLY
    demands = demands_of(config)
    count = partial(largest.micro_batch_tokens, config.batch_size)
    plan = plan_on_this_machine(
        config, family, folder, count, Captions(differ=True) if family.pads_text else None, accelerator.device,
        accelerator.num_processes, lambda own: gather_object([own]),
    )  # fmt: skip
    decided: list[EncoderPlan | None] = [None]
    if accelerator.is_main_process:
        facts = read_facts(accelerator.device, demands.memory_fraction)
        idle = idle_bytes(plan, footprint_of(config, family, folder, count(plan.text_multiple)))
        decided = [plan_encoders_of(config, facts, sizes, idle)]
    (encoders,) = broadcast_object_list(decided)
    return encoders
