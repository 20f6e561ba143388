"""Describes what is done between steps: measuring, drawing, checking. Each kind of look is a file of its own."""

from __future__ import annotations

from typing import Protocol


class Look(Protocol):
    """One kind of look at the weights between steps. It changes no weight and draws by keys of its own."""

    @property
    def name(self) -> str:
        """Name for messages, such as "samples"."""

    def is_due(self, step: int) -> bool:
        """Returns whether it is due after this step, 0 before the first."""

    def look(self, step: int) -> None:
        """Looks, unless that was done before a resume. Whatever it raises is reported, and costs no step."""

    def judge(self, step: int) -> None:
        """Draws the consequences of the last look.

        Raises:
            TrainingError: the run is to end.
        """
