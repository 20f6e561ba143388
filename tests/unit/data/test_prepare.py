"""What is noted about a data set before it is encoded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pixtune.data.prepare import missing_triggers


def test_captions_that_lack_a_trigger_word_are_named() -> None:
    texts = ("ZWX, a cat", "a dog", "zwx on a bike")
    examples: list[Any] = [SimpleNamespace(name=f"{number}.png", captions=(text,)) for number, text in enumerate(texts)]
    (sentence,) = missing_triggers(examples, ["zwx"])
    assert sentence.startswith("1 of 3 captions lack the trigger word 'zwx': 1.png.")
    assert not missing_triggers(examples, []) and not missing_triggers(examples[:1], ["zwx", "cat"])
