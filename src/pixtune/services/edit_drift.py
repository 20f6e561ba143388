"""Measures how samples of an edit model drift from the pictures that they edit: shift, scale and colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixtune.data.images import open_rgb
from pixtune.judging.alignment import align_pictures
from pixtune.services.session import Session
from pixtune.tracking.metrics import read_metrics

KIND = "edit_drift"
"""Kind of its lines in the log, one a sample."""


class EditDrift:
    """The look at the samples of a step beside their controls. It draws nothing and needs no device."""

    name = "the drift of samples from their controls"

    def __init__(self, session: Session) -> None:
        self._session = session
        self._done: set[str] = set()
        """Paths of the samples that have been measured."""

    def remember(self, lines: Sequence[dict[str, Any]]) -> None:
        """Takes the measurements so far from the log's lines."""
        self._done = {line["path"] for line in lines if line["kind"] == KIND}

    def is_due(self, step: int) -> bool:
        """Returns whether samples are due after this step."""
        return self._session.is_due(step, self._session.config.samples.every)

    def look(self, step: int) -> None:
        """Measures the samples of this step that have a control, unless that was done before a resume."""
        session = self._session
        if not session.is_main or not any(prompt.control_paths for prompt in session.data.prompts):
            return
        for line in read_metrics(session.log.path):
            if line["kind"] != "sample" or line["step"] != step or not line.get("controls"):
                continue
            if line["path"] not in self._done:
                figures = measure_drift(Path(line["controls"][-1]), session.output_dir / line["path"])
                session.log.write(KIND, step, path=line["path"], **figures)
                self._done.add(line["path"])

    def judge(self, step: int) -> None:
        """Ends no run: whether an edit may move things is for a person to say."""


def measure_drift(control_path: Path, sample_path: Path) -> dict[str, float | bool]:
    """Measures a sample against its control.

    Returns:
        `off_pixels`, the distance by which points of the picture are off, `scale`, and whether both `is_sure`, since
        a picture that is drawn anew has no shift; `color_levels`, the distance of the mean colours in levels of 255.
    """
    sample = open_rgb(sample_path)
    control = open_rgb(control_path).resize(sample.size, Image.Resampling.BOX)
    found = align_pictures(control, sample)
    means = [np.asarray(picture, dtype=np.float32).mean((0, 1)) for picture in (control, sample)]
    return {
        "off_pixels": round(found.off_pixels, 3),
        "scale": round(found.scale, 5),
        "is_sure": found.is_sure,
        "color_levels": round(float(np.sqrt(((means[1] - means[0]) ** 2).mean())), 2),
    }
