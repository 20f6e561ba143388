"""Processes of one run: where they stop, and who is missed. Here they are objects that talk through real sockets."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pixtune.errors import ConfigError, TrainingError
from pixtune.launch import joining
from pixtune.launch import peers as module
from pixtune.launch.agreement import digest_of, refuse_differences
from pixtune.launch.joining import connect_peers, join_launched
from pixtune.launch.peers import Link, Meeting, Peers

OPEN: list[socket.socket] = []
"""Connections that a test has made."""


@pytest.fixture(autouse=True)
def _closes_what_it_has_made() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def connected(num_processes: int) -> list[Peers]:
    links, others = [], []
    for rank in range(1, num_processes):
        here, there = socket.socketpair()
        here.setblocking(False)
        there.setblocking(False)
        OPEN.extend([here, there])
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


def test_they_wait_for_the_last_one_and_the_first_says_who_differs() -> None:
    first, second, third = group = connected(3)
    first.come("the data", {"a.png": "1", "b.png": "2"})
    second.come("the data", {"b.png": "2", "a.png": "1"})
    for _ in range(5):
        for process in group:
            process.exchange()
    assert [process.meeting("the data") for process in group] == [None] * 3
    third.come("the data", {"a.png": "1", "b.png": "3"})
    met: dict[int, Meeting] = {}

    def all_have_met() -> bool:
        for process in group:
            if (meeting := process.meeting("the data")) is not None:
                met[process.rank] = meeting
        return len(met) == 3

    talk(group, all_have_met)
    assert [met[rank].differing for rank in range(3)] == [(2,)] * 3
    assert [met[rank].facts for rank in range(3)] == [{}, {}, {"a.png": "1", "b.png": "2"}]
    refuse_differences(1, met[1].differing, {}, met[1].facts)
    with pytest.raises(ConfigError, match="process 2 of this run") as refused:
        refuse_differences(2, (2,), {"a.png": "1", "b.png": "3", "c.png": "4"}, met[2].facts)
    assert refused.value.faults == [
        "b.png: process 0 has 2, process 2 has 3",
        "c.png: process 0 has nothing, process 2 has 4",
    ]


@pytest.mark.parametrize("said", [True, False], ids=["it has left", "it was killed"])
def test_nobody_waits_for_one_that_is_gone(said: bool) -> None:
    first, second, third = connected(3)
    first.come("step 5", {})
    third.come("step 5", {})
    if said:
        second.leave("")
    for link in second._links.values():
        link.connection.close()
    talk([first, third], lambda: first.meeting("step 5"))
    talk([first, third], lambda: third.meeting("step 5"))
    assert (first.lost is None) == said


def test_the_first_confirms_that_it_reports_an_error_and_the_others_leave_it_to_it() -> None:
    first, second, third = group = connected(3)
    second.leave("a picture is damaged:\n  - a.png\n" + "x" * 100_000)
    talk(group, lambda: second.is_told and third.is_told)
    assert first.lost is not None and first.lost.startswith(
        "process 1 has ended with an error: a picture is damaged:\n"
    )
    assert len(first.lost) < 9000 and third.lost == first.lost and not first.is_told


def test_the_end_of_the_first_is_its_own_to_report_unless_it_was_killed() -> None:
    first, second, third = connected(3)
    first.leave("the disk is full")
    talk([second, third], lambda: second.lost and third.lost)
    assert second.is_told and third.is_told and "the disk is full" in f"{third.lost}"
    for process in (first, second, third, first):
        process.exchange()
    assert first.lost is None, "nobody tells it of itself"
    first, second, third = connected(3)
    for link in first._links.values():
        link.connection.close()
    talk([second, third], lambda: second.lost and third.lost)
    assert not second.is_told and not third.is_told


def test_two_hundred_and_fifty_five_others_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real connections, in one process: they come, they meet, and one that is gone is named, in some milliseconds."""
    number, shared = 256, list[Any]()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    others: list[socket.socket] = []

    def share(value: Any) -> None:
        shared.extend(value)

    def come() -> None:
        while len(shared) < 5:
            time.sleep(0.001)
        for rank in range(1, number):
            connection = socket.create_connection(("localhost", shared[1]))
            hello = {"token": shared[2], "rank": rank, "of": number, "host": f"host{rank // 8}", "process": rank}
            connection.sendall(json.dumps(hello).encode() + b"\n")
            others.append(connection)

    coming = threading.Thread(target=come)
    coming.start()
    first = connect_peers(0, number, share)
    coming.join()
    began = time.process_time()
    first.come("the start", {"learning_rate": "1"})
    arrival = json.dumps({"at": "the start", "digest": digest_of({"learning_rate": "1"})}).encode() + b"\n"
    for connection in others:
        connection.sendall(arrival)
    talk([first], lambda: first.meeting("the start"))
    assert all(b'"met": "the start"' in connection.recv(1 << 16) for connection in others)
    others[99].close()
    talk([first], lambda: first.lost)
    assert first.lost is not None and first.lost.startswith("process 100 of 256 (pid 100 on host12) is gone")
    assert time.process_time() - began < 1.0
    assert Peers(0, 1024, [])._beat_seconds == 5.0, "1,023 others give 205 signs of life a second"
    for connection in others:
        connection.close()


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


