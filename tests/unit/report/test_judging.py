"""The page's judgement: over-fitting in words, suspects with thumbnails, and nothing raw from a log."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from pixtune.report.judging import build_best, build_suspects
from pixtune.report.record import Outcome, Validation, read_record


def validation(step: int, loss: float) -> Validation:
    return Validation(step, loss, (loss,) * 4)


def test_over_fitting_is_told_where_training_pictures_improve_and_held_out_ones_do_not() -> None:
    outcome = Outcome(validation(0, 1.0), validation(30, 0.8), validation(10, 0.5))
    falling = [validation(0, 1.0), validation(10, 0.6), validation(30, 0.2)]
    told = build_best(outcome, falling, True)
    assert "0.5000 at step 10" in told and "best/" in told
    assert "best/" not in build_best(outcome, falling, False), "of a whole model no files are kept"
    assert "from 0.6000 to 0.2000: the model learns your pictures by heart" in told
    rising = [*falling[:2], validation(30, 0.9)]
    assert "by heart" not in build_best(outcome, rising, True) and "by heart" not in build_best(outcome, [], True)
    assert build_best(Outcome(validation(0, 1.0), validation(30, 0.5), validation(30, 0.5)), falling, True) == ""


def test_where_the_base_is_the_best_no_file_is_named_as_the_better_one() -> None:
    """Files in best/ are of the best trained step, which is worse than the base."""
    told = build_best(Outcome(validation(0, 1.0), validation(30, 8.0), validation(0, 1.0)), [], True)
    assert "No step was better on held-out pictures than the base model itself (1.0000" in told and "best/" not in told


def test_suspects_are_shown_with_thumbnails_and_escaped(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "00.png")
    entries: list[object] = [
        {"name": "a.png", "caption": "<script>", "gain": -0.1, "path": "00.png"},
        {"name": "b.png", "caption": "b", "gain": 0.0, "path": "../outside.png"},
        {"name": "c.png", "caption": "c", "gain": "no number", "path": "00.png"},
        "no entry",
    ]
    line = {"kind": "captions", "step": 0, "gains": {"a.png": -0.1}, "suspects": entries}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    page = build_suspects(tmp_path, read_record(tmp_path))
    assert "<script>" not in page and "&lt;script&gt;" in page and "data:image/png" in page
    assert "missing or damaged: ../outside.png" in page and "c.png" not in page
    assert build_suspects(tmp_path, read_record(tmp_path / "nowhere")) == ""
