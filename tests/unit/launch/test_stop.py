"""One process of two: what it waits for, and which of both reports the end. The other one is an object in a thread."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pixtune.errors import ConfigError, DataError, ExchangeError, TrainingError
from pixtune.launch import peers, stop
from pixtune.launch.peers import Link, Peers
from pixtune.launch.stop import Stopped, StopRequest, stopped_code


class Other:
    """The other process of two, which answers as long as it lives."""

    def __init__(self, rank: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.peers = Peers(rank, 2, [Link(1 - rank, f"process {1 - rank}", connection)])
        self._connection = connection
        self._lives = True
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._live)
        self._thread.start()

    def _live(self) -> None:
        while self._lives:
            with self._lock:
                self.peers.exchange()
            time.sleep(0.005)

    def does(self, what: Callable[[Peers], object]) -> None:
        with self._lock:
            what(self.peers)

    def die(self) -> None:
        self._lives = False
        self._thread.join()
        self._connection.close()


@contextmanager
def beside(rank: int) -> Iterator[tuple[StopRequest, Other]]:
    """A request to stop of the process of a rank, connected to the other one."""
    here, there = socket.socketpair()
    here.setblocking(False)
    other = Other(1 - rank, there)
    with StopRequest() as request:
        request.connect(Peers(rank, 2, [Link(1 - rank, f"process {1 - rank}", here)]))
        try:
            yield request, other
        finally:
            other.die()
            request._failed = False  # else its thread would end this process soon, as it should
    time.sleep(0.01)
    here.close()


def later(seconds: float, what: Callable[[], object]) -> None:
    threading.Timer(seconds, what).start()


def wait_until(what: Callable[[], object]) -> None:
    end = time.monotonic() + 5
    while not what():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.005)


def test_a_process_waits_at_a_place_for_as_long_as_the_other_one_works_alone() -> None:
    with beside(1) as (request, other):
        later(0.3, lambda: other.does(lambda peers: peers.come("step 5", {})))
        began = time.monotonic()
        request.meet("step 5")
        assert time.monotonic() - began > 0.25
        other.does(lambda peers: peers.come("the data", {"a.png": "1"}))
        with pytest.raises(ConfigError, match="process 1 of this run would train something else") as refused:
            request.agree("the data", {"a.png": "2"})
        assert refused.value.faults == ["a.png: process 0 has 1, process 1 has 2"]


def test_it_waits_no_longer_for_one_that_is_gone() -> None:
    with beside(0) as (request, other):
        later(0.1, other.die)
        request.meet("step 5")  # the loop asks next
        assert request.requested(5)
        with pytest.raises(TrainingError, match="process 1 is gone"):
            request.agree("the encodings")


def test_one_process_alone_meets_nobody_and_reports_its_own_errors() -> None:
    with StopRequest() as request:
        request.meet("step 5")
        request.agree("the data", {"a.png": "1"})
        error = DataError("1 picture cannot be used", ["a.png"])
        assert request.one_voice(error) is error and request.is_first


def test_no_thread_would_answer_for_a_request_that_never_comes() -> None:
    here, _there = socket.socketpair()
    request = StopRequest()
    request.connect(Peers(0, 2, [Link(1, "process 1", here)]))
    assert not request.is_connected
    request.meet("step 5")


def test_the_first_process_reports_the_error_of_another_one_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "NEWS_SECONDS", 5.0)
    error = DataError("1 picture cannot be used", ["a.png is damaged"])
    with beside(1) as (request, other):  # the one that has it
        assert request.one_voice(error) is None
        wait_until(lambda: other.peers.lost == f"process 1 has ended with an error: {error}")
    with beside(0) as (request, other):  # the first one, whose exchange breaks off meanwhile
        later(0.1, lambda: other.does(lambda peers: peers.leave(f"{error}")))
        report = request.one_voice(RuntimeError("Connection closed by peer"))
        assert isinstance(report, TrainingError)
        assert f"{report}" == f"process 1 has ended with an error: {error}"


@pytest.mark.parametrize("error", [DataError("x", ["y"]), OSError(28, "No space left on device")])
def test_an_error_of_the_first_process_is_its_own_to_report(error: Exception) -> None:
    with beside(0) as (request, other):
        assert request.one_voice(error) is error
        wait_until(lambda: other.peers.lost is not None)
        assert other.peers.is_told, "the other one leaves it to the first"


def test_a_bug_keeps_its_traceback_where_it_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "NEWS_SECONDS", 0.2)
    with beside(1) as (request, other):
        bug = KeyError("x")
        assert request.one_voice(bug) is bug
        wait_until(lambda: other.peers.lost == "process 1 has ended with an error: KeyError: 'x'")


def test_where_the_first_is_killed_one_process_of_each_machine_reports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, local_rank, reports in ((1, "1", True), (8, "0", True), (9, "1", False)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with beside(1) as (request, other):
            assert request._peers is not None
            request._peers.rank = rank
            other.die()
            request.meet("step 5")
            report = request.one_voice(ExchangeError("gradients could not be exchanged"))
            assert (report is not None) == reports
            assert report is None or "process 0 is gone" in str(report)


def test_the_end_by_request_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(stop, "end_now", lambda code, line: ended.append(code))
    with pytest.raises(Stopped), beside(1) as (_, other):
        raise Stopped
    assert other.peers.lost is None and not ended


@pytest.mark.parametrize(("restarts", "code"), [(None, 130), ("0", 130), ("3", 0), ("many", 130)])
def test_a_launcher_that_would_start_a_stopped_run_again_is_given_0(restarts: str | None, code: int) -> None:
    assert stopped_code({} if restarts is None else {"TORCHELASTIC_MAX_RESTARTS": restarts}) == code


def test_what_hangs_after_an_error_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries may wait for processes that are gone as they are torn down."""
    ended: list[tuple[int, str]] = []
    monkeypatch.setattr(stop, "end_now", lambda code, line: ended.append((code, line)))
    monkeypatch.setattr(stop, "FAILED_SECONDS", 0.1)
    monkeypatch.setattr(stop, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(peers, "BEAT_SECONDS", 0.05)
    with beside(1) as (request, _):
        request.failing(DataError("x", ["y"]))
        wait_until(lambda: ended)
    assert ended[0] == (1, "")
