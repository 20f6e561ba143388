"""Stops a run that does not learn: see `judging/learning.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from pixtune.data.measured import measured_example
from pixtune.engine.apply import blocks_of
from pixtune.engine.relief import first_that_fits
from pixtune.errors import TrainingError, WeightsError
from pixtune.judging.learning import fault_of_file, judged_after, no_gradient, not_moved
from pixtune.judging.validation import velocities_at
from pixtune.services.checkpoints import Checkpoints
from pixtune.services.session import Session
from pixtune.storage.checkpoint_state import checkpoint_path
from pixtune.trained.average import average_of_sums
from pixtune.trained.optim import estimates_of, saw_gradient
from pixtune.trained.read_back import ReadBack, checksums

SIGMA = 0.5
"""Noise level of the fixed inputs."""
RESUMED_SHARE = 0.5
"""Part of the peak learning rate from which steps of a resumed run must move weights."""


class Learning:
    """The watch over gradients and weights of a session's first steps. It reads the device after two steps alone."""

    def __init__(self, session: Session, checkpoints: Checkpoints) -> None:
        self._session, self._checkpoints = session, checkpoints
        run, within, start = session.run, session.config.guard.must_learn_within, session.start_step
        # What a resumed run, or one from a LoRA, begins with is not zero, so a tiny step may be rounded away.
        is_zero = not start and session.config.init_lora is None
        share = max(run.trained.least_rate_share, 0.0 if is_zero else RESUMED_SHARE)
        self._judged_after = judged_after(run.learning_rate_at, start, run.num_steps, within, share) if within else None
        self._num_skipped = 0
        """Number of steps that had been skipped when the session began."""
        self._first: dict[str, int] = {}
        """Checksums of what must move, from before the session's first step."""

    def begin(self) -> None:
        """Notes the weights that the session begins with."""
        if self._judged_after is not None:
            self._first = self._checksums(self._session.run.trained.must_move)
            self._num_skipped = self._checkpoints.guard.state.num_skipped

    def after_step(self, step: int) -> None:
        """Judges what is due after a step.

        Raises:
            TrainingError: something that is trained does not learn. The steps so far are saved.
        """
        if not self._first:
            return
        if step == 1:
            self._end_by(step, self._fault_of_gradients())
        if self._judged_after is not None and step >= self._judged_after:
            self._end_by(step, self._fault_of_weights(step))

    def _checksums(self, names: Sequence[str]) -> dict[str, int]:
        held = self._session.run.trained.held
        return checksums({name: held[name] for name in names}, self._session.together)

    def _fault_of_gradients(self) -> str | None:
        parameters, stepped = self._session.run.trained.parameters, self._stepped()
        without = [name for name in parameters if name not in stepped]
        return no_gradient(without, len(parameters), self._last_block())

    def _stepped(self) -> set[str]:
        """Returns the names of parameters that a process has stepped."""
        trained = self._session.run.trained
        state = trained.optimizer.state
        return {*self._session.together.union([name for name, each in trained.parameters.items() if state.get(each)])}

    def _last_block(self) -> set[str]:
        """Returns the names of the last block's tensors: nothing reads what some of them make of the text."""
        run = self._session.run
        last = {id(parameter) for parameter in blocks_of(run.transformer.module, run.family)[-1].parameters()}
        return {name for name, parameter in run.trained.parameters.items() if id(parameter) in last}

    def _fault_of_weights(self, step: int) -> str | None:
        run, first = self._session.run, self._first
        stepped, together = self._stepped(), self._session.together
        must_move = [name for name in run.trained.must_move if name in stepped]
        now = self._checksums(must_move)
        unmoved = [name for name, checksum in now.items() if checksum == first[name]]
        if unmoved:
            self._checkpoints.read_back(step)  # how many of the steps were skipped, and changed nothing
        steps = range(self._session.start_step, step)
        rates = [rate for before in steps if (rate := run.learning_rate_at(before)) > 0]
        num_sound = len(rates) - (self._checkpoints.guard.state.num_skipped - self._num_skipped)
        if unmoved and num_sound < self._session.config.guard.must_learn_within and step < run.num_steps:
            return None  # and is judged again after the next step
        self._judged_after, self._first = None, {}
        if unmoved and num_sound <= 0:
            return None  # no step changed anything, which the guard of the losses judges
        state = run.trained.optimizer.state
        own = {name: state.get(run.trained.parameters[name]) for name in unmoved}
        seen = together.union([name for name, each in own.items() if each and saw_gradient(run.plan.optimizer, each)])
        has_gradient = {name: name in seen for name in unmoved}
        last_block = self._last_block()
        unmoved = [name for name in unmoved if has_gradient[name] or name not in last_block]
        return not_moved(unmoved, len(must_move), num_sound, has_gradient, max(rates, default=0.0))

    def _end_by(self, step: int, fault: str | None) -> None:
        if fault is not None:
            if self._session.saved_step != step:
                self._checkpoints.save(step)
            raise TrainingError(not_learning(step, fault, "must_learn_within"))


