"""The parts of a run that the loop uses, the calls that it makes around its steps, and how a run ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from accelerate import Accelerator

from pixtune.config.schema import TrainConfig
from pixtune.data.batches import Batch, BatchSource
from pixtune.engine.capture import ReplayedPass
from pixtune.engine.exchange import Exchange
from pixtune.engine.load import LoadedTransformer
from pixtune.engine.modulation_ahead import StepsAhead
from pixtune.engine.relief import Reliefs
from pixtune.family import ModelFamily
from pixtune.judging.validation import ValidationLoss
from pixtune.launch.stop import StopRequest
from pixtune.plan.training import TrainingPlan
from pixtune.tracking.figures import StepOutcome
from pixtune.tracking.memory import RunMemory
from pixtune.trained.methods import TrainedWeights


@dataclass(frozen=True)
class Run:
    """The parts that a step uses; `train.assemble` builds them."""

    config: TrainConfig
    family: ModelFamily
    plan: TrainingPlan
    """The plan that the run began with."""
    accelerator: Accelerator
    memory: RunMemory
    transformer: LoadedTransformer
    trained: TrainedWeights
    forward_backward: ReplayedPass[Batch]
    """`train.forward_backward` of a batch on the device; returns what its examples contribute to the step's loss."""
    exchange: Exchange
    """Averaging of a step's totals, and of its gradients, over all processes."""
    reliefs: Reliefs
    """Ways for a step to need less where it runs out of memory. Their `plan` is the one that is carried out now."""
    learning_rate_at: Callable[[int], float]
    """Learning rate of a step, 0 for the first."""
    source: BatchSource
    steps_ahead: StepsAhead
    num_steps: int
    """Optimizer steps of the whole run, those before a resume included."""
    stop: StopRequest
    """Whether the run is asked to end early."""


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run."""

    finished: bool
    """Whether all steps were taken; if not, the run was asked to stop and can be resumed."""
    step: int
    """Number of steps taken."""
    output_dir: Path
    first_loss: ValidationLoss | None = None
    """Held-out loss before the first step."""
    last_loss: ValidationLoss | None = None
    """Held-out loss after the last step."""
    took_steps: bool = True
    """Whether this session took any; a finished run that is started again takes none."""
    few_held_out: int | None = None
    """Number of held-out pictures where they are so few that their loss is a rough figure; None where they are not."""


class AroundSteps(Protocol):
    """Calls that the loop makes around its steps: to `Services`, or to a stand-in while steps are timed."""

    start_step: int
    """Number of steps that were taken before this session."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def before_first_step(self) -> TrainResult | None:
        """Does everything that is due before the session's first step; returns a result where the run is over."""

    def see_batch(self, batch: Batch) -> None:
        """Receives a batch that the current step learns from."""

    def waited(self, seconds: float) -> None:
        """Receives the time that the loop had to wait for a micro-batch."""

    def after_step(self, step: int, outcome: StepOutcome) -> TrainResult | None:
        """Does everything that is due after a step, 1 for the first; returns a result where the run is over by it."""

    def interrupted(self, step: int, alone: bool = False) -> TrainResult:
        """Ends the session early, after this many steps.

        Args:
            alone: other processes may not have come here.
        """

    def finish(self) -> TrainResult:
        """Ends the run after its last step."""
