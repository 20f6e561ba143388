"""Supplies a stream's order with rows, and the cache with their encodings."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pixtune.config.schema import TrainConfig
from pixtune.data.cache import Ledger
from pixtune.data.encodings import Encodings
from pixtune.data.example_table import Example
from pixtune.data.streamed.bounded_store import BoundedStore
from pixtune.data.streamed.framing import Framer
from pixtune.data.streamed.reading import Reader, ReadRows, refuse_too_many_skipped, skipped_note
from pixtune.data.streamed.state import Counts, StreamState
from pixtune.data.streamed.windows import StreamRow
from pixtune.data.wanted import Wanted
from pixtune.engine.relief import drop_frames, first_line, lacks_memory
from pixtune.errors import DataError, MemoryShortage, TrainingError
from pixtune.family import ModelFamily
from pixtune.launch.crew import Crew


@dataclass
class Supply:
    """Source of a stream's rows, and of their encodings: reader, framings, encoders and cache put together."""

    config: TrainConfig
    family: ModelFamily
    reader: Reader
    framer: Framer
    encodings: Encodings
    store: BoundedStore
    crew: Crew
    """All processes of the run; those that share the cache are the reader's."""
    beside: Wanted
    """Held-out pictures and prompts, which are encoded beside the rows and stay."""
    held_out: Sequence[StreamRow]
    """Rows of the stream among these, whose pictures are not there before they are read."""
    show: Callable[[str], object]

    @property
    def num_shards(self) -> int:
        return len(self.reader.shards.names)

    def example_of(self, row: StreamRow) -> Example:
        """Frames a row as its epoch uses it."""
        return self.framer.example(row)

    def read(self, state: StreamState) -> ReadRows:
        """Reads the rows of the window after a state.

        Raises:
            DataError: the stream cannot be read, or other processes read other rows.
        """
        window = self.config.stream.window
        assert window is not None, "only streams have a supply"
        try:
            read = self.reader.read(state.position, window)
            self._compare(read)
        except TrainingError as error:  # of another process; the steps so far are to be saved, as in that one
            raise DataError("another process cannot read the stream", [str(error)]) from error
        if sentence := skipped_note(read.problems):
            self.show(f"note: {sentence}")
        return read

    def _compare(self, read: ReadRows) -> None:
        """Refuses rows that are not those of the other machines, which read them for themselves."""
        if self.crew.size == self.reader.crew.size:
            return
        rows = sorted((row.place.shard, row.place.row, row.digest, row.captions) for row in read.rows)
        digests = self.crew.gather("comparing the stream", hashlib.sha256(json.dumps(rows).encode()).hexdigest())
        if different := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
            raise DataError(
                "machines read different streams",
                [
                    f"Process {different[0]} has read other rows than process 0. All machines need the same shards, or "
                    "one cache that they share (data_config.cache_dir)."
                ],
            )

    def count(self, counts: Counts, problems: Sequence[str]) -> None:
        """Refuses a stream of which too many rows cannot be used."""
        refuse_too_many_skipped(counts.read, counts.skipped, self.config.stream.skipped_share, problems)

    def encode(self, rows: Sequence[tuple[StreamRow, Example]]) -> None:
        """Has the encodings of all these examples, and of what is beside them, in the cache when it returns.

        Raises:
            DataError: a row that has to be encoded again is not what it was, or the cache's limit is too small.
            MemoryShortage: the encoders do not fit beside the transformer.
        """
        obstacle = None
        try:
            self._encode(rows)
        except TrainingError as error:
            raise DataError("another process cannot encode the stream", [str(error)]) from error
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            obstacle = first_line(error)
            drop_frames(error)
        if obstacle is not None:  # outside the except clause, since the error holds the memory of the work that failed
            raise MemoryShortage("encoding a window of the stream", obstacle)

    def _encode(self, rows: Sequence[tuple[StreamRow, Example]]) -> None:
        encodings, reader = self.encodings, self.reader
        # Reasons for misses are of no use here, and a ledger of all windows would grow without an end.
        encodings.encoder = replace(encodings.encoder, ledger=Ledger(None))
        wanted = replace(self.beside, training=[example for _, example in rows])
        items, pictures = wanted.texts(self.config, self.family), wanted.pictures(self.config)
        self.store.begin(encodings.digests(items, pictures))
        no_texts, no_latents = encodings.know_only(items, pictures)
        if no_texts or no_latents:
            lacking = {key.digest for each in (no_texts, no_latents) for key, _ in each.problems}
            of_stream = [*rows, *zip(self.held_out, self.beside.held_out, strict=False)]
            reader.read_again([row for row, example in of_stream if self._needs_files(example, lacking)])
            held_out = [*map(self.framer.located, self.beside.held_out)] if self.held_out else self.beside.held_out
            training = [self.framer.located(example) for _, example in rows]
            wanted = replace(wanted, training=training, held_out=held_out)
            items, pictures = wanted.texts(self.config, self.family), wanted.pictures(self.config)
            texts = encodings.fill_texts(items, no_texts)
            latents = encodings.fill_pictures(pictures, no_latents)
            self.show(
                f"stream: {sum(texts.misses.values())} captions and {sum(latents.misses.values())} pictures encoded"
            )
        reader.crew.wait("encoding the stream")
        reader.paths.clear()
        if reader.crew.is_first:
            shutil.rmtree(reader.pictures, ignore_errors=True)

    def _needs_files(self, example: Example, lacking: set[str]) -> bool:
        """Returns whether a row's pictures have to be read again, since something of them is to be encoded."""
        if all(digest in self.reader.paths for digest in example.known_digests):
            return False
        own = replace(self.beside, training=[example], held_out=(), asked=(), prompts=())
        items, pictures = own.texts(self.config, self.family), own.pictures(self.config)
        seen = [item for item in items if item.pictures]
        return not lacking.isdisjoint(self.encodings.digests(seen, pictures))
