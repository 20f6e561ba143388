"""What is noted about a data set before it is encoded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pixtune.data.prepare import missing_triggers, partly_masked


def test_captions_that_lack_a_trigger_word_are_named() -> None:
    texts = ("ZWX, a cat", "a dog", "zwx on a bike")
    examples: list[Any] = [SimpleNamespace(name=f"{number}.png", captions=(text,)) for number, text in enumerate(texts)]
    (sentence,) = missing_triggers(examples, ["zwx"])
    assert sentence.startswith("1 of 3 captions lack the trigger word 'zwx': 1.png.")
    assert not missing_triggers(examples, []) and not missing_triggers(examples[:1], ["zwx", "cat"])


def test_how_many_pictures_have_masks_is_told_where_some_have_none() -> None:
    masked, whole = SimpleNamespace(mask="a.png"), SimpleNamespace(mask=None)
    examples: list[Any] = [masked, whole, masked]
    assert partly_masked(examples) == ["2 of 3 pictures have masks; the others count as a whole."]
    assert not partly_masked(examples[:1]) and not partly_masked(examples[1:2])
