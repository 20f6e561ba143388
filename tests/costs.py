"""Shows what tests cost in CPU seconds, which another load on the machine hardly changes: `pytest -p tests.costs`.

Counted are a test's own process and those that it starts and waits for, also through the process that forks
(`tests/processes.py`). A fixture's cost is its first user's; forks that are never waited for are nobody's.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

MOST_SHOWN = 40
OPEN = open
"""Python's own: a test that has just ended may have replaced it."""
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """CPU time of this process, the one that forks, and their children that have ended."""
    seconds = sum(os.times()[:4])
    forks = sys.modules.get("multiprocessing.forkserver")
    server = forks and forks._forkserver._forkserver_pid
    if server:
        with OPEN(f"/proc/{server}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        seconds += sum(map(int, fields[11:15])) / TICKS
    return seconds


class Costs:
    """Measures from one report of a test to the next, and shows sums at the end."""

    def __init__(self) -> None:
        self.last = cpu_seconds()
        self.of_test: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, Any, Any]:
        report = yield
        now = cpu_seconds()
        report.cpu_seconds, self.last = now - self.last, now  # travels to xdist's controller with the report
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.of_test[report.nodeid] += report.cpu_seconds

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        files: Counter[str] = Counter()
        for test, seconds in self.of_test.items():
            files[test.partition("::")[0]] += seconds
        for title, costs in (("files", files), ("tests", self.of_test)):
            terminalreporter.section(f"CPU seconds of {title}: {sum(costs.values()):.0f}")
            for name, seconds in costs.most_common(MOST_SHOWN):
                terminalreporter.write_line(f"{seconds:8.2f} {name}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Costs())
