"""The entries of a queue, in an SQLite file: every change is one transaction, whatever is killed meanwhile."""

from __future__ import annotations

import json
import os
import shlex
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pixtune.config import load_config
from pixtune.errors import QueueError
from pixtune.inputs.reading import MEBIBYTE, read_bounded
from pixtune.queue.entries import ENDED, Entry, EntryState, entry_of
from pixtune.storage.checkpoint_state import find_checkpoints

FILE_NAME = "queue.sqlite3"
VERSION = 1
WAIT_SECONDS = 30.0
"""Time to wait for another process's transaction, which takes milliseconds."""
LARGEST_CONFIG_BYTES = 4 * MEBIBYTE

TABLES = """
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    position REAL NOT NULL,
    state TEXT NOT NULL DEFAULT 'waiting',
    is_held INTEGER NOT NULL DEFAULT 0,
    output_dir TEXT NOT NULL,
    folder TEXT NOT NULL,
    config_name TEXT NOT NULL,
    config TEXT NOT NULL,
    overrides TEXT NOT NULL,
    start_at REAL,
    added REAL NOT NULL,
    began REAL,
    ended REAL,
    exit_code INTEGER,
    error TEXT,
    num_starts INTEGER NOT NULL DEFAULT 0,
    is_attended INTEGER NOT NULL DEFAULT 0,
    attendant TEXT,
    boot TEXT
);
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


def usual_folder() -> Path:
    """Returns the folder of this user's queue: `PIXTUNE_QUEUE`, or one of the XDG state folder."""
    if named := os.environ.get("PIXTUNE_QUEUE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "pixtune" / "queue"


class Queue:
    """One queue. Each method is a transaction of its own and may be called by any thread and process.

    Args:
        folder: folder of its files; made where there is none.

    Raises:
        QueueError: from every method, where the file cannot be used; says why.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.path = self.folder / FILE_NAME
        self._write_ahead()
        with self.transaction() as database:
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise QueueError(f"{self.path} is of a newer version of pixtune. Use that one, or another --queue.")
            for statement in TABLES.split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {VERSION}")

    # ---- what there is

    def entries(self) -> list[Entry]:
        """Lists all entries: those that have begun, by that time, then those that wait, in their order."""
        with self.transaction() as database:
            return all_entries(database)

    def entry(self, number: int) -> Entry:
        """Returns one entry.

        Raises:
            QueueError: there is none of this number.
        """
        with self.transaction() as database:
            return _entry(database, number)

    @property
    def is_paused(self) -> bool:
        """Whether no run is started."""
        with self.transaction() as database:
            return setting(database, "is_paused") == "true"

    def log_of(self, number: int) -> Path:
        """Returns the file with all that an entry's run has printed."""
        return self.folder / "logs" / f"{number}.log"

    def lock_of(self, number: int) -> Path:
        """Returns the file that is locked as long as an entry's processes live."""
        return self.folder / "locks" / f"{number}.lock"

    def config_of(self, number: int) -> Path:
        """Returns the copy of an entry's config that its run reads, whatever happened to the file since."""
        return self.folder / "configs" / f"{number}.yaml"

    # ---- changes

    def add(self, config: Path, overrides: Sequence[str] = (), start_at: float | None = None) -> Entry:
        """Checks a config as `pixtune train` does, and puts a run at the queue's end.

        Args:
            start_at: time before which it is not started, in seconds since 1970.

        Raises:
            ConfigError, NotYetError: the config is wrong.
            QueueError: another entry has the same output folder, or that holds a run which is not to be resumed.
        """
        folder = Path.cwd()
        settings = load_config(config, overrides)
        output_dir = Path(os.path.realpath(folder / settings.output_dir))  # as one folder may have several names
        if settings.resume_from_checkpoint is None and (existing := find_checkpoints(output_dir)):
            raise QueueError(
                f"{output_dir} already holds a run (up to {existing[-1].name}). To go on with it: "
                "resume_from_checkpoint=latest. To train anew: another output_dir."
            )
        try:
            text = read_bounded(config, LARGEST_CONFIG_BYTES).decode()
        except (OSError, ValueError) as error:
            raise QueueError(f"{config} cannot be read ({error}).") from error
        with self.transaction() as database:
            for other in all_entries(database):
                if other.output_dir == output_dir and other.state not in ENDED:
                    raise QueueError(
                        f"{output_dir} is the folder of entry {other.id}, which is {other.state}. Name another one: "
                        "output_dir=FOLDER."
                    )
            last = database.execute("SELECT COALESCE(MAX(position), 0) FROM entries").fetchone()[0]
            number = database.execute(
                "INSERT INTO entries (position, output_dir, folder, config_name, config, overrides, start_at, added) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    last + 1, str(output_dir), str(folder), config.name, text, json.dumps([*overrides]), start_at,
                    time.time(),
                ),
            ).lastrowid  # fmt: skip
            assert number is not None
            return _entry(database, number)

    def move(self, number: int, place: int) -> Entry:
        """Moves an entry that waits to a place among those that do, 1 for the next; beyond the last one: to the end.

        Raises:
            QueueError: it does not wait.
        """
        with self.transaction() as database:
            if _entry(database, number).state != "waiting":
                raise QueueError(f"entry {number} does not wait: it is {_entry(database, number).state}.")
            waiting = [each.id for each in all_entries(database) if each.state == "waiting" and each.id != number]
            waiting.insert(max(place - 1, 0), number)
            for position, each in enumerate(waiting, 1):
                database.execute("UPDATE entries SET position = ? WHERE id = ?", (position, each))
            return _entry(database, number)

    def remove(self, number: int) -> Entry:
        """Takes an entry that does not run out of the queue. Its output folder stays.

        Raises:
            QueueError: it runs.
        """
        with self.transaction() as database:
            entry = _entry(database, number)
            if entry.state == "running":
                raise QueueError(
                    f"entry {number} is running: stop it first (pixtune stop {shlex.quote(str(entry.output_dir))})."
                )
            database.execute("DELETE FROM entries WHERE id = ?", (number,))
        for path in (self.log_of(number), self.config_of(number), self.lock_of(number)):
            path.unlink(missing_ok=True)
        return entry

    def pause(self, number: int | None = None) -> None:
        """Lets no run start, or not one of them. What runs goes on.

        Raises:
            QueueError: that one does not wait.
        """
        with self.transaction() as database:
            if number is None:
                database.execute("INSERT OR REPLACE INTO settings VALUES ('is_paused', 'true')")
                return
            if _entry(database, number).state != "waiting":
                raise QueueError(f"entry {number} does not wait: it is {_entry(database, number).state}.")
            database.execute("UPDATE entries SET is_held = 1 WHERE id = ?", (number,))

    def start(self, number: int | None = None) -> None:
        """Lets runs start again, or one of them, at once; one that has ended waits again, and is resumed if it can be.

        Raises:
            QueueError: that one runs, or has finished.
        """
        with self.transaction() as database:
            if number is None:
                database.execute("INSERT OR REPLACE INTO settings VALUES ('is_paused', 'false')")
                return
            entry = _entry(database, number)
            if entry.state in ("running", "finished"):
                raise QueueError(f"entry {number} cannot be started: it is {entry.state}.")
            if entry.state in ENDED:
                wait_again(database, number)
            database.execute("UPDATE entries SET is_held = 0, start_at = NULL WHERE id = ?", (number,))

    # ---- for those that start runs

    def _write_ahead(self) -> None:
        """Sets the file's mode, once for all, in which readers and a writer do not hinder each other."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                with closing(self._connect()) as database:
                    database.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                # Of two that do it at the same moment, one is refused at once, whatever its time to wait.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise self._unusable(error) from error
                time.sleep(0.05)
            except sqlite3.Error as error:
                raise self._unusable(error) from error

    def _connect(self) -> sqlite3.Connection:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise QueueError(f"{self.path} cannot be opened ({error}). Name another folder: --queue FOLDER.") from error

    def _unusable(self, error: sqlite3.Error) -> QueueError:
        return QueueError(
            f"{self.path} cannot be used ({error}). Is the disk full, or the file damaged? What is lost with it is the "
            "order of the runs alone: move it away to begin anew."
        )

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Opens the file for one transaction, which waits for those of others; an error takes all of it back."""
        database = self._connect()
        try:
            database.row_factory = sqlite3.Row
            database.execute("PRAGMA synchronous = FULL")
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        finally:
            database.close()  # takes back what was not committed


