"""Makes a caption of a captioner's answer, or finds why it can be none. Pure functions of text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pixtune.family import Answer

THOUGHT_ENDS = "</think>"
"""Mark behind which the answer of a model stands that thinks aloud."""
JOINER, BROKEN = "\u200d", "\ufffd"
"""Letters that join emoji to one, and that stand for a letter whose bytes an answer's end cut through."""
HEADING = re.compile(r"^[*#\s]*(caption|description|instruction|edit instruction|answer)\s*\**\s*:\s*\**\s*", re.I)
OPENING = re.compile(
    r"^(?:in )?(?:this|the) (?:image|picture|photo|photograph|illustration|drawing|painting)"
    r"(?: (?:shows|depicts|features|displays|presents|portrays|captures|is of)|,)\s+(?=\S)",
    re.I,
)
"""Opening that vision-language models have, and that would stand in nearly all captions of a data set."""
SENTENCE_END = re.compile(r"[.!?。！？]+[\"')\]”’]*(?=\s|$)|[。！？]")
WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\W぀-ヿ㐀-鿿]+(?:['’\-][^\W぀-ヿ㐀-鿿]+)*")
"""Word, or a letter of a script that has no spaces."""
QUOTES = {'"': '"', "'": "'", "“": "”", "«": "»", "`": "`"}
LONGEST_REPEAT = 24
"""Words of the longest phrase whose repetition is looked for."""
REPEATED_WORDS = 10
"""Words that a repetition has at least: "very, very, very" is none."""


@dataclass(frozen=True)
class Caption:
    """A caption, as it is written to a file."""

    text: str
    cut: bool
    """Whether the answer was longer than is allowed, and is cut."""


def caption_of(answer: Answer, max_words: int | None, trigger: str | None = None) -> Caption:
    """Makes a caption of an answer: one line, without heading, quotes and usual opening, as long as is allowed.

    An answer that is too long is cut behind its last whole sentence, or where it has none behind a word.

    Args:
        max_words: most words without the trigger; None: as many as there are.
        trigger: words that are put in front.

    Raises:
        ValueError: it can be no caption; says why, without its subject.
    """
    spoken = " ".join(answer.text.rpartition(THOUGHT_ENDS)[2].split())
    text = "".join(each for each in spoken if each in JOINER or (each.isprintable() and each != BROKEN))
    if text.startswith("<think>"):
        raise ValueError("thinks aloud and comes to no end: give more --max-tokens, or another captioner")
    text = unwrapped(HEADING.sub("", unwrapped(text)))
    if (opening := OPENING.match(text)) is not None:
        text = text[opening.end() :]
        text = text[0].upper() + text[1:]
    if not (words := WORD.findall(text)):
        raise ValueError("is empty")
    if (phrase := repeated(words)) is not None:
        raise ValueError(f"repeats itself ({phrase!r})")
    is_long = max_words is not None and len(words) > max_words
    cut = is_long or not answer.ended
    if cut:
        text = shortened(text, max_words if is_long else None)
    return Caption(text if trigger is None else f"{trigger}, {text}", cut)


def unwrapped(text: str) -> str:
    """Returns a text without marks of emphasis or quotation around the whole of it."""
    text = text.strip()
    while len(text) > 1 and (text[0] == text[-1] == "*" or QUOTES.get(text[0]) == text[-1]):
        if text[0] != "*" and text[0] in text[1:-1]:
            break  # two quotations, not one
        text = text[1:-1].strip()
    return text


def shortened(text: str, max_words: int | None) -> str:
    """Cuts a text to at most so many words, behind a sentence if there is a whole one, and else behind a word.

    Args:
        max_words: None: the text itself broke off, maybe within a word.
    """
    ends = [match.end() for match in WORD.finditer(text)]
    limit = len(text) if max_words is None else _with_marks(text, ends[max_words - 1])
    sentences = [match.end() for match in SENTENCE_END.finditer(text) if ends[0] <= match.end() <= limit]
    if sentences:
        return text[: sentences[-1]]
    whole = ends[: max_words if max_words is not None else max(len(ends) - 1, 1)]
    return text[: whole[-1]]


def _with_marks(text: str, end: int) -> int:
    """Returns the position behind the marks that follow a word without a space."""
    while end < len(text) and not text[end].isspace() and not WORD.match(text, end):
        end += 1
    return end


def repeated(words: list[str]) -> str | None:
    """Finds a phrase that stands several times in a row, as where a model is caught in a loop; None: there is none.

    Counted are three times at least, with `REPEATED_WORDS` together.
    """
    lower = [word.casefold() for word in words]
    for length in range(1, min(LONGEST_REPEAT, len(lower) // 3) + 1):
        run = 0  # words in a row that equal the one `length` before
        for place in range(length, len(lower)):
            run = run + 1 if lower[place] == lower[place - length] else 0
            if run >= max(2 * length, REPEATED_WORDS - length):
                return " ".join(words[place - length + 1 : place + 1])
    return None
