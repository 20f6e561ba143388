"""`pixtune keys`: the keys of a config, found by a word."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Sequence

from pixtune.config.keys_page import find_keys

WIDEST = 120
"""Largest number of letters in a line."""


def list_keys(words: Sequence[str], show: Callable[[str], object]) -> bool:
    """Prints the keys that words mean, as `find_keys` finds them; none: all keys.

    Returns:
        Whether something was found.
    """
    found, sentences = find_keys(words)
    width = min(shutil.get_terminal_size((80, 24)).columns, WIDEST)
    for text in (*sentences, *(key.in_text() for key in found)):
        for line in text.split("\n"):
            indent = " " * (len(line) - len(line.lstrip())) or "  "
            show(textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False))
    return bool(found) or not sentences