def set_state(database: sqlite3.Connection, number: int, state: EntryState, **values: Any) -> None:
    """Sets an entry's state and other columns."""
    values = {"state": state, **values}
    columns = ", ".join(f"{name} = :{name}" for name in values)
    database.execute(f"UPDATE entries SET {columns} WHERE id = :id", {**values, "id": number})


def wait_again(database: sqlite3.Connection, number: int, first: bool = False) -> None:
    """Lets an entry that was begun wait again, at the queue's beginning or end."""
    position = "MIN(position) - 1" if first else "MAX(position) + 1"
    place = database.execute(f"SELECT {position} FROM entries").fetchone()[0]
    set_state(
        database, number, "waiting", position=place, began=None, ended=None, exit_code=None, error=None, is_attended=0,
        attendant=None,
    )  # fmt: skip


def all_entries(database: sqlite3.Connection) -> list[Entry]:
    """Lists all entries as `Queue.entries` does."""
    rows = database.execute(
        "SELECT * FROM entries ORDER BY state = 'waiting', CASE state WHEN 'waiting' THEN position "
        "ELSE COALESCE(began, added) END, id"
    ).fetchall()
    num_others = sum(row["state"] != "waiting" for row in rows)
    return [entry_of(row, max(index - num_others + 1, 0)) for index, row in enumerate(rows)]


def _entry(database: sqlite3.Connection, number: int) -> Entry:
    for entry in all_entries(database):
        if entry.id == number:
            return entry
    raise QueueError(f"there is no entry {number} in the queue: `pixtune queue list` shows them.")


def setting(database: sqlite3.Connection, name: str) -> str | None:
    """Returns a setting of the whole queue."""
    row = database.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
    return row["value"] if row else None
