"""Architectures of published models that pixtune ships: what a plan reads of a model, without its weights.

`architectures.json` holds the fields of the hub's own JSON files that matter, and the numbers of parameters of encoders
and autoencoders: those that reach a device, as counted in the published files.
"""

from __future__ import annotations

import difflib
import json
from functools import cache
from pathlib import Path
from typing import Any

from pixtune.inputs.misspelt import did_you_mean

FILE = Path(__file__).with_name("architectures.json")
SIMILARITY = 0.8
"""Share of matching characters from which a name counts as a misspelt one, by `difflib`."""


@cache
def read_shipped() -> dict[str, Any]:
    """Reads `architectures.json`: models by hub name, configs and numbers of parameters by component."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def shipped_names() -> tuple[str, ...]:
    """Returns the hub names of the models whose architecture is shipped."""
    return tuple(read_shipped()["models"])


def spelling_hint(name: str) -> str:
    """Returns a sentence that names what an unknown name resembles: a path, or a shipped model; empty if there is none.

    The owner may be missing: `flux.1-dev` resembles `black-forest-labs/FLUX.1-dev`.
    """
    if here := did_you_mean(Path(name).expanduser(), SIMILARITY):
        return here
    known = {spelt.lower(): shipped for shipped in shipped_names() for spelt in (shipped, shipped.split("/")[1])}
    for spelt in (name.lower(), name.lower().split("/")[-1]):
        if near := difflib.get_close_matches(spelt, known, n=1, cutoff=SIMILARITY):
            return "" if known[near[0]] == name else f" Did you mean {known[near[0]]}?"
    return ""
