"""Lists what a run reads, and which texts and pictures of that are encoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from pixtune.config.schema import TrainConfig
from pixtune.data.encode import FramedPicture, TextItem, shorten
from pixtune.data.encodings import control_pictures, target_picture, text_item
from pixtune.data.example_table import Example
from pixtune.data.prepared import dropped_captions
from pixtune.data.rivals import CaptionTrials
from pixtune.data.sample_prompts import AskedPrompt
from pixtune.data.swapped import BothWays, needed_pictures, needed_texts
from pixtune.family import ModelFamily
from pixtune.plan.passes import needs_negative


@dataclass(frozen=True)
class Wanted:
    """Everything that a run reads, before any of it is encoded."""

    training: Sequence[Example]
    """Examples to train on, regularization pictures last."""
    num_prior: int
    """Number of regularization pictures."""
    held_out: Sequence[Example]
    asked: Sequence[AskedPrompt]
    """Prompts of samples, as the config asks for them."""
    prompts: Sequence[Example]
    """Prompts in the form of examples."""
    pairs: Sequence[BothWays]
    """Training pairs, for the base model to tell whether controls and targets were swapped."""
    trials: CaptionTrials
    """Captions to be tried on other pictures."""

    def named_texts(self) -> Iterator[tuple[str, TextItem]]:
        """Yields captions and prompts of samples as the text encoder gets them, each after its name in messages."""
        for each, variant in all_variants(self.training):
            for text in each.captions:
                yield each.name, text_item(text, each, variant)
        for each in self.held_out:
            yield each.name, text_item(each.caption, each, 0)
        for each in self.prompts:
            yield f"the prompt {shorten(each.caption)}", text_item(each.caption, each, 0)

    def texts(self, config: TrainConfig, family: ModelFamily) -> list[TextItem]:
        """Lists the captions to encode before training, each once."""
        return list(dict.fromkeys(self._texts(config, family)))

    def _texts(self, config: TrainConfig, family: ModelFamily) -> Iterator[TextItem]:
        for example in (*self.held_out, *self.prompts):
            yield text_item(example.caption, example, 0)
        if needs_negative(family, config.samples.guidance_scale):
            for each, example in zip(self.asked, self.prompts, strict=True):
                yield text_item(family.dropped_caption if each.negative is None else each.negative, example, 0)
        if config.precompute_text_embeddings:
            instead = dropped_captions(family, self.training, config.data_config.caption_dropout_rate)
            for example, variant in all_variants(self.training):
                for text in (*example.captions, *instead):
                    yield text_item(text, example, variant)
        yield from needed_texts(self.pairs, family.dropped_caption)
        yield from self.trials.texts()

    def pictures(self, config: TrainConfig) -> list[FramedPicture]:
        """Lists the pictures to encode before training, each once."""
        return list(dict.fromkeys(self._pictures(config)))

    def _pictures(self, config: TrainConfig) -> Iterator[FramedPicture]:
        for example in self.prompts:
            yield from control_pictures(example, 0)
        trained = all_variants(self.training) if config.precompute_image_embeddings else iter(())
        for example, variant in chain(((example, 0) for example in self.held_out), trained):
            yield target_picture(example, variant)
            yield from control_pictures(example, variant)
        yield from needed_pictures(self.pairs)


def all_variants(examples: Iterable[Example]) -> Iterator[tuple[Example, int]]:
    """Yields each example with each of its framings' numbers."""
    return ((example, variant) for example in examples for variant in range(len(example.framings)))
