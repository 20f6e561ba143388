"""Told to stop, by whom and when it may be: the step is saved, the run ends soon, and nobody is left behind."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pixtune.storage.checkpoint import load_checkpoint
from pixtune.storage.checkpoint_state import find_checkpoints
from pixtune.tracking.figures import StepOutcome
from pixtune.tracking.metrics import read_metrics
from tests import processes
from tests.runs import ROOT, environment, overrides, write_config

ENDLESS = {"max_train_steps": 5000, "checkpointing_steps": 5000, "logging_steps": 1}
SOON_SECONDS = 5.0
STOPPED = 130


@pytest.fixture(scope="module", autouse=True)
def _nothing_waits_for_the_disk() -> None:
    """An environment that was just installed is gigabytes to be written, for which the first checkpoint would wait."""
    os.sync()


def start(folder: Path, cache: Path, before: processes.Before | None = None, **changes: object) -> processes.Started:
    words = overrides(folder / "run", cache, **{**ENDLESS, **changes})
    arguments = ["-m", "pixtune.cli", "train", "--config", str(write_config(folder)), *words]
    return processes.start(arguments, environment(), before)


def wait_until(what: Callable[[], object], process: processes.Started) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert process.poll() is None, f"ended early: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.01)


def lines_of(folder: Path, kind: str) -> list[int]:
    return [line["step"] for line in read_metrics(folder / "run" / "metrics.jsonl") if line["kind"] == kind]


def wait_for_step(process: processes.Started, folder: Path, step: int) -> None:
    wait_until(lambda: step in lines_of(folder, "step"), process)


def end_of(process: processes.Started, seconds: float = SOON_SECONDS) -> tuple[int | None, str]:
    """Exit code and all that was printed; fails if the process goes on for longer."""
    began = time.monotonic()
    printed, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < seconds, printed
    return process.returncode, printed


def saved_step(folder: Path) -> int:
    (path,) = find_checkpoints(folder / "run")
    return load_checkpoint(path).step


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1], ids=lambda number: signal.Signals(number).name)
def test_a_closed_terminal_and_a_clusters_warning_save_the_very_step(
    tmp_path: Path, warm_cache: Path, number: signal.Signals
) -> None:
    process = start(tmp_path, warm_cache, hang_up_is_heard)
    wait_for_step(process, tmp_path, 3)
    process.send_signal(number)
    code, printed = end_of(process)
    assert code == STOPPED, printed
    assert saved_step(tmp_path) == max(lines_of(tmp_path, "step")), printed
    assert f"{number.name}: stopping after this step" in printed


def hang_up_is_heard() -> None:
    """Whatever the suite itself was started with: a process inherits what `nohup` does."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def hang_up_is_ignored() -> None:
    """What `nohup` does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_nohup_goes_on_without_its_terminal(tmp_path: Path, warm_cache: Path) -> None:
    process = start(tmp_path, warm_cache, hang_up_is_ignored, max_train_steps=15)
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGHUP)
    code, printed = end_of(process, 30)
    assert code == 0, printed


DRAWING: dict[str, object] = {
    "samples__prompts": "['a','b']",
    "samples__num_steps": 5000,
    "samples__every": 3,
    "samples__width": 64,
    "samples__height": 64,
}
MEASURING: dict[str, object] = {
    "validation__held_out": 0.2,
    "validation__num_draws": 5000,
    "validation__every": 3,
}


def skip_first_look() -> None:
    """Nothing is measured or drawn before the first step."""
    from pixtune.services import Services

    look = Services._look
    Services._look = lambda self, step: look(self, step) if step else None  # type: ignore[method-assign]


@pytest.mark.parametrize("work", [DRAWING, MEASURING], ids=["drawing", "measuring"])
def test_told_to_stop_in_work_between_steps_leaves_it_out(
    tmp_path: Path, warm_cache: Path, work: dict[str, object]
) -> None:
    process = start(tmp_path, warm_cache, skip_first_look, **work)
    wait_for_step(process, tmp_path, 3)
    time.sleep(0.5)
    assert max(lines_of(tmp_path, "step")) == 3, "it is not at work between steps"
    process.send_signal(signal.SIGTERM)
    code, printed = end_of(process)
    assert code == STOPPED, printed
    assert saved_step(tmp_path) == 3, printed
    assert "warning" not in printed, printed


def test_told_to_stop_before_the_first_step_ends_at_once(tmp_path: Path, warm_cache: Path) -> None:
    process = start(tmp_path, warm_cache, None, **DRAWING)
    wait_until((tmp_path / "run" / "metrics.jsonl").exists, process)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    code, printed = end_of(process, 2)
    assert code == STOPPED and "stopped before the first step" in printed and "Traceback" not in printed, printed
    assert not find_checkpoints(tmp_path / "run")


def test_told_to_stop_while_encoding_keeps_what_is_encoded(tmp_path: Path) -> None:
    cache, entries = tmp_path / "cache", lambda: [*(tmp_path / "cache").rglob("*.safetensors")]
    process = start(tmp_path, cache, slow_encoding)
    wait_until(lambda: len(entries()) > 3, process)
    process.send_signal(signal.SIGINT)
    code, printed = end_of(process, 3)
    assert code == STOPPED and "Traceback" not in printed, printed
    assert not [*cache.rglob("*.tmp")]
    kept = len(entries())
    again = start(tmp_path, cache, max_train_steps=1)
    code, printed = end_of(again, 60)
    assert code == 0, printed
    assert f"captions: {kept} from the cache" in printed, printed


def slow_encoding() -> None:
    """Each entry of the cache takes a while to be written."""
    from pixtune.data import cache

    write = cache.DiskStore.write

    def slowly(self: cache.DiskStore, digest: str, entry: cache.Entry) -> None:
        time.sleep(0.05)
        write(self, digest, entry)

    cache.DiskStore.write = slowly  # type: ignore[method-assign]


def be_busy() -> None:
    """A minute in a library that does not come back to Python, whatever signal comes."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)


