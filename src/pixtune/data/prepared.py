"""A data set as the loop takes it, with the counts that are made before the first step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from pixtune.data.batches import ExampleReader
from pixtune.data.encode import TextItem
from pixtune.data.encodings import Encodings, control_pictures, target_picture, text_item
from pixtune.data.example_table import Example
from pixtune.data.order import Signature, Use
from pixtune.data.rivals import NO_TRIALS, CaptionTrials
from pixtune.data.streamed.order import StreamOrder
from pixtune.data.swapped import EncodedBothWays
from pixtune.family import Conditioning, LatentDistribution, ModelFamily
from pixtune.judging.validation import HeldOutPicture
from pixtune.plan.encoders import EncoderPlan
from pixtune.plan.text_padding import CaptionedSize, Captions, padded_length
from pixtune.sampler import EncodedPrompt
from pixtune.storage.model_folder import ModelFolder


@dataclass(frozen=True)
class DataFingerprint:
    """Digests by which a data set is recognized."""

    digest: str
    """Hash over everything that decides what is trained on."""
    examples: Mapping[str, str] | None = None
    """Short digests by name, as "caption-pictures"; None where there are too many, or the data are drawn."""

    @property
    def entries(self) -> dict[str, Any]:
        """Entries of a `RunIdentity`."""
        return {"data": self.digest, "examples": self.examples}


@dataclass(frozen=True)
class PreparedData:
    """A data set that needs no encoders, unless the config has them encode in the loop."""

    reader: ExampleReader
    buckets: list[list[Signature]]
    """Sizes of each training example's variants."""
    held_out: list[HeldOutPicture]
    prompts: list[EncodedPrompt]
    both_ways: list[EncodedBothWays]
    """A few training pairs with their swap, for the base model to tell which is right; see `swapped.py`."""
    most_image_tokens: int
    """Largest number of image tokens of an example, target and control pictures together."""
    most_text_tokens: int
    """Largest number of text tokens of an example."""
    captions: Captions
    fingerprint: DataFingerprint
    encoders: EncoderPlan
    """Plan by which it was encoded."""
    uses: Sequence[Use] = ()
    """Ways in which epochs use the training examples; empty: once each."""
    num_prior: int = 0
    """Number of regularization pictures, which are the last training examples."""
    stream: StreamOrder | None = None
    """Order of a data set that is read window by window; None: it is known whole."""
    encoding_bytes: int = 0
    """Device memory that encoding between steps needs; 0: nothing is encoded there."""
    trials: CaptionTrials = NO_TRIALS
    """Trials of captions on the training pictures, for the base model to find wrong ones."""

    @property
    def sizes_vary(self) -> bool:
        """Whether steps have different numbers of tokens."""
        return self.captions.differ or len({size for variants in self.buckets for size in variants}) > 1

    @property
    def sample_pixels(self) -> int:
        """Number of pixels of the largest sample; 0 where none is wanted."""
        return max((math.prod(prompt.size) for prompt in self.prompts), default=0)

    def micro_batch_tokens(self, batch_size: int, text_multiple: int = 1) -> int:
        """Counts image and text tokens of one process's largest micro-batch, its captions padded to a multiple."""
        return batch_size * (self.most_image_tokens + padded_length(self.most_text_tokens, text_multiple))


def most_image_tokens(family: ModelFamily, folder: ModelFolder, examples: Sequence[Example]) -> int:
    """Returns the largest number of image tokens of an example, its control pictures included."""
    signatures = {example.signature(variant) for example in examples for variant in range(len(example.framings))}
    return max(image_tokens(family, folder, signature) for signature in signatures)


def image_tokens(family: ModelFamily, folder: ModelFolder, signature: Signature) -> int:
    """Counts the image tokens of an example with pictures of these sizes."""
    return sum(family.num_image_tokens(*family.latent_shape(folder, *size)[1:]) for size in signature)


def dropped_captions(family: ModelFamily, examples: Sequence[Example], dropout: float) -> list[str]:
    """Returns the family's dropped caption, if a turn of some example has it; else nothing."""
    return [family.dropped_caption] if any(example.use.drops(dropout) > 0 for example in examples) else []


def captioned_sizes(
    family: ModelFamily,
    folder: ModelFolder,
    examples: Sequence[Example],
    text_tokens: Mapping[TextItem, int],
    dropout: float,
) -> tuple[CaptionedSize, ...]:
    """Counts how often captions of each length meet pictures of each size in an epoch."""
    turns_of: dict[Signature, dict[int, float]] = {}
    for example in examples:
        dropped = example.use.drops(dropout)
        own = (1 - dropped) / len(example.captions)
        captions = [*((own, caption) for caption in example.captions), (dropped, family.dropped_caption)]
        for variant in range(len(example.framings)):
            lengths = turns_of.setdefault(example.signature(variant), defaultdict(float))
            of_variant = example.use.shares[variant] if example.use.shares else 1 / len(example.framings)
            for share, caption in captions:
                if share:
                    turns = example.use.repeats * share * of_variant
                    lengths[text_tokens[text_item(caption, example, variant)]] += turns
    return tuple(CaptionedSize(image_tokens(family, folder, size), lengths) for size, lengths in turns_of.items())


class Indexed(Protocol):
    """Examples by their numbers, however many of them there are."""

    def __getitem__(self, number: int, /) -> Example: ...


def reader_of(
    family: ModelFamily,
    folder: ModelFolder,
    examples: Indexed,
    names: Sequence[str],
    read_latents: Callable[[int, int], LatentDistribution],
    read_text: Callable[[int, int, int | None], Conditioning],
    read_controls: Callable[[int, int], list[Tensor]],
) -> ExampleReader:
    """Builds the reader of a family's examples from functions that read their encodings; see `ExampleReader`."""
    return ExampleReader(
        read_latents=read_latents,
        read_text=read_text,
        read_controls=read_controls,
        latent_shape=lambda example, variant: family.latent_shape(folder, *examples[example].framings[variant].size),
        stack=family.stack_conditioning,
        time_shift=lambda height, width: family.time_shift(folder, family.num_image_tokens(height, width)),
        num_image_tokens=family.num_image_tokens,
        names=names,
    )


def encoded_reader(
    family: ModelFamily, folder: ModelFolder, examples: Indexed, names: Sequence[str], encodings: Encodings
) -> ExampleReader:
    """Builds the reader of examples whose encodings are known."""

    def read_latents(example: int, variant: int) -> LatentDistribution:
        return encodings.latents(target_picture(examples[example], variant))

    def read_text(example: int, variant: int, caption: int | None) -> Conditioning:
        text = family.dropped_caption if caption is None else examples[example].captions[caption]
        return encodings.text(text_item(text, examples[example], variant))

    def read_controls(example: int, variant: int) -> list[Tensor]:
        # Stock pipelines take the most likely latents of a control, which is seen clean.
        return [encodings.latents(picture).mean_BCHW for picture in control_pictures(examples[example], variant)]

    return reader_of(family, folder, examples, names, read_latents, read_text, read_controls)


def with_weights(
    reader: ExampleReader, examples: Sequence[Example], read_weights: Callable[[int, int], Tensor]
) -> ExampleReader:
    """Returns a reader that also has the examples' masks, where any has one, and loss weights, where any is not 1."""
    weights = [example.loss_weight for example in examples]
    return replace(
        reader,
        read_weights=read_weights if any(example.mask for example in examples) else None,
        example_weights=weights if any(weight != 1 for weight in weights) else None,
    )
