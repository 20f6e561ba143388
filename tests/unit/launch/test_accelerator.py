"""A launcher that starts fewer processes than it was asked for is told of, by what accelerate itself would set."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from pixtune.config.schema import TrainConfig
from pixtune.launch import accelerator as launching
from pixtune.launch.accelerator import agree_with_others, exchange_error, launched_alone

CONFIG = TrainConfig.model_validate(
    {
        "pretrained_model_name_or_path": "model",
        "output_dir": "out",
        "data_config": {"img_dir": "pictures"},
        "max_train_steps": 1,
        "learning_rate": 0.5,
    }
)


def environment_of(*words: str) -> dict[str, str]:
    """The environment in which accelerate starts a script without MPI."""
    usual = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    args = launch_command_parser().parse_args([*words, *usual, "train.py"])
    return dict(prepare_simple_launcher_cmd_env(args)[1])


@pytest.fixture(autouse=True)
def without_traces_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("ACCELERATE_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("number", ["2", "8"])
def test_one_process_of_several_is_told_with_the_remedy(number: str) -> None:
    note = launched_alone(environment_of("--cpu", "--num_processes", number))
    assert note is not None and "torchrun --nproc-per-node" in note


def test_what_was_asked_for_is_not_worth_a_word() -> None:
    assert launched_alone(environment_of("--cpu", "--num_processes", "1")) is None
    assert launched_alone({}) is None
    asked = environment_of("--cpu", "--num_processes", "2")
    assert launched_alone({**asked, "RANK": "0", "WORLD_SIZE": "2"}) is None
    assert launched_alone({"MASTER_ADDR": "node1"}) is None  # a cluster's own


@pytest.mark.parametrize("num_processes", [1, 2])
def test_several_processes_are_connected_and_one_is_not(num_processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    connected: list[Any] = []
    monkeypatch.setattr(launching, "connect_peers", lambda rank, number, share: (rank, number))
    came: list[Any] = []
    stop: Any = SimpleNamespace(connect=connected.append, is_connected=False, agree=lambda *found: came.append(found))
    alone: Any = SimpleNamespace(
        num_processes=num_processes, process_index=num_processes - 1, device=torch.device("cpu")
    )
    agree_with_others(CONFIG, stop, alone)
    assert connected == ([(1, 2)] if num_processes == 2 else [])
    assert [place for place, _ in came] == ["the start"] * len(connected)
    assert not came or (came[0][1]["learning_rate"] == "0.5" and "the version of torch" in came[0][1])
    stop.is_connected = True  # and has agreed, before the process group was started
    agree_with_others(CONFIG, stop, alone)
    assert len(connected) == len(came) == num_processes - 1


def test_what_nccl_reports_ends_a_run_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = iter(["SUCCESS", "TIMEOUT", "REMOTE_ERROR"])
    backend = SimpleNamespace(get_error=lambda: SimpleNamespace(name=next(kinds)))
    group = SimpleNamespace(_get_backend=lambda device: backend)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", lambda: group)
    device = torch.device("cuda")
    assert exchange_error(device) is None
    late, gone = exchange_error(device), exchange_error(device)
    assert late is not None and "for 20 minutes, though all processes run" in late
    assert gone is not None and "NCCL reports REMOTE_ERROR" in gone
    backend = SimpleNamespace()  # gloo's has none
    assert exchange_error(device) is None
