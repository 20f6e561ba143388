"""The order of a queue, beside a plain list; and files that are none of a queue's."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixtune.errors import ConfigError, QueueError
from pixtune.queue.entries import read_time
from pixtune.queue.store import Queue, set_state
from tests.runs import overrides, write_config

Add = Callable[..., int]


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path / "queue")


@pytest.fixture
def add(queue: Queue, tmp_path: Path) -> Add:
    def make(name: str, **changes: object) -> int:
        return queue.add(write_config(tmp_path), overrides(tmp_path / "runs" / name, tmp_path / "cache", **changes)).id

    return make


def waiting(queue: Queue) -> list[int]:
    entries = [each for each in queue.entries() if each.state == "waiting"]
    assert [each.place for each in entries] == [*range(1, len(entries) + 1)]
    return [each.id for each in entries]


@settings(max_examples=15)
@given(
    st.lists(
        st.one_of(
            st.just(("insert",)),
            st.tuples(st.just("move"), st.integers(1, 6), st.integers(-1, 9)),
            st.tuples(st.just("remove"), st.integers(1, 6)),
        ),
        max_size=12,
    )
)
def test_the_order_is_that_of_a_list(tmp_path_factory: pytest.TempPathFactory, changes: list[Any]) -> None:
    queue, model = Queue(tmp_path_factory.mktemp("order")), list[int]()
    number = 0
    for what, *rest in changes:
        if what == "insert":
            number += 1
            with queue.transaction() as database:
                database.execute(
                    "INSERT INTO entries (position, output_dir, folder, config_name, config, overrides, added) SELECT "
                    "COALESCE(MAX(position), 0) + 1, '/o', '/f', 'c', '', '[]', 0 FROM entries"
                )
            model.append(number)
        elif rest[0] not in model:
            with pytest.raises(QueueError, match="no entry"):
                queue.move(rest[0], 1)
        elif what == "move":
            model.remove(rest[0])
            model.insert(max(int(rest[1]) - 1, 0), rest[0])
            queue.move(*rest)
        else:
            model.remove(rest[0])
            queue.remove(rest[0])
        assert waiting(queue) == model


def test_an_entry_keeps_what_was_added(queue: Queue, add: Add, tmp_path: Path) -> None:
    entry = queue.entry(add("a", rank=8))
    assert (entry.state, entry.place, entry.output_dir) == ("waiting", 1, tmp_path / "runs" / "a")
    assert "rank=8" in entry.overrides and entry.folder == Path.cwd() and entry.config_name == "run.yaml"
    with queue.transaction() as database:
        (text,) = database.execute("SELECT config FROM entries").fetchone()
    assert text == (tmp_path / "run.yaml").read_text()
    assert Queue(queue.folder).entries() == [entry], "another process sees the same"


def test_what_cannot_be_trained_is_refused_when_it_is_added(queue: Queue, add: Add, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank"):
        add("a", rank=0)
    with pytest.raises(ConfigError):
        queue.add(tmp_path / "nowhere.yaml")
    add("a")
    with pytest.raises(QueueError, match="entry 1, which is waiting"):
        add("a")
    (tmp_path / "runs" / "b" / "checkpoint-000003").mkdir(parents=True)
    with pytest.raises(QueueError, match="already holds a run"):
        add("b")
    add("b", resume_from_checkpoint="latest")
    assert waiting(queue) == [1, 2]


def test_pausing_and_starting(queue: Queue, add: Add) -> None:
    first = add("a")
    assert not queue.is_paused
    queue.pause()
    assert queue.is_paused and Queue(queue.folder).is_paused
    queue.start()
    assert not queue.is_paused
    queue.pause(first)
    assert queue.entry(first).is_held
    queue.start(first)
    assert not queue.entry(first).is_held
    with queue.transaction() as database:
        set_state(database, first, "running")
    for change in (queue.remove, queue.pause, queue.start, lambda number: queue.move(number, 1)):
        with pytest.raises(QueueError, match="running"):
            change(first)
    with queue.transaction() as database:
        set_state(database, first, "failed", error="it broke", exit_code=1, num_starts=1)
    other = add("b")
    queue.start(first)
    entry = queue.entry(first)
    assert (entry.state, entry.error, entry.exit_code, entry.num_starts) == ("waiting", None, None, 1)
    assert waiting(queue) == [other, first], "at the end"


def test_an_error_within_a_transaction_takes_all_of_it_back(queue: Queue, add: Add) -> None:
    first = add("a")
    with pytest.raises(QueueError, match="no entry 99"), queue.transaction() as database:
        set_state(database, first, "running")
        queue_entry = [each for each in database.execute("SELECT id FROM entries") if each["id"] == 99]
        if not queue_entry:
            raise QueueError("there is no entry 99")
    assert queue.entry(first).state == "waiting"


def test_many_at_the_same_moment_wait_for_each_other(tmp_path: Path) -> None:
    failures = list[BaseException]()

    def insert() -> None:
        try:
            queue = Queue(tmp_path / "queue")
            for _ in range(5):
                with queue.transaction() as database:
                    (number,) = database.execute("SELECT COUNT(*) FROM entries").fetchone()
                    database.execute(
                        "INSERT INTO entries (position, output_dir, folder, config_name, config, overrides, added) "
                        "VALUES (?, '/o', '/f', 'c', '', '[]', 0)", (number,),
                    )  # fmt: skip
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=insert) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with Queue(tmp_path / "queue").transaction() as database:
        positions = [row[0] for row in database.execute("SELECT position FROM entries ORDER BY position")]
    assert positions == [*range(40)], "none has read what another was about to change"


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"\xff" * 5000, b"\0" * 4096])
def test_a_damaged_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "queue.sqlite3").write_bytes(content)
    with pytest.raises(QueueError, match="move it away"):
        Queue(tmp_path)


def test_places_that_cannot_hold_a_queue_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QueueError, match="--queue"):
        Queue(tmp_path / "file" / "queue")
    (tmp_path / "folder" / "queue.sqlite3").mkdir(parents=True)
    with pytest.raises(QueueError):
        Queue(tmp_path / "folder")
    Queue(tmp_path / "newer")
    with sqlite3.connect(tmp_path / "newer" / "queue.sqlite3") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(QueueError, match="newer version"):
        Queue(tmp_path / "newer")


NOW = datetime(2026, 11, 30, 21, 15, 30, tzinfo=timezone(timedelta(hours=1)))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("22:30", NOW.replace(hour=22, minute=30, second=0)),
        ("21:15", NOW.replace(day=1, month=12, hour=21, minute=15, second=0)),
        ("7:05", NOW.replace(day=1, month=12, hour=7, minute=5, second=0)),
        ("2026-12-24 22:30", datetime(2026, 12, 24, 22, 30, tzinfo=NOW.tzinfo)),
        ("2026-12-24T22:30+00:00", datetime(2026, 12, 24, 22, 30, tzinfo=UTC)),
        ("+90min", NOW + timedelta(minutes=90)),
        ("+2h", NOW + timedelta(hours=2)),
        (" +1d ", NOW + timedelta(days=1)),
    ],
)
def test_times_are_read_as_people_write_them(words: str, expected: datetime) -> None:
    assert read_time(words, NOW) == expected


@pytest.mark.parametrize(
    "words",
    [
        "",
        "tomorrow",
        "25:00",
        "22:60",
        "+h",
        "+-2h",
        "-2h",
        "2025-01-01 10:00",
        "2026-13-01",
        "+9999999h",
        "٢٢:٣٠",
        "+٣h",
    ],
)
def test_times_that_are_none_or_past_are_told(words: str) -> None:
    with pytest.raises(QueueError, match=r"is no time|is past"):
        read_time(words, NOW)
