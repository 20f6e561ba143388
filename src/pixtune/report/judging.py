"""Parts of the page that judge: which step was best, whether the run over-fits, and captions that look wrong."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from pixtune.report.pictures import data_uri, open_picture
from pixtune.report.record import Outcome, RunRecord, Suspect, Validation

CLEARLY = 0.005
"""Part of a loss by which another must differ to be called lower or higher."""
EDGE = 192
"""Longer side of a suspect's thumbnail in pixels."""


def build_best(outcome: Outcome, training: Sequence[Validation], is_kept: bool) -> str:
    """Builds a remark where the held-out loss was lowest before the end, with what the training pictures show of it.

    Args:
        training: losses of training pictures, measured as those held out.
        is_kept: whether files of the best weights stand in best/; of whole models none do.
    """
    best, last = outcome.best, outcome.last
    if best.loss >= last.loss * (1 - CLEARLY):
        return ""
    if best.step == 0:
        return (
            f"<p>No step was better on held-out pictures than the base model itself ({best.loss:.4f} at step 0). "
            "A lower learning rate may learn more.</p>"
        )
    kept = "; they stand in <code>best/</code>" if is_kept else ""
    by_step = {each.step: each.loss for each in training}
    learned = ""
    if best.step in by_step and last.step in by_step and by_step[last.step] < by_step[best.step] * (1 - CLEARLY):
        learned = (
            f" Since then the loss on training pictures has fallen further, from {by_step[best.step]:.4f} to "
            f"{by_step[last.step]:.4f}: the model learns your pictures by heart (over-fitting)."
        )
    return (
        f"<p>The lowest was {best.loss:.4f} at step {best.step:,}, before the end. "
        f"The weights of that step may be the better ones{kept}.{learned}</p>"
    )


def build_suspects(output_dir: Path, record: RunRecord) -> str:
    """Builds the pictures whose captions are most likely wrong; empty where there are none."""
    if not record.suspects:
        return ""
    figures = "".join(_build_suspect(output_dir, suspect) for suspect in record.suspects)
    return (
        "<section><h2>Captions that look wrong</h2><p>The base model tried each caption on its picture and on others "
        "before it learned anything. These fit their own picture hardly better than captions of other pictures do, so "
        "they may be wrong. The worst comes first. Correct what is wrong, or leave the pictures out with "
        f'<code>data_config.exclude</code>.</p><div class="pairs">{figures}</div></section>'
    )


def _build_suspect(output_dir: Path, suspect: Suspect) -> str:
    picture = open_picture(output_dir, suspect.path)
    name = escape(suspect.name)
    shown = (
        f'<span class="missing">missing or damaged: {escape(suspect.path)}</span>'
        if picture is None
        else f'<img src="{data_uri(picture, EDGE)}" alt="{name}" width="{picture.width}" height="{picture.height}" '
        'loading="lazy">'
    )
    return (
        f'<figure><span class="picture">{shown}{name}</span>'
        f'<figcaption dir="auto">{escape(suspect.caption)} <span>its caption lowers the loss by '
        f"{suspect.gain:+.1%} more here than on other pictures</span></figcaption></figure>"
    )