def busy_loading(began: Path) -> None:
    from pixtune import assembly

    def load(*arguments: object) -> None:
        began.touch()
        be_busy()

    vars(assembly)["load_planned"] = load


def test_told_to_stop_while_a_library_loads_ends_all_the_same(tmp_path: Path, warm_cache: Path) -> None:
    began = tmp_path / "began"
    process = start(tmp_path, warm_cache, functools.partial(busy_loading, began))
    wait_until(began.exists, process)
    process.send_signal(signal.SIGTERM)
    code, printed = end_of(process)
    assert code == STOPPED, printed


def busy_step(began: Path) -> None:
    """The sixth step does not end."""
    from pixtune import train

    take = train.train_step

    def stuck(run: Any, micro_batches: Any, step: int) -> StepOutcome:
        if step == 5:
            began.touch()
            be_busy()
        return take(run, micro_batches, step)

    vars(train)["train_step"] = stuck


def test_a_second_signal_ends_at_once_and_keeps_what_is_saved(tmp_path: Path, warm_cache: Path) -> None:
    began = tmp_path / "began"
    process = start(tmp_path, warm_cache, functools.partial(busy_step, began), checkpointing_steps=4)
    wait_until(began.exists, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # passed on by a launcher: the same one
    time.sleep(1.5)
    assert process.poll() is None, "two at once are one"
    process.send_signal(signal.SIGINT)
    code, printed = end_of(process, 1)
    assert code == 1 and "SIGINT: ending at once" in printed, printed
    assert saved_step(tmp_path) == 4
    assert not [*(tmp_path / "run").glob(".checkpoint*")]


def test_a_launcher_that_is_told_to_stop_leaves_no_orphan(tmp_path: Path, warm_cache: Path) -> None:
    """`accelerate launch` passes nothing on: it ends, and its process notices that."""
    words = ["launch", "--num_processes", "1", "--cpu", "train.py", "--config", str(write_config(tmp_path))]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words]
    with subprocess.Popen(
        [*command, *overrides(tmp_path / "run", warm_cache, **ENDLESS)], cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as launcher:  # fmt: skip
        wait_for_step(launcher, tmp_path, 2)
        launcher.send_signal(signal.SIGKILL)
        began = time.monotonic()
        printed, _ = launcher.communicate(timeout=60)  # the pipe closes when the training has ended, too
        assert time.monotonic() - began < SOON_SECONDS + 2, printed
    assert "the launcher has ended: stopping after this step" in printed
    assert saved_step(tmp_path) == max(lines_of(tmp_path, "step"))


# ---- several processes


@pytest.fixture
def two(tmp_path: Path, warm_cache: Path) -> Iterator[list[processes.Started]]:
    """Two processes of one run on the CPU, as a launcher would start them, in their third step or later."""
    port = 29000 + os.getpid() % 900
    ranks = []
    for rank in (0, 1):
        config = write_config(tmp_path)
        words = overrides(tmp_path / "run", warm_cache, **{**ENDLESS, "logging_steps": 7})
        env = environment(
            ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        arguments = ["-m", "pixtune.cli", "train", "--config", str(config), *words]
        ranks.append(processes.start(arguments, env, short_patience))
    wait_for_step(ranks[0], tmp_path, 7)
    yield ranks
    for process in ranks:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)


def short_patience() -> None:
    """A silent process counts as stopped after two seconds."""
    from pixtune.launch import peers, stop

    peers.SILENT_SECONDS, stop.LOST_SECONDS = 2.0, 1.0


def test_one_process_is_told_and_all_stop_after_the_same_step(two: list[processes.Started], tmp_path: Path) -> None:
    two[1].send_signal(signal.SIGTERM)
    (code, printed), (other_code, other) = end_of(two[0]), end_of(two[1])
    assert (code, other_code) == (STOPPED, STOPPED), printed + other
    assert saved_step(tmp_path) == max(lines_of(tmp_path, "step")), printed
    assert f"stopped after step {saved_step(tmp_path)};" in printed


def test_a_killed_process_is_named_and_the_step_is_saved(two: list[processes.Started], tmp_path: Path) -> None:
    two[1].send_signal(signal.SIGKILL)
    code, printed = end_of(two[0])
    assert code == 1, printed
    assert "process 1 of 2 (pid " in printed and "is gone" in printed and "Traceback" not in printed, printed
    assert saved_step(tmp_path) >= 7


def test_a_stopped_process_is_named_and_not_waited_for(two: list[processes.Started]) -> None:
    two[1].send_signal(signal.SIGSTOP)
    code, printed = end_of(two[0], 10)
    assert code == 1, printed
    assert "process 1 of 2 (pid " in printed and "was stopped" in printed, printed
