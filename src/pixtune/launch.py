"""Starts the processes of a run, and turns signals into a request to stop."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from importlib.util import find_spec
from types import FrameType, TracebackType
from typing import Self

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from pixtune.config.schema import TrainConfig
from pixtune.errors import ConfigError

CACHING_TIMEOUT = timedelta(hours=12)
"""Time that the other processes wait while the first fills the cache; the default of 10 minutes would end the run."""


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
    return Accelerator(
        log_with=config.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(config.output_dir), logging_dir=str(config.output_dir / config.logging_dir)
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=CACHING_TIMEOUT)],
    )


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a request to stop after this step; a second one ends the process."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        signal.signal(number, self._previous[number])  # type: ignore[arg-type]
        print(f"\n{signal.Signals(number).name}: stopping after this step, with a checkpoint", flush=True)

    def requested(self, step: int, agree_every: int) -> bool:
        """Returns whether to stop now. Several processes agree every `agree_every` steps, since each waits for all."""
        if self._accelerator.num_processes == 1:
            return self._received is not None
        if step % agree_every:
            return False
        votes = torch.tensor(float(self._received is not None), device=self._accelerator.device)
        return bool(self._accelerator.reduce(votes, reduction="sum") > 0)
