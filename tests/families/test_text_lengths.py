"""Which captions a model cuts: by the tokenizers' counts, and by what of a caption reaches its features."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from pixtune.families import family_of
from pixtune.family import Placement, Prompt, PromptOutline, TextLength
from pixtune.sizes import Size
from pixtune.storage.model_folder import ModelFolder
from tests.runs import ROOT

PICTURES: tuple[Size, ...] = ((224, 160), (64, 96))
WORDS = (" cat", " hand")
"""Each is one token in all of the small models' vocabularies."""
CASES = [
    # model, control pictures, max_tokens, number of the encoder, its features, limit
    ("tiny-qwen-image", 0, None, 0, "prompt_embeds", 512),
    ("tiny-qwen-image", 0, 12, 0, "prompt_embeds", 12),
    ("tiny-qwen-image", 0, 4000, 0, "prompt_embeds", 1024),
    ("tiny-qwen-image-edit", 1, 70, 0, "prompt_embeds", 70),
    ("tiny-flux", 0, None, 0, "pooled_embeds", 77),
    ("tiny-flux", 0, None, 1, "prompt_embeds", 512),
    ("tiny-flux", 0, 12, 1, "prompt_embeds", 12),
]


@cache
def parts_of(model: str) -> tuple[ModelFolder, Any, Any]:
    folder = ModelFolder(ROOT / "assets" / model)
    family = family_of(folder)
    return folder, family, family.load_text_encoder(folder, Placement(torch.device("cpu"), torch.float32))


def features(model: str, text: str, num_pictures: int, max_tokens: int | None, name: str) -> Tensor:
    _, family, encoder = parts_of(model)
    pictures = tuple(Image.linear_gradient("L").resize(size).convert("RGB") for size in PICTURES[:num_pictures])
    (row,) = family.encode_text(encoder, [Prompt(text, pictures)], max_tokens)
    return row[name]


def lengths(model: str, text: str, num_pictures: int, max_tokens: int | None) -> tuple[TextLength, ...]:
    folder, family, _ = parts_of(model)
    (row,) = family.text_lengths(folder, [PromptOutline(text, PICTURES[:num_pictures])], max_tokens)
    return row


@pytest.mark.parametrize(("model", "num_pictures", "max_tokens", "number", "name", "limit"), CASES)
def test_the_last_word_reaches_the_features_unless_the_caption_counts_as_cut(
    model: str, num_pictures: int, max_tokens: int | None, number: int, name: str, limit: int
) -> None:
    """At the limit, and a token beyond it."""
    so_far = lengths(model, "a", num_pictures, max_tokens)[number].num_tokens
    for num_tokens, is_cut in ((limit, False), (limit + 1, True)):
        text = "a" + WORDS[0] * (num_tokens - so_far - 1)
        one, other = (text + word for word in WORDS)
        for each in (one, other):
            length = lengths(model, each, num_pictures, max_tokens)[number]
            assert (length.num_tokens, length.limit, length.is_cut) == (num_tokens, limit, is_cut)
        same = torch.equal(*(features(model, each, num_pictures, max_tokens, name) for each in (one, other)))
        assert same == is_cut


@pytest.mark.parametrize("num_pictures", [0, 1, 2])
def test_control_pictures_count_as_the_tokens_that_they_become(num_pictures: int) -> None:
    """With a limit that cuts nothing the features have a row a token, and five for the template's end."""
    model, text = "tiny-qwen-image-edit", "make it snow"
    (length,) = lengths(model, text, num_pictures, 10_000)
    assert length.num_tokens + 5 == len(features(model, text, num_pictures, 10_000, "prompt_embeds"))


def test_an_edit_model_cuts_nothing_by_itself() -> None:
    assert lengths("tiny-qwen-image-edit", "word " * 3000, 1, None) == ()


def test_many_captions_are_counted_in_their_order_without_a_tokenizers_warnings(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for model in ("tiny-qwen-image", "tiny-flux"):
        folder, family, _ = parts_of(model)
        texts = ["a cat", "a cat on a mat " * 3000, "a"]
        rows = family.text_lengths(folder, [PromptOutline(text) for text in texts])
        assert [max(length.num_tokens for length in row) > 5000 for row in rows] == [False, True, False]
        assert rows[0] != rows[2] and rows[2] == lengths(model, "a", 0, None)
    assert not caplog.records and "longer" not in capsys.readouterr().err
