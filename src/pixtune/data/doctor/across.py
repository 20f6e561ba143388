"""Near copies in several folders of one config: a held-out picture that is trained on as well measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pixtune.data.doctor.duplicates import find_near_copies
from pixtune.data.doctor.looks import Look
from pixtune.data.findings import Case, Finding, Level, count


def copies_across(
    folders: Sequence[Sequence[tuple[Path, Look]]], held_out: Sequence[tuple[Path, Look]] = ()
) -> list[Finding]:
    """Reports groups of near copies with members in more than one folder.

    Args:
        folders: pictures of each folder to train on.
        held_out: those that are held out.
    """
    places = [number for number, pictures in enumerate([*folders, held_out]) for _ in pictures]
    paths = [path for pictures in [*folders, held_out] for path, _ in pictures]
    found = find_near_copies([look for pictures in [*folders, held_out] for _, look in pictures])
    across = [group for group in found.groups if len({places[number] for number in group}) > 1]
    leaking = [group for group in across if places[group[-1]] == len(folders)]  # numbers rise, held-out ones are last
    twice = [group for group in across if places[group[-1]] != len(folders)]

    def cases(groups: Sequence[Sequence[int]]) -> tuple[Case, ...]:
        names = [[str(paths[number]) for number in group] for group in groups]
        return tuple(Case(" = ".join(group[:4]), tuple(group)) for group in names)

    findings = [
        Finding(
            Level.WARNING, "held-out-copies",
            f"{count(len(leaking), 'held-out picture is', 'held-out pictures are')} nearly one that is trained on",
            cases(leaking),
            "Its loss falls when the picture is learned by heart: take it out of one of the two folders.",
        ),
        Finding(
            Level.NOTE, "copies-across-folders",
            f"{count(len(twice), 'picture lies', 'pictures lie')} in several folders, nearly the same",
            cases(twice),
            "It is trained on in each, as often as their repeats say together.",
        ),
    ]  # fmt: skip
    return [finding for finding in findings if finding.cases]