class SavedFile:
    """The look at what was just saved, read back from the disk and put on the base."""

    name = "the check of the saved file"

    def __init__(self, session: Session) -> None:
        self._session = session
        self._fault: str | None = None

    def is_due(self, step: int) -> bool:
        """Returns whether a checkpoint was due after this step."""
        config = self._session.config
        is_checked = step > 0 and config.guard.must_learn_within > 0
        return is_checked and self._session.is_due(step, config.checkpointing_steps)

    def look(self, step: int) -> None:
        """Compares the velocity of the saved weights with that of the live ones, and of the base."""
        session, run = self._session, self._session.run
        path = checkpoint_path(session.output_dir, step)
        if not session.is_main or session.saved_step != step or not path.is_dir():
            return
        if step == session.start_step and session.config.resume_with_changes_in:
            return  # it may hold an average that this session has not
        picture = measured_example(run.source.reader, run.source.order.an_example)
        # Blocks are compiled for steps; to compile them anew for two passes would take longer than these.
        plainly = partial(torch.compiler.set_stance, "force_eager") if run.plan.compile else nullcontext
        with session.aside("check of the saved files", 2) as after_pass:  # one more for each file that is at fault

            def velocity() -> Tensor:
                with plainly():
                    return velocities_at(
                        run.family, run.transformer, picture, [SIGMA], session.config.seed, run.accelerator.device,
                        session.config.objective.guidance, None, after_pass,
                    )[0]  # fmt: skip

            def read_back() -> ReadBack:
                return run.trained.read_back(path, velocity)

            def with_room() -> ReadBack:
                run.forward_backward.release()
                return read_back()

            try:
                read = first_that_fits([read_back, with_room], self.name)
            except WeightsError as error:
                if isinstance(error.__cause__, OSError):
                    raise  # a disk that fails now may be read later, and checkpoints are verified on resuming
                self._fault = f"what was saved cannot be used: {error}".rstrip(".")
                return
        sum_of_rates = 0.0 if read.effect else self._sum_of_rates(step)  # which takes a moment over many steps
        self._fault = fault_of_file(read, path, session.config.mixed_precision, sum_of_rates)

    def _sum_of_rates(self, step: int) -> float:
        """Returns how far a weight may have moved, and its average where the file holds that."""
        run, ema = self._session.run, self._session.config.ema
        sizes = estimates_of(run.trained.optimizer).values()  # which grow: no step so far was larger
        rates = (math.prod(map(float, sizes), start=run.learning_rate_at(each)) for each in range(step))
        return sum(rates) if ema.decay is None else average_of_sums(rates, ema.decay, ema.warm_up)

    def judge(self, step: int) -> None:
        """Ends a run whose files are worth nothing.

        Raises:
            TrainingError: the last one is; says what it means.
        """
        if self._fault is not None:
            raise TrainingError(not_learning(step, self._fault, "must_learn_within"))


def not_learning(step: int, fault: str, key: str) -> str:
    """Writes the message of a run that ends because it does not learn."""
    return (
        f"step {step}: {fault}. Training stops here, since further steps would be lost; those so far are saved. To go "
        f"on all the same: resume_from_checkpoint=latest guard.{key}=0, which switches these checks off"
    )
