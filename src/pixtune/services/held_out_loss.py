"""Measures the held-out loss between steps, and lets the guard of the losses judge it."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from pixtune.judging.best import num_since_lowest
from pixtune.judging.validation import ValidationLoss
from pixtune.services.checkpoints import Checkpoints
from pixtune.services.measuring import measure_pictures
from pixtune.services.session import Session


class HeldOutLoss:
    """The look at held-out pictures: see `judging/validation.py`."""

    name = "the held-out loss"

    def __init__(self, session: Session, checkpoints: Checkpoints) -> None:
        self._session, self._checkpoints = session, checkpoints
        self.losses: dict[int, ValidationLoss] = {}
        """Held-out losses by step, those before a resume included."""

    def remember(self, lines: Sequence[dict[str, Any]]) -> None:
        """Takes the losses so far from the log's lines."""
        self.losses = {
            line["step"]: ValidationLoss(line["loss"], tuple(line["quarters"]))
            for line in lines
            if line["kind"] == "validation"
        }
        self._checkpoints.guard.held_out = {step: mean for step, mean in self.means.items() if isfinite(mean)}

    @property
    def means(self) -> dict[int, float]:
        """Mean losses by step."""
        return {step: loss.mean for step, loss in self.losses.items()}

    @property
    def has_stalled(self) -> bool:
        """Whether the loss has had no new lowest for as many validations as the config waits for."""
        patience = self._session.config.validation.patience
        return patience is not None and num_since_lowest(self.means) >= patience

    def is_due(self, step: int) -> bool:
        """Returns whether it is due after this step."""
        return self._session.is_due(step, self._session.validation_every)

    def look(self, step: int) -> None:
        """Measures, unless that was done before a resume."""
        session, pictures = self._session, self._session.data.held_out
        if not pictures or not session.is_main or step in self.losses:
            return
        loss = measure_pictures(session, pictures, self.name)
        self.losses[step] = loss
        session.log.write("validation", step, loss=loss.mean, quarters=loss.quarters)
        session.figures.track(step, {"held_out_loss": loss.mean})
        session.print(f"step {step}: held-out loss {loss.mean:.4f}")

    def judge(self, step: int) -> None:
        """Hands the loss to the guard.

        Raises:
            TrainingError: the loss is no number, or has exploded, and the run is to end.
        """
        if step in self.losses and step not in self._checkpoints.guard.held_out:
            with self._checkpoints.ending_well(step):
                self._session.figures.see_held_out(step, self.losses[step])
