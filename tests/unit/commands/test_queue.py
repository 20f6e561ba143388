"""`pixtune queue ...` as it is typed, and as programs read it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pixtune.cli import app
from pixtune.errors import QueueError
from pixtune.queue.store import Queue, set_state
from tests.runs import overrides, write_config


class Typed:
    """A queue that is used by typed commands alone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.queue = folder, Queue(folder / "queue")

    def __call__(self, *words: object) -> Result:
        return CliRunner().invoke(
            app, ["queue", *map(str, words)], env={"PIXTUNE_QUEUE": str(self.queue.folder), "COLUMNS": "400"}
        )

    def add(self, name: str, *words: object) -> Result:
        return self("add", write_config(self.folder), *overrides(self.folder / name, self.folder / "cache"), *words)

    def listed(self) -> list[dict[str, object]]:
        return json.loads(self("list", "--json").stdout)["entries"]


@pytest.fixture
def typed(tmp_path: Path) -> Typed:
    return Typed(tmp_path)


def test_a_queue_is_filled_put_in_order_and_emptied(typed: Typed, tmp_path: Path) -> None:
    assert "pixtune queue add" in typed("list").stdout
    for name in ("a", "b", "c"):
        assert typed.add(name).exit_code == 0
    added = typed.add("d", "--first", "--at", "+2h")
    assert "entry 4, number 1" in added.stdout and "`pixtune queue run` starts the queue" in added.stdout
    assert [each["id"] for each in typed.listed()] == [4, 1, 2, 3]
    assert "number 2" in typed("move", 3, 2).stdout
    assert typed("move", 4, "last").exit_code == 0
    assert [each["id"] for each in typed.listed()] == [3, 1, 2, 4]
    assert typed("pause", 1).exit_code == 0 and typed("pause").exit_code == 0
    shown = typed("list").stdout
    assert "paused" in shown and "held" in shown and "not before 20" in shown and str(tmp_path / "a") in shown
    assert typed("start").exit_code == 0 and typed("start", 1).exit_code == 0
    assert json.loads(typed("list", "--json").stdout)["is_paused"] is False
    assert typed("remove", 1, 2).exit_code == 0
    assert [each["id"] for each in typed.listed()] == [3, 4]
    with typed.queue.transaction() as database:
        set_state(database, 3, "failed", exit_code=1, error="it broke\nin detail", began=100.0, ended=160.0)
    assert "entry 3: it broke (log: " in (shown := typed("list").stdout) and "after 1 min 0 s, exit code 1" in shown
    assert "it broke" in typed.listed()[0]["error"]  # type: ignore[operator]
    assert typed("remove", "--ended").exit_code == 0
    assert [each["id"] for each in typed.listed()] == [4]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["move", 9, 1], 1, "no entry 9"),
        (["move", 1, 0], 2, "no place"),
        (["move", 1, "up"], 2, "no place"),
        (["remove"], 2, "--ended"),
        (["remove", 9], 1, "no entry 9"),
        (["pause", 9], 1, "no entry 9"),
        (["start", 9], 1, "no entry 9"),
        (["stop", 1], 1, "not running"),
        (["add"], 2, "name a config file"),
        (["remove", "all"], 2, "integer"),
    ],
)
def test_words_that_cannot_be_followed_are_told(typed: Typed, words: Sequence[object], code: int, told: str) -> None:
    typed.add("a")
    outcome = typed(*words)
    assert outcome.exit_code == code and told in outcome.output + str(outcome.exception)


def test_the_server_ends_when_all_is_done_and_tells_how(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixtune.commands import queue as commands

    for name in ("a", "b"):
        typed.add(name)
    calls = list[int]()

    def advance(queue: Queue) -> list[subprocess.Popen[bytes]]:
        calls.append(len(calls))
        if calls[-1] == 1:
            raise QueueError("the disk is full")
        number, state = [(1, "running"), (0, ""), (1, "failed"), (2, "running"), (2, "finished")][calls[-1]]
        with queue.transaction() as database:
            set_state(database, number, state)  # type: ignore[arg-type]
        return []

    monkeypatch.setattr(commands, "advance", advance)
    monkeypatch.setattr(commands, "LOOK_SECONDS", 0)
    outcome = typed("run", "--until-done")
    assert outcome.exit_code == 1, "one has failed"
    told = [line.split(": ")[0].split(" ", 1)[1] for line in outcome.stdout.splitlines() if " entry " in line]
    assert told == ["entry 1 is running", "entry 1 is failed", "entry 2 is running", "entry 2 is finished"]
    assert "warning: the disk is full" in outcome.stdout
    typed.queue.pause()
    typed.add("c")
    calls.clear()
    monkeypatch.setattr(commands, "advance", lambda queue: [])
    assert typed("run", "--until-done").exit_code == 0, "nothing is started in a pause"


def test_ctrl_c_ends_the_server_alone(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixtune.commands import queue as commands

    def interrupt(queue: Queue) -> list[subprocess.Popen[bytes]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "advance", interrupt)
    typed.add("a")
    with typed.queue.transaction() as database:
        set_state(database, 1, "running")
    outcome = typed("run")
    assert outcome.exit_code == 0 and "the run goes on" in outcome.stdout
