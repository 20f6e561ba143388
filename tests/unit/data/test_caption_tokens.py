"""Captions that a text encoder cuts: counted once, remembered, and named in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from pixtune.data.caption_tokens import Lengths, count_new, cut_captions
from pixtune.family import PromptOutline, TextLength


class LetterCounter:
    """Takes each letter for a token, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompts: Sequence[PromptOutline]) -> list[Lengths]:
        self.asked += [prompt.text for prompt in prompts]
        return [(TextLength("it reads", len(prompt.text), 4),) for prompt in prompts]


def outlines(*texts: str) -> dict[str, PromptOutline]:
    return {f"key of {text}": PromptOutline(text) for text in texts}


def test_what_was_counted_is_not_counted_again(tmp_path: Path) -> None:
    count, path = LetterCounter(), tmp_path / "cache" / "tokens.json"
    first = count_new(outlines("one", "three"), count, path)
    assert count.asked == ["one", "three"]
    later = count_new(outlines("three", "seven", "one"), count, path)
    assert count.asked == ["one", "three", "seven"]
    assert later == first | {"key of seven": (TextLength("it reads", 5, 4),)}
    assert list(later) == ["key of three", "key of seven", "key of one"]
    assert count_new(outlines("seven"), LetterCounter(), path) == {"key of seven": later["key of seven"]}


def test_without_a_file_nothing_is_remembered() -> None:
    count = LetterCounter()
    assert count_new(outlines("one"), count, None) == count_new(outlines("one"), count, None)
    assert count.asked == ["one", "one"]


def test_a_file_that_cannot_be_written_costs_the_memory_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "taken").touch()
    assert count_new(outlines("one"), LetterCounter(), tmp_path / "taken" / "tokens.json")
    assert "tokens.json could not be written" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", '{"key of one": 3}', '{"key of one": [["it reads"]]}'])
def test_a_damaged_file_is_counted_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(content)
    assert count_new(outlines("one"), LetterCounter(), path) == {"key of one": (TextLength("it reads", 3, 4),)}
    assert count_new(outlines("one"), LetterCounter(), path), "it is whole again"


def test_a_sentence_an_encoder_names_the_first_captions_with_their_largest_numbers() -> None:
    def lengths(short: int, long: int) -> Lengths:
        return TextLength("CLIP reads", short, 77), TextLength("T5 reads", long, 512)

    assert cut_captions([("a.txt", lengths(77, 512))]) == []
    assert cut_captions([("a.txt", lengths(78, 90)), ("b.txt", lengths(3, 3))]) == [
        "1 caption is longer than the 77 tokens that CLIP reads, and is cut there: a.txt (78 tokens)."
    ]
    both = [("a.txt", lengths(78, 90)), ("b.txt", lengths(600, 601)), ("a.txt", lengths(99, 90))]
    clip, t5 = cut_captions(both)
    assert clip == (
        "2 captions are longer than the 77 tokens that CLIP reads, and are cut there: a.txt (99 tokens), b.txt (600 "
        "tokens)."
    )
    assert "that T5 reads, and is cut there: b.txt (601 tokens)." in t5
    (many,) = cut_captions([(f"{number}.txt", lengths(80, 80)) for number in range(9)])
    assert many.startswith("9 captions") and many.endswith("4.txt (80 tokens) and 4 more.")
