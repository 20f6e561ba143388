"""Finds captions that do not fit their pictures, by the base model, before anything is learned.

A loss says nothing about a caption: pictures differ in how hard they are, and a picture whose loss falls less than that
of others is mostly an odd one, not a wrongly captioned one (docs/experiments.md). So a picture is compared with itself:
its loss with its own caption beside its loss with captions of other pictures, at the same noise. The *gain* is the
difference of their natural logarithms. A right caption has a large one; that of a swapped caption is about 0, since it
is one of the others. The base measures it, which has not learned a wrong caption by heart yet.

Pictures that look suspicious are looked at again, at another sigma, so that the noise that made them look so does not
count twice. What their captions do on other pictures is taken off: words that harm every picture say nothing of one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

SIGMA = 0.85
"""Sigma of the first look, at which captions matter most: nearer to clean, the noisy picture shows what it is."""
SIGMA_AGAIN = 0.7
"""Sigma of the second look. Of those from 0.5 to 0.9 it named the fewest right captions for the swapped ones found."""
MOST_NAMED = 10
"""Number of suspects that are named, at most."""
FEWEST = 8
"""Number of pictures below which their spread means nothing."""
LEAST_MEDIAN = 0.02
"""Median gain below which the base does not understand these captions, so that none can be judged."""
AGAIN_BELOW, LEAST_AGAIN, MOST_AGAIN, MOST_AGAIN_SHARE = 0.4, 4, 40, 0.25
"""Part of the median gain below which a picture is looked at again; number of pictures that are, at least and at most;
and share of all, at most."""
SUSPICIOUS_SHARE = 0.1
"""Part of the median gain below which a caption is suspicious after the second look. Of 3 swapped captions among 48,
two thirds are below it, and a right one in one run of three (docs/experiments.md)."""


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


def to_look_at_again(gains: Mapping[str, float]) -> list[str]:
    """Returns the names of pictures to look at again, from the gains of all, the most suspicious first."""
    ranked = rank(gains)
    if not ranked:
        return []
    threshold = AGAIN_BELOW * statistics.median(gains[name] for name in ranked)
    below = sum(gains[name] < threshold for name in ranked)
    return ranked[: min(max(below, LEAST_AGAIN), MOST_AGAIN, round(MOST_AGAIN_SHARE * len(ranked)))]


def beyond_others(own: Mapping[str, float], on_others: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Takes off each caption's gain on its own picture what it does on other ones.

    Args:
        own: gains, by the caption's picture.
        on_others: the logarithm of the losses of some other pictures, by their names, with each of these captions. On
            a picture, a caption's gain is that over the mean of all of them, its own picture's aside.
    """
    found = {}
    for name, gain in own.items():
        elsewhere = [
            gain_of([losses[name], *(losses[each] for each in losses if each != picture)])
            for picture, losses in on_others.items()
            if picture != name
        ]
        found[name] = gain - (statistics.fmean(elsewhere) if elsewhere else 0.0)
    return found


def suspects(gains: Mapping[str, float], again: Mapping[str, float]) -> list[str]:
    """Returns the names of pictures whose captions are most likely wrong, the worst first; often none.

    Args:
        gains: gains of all pictures at the first look.
        again: gains at the second look of those that were looked at again.
    """
    if not understands(gains):
        return []
    threshold = SUSPICIOUS_SHARE * statistics.median(gains[name] for name in rank(gains))
    return [name for name in rank(again) if again[name] < threshold][:MOST_NAMED]
