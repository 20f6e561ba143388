"""All cases of all kinds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.hostile import models, pictures, states, texts, weights
from tests.hostile.case import Case

SAMPLE: dict[str, tuple[str, ...]] = {
    pictures.PICTURES: (
        "damaged JPEG 0", "damaged WebP 1", "50% of a LZW TIFF", "PostScript", "PNG of 2^31 pixels a side",
        "PNG with a text bomb", "TIFF whose pages form a ring", "BMP with runs that jump", "named pipe",
        "link to a device", "sparse file of 1 TB", "folders in a ring",
    ),
    texts.CAPTIONS: ("UTF-16", "a lone surrogate", "100 MB", "escape codes", "one word of a megabyte, counted"),
    texts.NAMES: ("escape codes, of a bad picture", "line feeds, of a bad picture", "turned directions", "no UTF-8"),
    texts.METADATA: ("200,000 bad rows", "brackets 100,000 deep", "a caption of 30 MB", "1 TB"),
    texts.CONFIGS: ("a billion laughs", "a new object", "brackets 5,000 deep", "a device"),
    weights.SAFETENSORS: (
        "a header of 2^64-1 bytes (export)", "a header of 15 MB of brackets (sample)", "tensors that overlap (export)",
        "a zip of a pickle (sample)", "a side of 2^62 (export)", "1 TB of tensors (export)",
        "a header of 2^63 bytes (lora compare)", "1 TB of tensors (merge)",
    ),
    weights.LORA: (
        "a pattern of alternatives that takes for ever (sample)", "a pattern of many stars (sample)",
        "a step that is a text (export)", "an unknown family (export)", "of layers that are none (sample)",
    ),
    models.MODELS: (
        "code for everything", "an index upwards", "a billion layers", "a million heads (plan)",
        "weights as a pickle under their name", "a tokenizer that is a named pipe", "a needless file that is 1 TB",
        "an autoencoder of 10^9 blocks", "a part upwards", "a config that is a device", "tensors of other shapes",
    ),
    states.CHECKPOINTS: (
        "a file upwards", "a plan of wrong kinds", "a state of brackets 100,000 deep",
        "optimizer.safetensors without sides", "an optimizer's file that is a named pipe",
    ),
    states.LOGS: ("a line of a sample outside",),
    states.LOCKS: ("a lock that is 1 TB", "process -1"),
    states.CACHE: ("1 TB",),
}  # fmt: skip
"""Cases that are part of the suite: some seconds, and of every kind."""


def all_cases(rounds: int, scratch: Path) -> Iterator[Case]:
    """Yields every case.

    Args:
        rounds: randomly damaged copies of each thing.
        scratch: folder for the run that cases of resuming damage copies of.
    """
    yield from pictures.cases(rounds)
    yield from texts.cases(rounds)
    yield from weights.cases(rounds)
    yield from models.cases()
    states.make_run(scratch / "run")
    yield from states.cases(rounds, scratch / "run")


def in_sample(case: Case) -> bool:
    """Returns whether a case is part of the suite."""
    return case.name in SAMPLE.get(case.kind, ())
