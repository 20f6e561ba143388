"""Loss, rate, speed and memory of each step, read back from the device now and then instead of at every step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from pixtune.errors import TrainingError
from pixtune.hardware.monitor import get_memory_stats
from pixtune.metrics import MetricsLog
from pixtune.progress import StepBar


@dataclass(frozen=True)
class PendingStep:
    """A step whose figures are still on the device."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    learning_rate: float
    names: list[str]
    """Pictures that the step saw, to name them if its loss is no number."""


class StepFigures:
    """Collects steps and hands their figures to the log, the bar and the tracker.

    Args:
        log: None in all processes but the first.
        images_per_step: of all processes.
    """

    def __init__(
        self, accelerator: Accelerator, log: MetricsLog | None, bar: StepBar, images_per_step: int, tracked: bool
    ) -> None:
        self._accelerator, self._log, self._bar = accelerator, log, bar
        self._images_per_step, self._tracked = images_per_step, tracked
        self._pending: list[PendingStep] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what has happened since the last step out of its seconds."""
        self._clock = time.perf_counter()

    def add(self, entry: PendingStep) -> None:
        """A step has been launched."""
        self._pending.append(entry)

    def read_back(self) -> None:
        """The one place that waits for the device: takes the figures of all steps since the last time.

        Raises:
            TrainingError: a loss or gradient is no number; names the step and its pictures.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        losses, norms = torch.stack([torch.stack((p.loss, p.grad_norm.float())) for p in pending]).T.tolist()
        seconds = (time.perf_counter() - self._clock) / len(pending)
        memory = get_memory_stats()["max_allocated_gb"]
        for entry, loss, norm in zip(pending, losses, norms, strict=True):
            _refuse_no_number(entry, loss, norm)
            if self._log:
                self._log.write(
                    "step", entry.step, loss=loss, grad_norm=norm, learning_rate=entry.learning_rate,
                    seconds=round(seconds, 5), peak_memory_gib=round(memory, 3),
                )  # fmt: skip
        self._bar.figures(losses[-1], seconds, self._images_per_step / seconds, memory)
        values = {"loss": losses[-1], "grad_norm": norms[-1], "learning_rate": pending[-1].learning_rate}
        self.track(pending[-1].step, {**values, "seconds_per_step": seconds, "peak_memory_gib": memory})
        self.restart_clock()

    def track(self, step: int, values: Mapping[str, float]) -> None:
        """Hands values to the config's tracker, if there is one."""
        if self._tracked:
            self._accelerator.log(dict(values), step=step)


def _refuse_no_number(entry: PendingStep, loss: float, norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise TrainingError(
        f"step {entry.step}: loss {loss}, gradient norm {norm}. Training stops here; later steps are not saved. "
        f"Pictures of this step: {', '.join(entry.names)}. Look at them, or lower learning_rate, and go on from the "
        "last checkpoint with resume_from_checkpoint=latest."
    )
