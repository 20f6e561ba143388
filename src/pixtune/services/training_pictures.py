"""Measures a few training pictures as held-out ones are, so that the two curves show when a run over-fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pixtune import randomness
from pixtune.data.measured import measured_example
from pixtune.engine.relief import first_that_fits
from pixtune.judging.validation import NUM_QUARTERS, ValidationLoss, measure
from pixtune.services.session import MOST_TRAINING_PICTURES, Session

KIND = "training_pictures"
"""Kind of its lines in the log."""


class TrainingPictures:
    """The look at some of the pictures that are trained on, with fixed noise, wherever others are held out."""

    name = "the loss on training pictures"

    def __init__(self, session: Session) -> None:
        self._session = session
        self._done: set[int] = set()
        names, seed = session.run.source.reader.names, session.config.seed
        learned = range(len(names) - session.data.num_prior)  # regularization pictures show nothing of the kind
        by_lot = sorted(learned, key=lambda number: randomness.draw_key(seed, "measured", names[number]))
        self._examples = by_lot[: min(len(session.data.held_out), MOST_TRAINING_PICTURES)]

    def remember(self, lines: Sequence[dict[str, Any]]) -> None:
        """Takes the measurements so far from the log's lines."""
        self._done = {line["step"] for line in lines if line["kind"] == KIND}

    def is_due(self, step: int) -> bool:
        """Returns whether it is due after this step: whenever held-out pictures are."""
        return self._session.is_due(step, self._session.validation_every)

    def look(self, step: int) -> None:
        """Measures, unless that was done before a resume."""
        session, run, config = self._session, self._session.run, self._session.config
        if not self._examples or not session.is_main or step in self._done:
            return
        num_draws = config.validation.num_draws
        pictures = [measured_example(run.source.reader, example) for example in self._examples]
        num_passes = len(pictures) * -(-NUM_QUARTERS * num_draws // config.batch_size)
        in_place, aside = run.trained.result_in_place(in_training=True), session.aside(self.name, num_passes)
        with in_place, aside as after_pass:

            def measured(batch_size: int) -> ValidationLoss:
                return measure(
                    run.family, run.transformer, pictures, num_draws, config.seed, run.accelerator.device,
                    config.objective.guidance, batch_size, after_pass,
                )  # fmt: skip

            def one_by_one() -> ValidationLoss:
                run.forward_backward.release()
                return measured(batch_size=1)

            loss = first_that_fits([lambda: measured(config.batch_size), one_by_one], self.name)
        self._done.add(step)
        session.log.write(KIND, step, loss=loss.mean, quarters=loss.quarters)
        session.figures.track(step, {"training_pictures_loss": loss.mean})

    def judge(self, step: int) -> None:
        """Ends no run: the held-out loss tells whether what was learned carries over."""
