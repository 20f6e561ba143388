"""Measures a few training pictures as held-out ones are, so that the two curves show when a run over-fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pixtune import randomness
from pixtune.data.measured import measured_example
from pixtune.services.measuring import measure_pictures
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
        session = self._session
        if not self._examples or not session.is_main or step in self._done:
            return
        reader = session.run.source.reader
        pictures = [measured_example(reader, example) for example in self._examples]
        loss = measure_pictures(session, pictures, self.name)
        self._done.add(step)
        session.log.write(KIND, step, loss=loss.mean, quarters=loss.quarters)
        session.figures.track(step, {"training_pictures_loss": loss.mean})

    def judge(self, step: int) -> None:
        """Ends no run: the held-out loss tells whether what was learned carries over."""
