"""Hints at what a path that leads nowhere may have meant."""

from __future__ import annotations

from difflib import get_close_matches
from itertools import islice
from pathlib import Path

MOST_NAMES = 10_000
"""Number of a folder's names that are compared: of millions, reading them would be what one waits for."""


def similar_paths(path: Path, cutoff: float = 0.6) -> list[Path]:
    """Finds what lies where a path leads astray: paths whose first missing part is replaced by one that is alike.

    Args:
        path: a path that does not exist.
        cutoff: least likeness of two names, 0 to 1, as `difflib` counts it.

    Returns:
        At most three, the likest first.
    """
    places = [place for place in (path, *path.parents) if place.parent.is_dir()]
    if not places or path.exists():
        return []
    astray = places[0]
    try:
        names = [each.name for each in islice(astray.parent.iterdir(), MOST_NAMES)]
    except OSError:  # a folder that may not be listed gives no hint
        return []
    found = []
    for name in get_close_matches(astray.name, names, n=3, cutoff=cutoff):
        meant = astray.with_name(name)
        whole = meant / path.relative_to(astray)
        found.append(whole if whole.exists() else meant)
    return found


def did_you_mean(path: Path, cutoff: float = 0.6) -> str:
    """Returns a sentence that names what a path may have meant, with a space before it; empty if nothing is alike."""
    found = similar_paths(path, cutoff)
    return f" Did you mean {' or '.join(str(each) for each in found)}?" if found else ""
