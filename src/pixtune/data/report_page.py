"""The report on a data set as a person reads it in a terminal: the verdict, then what weighs most."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from shutil import get_terminal_size
from textwrap import wrap

from pixtune.data.findings import Finding, Level, count
from pixtune.inputs.printing import one_line

WIDEST = 100
"""Number of columns that lines are broken at where a terminal has more."""
NAMES_SHOWN = 5
"""Number of names that a finding shows, unless all are asked for."""
PROBLEMS_SHOWN = 50
"""Number of whole sentences that it shows: each may be a mistake of its own kind."""

HEADINGS = {Level.ERROR: "Problems", Level.WARNING: "Warnings", Level.NOTE: "Notes"}


def terminal_width() -> int | None:
    """Returns the columns to break lines at; None where no terminal shows them: scripts look for whole sentences."""
    return min(get_terminal_size().columns, WIDEST) if sys.stdout.isatty() else None


def render(
    num_pictures: int,
    findings: Sequence[Finding],
    facts: Sequence[str],
    all_names: bool = False,
    width: int | None = None,
) -> str:
    """Formats findings. Lines of names are indented, so that none can pass for a line of the report.

    Args:
        facts: sentences on the data set that are no findings.
        all_names: show every case, not the first few.
        width: number of columns that lines are broken at; None: they are not broken.
    """
    width = width or 10**9
    lines = [*_wrapped(verdict(num_pictures, findings), "", "", width)]
    is_cut = False
    for level, heading in HEADINGS.items():
        of_level = [finding for finding in findings if finding.level == level]
        if of_level:
            lines += ["", f"{heading} ({len(of_level)})"]
        for finding in of_level:
            few = PROBLEMS_SHOWN if finding.one_by_one else NAMES_SHOWN
            shown = len(finding.cases) if all_names else few
            is_cut |= len(finding.cases) > shown
            lines += _finding_lines(finding, shown, width)
    lines.append("")
    for fact in facts:
        lines += _wrapped(fact, "", "  ", width)
    if is_cut:
        lines.append("Every name: --all.")
    return "\n".join(lines).rstrip()


def verdict(num_pictures: int, findings: Sequence[Finding]) -> str:
    """Returns in a sentence whether training can start, and how much there is to read."""
    numbers = {level: sum(finding.level == level for finding in findings) for level in Level}
    words = {
        Level.ERROR: count(numbers[Level.ERROR], "problem", "problems"),
        Level.WARNING: count(numbers[Level.WARNING], "warning", "warnings"),
        Level.NOTE: count(numbers[Level.NOTE], "note", "notes"),
    }
    *others, last = [words[level] for level in Level if numbers[level]] or [""]
    listed = f"{', '.join(others)} and {last}" if others else last
    pictures = count(num_pictures, "picture", "pictures")
    if numbers[Level.ERROR]:
        return f"The data set cannot be trained on: {listed}, {pictures}."
    if numbers[Level.WARNING]:
        return f"The data set can be trained on; look at {listed} first. {pictures}."
    return f"The data set is fine. {pictures}{', ' + listed if listed else ''}."


def _finding_lines(finding: Finding, shown: int, width: int) -> Iterator[str]:
    number = f" ({len(finding.cases):,})" if finding.one_by_one else ""
    yield from _wrapped(f"{finding.meaning}{number}. [{finding.code}]", "  ", "  ", width)
    cases, more = finding.cases[:shown], len(finding.cases) - shown
    if finding.one_by_one or any(case.detail for case in cases):
        for case in cases:
            yield from _wrapped(case.text, "    - ", "      ", width)
            if case.detail:
                yield from _wrapped(_shortened(case.detail), "      ", "      ", width)
        if more > 0:
            yield f"    and {more:,} more"
    else:
        rest = f" and {more:,} more" if more > 0 else ""
        yield from _wrapped(", ".join(case.text for case in cases) + rest, "    ", "    ", width)
    if finding.remedy:
        yield from _wrapped(finding.remedy, "  > ", "    ", width)


def _wrapped(text: str, first: str, later: str, width: int) -> list[str]:
    return wrap(
        one_line(text), width, initial_indent=first, subsequent_indent=later,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _shortened(text: str, most: int = 140) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."
