"""Reads the rows of a stream's windows: patiently, lane by lane, divided among the processes that share the cache."""

from __future__ import annotations

import json
import logging
import tarfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pixtune.config.folders import CaptionRules
from pixtune.data.ahead import made_ahead
from pixtune.data.examples import captions_of
from pixtune.data.images import decoded, picture_digest, while_unchanged
from pixtune.data.pairs import Pair, shorten
from pixtune.data.streamed.position import LanePosition, Position, has_ended, lanes_of, next_epoch, shares_of
from pixtune.data.streamed.shards import Shards, first_cause, why_unreadable
from pixtune.data.streamed.windows import RowPlace, StreamRow
from pixtune.errors import DataError, PixtuneError, ShardError
from pixtune.launch.crew import Crew
from pixtune.launch.stop import Stopped
from pixtune.sizes import Size

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS, MOST_PAUSE_SECONDS = 1.0, 60.0
"""Pauses before a shard is tried again: each twice the one before."""
TRIES_OF_DAMAGE = 3
"""Number of times that a shard is read which looks damaged or gone: a connection that was cut may look so, too."""
DECODE_THREADS = 2
"""Number of threads that check the pictures of one lane, of which there are several."""
ROWS_AHEAD = 4 * DECODE_THREADS
LONGEST_CAPTION = 1 << 14
"""Length of a caption, in characters, that no model reads, and that checkpoints of a stream do not keep."""
EXCHANGED_CHARACTERS = 1 << 21
"""Length of the pieces in which processes exchange rows: their store takes no value of more than 8 MiB."""
STATUSES_THAT_PASS = (408, 425, 429)
"""Answers of a server that refuses now and may not later: it waited too long, or was asked too often."""
FEW_SKIPPED = 10
"""Number of rows that may be skipped whatever their share is."""


@dataclass(frozen=True)
class Patience:
    """Patience with shards that cannot be read for a while."""

    seconds: float
    check: Callable[[], None] = lambda: None
    """Function that raises where the run is asked to end."""
    sleep: Callable[[float], None] = time.sleep

    def wait(self, seconds: float) -> None:
        """Waits, and notices a request to end within a second."""
        while seconds > 0:
            self.check()
            self.sleep(min(1.0, seconds))
            seconds -= 1.0


def patiently(
    rows_from: Callable[[int], Iterator[Pair | str]], start: int, name: str, patience: Patience
) -> Iterator[Pair | str]:
    """Yields a shard's rows from one on. Where that fails, the shard is opened again at the row where it did.

    Args:
        rows_from: opens the shard at a row.
        name: the shard's name in messages.

    Raises:
        DataError: it failed for too long without a row in between; or it looks damaged each time.
    """
    row, waited, tries, pause = start, 0.0, 0, FIRST_PAUSE_SECONDS
    while True:
        try:
            for each in _naming_what_failed(rows_from, row):
                yield each
                row, waited, tries, pause = row + 1, 0.0, 0, FIRST_PAUSE_SECONDS
            return
        except ShardError as error:
            tries += 1
            cause = str(error)
            if error.looks_damaged and tries >= TRIES_OF_DAMAGE:
                problem = f"{name} cannot be read from its row {row} on, {tries} times with the same result: {cause}."
                remedy = "It is damaged or gone: put it back, or take it out of the data set"
                raise _unreadable(problem, remedy) from error
            if not error.looks_damaged and waited >= patience.seconds:
                problem = f"{name} cannot be read from its row {row} on, after {waited:.0f} seconds of trying: {cause}."
                raise _unreadable(problem, "stream.patience_seconds is the time for which it is tried") from error
        log.warning("%s cannot be read from its row %d on (%s): trying again in %.0f seconds", name, row, cause, pause)
        patience.wait(pause)
        waited, pause = waited + pause, min(2 * pause, MOST_PAUSE_SECONDS)


def _naming_what_failed(rows_from: Callable[[int], Iterator[Pair | str]], row: int) -> Iterator[Pair | str]:
    """Yields a shard's rows from one on.

    Raises:
        ShardError: the library, or what it uses, fails, which raise anything.
    """
    try:
        yield from rows_from(row)
    except PixtuneError:
        raise
    except Exception as error:
        raise ShardError(why_unreadable(error), looks_damaged(error)) from error


