"""A run that is asked from outside, by files in its folder: it saves, waits and stops, and trains the same bits."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from pixtune.runs.read import read_run
from pixtune.storage.checkpoint_state import find_checkpoints
from pixtune.storage.requests import ask, withdraw
from pixtune.tracking.metrics import read_metrics
from tests.faults.test_stop import STOPPED, end_of, skip_first_look, start, wait_until


def losses_of(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "step"}


def test_a_run_saves_pauses_and_stops_when_it_is_asked_and_trains_the_same(tmp_path: Path, warm_cache: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop_now").touch()  # left from an earlier session
    process = start(tmp_path, warm_cache, skip_first_look)
    run = tmp_path / "run"

    def wait_for_more(steps: int) -> None:
        goal = max(losses_of(run), default=0) + steps
        wait_until(lambda: max(losses_of(run), default=0) >= goal, process)

    wait_until(lambda: (run / "metrics.jsonl").exists(), process)
    wait_for_more(2)
    assert read_run(run).state == "running" and read_run(run).num_steps == 5000
    (run / "stop_now").mkdir()  # nobody's request: it cannot be deleted as one
    ask(run, "save_now")
    wait_until(lambda: not (run / "save_now").exists() and find_checkpoints(run), process)
    ask(run, "pause")
    wait_until(lambda: read_run(run).is_paused, process)
    paused = read_run(run)
    assert paused.state == "running" and paused.checkpoints[-1].step == paused.step, "nothing is lost by killing it"
    time.sleep(0.5)
    assert read_run(run).step == paused.step
    withdraw(run, "pause")
    wait_for_more(2)
    assert not read_run(run).is_paused
    (run / "stop_now").rmdir()
    ask(run, "pause")
    wait_until(lambda: read_run(run).is_paused, process)
    process.send_signal(signal.SIGTERM)
    code, printed = end_of(process)
    assert code == STOPPED and "Traceback" not in printed, printed
    stopped = read_run(run)
    assert (stopped.state, stopped.requests) == ("stopped", ())
    assert stopped.checkpoints[-1].step == stopped.step
    assert "stop_now cannot be deleted" in printed and "paused, with its memory kept" in printed

    asked, steps = losses_of(run), 6
    (tmp_path / "alone").mkdir()
    alone = start(tmp_path / "alone", warm_cache, skip_first_look)
    wait_until(lambda: len(losses_of(tmp_path / "alone" / "run")) >= steps, alone)
    ask(tmp_path / "alone" / "run", "stop_now")
    code, printed = end_of(alone)
    assert code == STOPPED and "stop_now: stopping after this step" in printed, printed
    assert read_run(tmp_path / "alone" / "run").state == "stopped"
    undisturbed = losses_of(tmp_path / "alone" / "run")
    same = asked.keys() & undisturbed.keys()
    assert len(same) >= steps and all(asked[step] == undisturbed[step] for step in same)
