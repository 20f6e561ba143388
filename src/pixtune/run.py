"""What the loop holds and hands on: the parts of a run, what is called around its steps, how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from accelerate import Accelerator
from torch import Tensor

from pixtune.config.schema import TrainConfig
from pixtune.data.batches import Batch, BatchSource
from pixtune.engine.capture import ReplayedPass
from pixtune.engine.load import LoadedTransformer
from pixtune.engine.modulation_ahead import StepsAhead
from pixtune.family import ModelFamily
from pixtune.plan.training import TrainingPlan
from pixtune.tracking.memory import RunMemory
from pixtune.trained.methods import TrainedWeights
from pixtune.validation import ValidationLoss


@dataclass(frozen=True)
class Run:
    """The parts that a step touches."""

    config: TrainConfig
    family: ModelFamily
    plan: TrainingPlan
    accelerator: Accelerator
    memory: RunMemory
    transformer: LoadedTransformer
    trained: TrainedWeights
    forward_backward: ReplayedPass[Batch]
    learning_rate_at: Callable[[int], float]
    source: BatchSource
    steps_ahead: StepsAhead
    num_steps: int


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    finished: bool
    """False: it was told to stop, and can be resumed."""
    step: int
    output_dir: Path
    first_loss: ValidationLoss | None = None
    """Held-out loss before training."""
    last_loss: ValidationLoss | None = None


class AroundSteps(Protocol):
    """What the loop calls around its steps: `Services`, or what stands in their place while steps are timed."""

    start_step: int

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def before_first_step(self) -> None: ...

    def see_batch(self, batch: Batch) -> None: ...

    def waited(self, seconds: float) -> None: ...

    def after_step(self, step: int, loss: Tensor, grad_norm: Tensor) -> None: ...

    def interrupted(self, step: int) -> TrainResult: ...

    def finish(self) -> TrainResult: ...
