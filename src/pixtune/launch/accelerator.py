"""Starts the processes of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list

from pixtune.config.schema import TrainConfig
from pixtune.errors import ConfigError
from pixtune.launch.agreement import facts_of_start
from pixtune.launch.crew import ALONE, Crew, gather_crew
from pixtune.launch.joining import connect_peers
from pixtune.launch.stop import StopRequest
from pixtune.progress import printer

EXCHANGE_TIMEOUT = timedelta(minutes=20)
"""Time after which an exchange is given up that not all have come to, though all of them run.

One that is stopped or gone is noticed within a minute (`peers.py`), and where one works alone for long, the others wait
in `StopRequest.meet`, which has no limit. So only a step that takes one of them this much longer can meet it.
"""


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Starts the process group, device and trackers, under `accelerate launch` as under plain `python`.

    Precision, accumulation and gradient exchange are the loop's own (`train.train_step`).

    Raises:
        ConfigError: the tracker in `report_to` is not installed; accelerate would continue without it.
    """
    if config.report_to and find_spec(config.report_to) is None:
        raise ConfigError(
            f"report_to is {config.report_to}",
            [f"{config.report_to} is not installed: pip install {config.report_to}, or report_to=null"],
        )
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when CUDA starts
    if (note := launched_alone(os.environ)) is not None:
        printer()(f"note: {note}")
    return Accelerator(
        log_with=config.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(config.output_dir), logging_dir=str(config.output_dir / config.logging_dir)
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=EXCHANGE_TIMEOUT)],
    )


def join_crew() -> tuple[torch.device, Crew]:
    """Returns this process's device, and the processes with which it divides work, where a launcher started several.

    Raises:
        TrainingError: the processes cannot reach each other.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu"), ALONE
    state = PartialState(cpu=not torch.cuda.is_available())
    return state.device, gather_crew(state)


def launched_alone(environment: Mapping[str, str]) -> str | None:
    """Returns a sentence where `accelerate launch` was asked for several processes and starts one; else None.

    On a CPU without MPI, accelerate sets an address at which processes would meet, and starts the script once.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_SIZE")
    if not by_accelerate or any(rank in environment for rank in ranks):
        return None
    return (
        "accelerate was asked for several processes and started one: on a CPU it starts several through MPI only. For "
        "N processes: ACCELERATE_USE_CPU=true torchrun --nproc-per-node N train.py --config ..."
    )


def agree_with_others(config: TrainConfig, stop: StopRequest, accelerator: Accelerator) -> None:
    """Lets all processes of a run stop together, notice if one is gone, and refuse to be of different runs.

    Raises:
        ConfigError: this process has another config, or other versions of packages, than the first one.
        TrainingError: the processes cannot reach each other.
    """

    def from_first(value: Any) -> Any:
        (shared,) = broadcast_object_list([value])
        return shared

    if accelerator.num_processes == 1:
        return
    if not stop.is_connected:  # started by something that names no first process, such as MPI
        stop.connect(connect_peers(accelerator.process_index, accelerator.num_processes, from_first))
        stop.agree("the start", facts_of_start(config))
    if accelerator.device.type == "cuda":
        stop.notice(partial(exchange_error, accelerator.device))


def exchange_error(device: torch.device) -> str | None:
    """Returns why this process's GPU cannot exchange gradients any more; None: nothing is known against it.

    NCCL's own watchdog notices it and does no more (`joining.QUIET`): it would end the process without a word of use.
    """
    if not dist.is_initialized():
        return None
    backend: Any = dist.distributed_c10d._get_default_group()._get_backend(device)
    kind = backend.get_error().name if hasattr(backend, "get_error") else "SUCCESS"
    if kind == "SUCCESS":
        return None
    if kind == "TIMEOUT":
        minutes = EXCHANGE_TIMEOUT.total_seconds() / 60
        return f"an exchange of gradients has not come to its end for {minutes:.0f} minutes, though all processes run"
    return f"NCCL reports {kind}: look at the network and the GPUs between the processes of this run"