def looks_damaged(error: Exception) -> bool:
    """Returns whether an error is one of a shard's content or name, and not of the way to it.

    The library says that a file is not there whatever kept it from asking, so the first cause decides.
    """
    cause = first_cause(error)
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in STATUSES_THAT_PASS
    gone = isinstance(cause, FileNotFoundError | PermissionError | IsADirectoryError)
    return gone or isinstance(cause, tarfile.TarError | ValueError | KeyError | TypeError | EOFError)


def _unreadable(problem: str, remedy: str) -> DataError:
    return DataError("the stream cannot be read", [f"{problem} {remedy}. Resume with resume_from_checkpoint=latest."])


@dataclass(frozen=True)
class ReadRows:
    """Rows that were read, and where their reading ended."""

    rows: list[StreamRow]
    position: Position
    num_read: int
    problems: list[str]
    """A sentence for each row that was skipped."""
    num_copies: int
    """Number of rows that are held out."""


@dataclass
class Reader:
    """Reader of windows. It keeps shards open from one window to the next."""

    shards: Shards
    rules: CaptionRules
    controls: tuple[int, bool]
    """Largest number of control pictures of a row, and whether it may have none."""
    pictures: Path
    """Folder that pictures are copied to."""
    seed: int
    patience: Patience
    crew: Crew
    """Processes that divide the lanes: those that see the same folder of pictures."""
    held_out: Collection[str] = ()
    """Digests of pictures that are not trained on."""
    held_out_rows: int = 0
    """Number of the first shard's first rows that are not, either."""
    paths: dict[str, Path] = field(default_factory=dict)
    """Files of the pictures that were read since this was cleared, by their digests."""
    _open: dict[int, tuple[int, LanePosition, Iterator[Pair | str]]] = field(default_factory=dict)
    """Open shards by their lanes, with the epoch and position at which they stand."""

    def read(self, position: Position, wanted: int) -> ReadRows:
        """Reads the next rows of an epoch: as many as are wanted, or as are left in it.

        Raises:
            DataError: a shard cannot be read, in whichever process that is.
        """
        if has_ended(position, len(self.shards.names)):
            position = next_epoch(position)
        num_lanes, num_shards = len(position.lanes), len(self.shards.names)
        of_lanes = lanes_of(self.seed, position.epoch, num_shards, num_lanes)
        lanes = list(position.lanes)
        rows: list[StreamRow] = []
        problems: list[str] = []
        num_read = num_copies = 0
        while num_read < wanted and not has_ended(replace(position, lanes=tuple(lanes)), num_shards):
            alive = [lane.shard < len(shards) for lane, shards in zip(lanes, of_lanes, strict=True)]
            shares = shares_of(wanted - num_read, alive)
            mine = [lane for lane in range(num_lanes) if shares[lane] and lane % self.crew.size == self.crew.rank]
            given = [(position.epoch, lane, of_lanes[lane], lanes[lane], shares[lane]) for lane in mine]
            for each in self._exchange(given):
                lanes[each["lane"]] = LanePosition(*each["at"])
                num_read += each["read"]
                num_copies += each["copies"]
                problems += each["problems"]
                rows += [_from_plain(values) for values in each["rows"]]
        position = Position(position.epoch, position.window + 1, tuple(lanes))
        return ReadRows(rows, position, num_read, problems, num_copies)

    def _exchange(self, given: Sequence[tuple[int, int, Sequence[int], LanePosition, int]]) -> list[dict[str, Any]]:
        """Reads this process's lanes, and returns what all have read, by the lanes' numbers.

        An error of one process is an error of all, so that all save and end alike.
        """
        try:
            with ThreadPoolExecutor(max(1, len(given)), thread_name_prefix="lanes") as pool:  # most of it is waiting
                own: dict[str, Any] = {"lanes": [*pool.map(lambda each: self._read_lane(*each), given)]}
        except (DataError, Stopped) as error:
            if self.crew.size == 1:
                raise
            own = {"error": [error.headline, error.faults] if isinstance(error, DataError) else None}
        found = [json.loads(text) for text in gather_long(self.crew, json.dumps(own))]
        for each in found:
            if "error" in each:
                raise Stopped if each["error"] is None else DataError(*each["error"])
        return sorted(chain.from_iterable(each["lanes"] for each in found), key=lambda each: each["lane"])

    def _read_lane(self, epoch: int, lane: int, shards: Sequence[int], at: LanePosition, wanted: int) -> dict[str, Any]:
        """Reads some rows of a lane, as plain values for other processes."""
        rows: list[Any] = []
        problems: list[str] = []
        num_read = num_copies = 0
        while num_read < wanted and at.shard < len(shards):
            shard = shards[at.shard]
            opened = self._take_open(epoch, lane, at, shard)
            places = (RowPlace(epoch, shard, at.row + number) for number in range(wanted - num_read))
            listed = ((place, raw) for place, raw in zip(places, opened, strict=False))
            in_shard = 0
            for (place, raw), read in made_ahead(self._checked, listed, ROWS_AHEAD, DECODE_THREADS):
                self.patience.check()
                in_shard += 1
                if isinstance(read, str):
                    problems.append(f"{self.name_of(place)} {read}")
                elif self._is_held_out(read):
                    num_copies += 1
                else:
                    rows.append(_to_plain(read))
                    self._remember(read, raw)
            num_read += in_shard
            at = LanePosition(at.shard, at.row + in_shard)
            if num_read < wanted:  # the shard has ended
                at = LanePosition(at.shard + 1, 0)
            else:
                self._open[lane] = (epoch, at, opened)
        return {
            "lane": lane, "at": [at.shard, at.row], "read": num_read, "copies": num_copies, "problems": problems,
            "rows": rows,
        }  # fmt: skip

    def _take_open(self, epoch: int, lane: int, at: LanePosition, shard: int) -> Iterator[Pair | str]:
        of_epoch, stands_at, opened = self._open.pop(lane, (-1, at, iter(())))
        if (of_epoch, stands_at) == (epoch, at):
            return opened
        return self.rows_of(shard, at.row)

    def rows_of(self, shard: int, start: int) -> Iterator[Pair | str]:
        """Returns a shard's rows from one on, as `patiently` yields them."""
        name = f"{self.shards.names[shard]}"
        return patiently(lambda row: self.shards.rows(shard, row, self.pictures), start, name, self.patience)

    def name_of(self, place: RowPlace) -> str:
        """Returns a row's name in messages."""
        return f"{self.shards.names[place.shard]}, row {place.row}"

    def first_rows(self, wanted: int, least: int) -> tuple[list[StreamRow], int]:
        """Reads the first rows of the first shard that can be used, with the number of rows read for that.

        Args:
            least: number of rows that the shard must have; of one with fewer, none are returned.
        """
        rows: list[StreamRow] = []
        num_read = number = 0
        for number, raw in enumerate(islice(self.rows_of(0, 0), max(least, 4 * wanted)), 1):
            if len(rows) < wanted:
                read = self._checked((RowPlace(0, 0, number - 1), raw))
                num_read = number
                if isinstance(read, StreamRow):
                    rows.append(read)
                    self._remember(read, raw)
            elif number >= least:
                break
        return (rows, num_read) if number >= least else ([], 0)

    def read_again(self, rows: Sequence[StreamRow]) -> None:
        """Reads the pictures of rows that were read before, for encodings that are no longer in the cache.

        Raises:
            DataError: a row is not what it was.
        """
        of_shard: dict[int, dict[int, StreamRow]] = {}
        for row in rows:
            of_shard.setdefault(row.place.shard, {})[row.place.row] = row
        for shard, wanted in of_shard.items():
            start, end = min(wanted), max(wanted) + 1
            for number, raw in enumerate(islice(self.rows_of(shard, start), end - start), start):
                if number not in wanted:
                    continue
                row = wanted.pop(number)
                read = self._checked((row.place, raw))
                if not isinstance(read, StreamRow) or (read.digest, read.controls) != (row.digest, row.controls):
                    wanted[number] = row
                    break
                self._remember(read, raw)
            if wanted:
                name = self.name_of(next(iter(wanted.values())).place)
                problem = (
                    f"{name} is not the row that the run has read before, and its encoding is no longer in the cache. "
                    "Put the shard back as it was, or start a new run."
                )
                raise DataError("the stream has changed", [problem])

    def _is_held_out(self, row: StreamRow) -> bool:
        place = row.place
        return (place.shard == 0 and place.row < self.held_out_rows) or row.digest in self.held_out

    def _remember(self, row: StreamRow, raw: Pair | str) -> None:
        assert isinstance(raw, Pair), "only pairs can be used"
        self.paths[row.digest] = raw.image_path
        for (digest, _), path in zip(row.controls, raw.control_paths, strict=False):
            self.paths[digest] = path

    def _checked(self, given: tuple[RowPlace, Pair | str]) -> StreamRow | str:
        """Returns a row whose pictures were decoded to their last pixel, or a sentence on why it cannot be used."""
        place, raw = given
        if isinstance(raw, str):
            return f"is skipped: {raw}."
        most, may_lack = self.controls
        paths = raw.control_paths if most else ()
        if len(paths) > most or (most and not paths and not may_lack):
            return f"is skipped: it has {len(paths)} control pictures, and 1 to {most} are needed."
        try:
            captions = captions_of(raw, self.rules)
            if any(len(caption) > LONGEST_CAPTION for caption in captions):
                return f"is skipped: a caption has more than {LONGEST_CAPTION:,} characters."
            (digest, size), *controls = [_digest_and_size(path) for path in (raw.image_path, *paths)]
        except DataError as error:
            named = " ".join(error.faults).replace(f"{raw.image_path} ", "the picture ")
            return f"is skipped: {named}"
        return StreamRow(place, digest, size, captions, tuple(controls))


