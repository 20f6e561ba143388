"""What is said of a checkpoint before anything of its run is made, and who decides among several processes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from accelerate import Accelerator

from pixtune.errors import ConfigError
from pixtune.trained import resume_point
from pixtune.trained.resume_point import changed_versions, decide_once


def test_versions_that_differ_are_named_with_both() -> None:
    now = {"python": "3.12.1", "torch": "2.15.0", "peft": "0.21.2"}
    assert changed_versions({"python": "3.11.9", "torch": "2.15.0"}, now) == "python 3.11.9 -> 3.12.1"
    assert changed_versions({}, now) == changed_versions(now, now) == ""


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], list[Any]]:
    """Two processes after one another, with what the first one broadcasts."""
    sent: list[list[Any]] = []

    def broadcast(outcome: list[Any]) -> list[Any]:
        sent.append(outcome)
        return sent[0]

    def run(decide: Callable[[], Any]) -> list[Any]:
        found: list[Any] = []
        for is_main in (True, False):
            try:
                found.append(decide_once(cast(Accelerator, SimpleNamespace(is_main_process=is_main)), decide))
            except ConfigError as error:
                found.append(str(error))
        return found

    monkeypatch.setattr(resume_point, "broadcast_object_list", broadcast)
    return run


def test_the_first_process_decides_for_all(processes: Callable[[Callable[[], Any]], list[Any]]) -> None:
    calls: list[int] = []

    def decide() -> int:
        calls.append(1)
        return len(calls)

    assert processes(decide) == [1, 1] and calls == [1]


def test_its_error_is_everyones(processes: Callable[[Callable[[], Any]], list[Any]]) -> None:
    def decide() -> None:
        raise ConfigError("in use", ["by another run"])

    assert processes(decide) == ["in use:\n  - by another run"] * 2
