"""Findings on a data set: what was seen, in which files, what it means and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from pixtune.data.pairs import shorten


class Level(StrEnum):
    """Weight of a finding."""

    ERROR = "error"
    """Training cannot start."""
    WARNING = "warning"
    """Training can start and will probably suffer."""
    NOTE = "note"
    """Nothing needs to be done."""


@dataclass(frozen=True)
class Case:
    """One occurrence of a finding."""

    text: str
    """Name with its figure in brackets, or, where the finding is `one_by_one`, a whole sentence."""
    files: tuple[str, ...] = ()
    """Files that it is about; of near copies the whole group."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Numbers for programs, by stable names with their unit."""
    detail: str = ""
    """Remark for a person, such as the words that a caption loses."""


@dataclass(frozen=True)
class Finding:
    """All occurrences of one thing."""

    level: Level
    code: str
    """Stable name for programs, as `docs/preparing_pictures.md` lists them."""
    meaning: str
    """Sentence on what was found, without a full stop where names follow it."""
    cases: tuple[Case, ...] = ()
    remedy: str = ""
    """Sentence on what to do; empty where the cases' own sentences have it."""
    one_by_one: bool = False
    """Whether each case is a sentence of its own, so that `meaning` is only a heading."""

    @property
    def sentences(self) -> tuple[str, ...]:
        """Whole sentences for a log: one for each case, or one that names the first few."""
        if self.one_by_one:
            return tuple(case.text for case in self.cases)
        remedy = f" {self.remedy}" if self.remedy else ""
        if not self.cases:
            return (f"{self.meaning}.{remedy}",)
        return (f"{self.meaning}: {shorten(case.text for case in self.cases)}.{remedy}",)


def count(number: int, one: str, many: str) -> str:
    """Formats a number with its noun and verb."""
    return f"{number:,} {one if number == 1 else many}"


def cases_of(sentences: Sequence[str]) -> tuple[Case, ...]:
    """Returns sentences as cases that name no file apart."""
    return tuple(Case(sentence) for sentence in sentences)
