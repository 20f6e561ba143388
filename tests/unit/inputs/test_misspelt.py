"""Hints at what a path that leads nowhere may have meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixtune.inputs import misspelt
from pixtune.inputs.misspelt import did_you_mean, similar_paths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("cats/train", "cats/held_out", "dogs"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def test_the_likest_comes_first(folder: Path) -> None:
    (folder / "cats-2").mkdir()
    assert similar_paths(folder / "cast") == [folder / "cats", folder / "cats-2"]
    assert did_you_mean(folder / "cats3") == f" Did you mean {folder / 'cats'} or {folder / 'cats-2'}?"


def test_a_folder_above_may_be_the_misspelt_one(folder: Path) -> None:
    assert similar_paths(folder / "catz" / "train") == [folder / "cats" / "train"]
    assert similar_paths(folder / "catz" / "test") == [folder / "cats"]


def test_relative_paths_are_hinted_at_as_they_are_typed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert similar_paths(Path("cats/trian")) == [Path("cats/train")]
    assert similar_paths(Path("dog")) == [Path("dogs")]


def test_what_is_there_or_like_nothing_has_no_hint(folder: Path) -> None:
    assert did_you_mean(folder / "cats") == did_you_mean(folder / "parrots") == ""
    assert did_you_mean(folder / "cats" / "train.txt" / "x", cutoff=1.0) == ""


def test_of_a_large_folder_some_names_are_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misspelt, "MOST_NAMES", 0)
    assert similar_paths(folder / "cast") == []
