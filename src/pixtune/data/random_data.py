"""Stand-in data of runs with random weights: speed and memory are real, pictures are not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pixtune import randomness
from pixtune.config.schema import TrainConfig
from pixtune.data.encodings import text_item
from pixtune.data.example_table import Example
from pixtune.data.prepared import (
    DataFingerprint,
    PreparedData,
    captioned_sizes,
    dropped_captions,
    most_image_tokens,
    reader_of,
    with_weights,
)
from pixtune.family import Conditioning, LatentDistribution, ModelFamily
from pixtune.judging.validation import HeldOutPicture
from pixtune.plan.encoders import PLAINLY
from pixtune.plan.text_padding import Captions
from pixtune.sizes import Size
from pixtune.storage.model_folder import ModelFolder

MOST_TEXT_TOKENS = 256
"""Largest number of tokens of a stand-in caption, where the config sets no `max_text_tokens`."""
DROPPED_TEXT, HELD_OUT_TEXTS = -1, -2
"""Seeds of stand-in captions: training examples have their numbers, held-out ones count down from here."""


def random_data(
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    training: Sequence[Example],
    held_out: Sequence[Example],
) -> PreparedData:
    """Prepares random latents and text features of the right shapes.

    A caption has a token for each word, where the family's captions have lengths of their own. Held-out pictures are
    drawn separately, so that learning the distribution can be distinguished from learning the training examples.
    """
    most_tokens = config.data_config.max_text_tokens or MOST_TEXT_TOKENS
    dropout = config.data_config.caption_dropout_rate

    def num_tokens(caption: str) -> int:
        # A text encoder that sees control pictures makes most of its tokens of them.
        own_length = family.pads_text and not family.controls_in_text
        return min(max(len(caption.split()), 1), most_tokens) if own_length else most_tokens

    texts = {
        text_item(text, example, variant): num_tokens(text)
        for example in training
        for variant in range(len(example.framings))
        for text in (*example.captions, *dropped_captions(family, training, dropout))
    }

    def read_text(example: int, variant: int, caption: int | None) -> Conditioning:
        if caption is None:
            return family.random_text(folder, num_tokens(family.dropped_caption), DROPPED_TEXT)
        number = example + caption * len(training)  # the first captions have their examples' numbers
        return family.random_text(folder, num_tokens(training[example].captions[caption]), number)

    def random_latents(size: Size, *place: int | str) -> Tensor:
        return randomness.normal((1, *family.latent_shape(folder, *size)), config.seed, "random weights", *place)

    def held_out_picture(number: int, example: Example) -> HeldOutPicture:
        target, *controls = example.signature(0)
        return HeldOutPicture(
            example.name,
            random_latents(target, "held out", number),
            family.random_text(folder, num_tokens(example.caption), HELD_OUT_TEXTS - number),
            tuple(random_latents(size, "held out", number, place) for place, size in enumerate(controls)),
        )

    def read_latents(example: int, variant: int) -> LatentDistribution:
        mean_BCHW = random_latents(training[example].framings[variant].size, example)
        return LatentDistribution(mean_BCHW, torch.zeros_like(mean_BCHW))

    def read_controls(example: int, variant: int) -> list[Tensor]:
        sizes = training[example].signature(variant)[1:]
        return [random_latents(size, example, number) for number, size in enumerate(sizes)]

    def read_weights(example: int, variant: int) -> Tensor:
        return torch.ones(1, 1, *family.latent_shape(folder, *training[example].framings[variant].size)[1:])

    return PreparedData(
        reader=with_weights(
            reader_of(
                family, folder, training, [example.name for example in training], read_latents, read_text, read_controls
            ),
            training,
            read_weights,
        ),
        buckets=[[example.signature(variant) for variant in range(len(example.framings))] for example in training],
        held_out=[held_out_picture(number, example) for number, example in enumerate(held_out)],
        prompts=[],
        both_ways=[],
        most_image_tokens=most_image_tokens(family, folder, training),
        most_text_tokens=max(texts.values()),
        captions=Captions(
            differ=len(set(texts.values())) > 1, sizes=captioned_sizes(family, folder, training, texts, dropout)
        ),
        fingerprint=DataFingerprint("random"),
        encoders=PLAINLY,
        uses=[example.use for example in training],
    )
