"""Rows of a stream: each once an epoch, whoever reads them, from any position on, and past whatever fails."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixtune.config.folders import CaptionRules
from pixtune.data.pairs import Pair
from pixtune.data.streamed import reading
from pixtune.data.streamed.position import first_position, has_ended, lanes_of, shares_of
from pixtune.data.streamed.reading import Patience, Reader, gather_long, patiently, refuse_too_many_skipped
from pixtune.data.streamed.windows import RowPlace
from pixtune.errors import DataError
from pixtune.launch.crew import ALONE, Crew
from pixtune.launch.stop import Stopped
from tests.crews import in_crew

RULES = CaptionRules("txt", "file", None, "", shuffle=False, keep=0, dropout_rate=0.0, num_forms=1)


@dataclass
class Shards:
    """Shards in memory: each a list of rows."""

    rows_of: Sequence[Sequence[Pair | str]]
    opened: list[tuple[int, int]] = field(default_factory=list)
    is_remote: bool = False

    @property
    def names(self) -> list[str]:
        return [f"{number:03d}.tar" for number in range(len(self.rows_of))]

    def rows(self, shard: int, start: int, pictures: Path) -> Iterator[Pair | str]:
        self.opened.append((shard, start))
        yield from self.rows_of[shard][start:]


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("rows") / "picture.png"
    Image.new("RGB", (8, 6)).save(path)
    return path


def shards_of(picture: Path, lengths: Sequence[int]) -> Shards:
    return Shards(
        [[Pair(picture, "", caption=f"{n} {row}") for row in range(length)] for n, length in enumerate(lengths)]
    )


def reader_of(shards: Shards, crew: Crew = ALONE, **changes: object) -> Reader:
    given = {"controls": (0, False), "pictures": Path("nowhere"), "seed": 7, "patience": Patience(0), **changes}
    return Reader(shards, RULES, crew=crew, **given)  # type: ignore[arg-type]


def epochs(reader: Reader, shards_at_once: int, window: int, num_epochs: int) -> list[list[list[tuple[int, int]]]]:
    """Shard and row of each row of each window of the first epochs."""
    position, found = first_position(len(reader.shards.names), shards_at_once), list[list[list[tuple[int, int]]]]()
    while len(found) < num_epochs or not has_ended(position, len(reader.shards.names)):
        read = reader.read(position, window)
        if read.position.epoch == len(found):
            found.append([])
        position = read.position
        found[-1].append([(row.place.shard, row.place.row) for row in read.rows])
    return found


@settings(max_examples=15)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any), st.integers(1, 4), st.integers(1, 9), st.data())
def test_each_row_comes_once_an_epoch_however_uneven_shards_are(picture, lengths, shards_at_once, window, data):
    wanted = [(shard, row) for shard, length in enumerate(lengths) for row in range(length)]
    found = epochs(reader_of(shards_of(picture, lengths)), shards_at_once, window, 2)
    for windows in found:
        assert sorted(row for rows in windows for row in rows) == wanted
        assert all(len(rows) == window for rows in windows[:-2]), "windows are full as long as rows are left"
    assert data is not None


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_reads_the_same_windows_and_each_row_in_one(size, picture, monkeypatch):
    monkeypatch.setattr("pixtune.launch.crew.LOOK_SECONDS", 0.001)
    lengths = [5, 1, 0, 8, 3]
    alone = epochs(reader_of(shards_of(picture, lengths)), 3, 6, 1)
    stores = [shards_of(picture, lengths) for _ in range(size)]
    together = in_crew(size, lambda crew: epochs(reader_of(stores[crew.rank], crew), 3, 6, 1))
    assert [sorted(map(tuple, rows)) for rows in alone[0]] == [sorted(map(tuple, rows)) for rows in together[0][0]]
    assert all(each == together[0] for each in together)
    opened = [shard for store in stores for shard, start in store.opened]
    assert sorted(opened) == [*range(5)], "nobody opens what another one reads, and nobody opens it twice"


def test_reading_goes_on_from_any_position(picture):
    lengths = [4, 9, 2, 6]
    whole = reader_of(shards_of(picture, lengths))
    position = first_position(4, 3)
    for _ in range(8):
        read = whole.read(position, 5)
        anew = reader_of(shards_of(picture, lengths)).read(position, 5)
        assert (anew.rows, anew.position) == (read.rows, read.position)
        position = read.position


def test_the_order_of_shards_changes_with_epoch_and_seed():
    orders = {tuple(map(tuple, lanes_of(seed, epoch, 40, 4))) for seed in (1, 2) for epoch in (0, 1)}
    assert len(orders) == 4
    assert sorted(shard for lane in lanes_of(1, 0, 10, 4) for shard in lane) == [*range(10)]


@given(st.integers(0, 30), st.lists(st.booleans(), min_size=1, max_size=6).filter(any))
def test_shares_are_even_and_complete(wanted, alive):
    shares = shares_of(wanted, alive)
    assert sum(shares) == wanted
    given_alive = [share for share, is_alive in zip(shares, alive, strict=True) if is_alive]
    assert max(given_alive) - min(given_alive) <= 1
    assert not any(share for share, is_alive in zip(shares, alive, strict=True) if not is_alive)


class Failing:
    """A shard of ten rows that fails at some of its rows, each as often as is said."""

    def __init__(self, failures: dict[int, list[Exception]]) -> None:
        self.failures = failures

    def __call__(self, start: int) -> Iterator[str]:
        for row in range(start, 10):
            if self.failures.get(row):
                raise self.failures[row].pop(0)
            yield f"row {row}"


def test_a_shard_that_fails_for_a_while_is_opened_again_where_it_failed():
    pauses: list[float] = []
    failing = Failing({0: [OSError("no route")] * 3, 4: [TimeoutError(), tarfile.ReadError("cut")], 9: [OSError()] * 5})
    rows = [*patiently(failing, 0, "a.tar", Patience(100, sleep=pauses.append))]
    assert rows == [f"row {row}" for row in range(10)]
    assert sum(pauses) == (1 + 2 + 4) + (1 + 2) + (1 + 2 + 4 + 8 + 16)
    assert max(pauses) <= 1, "a request to end is noticed within a second"


@pytest.mark.parametrize(
    ("error", "times", "words"),
    [
        (OSError("no route to host"), 7, "after 63 seconds of trying: OSError: no route to host. stream.patience"),
        (tarfile.ReadError("bad header"), 3, "3 times with the same result: ReadError: bad header. It is damaged"),
        (FileNotFoundError("404"), 3, "3 times with the same result: FileNotFoundError: 404. It is damaged or gone"),
    ],
)
def test_patience_ends_with_the_cause(error, times, words):
    failing = Failing({4: [error] * 50})
    with pytest.raises(DataError) as caught:
        [*patiently(failing, 2, "a.tar", Patience(60, sleep=lambda seconds: None))]
    (fault,) = caught.value.faults
    assert fault.startswith("a.tar cannot be read from its row 4 on") and words in fault
    assert "resume_from_checkpoint=latest" in fault
    assert len(failing.failures[4]) == 50 - times


def test_what_no_waiting_mends_is_an_error_at_once():
    with pytest.raises(DataError, match="no column"):
        [*patiently(Failing({0: [DataError("no column", ["x"])]}), 0, "a", Patience(60, sleep=lambda seconds: None))]


def test_a_request_to_end_is_noticed_while_a_shard_is_waited_for(picture):
    asked = count()

    def check() -> None:
        if next(asked) == 5:
            raise Stopped

    failing = Failing({0: [OSError()] * 99})
    with pytest.raises(Stopped):
        [*patiently(failing, 0, "a", Patience(1e9, check, sleep=lambda seconds: None))]


def test_rows_that_cannot_be_used_are_skipped_and_named(tmp_path, picture, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_CAPTION", 30)
    cut = tmp_path / "cut.jpg"
    Image.effect_noise((64, 64), 90).save(cut)
    cut.write_bytes(cut.read_bytes()[:900])
    empty, text = tmp_path / "empty.png", tmp_path / "text.png"
    empty.touch()
    text.write_text("<html>404</html>")
    good = Pair(picture, "", caption="good")
    bad: list[Pair | str] = [
        "'txt' holds NoneType, and a text is needed",
        *(Pair(path, "", caption="x") for path in (cut, empty, text, tmp_path / "gone.png")),
        Pair(picture, "", caption="long " * 10),
        Pair(picture, "", caption="x", control_paths=(picture,) * 3),
    ]
    shards = Shards([[good, *bad, good]])
    read = reader_of(shards, controls=(2, True)).read(first_position(1, 8), 99)
    assert [row.place for row in read.rows] == [RowPlace(0, 0, 0), RowPlace(0, 0, len(bad) + 1)]
    assert len(read.problems) == len(bad) and read.num_read == len(bad) + 2
    assert all(f"000.tar, row {row} is skipped" in each for row, each in enumerate(read.problems, 1))
    assert "is empty" in read.problems[2] and "is text" in read.problems[3] and "3 control" in read.problems[6]


def test_held_out_rows_are_not_trained_on_wherever_their_picture_comes_again(tmp_path, picture):
    other = tmp_path / "other.png"
    Image.new("RGB", (8, 6), "red").save(other)
    shards = Shards([[Pair(picture, "", caption="a"), Pair(other, "", caption="b"), Pair(other, "", caption="c")],
                     [Pair(other, "", caption="d"), Pair(picture, "", caption="e")]])  # fmt: skip
    reader = reader_of(shards)
    rows, num_read = reader.first_rows(1, 3)
    reader.held_out, reader.held_out_rows = {rows[0].digest}, num_read
    assert reader.first_rows(1, 4) == ([], 0), "of a small shard none are held out"
    read = reader.read(first_position(2, 2), 9)
    assert sorted(row.captions[0] for row in read.rows) == ["b", "c", "d"] and read.num_copies == 2


def test_rows_are_read_again_only_where_they_are_what_they_were(tmp_path, picture):
    shards = shards_of(picture, [6])
    rows = reader_of(shards).read(first_position(1, 1), 6).rows
    again = reader_of(shards)
    again.read_again([rows[4], rows[2]])
    assert again.paths == {rows[0].digest: picture} and shards.opened[-1] == (0, 2)
    with pytest.raises(DataError, match="the stream has changed"):
        reader_of(Shards([shards.rows_of[0][:4]])).read_again([rows[4]])


def test_an_error_of_one_process_is_one_of_all(picture, monkeypatch):
    monkeypatch.setattr("pixtune.launch.crew.LOOK_SECONDS", 0.001)

    def read(crew: Crew) -> str:
        shards = shards_of(picture, [3, 3])
        if crew.rank == 1:
            shards.rows = Failing({0: [KeyError("x")] * 9})  # type: ignore[method-assign, assignment]
            shards.rows = lambda shard, start, pictures: Failing({0: [KeyError("x")] * 9})(start)  # type: ignore
        patience = Patience(0, sleep=lambda seconds: None)
        with pytest.raises(DataError) as caught:
            reader_of(shards, crew, patience=patience).read(first_position(2, 2), 6)
        return str(caught.value)

    one, other = in_crew(2, read)
    assert one == other and "cannot be read from its row 0 on" in one


def test_long_texts_are_exchanged_in_pieces(monkeypatch):
    monkeypatch.setattr("pixtune.launch.crew.LOOK_SECONDS", 0.001)
    monkeypatch.setattr(reading, "EXCHANGED_CHARACTERS", 10)
    texts = ["a" * 35, "", "b"]
    assert in_crew(3, lambda crew: gather_long(crew, texts[crew.rank])) == [texts] * 3


@pytest.mark.parametrize(("num_read", "num_skipped", "fits"), [(20, 10, True), (20, 11, False), (10_000, 200, True),
                                                               (10_000, 201, False)])  # fmt: skip
def test_too_many_skipped_rows_end_the_run(num_read, num_skipped, fits):
    if fits:
        refuse_too_many_skipped(num_read, num_skipped, 0.02, ["row 1"])
        return
    with pytest.raises(DataError, match=f"{num_skipped} of the {num_read} rows") as caught:
        refuse_too_many_skipped(num_read, num_skipped, 0.02, ["row 1"])
    assert caught.value.faults[0] == "row 1" and "stream.skipped_share=0.02" in caught.value.faults[1]
