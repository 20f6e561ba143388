"""benchmarks/neighbours.py: what a plan is compared with, that rungs of one build differ, and what the table counts."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pixtune.config import load_config
from pixtune.engine.activations import recompute
from pixtune.engine.apply import blocks_of
from pixtune.engine.forwards import is_recomputed
from pixtune.hardware.cards import facts_as
from pixtune.plan.demands import demands_of
from pixtune.plan.rungs import Rung
from pixtune.plan.situation import Situation, situation_of
from tests.full_size import full_size_footprint
from tests.runs import ROOT


@pytest.fixture
def neighbours(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("neighbours")


def situation(limit_gib: float) -> Situation:
    words = [
        "pretrained_model_name_or_path=m", "output_dir=o", "data_config.img_dir=p", "max_train_steps=1", "rank=16",
        f"gpu_memory_limit_gib={limit_gib}", "adam8bit=false",
    ]  # fmt: skip
    config = load_config(None, words, folders_must_exist=False)
    footprint = replace(full_size_footprint(config, "flux"), num_tokens=3648)
    return situation_of(facts_as("H200"), footprint, demands_of(config))


@pytest.mark.parametrize("limit_gib", [4.1, 8.3, 11.5, 40])
def test_a_plan_is_compared_with_others_that_fit_or_nearly_fit(neighbours: ModuleType, limit_gib: float) -> None:
    here = situation(limit_gib)
    found = neighbours.candidates(here)
    rungs = [each.rung for each in found]
    assert [each.relation for each in found].count("chosen") == 1 and found[0].relation == "chosen"
    assert len(set(rungs)) == len(rungs) >= 2
    for each in found:
        bold = each.why == "within 3% of fitting"
        assert here.needed(each.rung) <= here.usable_bytes * (1.03 if bold else 1)
        assert here.fits(each.rung) != bold
    plan = found[0].rung
    if plan.streamed_blocks:  # one block less, or few, is the nearest that might fit
        assert any(0 < plan.streamed_blocks - rung.streamed_blocks <= 2 for rung in rungs[1:])


def test_the_least_limit_is_refused_a_tenth_below(neighbours: ModuleType) -> None:
    here = situation(40)
    least = neighbours.least_limit(here)
    assert neighbours.candidates(neighbours.with_limit(here, least))
    assert not neighbours.candidates(neighbours.with_limit(here, least - 0.1))
    fastest = neighbours.limit_of_the_fastest(here)
    assert neighbours.candidates(neighbours.with_limit(here, fastest + 0.01))[0].rung == Rung("bf16")


def test_rungs_of_one_build_recompute_what_each_says_and_the_best_is_found(
    neighbours: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three rungs of a small model run on one loaded transformer: what is there at each measurement is looked at."""
    wanted = [
        Rung("bf16", 128, True, 3, False, reprojected_blocks=2),
        Rung("bf16", 128, True),
        Rung("bf16", 128, True, 1, True),
    ]
    seen: list[tuple[int, int]] = []
    put = neighbours.put_activations

    def looked_at(built: Any, plan: Any) -> None:
        put(built, plan)
        blocks = blocks_of(built.base.module, built.run.family)
        plain = sum(getattr(block.forward, "around", None) is recompute for block in blocks)
        seen.append((sum(map(is_recomputed, blocks)), plain))

    found = [neighbours.Candidate(rung, "same format" if n else "chosen", "") for n, rung in enumerate(wanted)]
    monkeypatch.setattr(neighbours, "one_of_each_way", lambda situation: found)
    monkeypatch.setattr(neighbours, "put_activations", looked_at)
    words = ["--tiny", "--models", "qwen-image", "--limits", 1, "--output", tmp_path]
    monkeypatch.setattr(sys, "argv", ["neighbours.py", *map(str, words)])
    neighbours.main()
    assert sorted(seen) == [(0, 0), (1, 0), (3, 3)], "blocks recomputed, and those of them without an offload"
    (file,) = tmp_path.glob("*.json")
    values = json.loads(file.read_text())
    assert [each["rung"] for each in values["results"]] == [asdict(rung) for rung in wanted]
    assert " of 1 plans are at most" in capsys.readouterr().out
    neighbours.main()
    assert len(json.loads(file.read_text())["results"]) == 3, "nothing is measured twice"


def test_what_gave_something_up_did_not_fit_and_more_memory_is_no_hindrance(neighbours: ModuleType) -> None:
    plan, bold, fewer = Rung("fp8", 128, True, 10), Rung("fp8", 128, True, 9), Rung("nf4", 128, True)

    def result(rung: Rung, limit: float, seconds: float, *gave_up: str) -> dict[str, Any]:
        return {
            "rung": asdict(rung), "limit_gib": limit, "seconds": seconds, "expected_seconds": 0.3, "gave_up": gave_up,
        }  # fmt: skip

    def limit(*rungs: Rung) -> list[dict[str, Any]]:
        relations = {"fp8": "same format", "nf4": "fewer bits"}
        return [
            {"rung": asdict(rung), "relation": relations[rung.weights_format] if n else "chosen", "why": ""}
            for n, rung in enumerate(rungs)
        ]

    values = {
        "case": {"model": "flux"},
        "limits": {"10": limit(plan, bold, fewer), "11": limit(plan, bold)},
        "results": [
            result(plan, 10, 0.33), result(bold, 10, 0.2, "leaner than planned"), result(bold, 11, 0.29),
            result(fewer, 10, 0.25),
        ],
    }  # fmt: skip
    table = importlib.import_module("neighbours_table")
    (first, alone), (second, over) = table.rows(values)
    assert alone == 1 and first[5] == "the plan" and first[8:11] == ["nf4, modulation 128 ahead, cheap recomputed",
                                                                     "0.250", "1.320"]  # fmt: skip
    assert over == pytest.approx(0.33 / 0.29) and second[3] == "0.330", "measured under the smaller limit"
