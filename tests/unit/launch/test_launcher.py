"""Which parents a run ends with."""

from __future__ import annotations

import os
import sys

import pytest

from pixtune.launch import launcher
from pixtune.launch.launcher import command_of, find_launcher, is_launcher, is_orphan


@pytest.mark.parametrize(
    "command",
    [
        "/usr/bin/python3 /home/USER/.venv/bin/accelerate launch train.py --config c.yaml",
        "accelerate launch train.py",
        "/usr/bin/python -m accelerate.commands.launch --num_processes 2 train.py",
        "python -m accelerate.commands.accelerate_cli launch train.py",
        "/usr/bin/python3 -u /x/bin/torchrun --nproc-per-node 2 train.py",
        "python -m torch.distributed.run train.py",
        "python /x/site-packages/torch/distributed/run.py train.py",
    ],
)
def test_launchers_are_recognized(command: str) -> None:
    assert is_launcher(command.split())


@pytest.mark.parametrize(
    "command",
    [
        "-bash",
        "bash -c accelerate-like/run.sh",
        "tmux new-session -s accelerate_run",
        "/usr/bin/python3 train.py --config /data/accelerate.yaml",
        "make demo",
        "slurmstepd: [1234.0]",
        "",
    ],
)
def test_shells_and_other_programs_are_none(command: str) -> None:
    assert not is_launcher(command.split())


def test_the_own_parent_is_a_test_and_no_launcher() -> None:
    assert command_of(os.getpid())[0] and find_launcher() is None


@pytest.mark.skipif(sys.platform == "win32", reason="a process there does not learn of its parent's end")
@pytest.mark.parametrize(
    ("environ", "parent", "command", "expected"),
    [
        ({"TORCHELASTIC_RUN_ID": "x"}, 1, "/sbin/init", True),
        ({"ACCELERATE_DYNAMO_MODE": "default"}, 812, "/usr/lib/systemd/systemd --user", True),
        ({"ACCELERATE_DYNAMO_MODE": "default"}, 1, "python /x/bin/accelerate launch train.py", False),  # in a container
        ({"TORCHELASTIC_RUN_ID": "x"}, 1, "python my_cluster.py", False),
        ({"ACCELERATE_DYNAMO_MODE": "default"}, 99, "bash run.sh", False),
        ({}, 1, "/sbin/init", False),  # nohup, and the shell has gone
    ],
)
def test_a_launcher_that_has_gone_before_one_looks_is_noticed(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], parent: int, command: str, expected: bool
) -> None:
    monkeypatch.setattr(os, "getppid", lambda: parent)
    monkeypatch.setattr(launcher, "command_of", lambda process: command.split())
    assert is_orphan(environ) is expected