@pytest.mark.parametrize(
    ("hellos", "reason"),
    [
        ([{"rank": 1, "of": 4}, {"rank": 1, "of": 4}], "two processes have the same RANK: process 1 of 4 (pid 7 on b)"),
        ([{"rank": 1, "of": 2}], "process 1 of 2 (pid 7 on b) has come to a run of 4"),
        ([{"rank": 9, "of": 4}], "process 9 of 4 (pid 7 on b) has come to a run of 4"),
        ([{"rank": 2, "of": 4}], "processes [1, 3] of 4 have not come within 0 s"),
    ],
)
def test_processes_that_are_not_those_of_the_run_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, hellos: list[dict[str, int]], reason: str
) -> None:
    monkeypatch.setattr(joining, "CONNECT_SECONDS", 0.3)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    others: list[socket.socket] = []

    def share(value: list[Any]) -> None:
        for hello in hellos:
            others.append(socket.create_connection(("localhost", value[1])))
            others[-1].sendall(json.dumps({"token": value[2], "host": "b", "process": 7, **hello}).encode() + b"\n")

    with pytest.raises(TrainingError) as refused:
        connect_peers(0, 4, share)
    assert reason in str(refused.value)
    for other in others:
        other.settimeout(5)
        assert reason[:20] in other.recv(1 << 12).decode()
        other.close()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "", "MASTER_PORT": "1"},
        {"RANK": "0", "WORLD_SIZE": "two", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
    ],
)
def test_one_process_joins_nobody(environ: dict[str, str]) -> None:
    assert join_launched(environ) is None


def test_a_launchers_port_that_leads_nowhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in joining.QUIET:
        monkeypatch.setenv(name, "INFO")
    monkeypatch.setattr(joining, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
        environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        with pytest.raises(TrainingError, match=f"process 0 cannot listen at port {port}, MASTER_PORT"):
            join_launched(environ)
    with pytest.raises(TrainingError, match=f"process 1 of 2 has not found process 0 at localhost:{port} within"):
        join_launched({**environ, "RANK": "1"})
    assert all(os.environ[name] == "INFO" for name in joining.QUIET), "what a user has set stays"


def test_a_first_process_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(TrainingError, match=rf"process 1 cannot reach process 0 at localhost:{port} .*firewall"):
        connect_peers(1, 2, lambda value: ["localhost", port, "token", "host", 5])


def test_a_lost_process_is_not_told_of_itself() -> None:
    group = connected(3)
    second, third = group[1:]
    second.leave("KeyError: 'x'")
    talk(group, lambda: third.lost)
    for process in group * 3:
        process.exchange()
    assert second.lost is None and second.is_told


def test_the_first_process_learns_the_most_that_any_has_come_to_need() -> None:
    first, second, third = group = connected(3)
    first.need({"blocks": 0, "parts": 1})
    assert first.needs == {"blocks": 0, "parts": 1}
    second.need({"blocks": 3, "parts": 1})
    third.need({"blocks": 2, "parts": 4})
    talk(group, lambda: first.needs == {"blocks": 3, "parts": 4})
    second.need({"blocks": 1})
    third.need({"blocks": 8})
    talk(group, lambda: first.needs == {"blocks": 8, "parts": 4})
    assert second.needs == {"blocks": 3, "parts": 1}, "the first one alone writes them down"
