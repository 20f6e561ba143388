"""Captions that a model's text encoders cut, found by the tokenizers alone.

A tokenizer with 151,000 entries takes three seconds to load, and one core six for 10,000 captions of 80 words. A run
whose captions are all in the cache is spared both: numbers of tokens are remembered beside the cache.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from pixtune.data.findings import Case, Finding, Level
from pixtune.family import CONTROL_SIDE, ModelFamily, PromptOutline, TextLength
from pixtune.inputs.reading import MEBIBYTE, read_bounded
from pixtune.sizes import Size
from pixtune.storage.files import write_if_possible
from pixtune.storage.model_folder import ModelFolder

log = logging.getLogger(__name__)

LARGEST_COUNTS_BYTES = 256 * MEBIBYTE
"""Size up to which a file of remembered numbers is read: that of two million captions."""

Lengths = tuple[TextLength, ...]
"""A prompt's length in each text encoder that cuts."""


@dataclass(frozen=True)
class CaptionCounter:
    """A model's way of counting the captions of a data set that is checked for it."""

    family: ModelFamily
    folder: ModelFolder
    max_tokens: int | None = None
    """Value of the config's `data_config.max_text_tokens`."""
    control_size: int = CONTROL_SIDE
    """Value of the config's `data_config.control_size`, in pixels."""

    def count(self, captions: Sequence[tuple[str, Sequence[Size]]]) -> list[Lengths]:
        """Counts the tokens of captions, each given with the sizes of its control pictures, which are taken whole."""
        outlines = [
            PromptOutline(text, tuple(self.family.vision_size(size, self.control_size) for size in sizes))
            if self.family.controls_in_text
            else PromptOutline(text)
            for text, sizes in captions
        ]
        return self.family.text_lengths(self.folder, outlines, self.max_tokens)


def count_new(
    prompts: Mapping[str, PromptOutline], count: Callable[[Sequence[PromptOutline]], list[Lengths]], path: Path | None
) -> dict[str, Lengths]:
    """Counts the prompts that the file at `path` does not hold, adds them to it, and returns the lengths of all.

    Args:
        prompts: prompts by names that stand for all that decides the numbers, such as digests of cache keys.
        path: file of remembered lengths; None: nothing is remembered.
    """
    known = _read(path) if path is not None and os.path.lexists(path) else {}
    new = {name: prompt for name, prompt in prompts.items() if name not in known}
    if new:
        known |= zip(new, count(list(new.values())), strict=True)
        if path is not None:
            rows = {name: [[each.reader, each.num_tokens, each.limit] for each in row] for name, row in known.items()}
            write_if_possible(path, json.dumps(rows, sort_keys=True).encode())
    return {name: known[name] for name in prompts}


def _read(path: Path) -> dict[str, Lengths]:
    try:
        rows = json.loads(read_bounded(path, LARGEST_COUNTS_BYTES).decode())
        known = {name: tuple(TextLength(*each) for each in row) for name, row in rows.items()}
        if all(_is_of_form(each) for row in known.values() for each in row):
            return known
        log.warning("%s is damaged; captions are counted again", path)
    except OSError as error:
        log.warning("%s cannot be read (%s); captions are counted again", path, error.strerror or error)
    except (ValueError, TypeError, AttributeError, RecursionError):  # no JSON, or JSON of another shape
        log.warning("%s is damaged; captions are counted again", path)
    return {}


def _is_of_form(length: TextLength) -> bool:
    return isinstance(length.reader, str) and type(length.num_tokens) is int and type(length.limit) is int


def cut_captions(named: Sequence[tuple[str, Lengths]]) -> list[str]:
    """Writes a sentence for each encoder that cuts captions: how many, at how many tokens, and the first few names.

    Args:
        named: pairs of a caption's name and its lengths. A name that occurs more than once (beside control pictures of
            several sizes) counts once, with its largest number of tokens.
    """
    return [sentence for finding in cut_findings(named) for sentence in replace(finding, remedy="").sentences]


def cut_findings(named: Sequence[tuple[str, Lengths]], lost: Mapping[str, str] = MappingProxyType({})) -> list[Finding]:
    """Returns a finding for each encoder that cuts captions.

    Args:
        named: as for `cut_captions`.
        lost: what a caption loses, by its name.
    """
    longest: dict[tuple[str, int], dict[str, int]] = {}
    for name, lengths in named:
        for length in lengths:
            if length.is_cut:
                of_encoder = longest.setdefault((length.reader, length.limit), {})
                of_encoder[name] = max(length.num_tokens, of_encoder.get(name, 0))
    findings = []
    for (reader, limit), cut in longest.items():
        subject, verb = ("1 caption", "is") if len(cut) == 1 else (f"{len(cut)} captions", "are")
        tokens = "1 token" if limit == 1 else f"{limit} tokens"
        cases = tuple(
            Case(
                f"{name} ({num} tokens)",
                (name,),
                {"tokens": num, "limit": limit},
                f"never read: {lost[name]}" if lost.get(name) else "",
            )
            for name, num in cut.items()
        )
        meaning = f"{subject} {verb} longer than the {tokens} that {reader}, and {verb} cut there"
        findings.append(
            Finding(Level.WARNING, "caption-cut", meaning, cases, "Shorten them, or put first what matters.")
        )
    return findings


def lost_words(texts: Sequence[str], count: Callable[[Sequence[tuple[int, str]]], list[Lengths]]) -> list[str]:
    """Returns the words that each text loses to the encoder that reads most of it; empty where none does.

    The tokens of beginnings are counted, twenty at a time, so a tokenizer that reports no positions serves as well.

    Args:
        count: counts the tokens of beginnings, each given with the number of its text.
    """
    words = [text.split() for text in texts]
    kept = [0] * len(texts)  # number of words that are surely read
    lost = [len(each) + 1 for each in words]  # and of those that surely are not, one more than there are at first
    while any(high - low > 1 for low, high in zip(kept, lost, strict=True)):
        tries = [
            (number, at)
            for number, (low, high) in enumerate(zip(kept, lost, strict=True))
            for at in sorted({low + max(1, (high - low) * part // 20) for part in range(1, 20)})
            if low < at < high
        ]
        lengths = count([(number, " ".join(words[number][:at])) for number, at in tries])
        for (number, at), of_encoders in zip(tries, lengths, strict=True):
            if of_encoders and all(each.is_cut for each in of_encoders):
                lost[number] = min(lost[number], at)
            elif at < lost[number]:
                kept[number] = max(kept[number], at)
    return [" ".join(each[low:]) for each, low in zip(words, kept, strict=True)]
