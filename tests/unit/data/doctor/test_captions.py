"""The caption lint: each fault alone, and captions that have none."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pixtune.data.caption_tokens import lost_words
from pixtune.data.doctor.captions import Caption, common_phrases, language_of, lint_captions
from pixtune.data.findings import Finding, Level
from pixtune.family import TextLength

THINGS = ["apple", "bicycle", "candle", "door", "engine", "flower", "guitar", "hammer", "island", "jacket"]


def lint(texts: list[str], triggers: list[str] | None = None, may_be_equal: bool = False) -> dict[str, Finding]:
    captions = [Caption(f"{number}.png", f"IMG_{number}", text, f"{number}.txt") for number, text in enumerate(texts)]
    return {finding.code: finding for finding in lint_captions(captions, triggers, may_be_equal)}


def test_good_captions_have_no_finding():
    assert (
        lint(
            [f"zorb, the {thing} on a table" if n % 2 else f"zorb, {thing}" for n, thing in enumerate(THINGS)], ["zorb"]
        )
        == {}
    )


def test_a_phrase_beside_the_trigger_is_a_warning_and_without_triggers_a_note():
    texts = [f"zorb, digital art of a {thing}" for thing in THINGS]
    phrase = lint(texts, ["zorb"])["caption-phrase"]
    assert phrase.level == Level.WARNING and "role" in phrase.remedy
    assert [case.text for case in phrase.cases] == ['"digital art of a" (100%)']
    assert lint(texts)["caption-phrase"].level == Level.NOTE


def test_a_phrase_is_common_above_four_fifths():
    texts = [f"{thing} in soft light" for thing in THINGS[:8]] + THINGS[8:]
    assert common_phrases(texts) == []
    texts[8] += " in soft light"
    assert common_phrases(texts) == [("in soft light", 0.9)]


def test_parts_and_function_words_are_no_phrases():
    assert common_phrases([f"the {thing} with a" for thing in THINGS]) == []
    assert common_phrases([f"{thing} red hat" for thing in THINGS]) == [("red hat", 1.0)]
    more = [f"{thing} red hat" for thing in THINGS[:9]] + ["red jacket"]
    assert common_phrases([*more, "red boat"]) == [("red", 1.0), ("red hat", 9 / 11)]


def test_captions_that_lack_a_trigger_are_named():
    found = lint([f"zorb {thing}" for thing in THINGS[:3]] + ["ZORB again", "a dog"], ["zorb"])["trigger-missing"]
    assert [case.text for case in found.cases] == ["4.png"] and "'zorb'" in found.meaning


@pytest.mark.parametrize(
    "text",
    ["a photo", "Image of", "TODO", "todo.", "picture", "IMG_3", "DSC_0042", "cat.jpg", "12345", "...", "untitled",
     "I'm sorry, but I can't help with that.", "an image of a", "n/a", "lorem ipsum dolor sit"],
)  # fmt: skip
def test_placeholders_are_named(text):
    found = lint(["a dog", "a cat", "a fish", text])
    assert [case.text.split()[0] for case in found["caption-placeholder"].cases] == ["3.png"]


@pytest.mark.parametrize("text", ["a photo of a cat", "zorb", "7 dogs", "image of the sea", "test pattern on a screen"])
def test_short_captions_that_say_something_are_none(text):
    assert "caption-placeholder" not in lint(["a dog", text])


def test_one_caption_for_all_is_a_warning_for_pictures_and_a_note_for_edits():
    assert lint(["a style"] * 10)["captions-equal"].level == Level.WARNING
    assert lint(["put a hat on"] * 10, may_be_equal=True)["captions-equal"].level == Level.NOTE


def test_a_caption_in_another_script_or_language_is_named():
    english = [f"the {thing} is on the table with a cup" for thing in THINGS]
    assert [c.text for c in lint([*english, "кот на столе"])["caption-script"].cases] == ["10.png (Cyrillic)"]
    german = "der Hund ist mit einem Ball auf der Wiese und trägt eine Mütze"
    assert [c.text for c in lint([*english, german])["caption-language"].cases] == ["10.png (German)"]
    assert not {"caption-script", "caption-language"} & set(lint([*english, "dog, ball, meadow"]))


def test_japanese_in_its_three_scripts_is_one():
    assert lint(["猫が座っている", "ネコ", "ねこ"]) == {}


def test_letters_that_look_alike_are_named():
    found = lint(["a cat", "a c\u0430t on a mat"])["caption-mixed-letters"]
    assert [case.files for case in found.cases] == [("1.txt",)]


@pytest.mark.parametrize(
    ("text", "language"),
    [("the man and the dog are in the park", "English"), ("le chat est sur la table avec une tasse", "French"),
     ("el perro está en la calle con un hombre", "Spanish"), ("cat, dog, table", None), ("", None)],
)  # fmt: skip
def test_languages(text, language):
    assert language_of(text) == language


@pytest.mark.parametrize("limit", [1, 7, 30, 599])
def test_lost_words_are_those_behind_the_limit(limit):
    """With a tokenizer that makes two tokens of each word and one of the end."""
    text = " ".join(f"w{number}" for number in range(600))

    def count(tries: Sequence[tuple[int, str]]) -> list[tuple[TextLength, ...]]:
        lengths = [2 * len(beginning.split()) + 1 for _, beginning in tries]
        return [(TextLength("clip", length, 5), TextLength("t5", length, limit)) for length in lengths]

    kept = (max(limit, 5) - 1) // 2
    (lost,) = lost_words([text], count)
    assert lost.split()[:1] == [f"w{kept}"] and len(lost.split()) == 600 - kept


def test_texts_that_fit_lose_nothing():
    assert lost_words(["a b c", ""], lambda tries: [(TextLength("t5", 3, 10),)] * len(tries)) == ["", ""]


def test_hostile_captions_are_quoted_safely():
    found = lint(["\x1b[31m" * 3, "a\x00b" * 1000, "x" * 100_000, "\u202e" * 50, "a dog"])
    assert all(case.text.isprintable() for finding in found.values() for case in finding.cases)
