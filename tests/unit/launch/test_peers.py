"""Processes of one run: where they stop, and who is missed. Here they are objects that talk through real sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from pixtune.errors import TrainingError
from pixtune.launch import peers as module
from pixtune.launch.peers import Link, Peers, connect_peers


def connected(num_processes: int) -> list[Peers]:
    links, others = [], []
    for rank in range(1, num_processes):
        here, there = socket.socketpair()
        here.setblocking(False)
        there.setblocking(False)
        links.append(Link(rank, f"process {rank}", here))
        others.append(Peers(rank, num_processes, [Link(0, "process 0", there)]))
    return [Peers(0, num_processes, links), *others]


def talk(group: list[Peers], until: Callable[[], object], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "nothing came of it"
        for process in group:
            process.exchange()


def test_the_process_that_is_furthest_decides_where_all_stop() -> None:
    group = connected(3)
    group[2].ask_to_stop("SIGTERM")
    talk(group, lambda: all(process.reason == "SIGTERM" for process in group))
    for process, begun in zip(group, (10, 11, 10), strict=True):
        assert process.stop_at is None
        process.freeze(begun)
        process.freeze(99)  # only the first report counts
    talk(group, lambda: all(process.stop_at is not None for process in group))
    assert [process.stop_at for process in group] == [11, 11, 11]


def test_all_learn_that_the_first_has_saved() -> None:
    group = connected(3)
    group[1].saved()
    assert not group[1].is_saved, "only the first saves"
    group[0].saved()
    talk(group, lambda: all(process.is_saved for process in group))


def test_a_process_whose_connection_ends_is_named_to_all() -> None:
    first, second, third = connected(3)
    for link in second._links.values():
        link.connection.close()
    talk([first, third], lambda: first.lost and third.lost)
    assert first.lost == third.lost
    assert first.lost is not None and first.lost.startswith("process 1 is gone")
    first.freeze(7)
    third.freeze(7)
    talk([first, third], lambda: third.stop_at == 7)


def test_a_process_that_says_why_it_ends_is_quoted() -> None:
    first, second = connected(2)
    second.leave("2 pictures cannot be used")
    talk([first], lambda: first.lost)
    assert first.lost == "process 1 has ended with an error: 2 pictures cannot be used"


def test_a_process_that_has_finished_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.2)
    first, second = connected(2)
    second.leave("")
    for link in second._links.values():
        link.connection.close()
    end = time.monotonic() + 0.5
    talk([first], lambda: time.monotonic() > end)
    assert first.lost is None
    first.freeze(3)
    assert first.stop_at == 3


def test_silence_is_missed_but_not_by_one_who_was_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    first, second = connected(2)
    now[0] = 1000.0  # this whole process was stopped, and everybody's clock went on
    first.exchange()
    assert first.lost is None
    for _ in range(40):
        now[0] += 1
        first.exchange()
        second.exchange()
    assert first.lost is None and second.lost is None, "signs of life count"
    while first.lost is None and now[0] < 1200:
        now[0] += 1
        first.exchange()
    assert first.lost is not None and "process 1 has not been heard of for 45 s" in first.lost
    assert module.SILENT_SECONDS <= now[0] - 1040 <= module.SILENT_SECONDS + 2


def test_they_meet_by_what_the_first_shares_and_strangers_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    shared: list[Any] = []
    is_shared = threading.Event()
    met: dict[int, Peers] = {}

    def share(value: Any) -> Any:
        if value is not None:
            shared.append(value)
            with socket.create_connection(("localhost", value[1])) as stranger:
                stranger.sendall(b'{"token": "guessed", "rank": 1}\n')
            with socket.create_connection(("localhost", value[1])) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            is_shared.set()
        assert is_shared.wait(5)
        return shared[0]

    def meet(rank: int) -> None:
        met[rank] = connect_peers(rank, 3, share)

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    group = [met[rank] for rank in range(3)]
    group[0].ask_to_stop("SIGHUP")
    talk(group, lambda: all(process.reason == "SIGHUP" for process in group))
    assert [process.rank for process in group] == [0, 1, 2]
    for process, begun in zip(group, (3, 4, 3), strict=True):
        process.freeze(begun)
    talk(group, lambda: all(process.stop_at == 4 for process in group))


def test_a_first_process_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(TrainingError, match=rf"process 1 cannot reach process 0 at localhost:{port} .*firewall"):
        connect_peers(1, 2, lambda value: ["localhost", port, "token", "host", 5])
