"""The reports on data sets for programs, in a form that stays: docs/preparing_pictures.md describes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pixtune.data.findings import Level
from pixtune.data.validate import DatasetReport

FORMAT = 1
"""Version of the form; keys are added without a new one."""


def to_json(reports: Sequence[DatasetReport]) -> str:
    """Formats reports as one JSON object."""
    levels = [level for level in Level for report in reports if report.of_level(level)]
    verdict = {Level.ERROR: "problems", Level.WARNING: "warnings"}.get(levels[0], "fine") if levels else "fine"
    form = {"format": FORMAT, "verdict": verdict, "data_sets": [_data_set(report) for report in reports]}
    return json.dumps(form, indent=1)


def _data_set(report: DatasetReport) -> dict[str, Any]:
    longest = report.longest_caption
    return {
        "folder": str(report.image_folder),
        "control_folders": [str(folder) for folder in report.control_folders],
        "num_pictures": report.num_pictures,
        "sizes": [
            {"width": width, "height": height, "num_pictures": number}
            for (width, height), number in sorted(report.bucket_counts.items())
        ],
        "longest_caption": longest and {"file": str(longest.path), "num_characters": longest.num_characters},
        "findings": [
            {
                "level": finding.level.value,
                "code": finding.code,
                "meaning": finding.meaning,
                "remedy": finding.remedy,
                "cases": [
                    {"text": case.text, "files": list(case.files), "figures": dict(case.figures), "detail": case.detail}
                    for case in finding.cases
                ],
            }
            for finding in report.findings
        ],
    }
