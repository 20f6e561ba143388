"""A data set as the loop takes it, and what is counted of it before the first step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from pixtune.data.batches import SampleReader, Signature
from pixtune.data.encode import TextItem
from pixtune.data.encodings import text_item
from pixtune.data.samples import Sample
from pixtune.data.swapped import EncodedBothWays
from pixtune.family import Conditioning, LatentDistribution, ModelFamily
from pixtune.plan.encoders import EncoderPlan
from pixtune.plan.text_padding import CaptionedSize, Captions, padded_length
from pixtune.sampler import EncodedPrompt
from pixtune.sizes import Size
from pixtune.storage.model_folder import ModelFolder
from pixtune.validation import HeldOutPicture


@dataclass(frozen=True)
class PreparedData:
    """A data set that no longer needs its encoders, unless the config has them encode in the loop."""

    reader: SampleReader
    buckets: list[list[Signature]]
    """Sizes in pixels of each training sample's variants."""
    held_out: list[HeldOutPicture]
    prompts: list[EncodedPrompt]
    both_ways: list[EncodedBothWays]
    """A few training pairs and their swap, to ask the base model which is right; see `swapped.py`."""
    most_image_tokens: int
    """Target and control pictures together."""
    most_text_tokens: int
    captions: Captions
    fingerprint: str
    """A hash over everything that decides what is trained on."""
    encoders: EncoderPlan
    """How it was encoded."""

    @property
    def sizes_vary(self) -> bool:
        """Whether steps have different numbers of tokens."""
        return self.captions.differ or len({size for variants in self.buckets for size in variants}) > 1

    @property
    def drawn_pixels(self) -> int:
        """Of the largest sample picture; 0 where none is drawn."""
        return max((math.prod(prompt.size) for prompt in self.prompts), default=0)

    def micro_batch_tokens(self, batch_size: int, text_multiple: int = 1) -> int:
        """Image and text tokens of one process's largest micro-batch, its captions padded to a multiple."""
        return batch_size * (self.most_image_tokens + padded_length(self.most_text_tokens, text_multiple))


def most_image_tokens(family: ModelFamily, folder: ModelFolder, samples: Sequence[Sample]) -> int:
    signatures = {sample.signature(variant) for sample in samples for variant in range(len(sample.framings))}
    return max(image_tokens(family, folder, signature) for signature in signatures)


def image_tokens(family: ModelFamily, folder: ModelFolder, signature: Signature) -> int:
    return sum(family.num_image_tokens(*family.latent_shape(folder, *size)[1:]) for size in signature)


def captioned_sizes(
    family: ModelFamily,
    folder: ModelFolder,
    samples: Sequence[Sample],
    text_tokens: Mapping[TextItem, int],
    dropout: float,
) -> tuple[CaptionedSize, ...]:
    """Which captions are drawn with pictures of which sizes, how often."""
    draws_of: dict[Signature, dict[int, float]] = {}
    shares = [(1 - dropout, None), (dropout, family.dropped_caption)]
    for sample in samples:
        for variant in range(len(sample.framings)):
            lengths = draws_of.setdefault(sample.signature(variant), defaultdict(float))
            for share, instead in shares:
                if share:
                    caption = sample.caption if instead is None else instead
                    lengths[text_tokens[text_item(caption, sample, variant)]] += share / len(sample.framings)
    return tuple(CaptionedSize(image_tokens(family, folder, size), lengths) for size, lengths in draws_of.items())


def sample_reader(
    family: ModelFamily,
    folder: ModelFolder,
    samples: Sequence[Sample],
    read_latents: Callable[[int, int], LatentDistribution],
    read_text: Callable[[int, int, bool], Conditioning],
    read_controls: Callable[[int, int], list[Tensor]],
) -> SampleReader:
    """Reads a family's samples in the given ways; see `SampleReader`."""
    return SampleReader(
        read_latents=read_latents,
        read_text=read_text,
        read_controls=read_controls,
        latent_size=partial(latent_size, family, folder, samples),
        stack=family.stack_conditioning,
        time_shift=lambda height, width: family.time_shift(folder, family.num_image_tokens(height, width)),
        num_image_tokens=family.num_image_tokens,
        names=[sample.name for sample in samples],
    )


def latent_size(family: ModelFamily, folder: ModelFolder, samples: Sequence[Sample], sample: int, variant: int) -> Size:
    """Height and width."""
    _, height, width = family.latent_shape(folder, *samples[sample].framings[variant].size)
    return height, width
