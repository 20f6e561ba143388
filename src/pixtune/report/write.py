"""Writes a run's report, and the picture of its samples before and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixtune.report.page import build_page
from pixtune.report.pictures import render_before_after
from pixtune.report.record import read_record
from pixtune.storage.files import write_atomically

PAGE_FILE = "report.html"
BEFORE_AFTER_FILE = "before_after.png"


def write_report(
    output_dir: Path,
    *,
    config: Mapping[str, Any],
    plan: Mapping[str, Any],
    versions: Mapping[str, str],
    facts: Mapping[str, str | int | float],
    num_steps: int | None = None,
) -> Path:
    """Writes `report.html` from `metrics.jsonl`, and `before_after.png` if there are samples of step 0 and a later one.

    Without such samples, a `before_after.png` of an earlier run is removed.

    Args:
        output_dir: the run's folder, with `metrics.jsonl` and the samples that it names.
        config: nested, as `config.to_dict` returns it.
        plan: as `TrainingPlan.to_dict` returns it.
        versions: versions of packages, by name.
        facts: other values to show, by the words to show them under.
        num_steps: optimizer steps of the whole run; None: those in the log are all.

    Returns:
        The page's path.
    """
    record = read_record(output_dir)
    if record.pairs:
        write_atomically(output_dir / BEFORE_AFTER_FILE, render_before_after(output_dir, record))
    else:
        (output_dir / BEFORE_AFTER_FILE).unlink(missing_ok=True)  # of an earlier run in this folder
    page = build_page(output_dir, record, config=config, plan=plan, versions=versions, facts=facts, num_steps=num_steps)
    path = output_dir / PAGE_FILE
    write_atomically(path, page.encode("utf-8", errors="replace"))  # "replace": a prompt may hold half a surrogate pair
    return path
