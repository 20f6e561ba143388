"""benchmarks/adapters.py on a small model: a step of each kind of adapter is timed, beside a LoRA's."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT

WIDTH, LAYERS, RANK, FACTOR = 256, 20, 16, 16


def test_each_kind_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    words = ["--model", "tiny", "--steps", 1, "--json", tmp_path / "r.json", "lora,bf16", "lokr,bf16", "dora,bf16"]
    monkeypatch.setattr(sys, "argv", ["adapters.py", *map(str, words)])
    importlib.import_module("adapters").main()
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["kind"], row["trained_weights"]) for row in rows] == [
        ("lora", LAYERS * RANK * 2 * WIDTH),
        ("lokr", LAYERS * (FACTOR**2 + (WIDTH // FACTOR) ** 2)),
        ("dora", LAYERS * (RANK * 2 * WIDTH + WIDTH)),
    ]
    assert rows[0]["times_lora"] == 1 and all(row["ms_per_step"] > 0 and row["times_lora"] > 0 for row in rows)
