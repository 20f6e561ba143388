"""READ FIRST. One training run: `train` has it assembled, `run_steps` is the loop, `train_step` is one step.

The story continues in `assembly.py` (what a run is made of), `objective.py` (what a step learns), `data/batches.py`
(what it sees), `families/` (what a model looks like), `plan/training.py` (what memory allows), `services/` (what
happens around the steps) and `storage/checkpoint.py` (what a crash leaves).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, islice, tee
from typing import TypeVar

import torch
from torch import Tensor, nn

from pixtune.assembly import go_on_from, set_up
from pixtune.config.schema import TrainConfig
from pixtune.data.batches import Batch, observed, read_ahead, timed
from pixtune.engine.relief import (
    drop_frames,
    first_line,
    free_unused,
    lacks_memory,
)
from pixtune.errors import DataError, ExchangeError, MemoryShortage, PixtuneError
from pixtune.family import ModelFamily
from pixtune.launch.stop import Stopped, StopRequest
from pixtune.objective import add_noise, example_losses, loss_weights, velocity_target
from pixtune.planning import Leaner, leaner_than
from pixtune.run import AroundSteps, Run, TrainResult
from pixtune.storage.output_lock import OutputLock
from pixtune.tracking.figures import StepOutcome
from pixtune.trained.optim import estimates_of
from pixtune.trained.schedule import set_learning_rate

log = logging.getLogger(__name__)
T = TypeVar("T")


def train(config: TrainConfig, stop: StopRequest | None = None) -> TrainResult:
    """Trains a LoRA, or all weights, anew or from a checkpoint, and writes files that others load and a report.

    Where the plan cannot be carried out with the memory there is, the run goes on from where it is by a leaner one.

    Args:
        stop: the request to end early; None: it never comes.

    Raises:
        PixtuneError: a problem that a user can fix; nothing is lost, and the message says what to do.
        Stopped: `stop` came while no step was unsaved.
    """
    with OutputLock(config.output_dir) as lock:
        return _train(config, lock, stop or StopRequest())


def _train(config: TrainConfig, lock: OutputLock, stop: StopRequest) -> TrainResult:
    leaner: Leaner | None = None
    while True:
        run, services = set_up(config, forward_backward, leaner, lock, stop)
        try:
            return run_steps(run, services)
        except MemoryShortage as shortage:
            leaner = leaner_than(run.reliefs.plan, leaner) if run.accelerator.num_processes == 1 else None
            if leaner is None:
                raise
            log.warning("%s\nThe run goes on from step %d by a leaner plan.", shortage, services.saved_step)
            config = go_on_from(config, services)
            drop_frames(shortage)
        del run, services
        free_unused()  # outside the except clause, since the error holds the run that failed


def run_steps(run: Run, services: AroundSteps) -> TrainResult:
    """Takes a run's steps, and calls the services that are due before, between and after them.

    A request to stop ends the run after the current step, with a checkpoint.

    Raises:
        DataError: a picture or an encoding that a step needs has changed, is damaged or gone; the steps are saved.
        TrainingError: memory that CPU and GPU share is nearly used up, and the step is saved; or a loss is no number.
        MemoryShortage: a step needs more memory than there is, whatever it gives up; the steps before are saved.
        ExchangeError: another process of the run is gone; the steps before are saved.
    """
    per_step = run.config.gradient_accumulation_steps
    first, last = services.start_step * per_step, run.num_steps * per_step
    made = read_ahead(run.source, first, last, run.config.data_config.num_workers, run.plan.pin_memory)
    micro_batches = observed(timed(made, services.waited), services.see_batch)
    with services:
        if (result := services.before_first_step()) is not None:
            return result
        for step in range(services.start_step, run.num_steps):
            if run.stop.requested(step):
                return services.interrupted(step)
            num_taken = step
            try:
                outcome = take_step(run, islice(micro_batches, per_step), step)
                num_taken += 1
                until_it_fits(run, partial(run.steps_ahead.look_ahead, step), f"step {step + 2}")
            except (DataError, ExchangeError, MemoryShortage) as error:
                run.stop.failing(error)
                if not getattr(error, "weights_are_torn", False):
                    services.interrupted(num_taken, alone=True)
                raise
            except Stopped:  # asked for while the step waited for its data
                if step == services.start_step:
                    raise
                return services.interrupted(num_taken)
            if (result := services.after_step(step + 1, outcome)) is not None:
                return result
            if scarcity := run.memory.scarcity():
                services.interrupted(step + 1, alone=True)
                raise scarcity
        return services.interrupted(run.num_steps) if run.stop.requested(run.num_steps) else services.finish()


def take_step(run: Run, micro_batches: Iterable[list[Batch]], step: int) -> StepOutcome:
    """Takes one optimizer step as `train_step` does. Where it runs out of memory it is taken again, and needs less.

    Raises:
        MemoryShortage: nothing is left that it could give up.
    """

    def attempt() -> StepOutcome:
        nonlocal micro_batches
        micro_batches, again = tee(micro_batches)
        run.steps_ahead.reach(step)
        return train_step(run, again, step)

    return until_it_fits(run, attempt, f"step {step + 1}")


def until_it_fits(run: Run, attempt: Callable[[], T], what: str) -> T:
    """Returns what `attempt` returns. After each that runs out of memory the run gives something up.

    Raises:
        MemoryShortage: nothing is left to give up, or the attempt has changed some of the weights.
        ExchangeError: another process of the run is gone.
    """
    alone, process = run.accelerator.num_processes == 1, run.accelerator.process_index
    what += "" if alone else f" in process {process}"
    while True:
        num_begun = run.exchange.num_begun
        try:
            return attempt()
        except RuntimeError as error:
            if not lacks_memory(error):
                if not isinstance(error, PixtuneError) and (lost := run.stop.news()) is not None:
                    raise ExchangeError(lost) from error
                raise
            obstacle = first_line(error)
            drop_frames(error)
        # Outside the except clause, since the error holds the memory of the work that failed.
        run.forward_backward.zero_gradients()
        if not run.trained.abandon_step():
            raise MemoryShortage(what, obstacle, weights_are_torn=True)
        # The others have gone on from an exchange that this process has entered, and gather its parts within a pass.
        can_repeat = alone or (run.exchange.num_begun == num_begun and run.plan.shards == 1)
        relief = run.reliefs() if can_repeat else None
        if relief is None:
            raise MemoryShortage(what, obstacle)
        log.warning("%s ran out of memory (%s) and is taken again: %s", what, obstacle.rstrip("."), relief)


def train_step(run: Run, micro_batches: Iterable[list[Batch]], step: int) -> StepOutcome:
    """Takes one optimizer step over its micro-batches, without waiting for the device."""
    set_learning_rate(run.trained.optimizer, run.learning_rate_at(step))
    device = run.accelerator.device
    losses = [run.forward_backward(batch.to(device)).clone() for batch in chain.from_iterable(micro_batches)]
    losses_2B = torch.cat(losses, 1)
    totals_2 = losses_2B.sum(1)
    run.exchange(totals_2)
    grad_norm = run.trained.step(totals_2[0])
    run.forward_backward.zero_gradients()
    return StepOutcome(totals_2, grad_norm, losses_2B[0], estimates_of(run.trained.optimizer))


def forward_backward(
    config: TrainConfig, family: ModelFamily, transformer: nn.Module, backward: Callable[[Tensor], None], batch: Batch
) -> Tensor:
    """Computes a batch's share of a step's loss, and by `backward` its share of the gradients.

    Returns:
        Shape (2, B): the shares of its examples, and what these would be for a model that predicts no velocity at all.
    """
    noisy_BCHW = add_noise(batch.latents_BCHW, batch.noise_BCHW, batch.sigma_B)
    velocity_BCHW = family.predict_velocity(
        transformer, noisy_BCHW, batch.sigma_B, batch.conditioning, batch.controls, config.objective.guidance
    )
    target_BCHW = velocity_target(batch.latents_BCHW, batch.noise_BCHW)
    losses_of = partial(
        example_losses, target_BCHW=target_BCHW, weights_B1HW=batch.weights_B1HW, huber_delta=config.objective.delta
    )
    num_examples = config.batch_size * config.gradient_accumulation_steps
    share_B = loss_weights(config.objective.weighting_scheme, batch.sigma_B) / num_examples
    if batch.example_weight_B is not None:
        share_B = share_B * batch.example_weight_B
    loss_B, loss_of_nothing_B = (share_B * losses_of(each) for each in (velocity_BCHW, torch.zeros_like(target_BCHW)))
    backward(loss_B.sum())
    return torch.stack([loss_B.detach(), loss_of_nothing_B])
