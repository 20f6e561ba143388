"""Servers and attendants killed at each line: every run begins once, none beside another, all come to an end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pixtune.queue.store import Queue
from tests.runs import ROOT, environment, overrides, write_config

SEEDS = (0, 1, 130)
STATES = ["finished", "failed", "stopped"]


@pytest.fixture
def harness(tmp_path: Path) -> Callable[[str, int, int], list[dict[str, Any]]]:
    """Runs `harness.py` on a queue of some entries, and returns what became of each try."""

    def run(who: str, num_entries: int, every: int) -> list[dict[str, Any]]:
        template = tmp_path / "template"
        queue = Queue(template)
        for number in range(num_entries):
            output_dir = template / "runs" / str(number)
            queue.add(write_config(tmp_path), overrides(output_dir, tmp_path / "cache", seed=SEEDS[number % 3]))
        outcome = subprocess.run(
            [sys.executable, "-m", "tests.unit.queue.harness", who, str(template), str(every)],
            cwd=ROOT, env=environment(PYTHONPATH=f"{ROOT}/src:{ROOT}"), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert outcome.returncode == 0, outcome.stderr
        return json.loads(outcome.stdout)

    return run


def test_a_server_that_is_killed_at_any_line_starts_every_run_once_and_in_order(harness: Callable[..., Any]) -> None:
    tries = harness("server", 2, 9)
    assert len(tries) > 12, "or nothing was killed"
    for each in tries:
        assert each["ended"] and each["states"] == STATES[:2], each
        assert each["begins"] == ["0", "1"] and not each["overlaps"], each


def test_an_attendant_that_is_killed_at_any_line_leaves_a_queue_that_goes_on(harness: Callable[..., Any]) -> None:
    tries = harness("attendant", 2, 13)
    assert len({tuple(each["states"]) for each in tries}) > 1, "it was killed before and after its run"
    for each in tries:
        assert each["ended"] and not each["overlaps"], each
        assert each["begins"] in (["0", "1"], ["1"]), each
        assert each["states"][-1] == "failed" and each["states"][0] in ("finished", "killed"), each


def test_several_servers_of_one_queue_start_every_run_once(harness: Callable[..., Any]) -> None:
    (outcome,) = harness("two", 6, 1)
    assert outcome["codes"] == [0, 0, 0] and outcome["states"] == STATES * 2
    assert outcome["begins"] == ["0", "1", "2", "3", "4", "5"] and not outcome["overlaps"]
