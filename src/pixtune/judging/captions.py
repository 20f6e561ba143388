"""Finds captions that do not fit their pictures, by the base model, before anything is learned.

A loss says nothing about a caption: pictures differ in how hard they are, and a picture whose loss falls less than that
of others is mostly an odd one, not a wrongly captioned one (docs/experiments.md). So a picture is compared with itself:
its loss with its own caption beside its loss with captions of other pictures, at the same noise. The *gain* is the
difference of their natural logarithms. A right caption has a large one; that of a swapped caption is about 0, since it
is one of the others. The base measures it, which has not learned a wrong caption by heart yet.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

SIGMA = 0.85
"""Sigma at which captions matter most: nearer to clean, the noisy picture itself shows what it is."""
MOST_NAMED = 10
"""Number of suspects that are named, at most."""
FEWEST = 8
"""Number of pictures below which their spread means nothing."""
LEAST_MEDIAN = 0.02
"""Median gain below which the base does not understand these captions, so that none can be judged."""
SUSPICIOUS_SHARE = 0.3
"""Part of the median gain below which a caption is suspicious. Of 3 swapped captions among 48, 83% are below it, and a
right one in one run of 20; at 0.4 it is 91%, and one in 3 runs. With models that draw some things otherwise than the
pictures do it is up to 3 right ones a run (docs/experiments.md)."""


def gain_of(log_losses: Sequence[float]) -> float:
    """Returns the gain of a caption, from the logarithm of its picture's loss with it, and then with each of others."""
    own, *others = log_losses
    return statistics.fmean(others) - own


def rank(gains: Mapping[str, float]) -> list[str]:
    """Returns the names of pictures, the most suspicious caption first. Gains that are no numbers are left out."""
    return sorted((name for name in gains if math.isfinite(gains[name])), key=lambda name: (gains[name], name))


def understands(gains: Mapping[str, float]) -> bool:
    """Returns whether captions help this model on most pictures, so that one that does not help stands out."""
    ranked = rank(gains)
    return len(ranked) >= FEWEST and statistics.median(gains[name] for name in ranked) >= LEAST_MEDIAN


def suspects(gains: Mapping[str, float]) -> list[str]:
    """Returns the names of pictures whose captions are most likely wrong, the worst first; often none."""
    if not understands(gains):
        return []
    ranked = rank(gains)
    median = statistics.median(gains[name] for name in ranked)
    return [name for name in ranked if gains[name] < SUSPICIOUS_SHARE * median][:MOST_NAMED]
