"""benchmarks/captions.py on a small model: figures for each format and number of pictures."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, TINY_MODEL


def test_each_format_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    words = ["--captioner", TINY_MODEL, "--size", 96, "--tokens", 3, "--at-once", 2, 1, "--json", tmp_path / "r.json"]
    monkeypatch.setattr(sys, "argv", ["captions.py", *map(str, words)])
    importlib.import_module("captions").main()
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["format"], row["at_once"]) for row in rows] == [
        (name, count) for name in ("bf16", "int8", "nf4") for count in (2, 1)
    ]
    assert all(row["expected_peak_gib"] > row["expected_weights_gib"] >= 0 < row["reading_seconds"] for row in rows)
