"""Asks the base model before a new run's first step whether its controls and targets are swapped."""

from __future__ import annotations

from pixtune.data.swapped import measure_gains, swap_warning
from pixtune.services.session import Session


class SwappedControls:
    """The look at a few pairs both ways, which is due once: see `data/swapped.py`."""

    name = "the check for swapped controls"

    def __init__(self, session: Session) -> None:
        self._session = session

    def is_due(self, step: int) -> bool:
        """Returns whether no step has been taken."""
        return step == 0

    def look(self, step: int) -> None:
        """Measures, and warns where they look swapped."""
        session, run = self._session, self._session.run
        if not session.data.both_ways or not session.is_main:
            return
        with session.with_base_alone():
            gains = measure_gains(
                run.family, run.transformer, session.data.both_ways, session.config.seed, run.accelerator.device,
                session.config.objective.guidance, session.pace,
            )  # fmt: skip
        if (warning := swap_warning(gains)) is not None:
            session.print(f"warning: {warning}")

    def judge(self, step: int) -> None:
        """Ends no run: the warning is a guess."""
