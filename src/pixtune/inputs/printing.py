"""Text that others wrote (names of files and tensors, captions), made fit for a terminal.

A file's name may hold escape codes, which would recolour, clear or retitle the terminal, and line feeds, which would
forge lines of a report. All that is printed passes through one of these functions.
"""

from __future__ import annotations

import unicodedata

DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of reading, so that a name looks like another."""
UNFIT = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode's categories of control characters, lone surrogates, and separators of lines and paragraphs."""


def one_line(text: str) -> str:
    """Replaces what steers a terminal, breaks the line, turns the direction or cannot be encoded by its escape."""
    if text.isprintable():
        return text
    return "".join(_escape(mark) if is_unfit(mark) or mark in DIRECTIONS else mark for mark in text)


def lines(text: str) -> str:
    """Makes each line of a text of several lines fit, as `one_line` does. A tabulator counts as a space."""
    return "\n".join(one_line(line.replace("\t", " ")) for line in text.split("\n"))


def is_unfit(mark: str) -> bool:
    """Returns whether a character steers a terminal, breaks lines or is half a character: no name needs it."""
    return unicodedata.category(mark) in UNFIT


def _escape(mark: str) -> str:
    return mark.encode("unicode_escape").decode("ascii")
