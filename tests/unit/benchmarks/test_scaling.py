"""What `benchmarks/scaling.py` has found is kept where a run fails or takes too long, and nothing runs on."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import scaling
from scaling_processes import Bench, CellError, children_of, end_group, finish, is_running, launched, start_run


def bench(folder: Path, seconds: float = 60) -> Bench:
    return Bench(folder, "cpu", 2, 1, most_seconds=seconds, end_by=time.monotonic() + 60)


def test_a_cell_that_fails_keeps_what_its_runs_before_have_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cell(bench: Bench) -> Iterator[dict[str, object]]:
        yield {"name": "first"}
        raise CellError("exit code 1")

    monkeypatch.setitem(scaling.CELLS, "a", cell)
    scaling.run_cell("a", bench(tmp_path), tmp_path)
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["runs"] == [{"name": "first"}] and written["failed"] == "CellError: exit code 1"


def test_a_run_that_takes_too_long_is_ended_with_what_it_started(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '99']).pid, flush=True); time.sleep(99)"
    process = start_run(bench(tmp_path), launched(1, ["-c", script]), log)
    while not log.read_text().strip():
        time.sleep(0.01)
    with pytest.raises(CellError, match="took more than"):
        finish(bench(tmp_path, 0.1), process, log)
    child = int(log.read_text())
    end_by = time.monotonic() + 5
    while is_running(child) and time.monotonic() < end_by:
        time.sleep(0.01)
    assert process.poll() is not None and not is_running(child)


def test_nothing_starts_when_no_time_is_left(tmp_path: Path) -> None:
    with pytest.raises(CellError, match="no time is left"):
        start_run(bench(tmp_path, 1), ["true"], tmp_path / "log")
    assert not (tmp_path / "log").exists()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are found in /proc")
def test_the_ranks_of_a_launcher_are_found(tmp_path: Path) -> None:
    script = "import os, subprocess, sys\nfor rank in '01': subprocess.Popen(['sleep', '9'], env={'RANK': rank})\n"
    process = start_run(
        bench(tmp_path), [sys.executable, "-c", script + "import time; time.sleep(9)"], tmp_path / "log"
    )
    try:
        end_by = time.monotonic() + 5
        while len(found := children_of(process.pid)) < 2 and time.monotonic() < end_by:
            time.sleep(0.01)
        assert found.keys() == {0, 1} and os.getpid() not in found.values()
    finally:
        end_group(process)