def _digest_and_size(path: Path) -> tuple[str, Size]:
    digest = picture_digest(path)
    with while_unchanged(path, digest), decoded(path) as picture:
        return digest, picture.image.size


def _to_plain(row: StreamRow) -> list[Any]:
    place = row.place
    return [place.epoch, place.shard, place.row, row.digest, row.size, row.captions, row.controls]


def _from_plain(values: Sequence[Any]) -> StreamRow:
    epoch, shard, row, digest, size, captions, controls = values
    of_controls = tuple((each, (width, height)) for each, (width, height) in controls)
    return StreamRow(RowPlace(epoch, shard, row), digest, (size[0], size[1]), tuple(captions), of_controls)


def gather_long(crew: Crew, text: str) -> list[str]:
    """Returns in all processes the texts of all, however long they are, by rank."""
    if crew.size == 1:
        return [text]
    pieces = [text[start : start + EXCHANGED_CHARACTERS] for start in range(0, len(text), EXCHANGED_CHARACTERS)]
    most = max(crew.gather("reading the stream", len(pieces)))
    found = [""] * crew.size
    for number in range(most):
        of_all = crew.gather("reading the stream", pieces[number] if number < len(pieces) else "")
        found = [before + piece for before, piece in zip(found, of_all, strict=True)]
    return found


def refuse_too_many_skipped(num_read: int, num_skipped: int, share: float, problems: Sequence[str]) -> None:
    """Ends a run whose stream has more damaged rows than the config allows.

    Raises:
        DataError: it has; names some.
    """
    if num_skipped <= max(FEW_SKIPPED, share * num_read):
        return
    raise DataError(
        f"{num_skipped} of the {num_read} rows of the stream so far cannot be used",
        [
            *problems[:FEW_SKIPPED],
            f"stream.skipped_share={share:g} allows no more. Mend the rows, or raise it; then resume with "
            "resume_from_checkpoint=latest.",
        ],
    )


def skipped_note(problems: Sequence[str]) -> str | None:
    """Returns a sentence on the rows of a window that were skipped; None: none were."""
    if not problems:
        return None
    rows = "1 row" if len(problems) == 1 else f"{len(problems)} rows"
    return f"{rows} of the stream skipped: {shorten(problems)}"
