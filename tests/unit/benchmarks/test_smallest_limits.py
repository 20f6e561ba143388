"""benchmarks/smallest_limits.py: the limits that the planner finds, and what is made of the runs at and below them."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pixtune.errors import PlanError
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB
from tests.runs import ROOT


@pytest.fixture
def smallest_limits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("smallest_limits")


@pytest.mark.parametrize("word", ["flux", "flux,full"])
def test_a_run_is_planned_at_the_limit_and_refused_a_tenth_below(
    smallest_limits: ModuleType, tmp_path: Path, word: str
) -> None:
    """As `pixtune train` plans it, from its config alone."""
    facts = facts_as("H200", 100 * GIB)
    facts = replace(facts, free_bytes=facts.total_bytes)
    cell = smallest_limits.search(word, facts, True)
    assert (cell.method, cell.size, cell.batch_size) == ("full" if "full" in word else "lora", 1024, 1)
    for name, limit_gib in (("at", cell.limit_gib), ("below", round(cell.limit_gib - 0.1, 1))):
        (tmp_path / name).mkdir()
        command = smallest_limits.prepare(replace(cell, limit_gib=limit_gib), tmp_path / name)
        if name == "at":
            assert smallest_limits.plan_cell(command, facts).recomputed_blocks == 57
        else:
            with pytest.raises(PlanError, match="missing"):
                smallest_limits.plan_cell(command, facts)


def test_a_run_below_is_reported_as_refused_only_where_it_was(
    smallest_limits: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smallest_limits, "REFUSAL_SECONDS", 1.5)
    cell = smallest_limits.cell_of("flux", 2.8, True)
    at: dict[str, Any] = {
        "outcome": "ran", "seconds_per_step_all": [3.0, 0.5], "memory": {"process_peak_gib": 2.85}, "shortages": [],
        "measured_peak_gib": 1.75, "expected_peak_gib": 1.74,
        "plan": {"weights_format": "nf4", "modulation_rows": 128, "selective": True, "recomputed_blocks": 57,
                 "offload_inputs": True, "streamed_blocks": 57, "kept_transposes": False},
    }  # fmt: skip
    refusing = "print('error: this run needs 3.0 GiB: 0.1 GiB are missing.'); raise SystemExit(1)"
    for script, shown in ((refusing, "refused: 0.1 GiB missing"), ("import time; time.sleep(60)", "unfinished")):
        folder = tmp_path / shown[:4]
        folder.mkdir()
        began = time.monotonic()
        below = smallest_limits.refusal(cell, (sys.executable, "-c", script), folder)
        assert time.monotonic() - began < 20
        columns = smallest_limits.row("flux", {"limit_gib": 2.9, "at": at, "below": below}).split(" | ")
        assert columns[4:10] == ["ran", "0.50", "1.75", "1.74", "2.85", shown], columns
    alone = smallest_limits.row("flux,full,24", {"limit_gib": 24, "below": below}).split(" | ")
    assert alone[1:4] == ["full", "24", ""] and alone[9] == "unfinished"
    assert math.isfinite(below["wall_seconds"]) and json.dumps(below)


def test_what_is_no_model_or_method_is_refused(smallest_limits: ModuleType) -> None:
    for word in ("flux,lokr", "flix", "flux,full,much"):
        with pytest.raises(ValueError):
            smallest_limits.cell_of(word, 10, True)
