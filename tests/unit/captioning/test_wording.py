"""A caption from an answer: what is taken off, where it is cut, and what is none."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pixtune.captioning.wording import WORD, caption_of, repeated, shortened
from pixtune.family import Answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A cat sits.\n\nIt is red.  ", "A cat sits. It is red."),
        ('"A cat sits."', "A cat sits."),
        ('"Yes" and "no" on two signs.', '"Yes" and "no" on two signs.'),
        ('"Open" and "shut"', '"Open" and "shut"'),
        ("**Caption:** A cat.", "A cat."),
        ("Instruction: add a hat", "add a hat"),
        ("The image shows a cat on a mat.", "A cat on a mat."),
        ("This picture depicts two dogs.", "Two dogs."),
        ("In this photo, a bird sings.", "A bird sings."),
        ("The image is of a bird.", "A bird."),
        ("The image on the wall is blue.", "The image on the wall is blue."),
        ("<think>A cat?</think>\n\nA cat.", "A cat."),
        ("一只猫坐在垫子上。", "一只猫坐在垫子上。"),
        ("A \x1b[31mcat\u202e\ufffd sits 👩\u200d🚀.", "A [31mcat sits 👩\u200d🚀."),
    ],
)
def test_a_caption_is_the_answer_without_its_wrapping(answer: str, expected: str) -> None:
    assert caption_of(Answer(answer, True), None).text == expected


def test_the_trigger_stands_in_front_and_is_not_counted() -> None:
    assert caption_of(Answer("A red cat.", True), 3, "zwx style").text == "zwx style, A red cat."


@pytest.mark.parametrize(
    ("answer", "ended", "max_words", "expected"),
    [
        ("One two three. Four five six. Seven", True, 6, "One two three. Four five six."),
        ("One two three. Four five six. Seven", True, 5, "One two three."),
        ("One two three, four five", True, 4, "One two three, four"),
        ("One two. Three fou", False, None, "One two."),
        ("One two thr", False, None, "One two"),
        ("One two. Three fou", False, 60, "One two."),
        ("It costs 3.50 euros today", False, None, "It costs 3.50 euros"),
        ('He says "go." Then he', False, None, 'He says "go."'),
        ("红色的猫。蓝色的狗。绿", False, None, "红色的猫。蓝色的狗。"),
        ("One two three.", True, 3, "One two three."),
    ],
)
def test_what_is_too_long_ends_behind_a_sentence_or_a_word(
    answer: str, ended: bool, max_words: int | None, expected: str
) -> None:
    caption = caption_of(Answer(answer, ended), max_words)
    assert caption.text == expected
    assert caption.cut == (not ended or expected != answer)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("", "is empty"),
        (" \n ...", "is empty"),
        ("!!! ???", "is empty"),
        ("a red hat and " * 4, r"repeats itself \('a red hat and'\)"),
        ("A hat. " + "very " * 10, "repeats itself"),
        ("红" * 12, "repeats itself"),
        ("<think>Hmm, this is", "thinks aloud"),
    ],
)
def test_what_can_be_no_caption_is_refused(answer: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        caption_of(Answer(answer, True), 60)


def test_what_is_no_loop_is_let_through() -> None:
    for text in ("very, very, very, very old", "a red hat, a blue hat, a green hat, a grey hat", "tick tock " * 4):
        assert repeated(WORD.findall(text)) is None


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_repetition_is_what_a_pattern_finds(words: list[str]) -> None:
    """Beside a regular expression: a phrase, then itself twice or more, ten words in all."""
    text = "".join(words)
    found = any(
        len(match.group()) >= 10 for n in range(1, 11) for start in range(len(text))
        if (match := re.compile(rf"(.{{{n}}})\1{{2,}}").match(text, start))
    )  # fmt: skip
    # A loop may also end within the phrase: those words count, the third turn must be whole.
    partial = any(
        all(text[place] == text[place - n] for place in range(start + n, end))
        for n in range(1, 11) for start in range(len(text)) for end in range(start + max(3 * n, 10), len(text) + 1)
    )  # fmt: skip
    assert (repeated(words) is not None) == partial
    assert partial or not found


@example(". a.a", 1)
@given(st.text(alphabet="ab ,.\"'!", min_size=1), st.integers(1, 5))
def test_a_shortened_text_is_a_beginning_and_no_longer_than_allowed(text: str, most: int) -> None:
    words = WORD.findall(text)
    if len(words) <= most:
        return
    short = shortened(text, most)
    assert text.startswith(short) and 1 <= len(WORD.findall(short)) <= most
