"""Controls that are their targets: pairs that teach an edit model to change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pixtune.data.controls import same_shape
from pixtune.data.findings import Finding, Level, cases_of, count
from pixtune.data.pairs import Pair
from pixtune.data.scan import Checked

NEARLY_UNCHANGED = 16
"""Largest difference of a thumbnail's colours, of 255, below which a control counts as nearly its target.

The largest difference serves, not the mean, since an edit may be small. Measured on the 96 drawings of
`assets/demo-edit` at 256 pixels and on 24 pictures of 1/f noise at 512, as smallest / median / largest over the
pictures:

    change                       mean                     largest
    JPEG quality 75, drawings     0.15 /  0.79 /  1.49      4 /   9 /  15
    JPEG quality 50, drawings     0.25 /  1.15 /  1.89      6 /  13 /  19
    JPEG quality 50, noise        0.70 /  0.73 /  0.75      3 /   3 /   5
    half the size, drawings       0.06 /  0.20 /  0.50      2 /   4 /   6
    3% brighter, drawings         0.41 /  1.68 /  3.07      5 /   7 /   7
    a box on 0.25%, drawings      0.06 /  0.26 /  0.53     33 / 150 / 246
    a box on 1%, drawings         0.25 /  1.04 /  2.21     46 / 182 / 255
    a box on 1%, noise            0.35 /  0.76 /  1.25     75 / 138 / 189
    demo-edit's own pairs        14.01 / 37.51 / 73.18    143 / 228 / 255

So no mean tells a small edit from another JPEG, and with 64 pixels a side the largest difference fails as well: along
lines JPEG 50 reaches 56. Edits that restore pictures (noise of deviation 5: 3 / 4 / 4) lie below, which the warning
mentions.
"""


def find_unchanged(pairs: Sequence[Pair], pictures: Mapping[Path, Checked]) -> list[Finding]:
    """Warns of controls that are their target: the very file, or, in most examples, nearly the same picture.

    A few examples that change nothing may be intended: an edit model learns from them what to leave alone.
    """

    def holds_target(pair: Pair) -> bool:
        digest = pictures[pair.image_path].digest
        return bool(digest) and any(pictures[path].digest == digest for path in pair.control_paths)

    with_control = [pair for pair in pairs if pair.control_paths]
    same = [pair.name for pair in with_control if holds_target(pair)]
    near = [
        pair.name
        for pair in with_control
        if not holds_target(pair) and _nearly_same(pictures[pair.image_path], pictures[pair.control_paths[0]])
    ]
    findings = [
        Finding(
            Level.WARNING, "control-is-target",
            f"{count(len(same), 'control picture is', 'control pictures are')} the target itself",
            cases_of(same),
            "A few may teach what to leave alone; else put the picture before the edit there.",
        )
    ]  # fmt: skip
    if near and len(same) + len(near) > len(with_control) / 2:
        findings.append(Finding(
            Level.WARNING, "control-nearly-target",
            f"{count(len(near), 'control picture is', 'control pictures are')} nearly the target, of "
                f"{len(with_control)}",
            cases_of(near),
            "Such rows teach the model to change nothing; right only where restoring pictures (sharper, less noise) is "
            "what it is to learn.",
        ))  # fmt: skip
    return findings


def _nearly_same(target: Checked, control: Checked) -> bool:
    """Returns whether a control is nearly its target, by `NEARLY_UNCHANGED`.

    A control of another shape is a reference, not the picture before the edit.
    """
    if target.thumbnail_HW3 is None or control.thumbnail_HW3 is None or target.size is None or control.size is None:
        return False
    difference = np.abs(target.thumbnail_HW3.astype(np.int16) - control.thumbnail_HW3)
    return same_shape(target.size, control.size) and bool(difference.max() < NEARLY_UNCHANGED)
