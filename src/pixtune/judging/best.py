"""Decides which weights were best by the held-out losses so far, and whether more steps still help."""

from __future__ import annotations

import math
from collections.abc import Mapping


def best_step(losses: Mapping[int, float]) -> int | None:
    """Returns the step with the lowest held-out loss, the earliest of equals, before which something was trained.

    Returns:
        None where no loss of a trained step is a number.
    """
    steps = [step for step, loss in losses.items() if step > 0 and math.isfinite(loss)]
    return min(steps, key=lambda step: (losses[step], step), default=None)


def num_since_lowest(losses: Mapping[int, float]) -> int:
    """Counts the validations since the lowest held-out loss, the base's own included."""
    finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    lowest = min(finite, key=lambda step: (finite[step], step), default=0)
    return sum(step > lowest for step in losses)


def end_words(losses: Mapping[int, float], last_step: int, folder: str | None) -> str | None:
    """Returns a sentence on the best weights at a run's end; None where nothing was measured, or the last are the best.

    Args:
        folder: folder that holds the best weights; None: no files of them were written.
    """
    best = best_step(losses)
    if best is None or last_step not in losses or best == last_step:
        return None
    at_start = losses.get(0)
    if at_start is not None and at_start <= losses[best]:
        return (
            f"no step was better on held-out pictures than the base model itself ({at_start:.4f}; lowest after it "
            f"{losses[best]:.4f} at step {best}): a lower learning_rate may learn more"
        )
    where = f"; those weights are in {folder}" if folder else ""
    return f"best on held-out pictures: step {best}, with {losses[best]:.4f} (last step {losses[last_step]:.4f}){where}"
