"""Looks at the first rows of a stream, for `pixtune validate`: nobody reads all of it before it is trained on."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from pixtune.config.folders import folders_of
from pixtune.config.schema import TrainConfig
from pixtune.data.controls import ControlRules
from pixtune.data.examples import folders_apart
from pixtune.data.streamed.framing import Framer
from pixtune.data.streamed.position import first_position
from pixtune.data.streamed.reading import Patience, Reader, refuse_too_many_skipped
from pixtune.data.streamed.shards import open_shards
from pixtune.errors import DataError
from pixtune.launch.crew import ALONE

MOST_ROWS = 256
"""Number of rows that are looked at."""
MOST_NAMED = 10
PATIENCE_SECONDS = 10.0
"""Time for which a shard is tried again: somebody waits for the answer."""


def first_rows_of(config: TrainConfig, multiple: int, rules: ControlRules | None) -> str:
    """Reads the rows that a run would read first, and returns what there is to know of them, in lines.

    Args:
        multiple, rules: as for `examples.read_examples`.

    Raises:
        DataError: the stream cannot be read, or too many of these rows cannot be used.
    """
    (own,) = folders_of(config.data_config)
    shards = open_shards(own, folders_apart(config))
    num_shards = len(shards.names)
    if not num_shards:
        raise DataError("nothing is left to train on", [f"{own.img_dir} holds no pictures."])
    with tempfile.TemporaryDirectory(prefix="pixtune-") as pictures:
        reader = Reader(
            shards, own.captions, (rules.most if rules else 0, own.allow_missing_controls), Path(pictures),
            config.seed, Patience(min(PATIENCE_SECONDS, config.stream.patience_seconds)), ALONE,
        )  # fmt: skip
        wanted = min(config.stream.window or MOST_ROWS, MOST_ROWS)
        read = reader.read(first_position(num_shards, config.stream.shards_at_once), wanted)
    refuse_too_many_skipped(read.num_read, len(read.problems), config.stream.skipped_share, read.problems)
    framer = Framer(own, multiple, rules, config.seed, shards.names, Path)
    sizes = Counter(framer.example(row).framings[0].size for row in read.rows)
    empty = sum(not row.captions[0] for row in read.rows)
    lines = [
        f"A stream of {num_shards:,} shards. The first {read.num_read} rows, as the run reads them: "
        f"{len(read.rows)} can be trained on, {len(read.problems)} are skipped.",
        *(f"  {problem}" for problem in read.problems[:MOST_NAMED]),
        *([f"  {empty} have an empty caption."] if empty else []),
        "  Sizes: " + ", ".join(f"{width} x {height}: {count}" for (width, height), count in sizes.most_common()),
        "The other rows are checked when they are read: those that cannot be used are skipped, up to "
        f"stream.skipped_share={config.stream.skipped_share:g} of them.",
    ]
    return "\n".join(lines)
