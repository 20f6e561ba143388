"""A run that its launcher starts anew goes on from what this launch has saved, and from nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from pixtune.storage import restart
from pixtune.storage.restart import launch_of, resume_after_restart

ELASTIC = {"TORCHELASTIC_RUN_ID": "job-7", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "1"}


def folder_with(monkeypatch: pytest.MonkeyPatch, *launches: str | None) -> None:
    """Stands in for checkpoints on the course of a run, the newest first, by the launches that wrote them."""
    course = [SimpleNamespace(path=launch) for launch in launches]
    monkeypatch.setattr(
        restart, "read_folder", lambda output_dir: SimpleNamespace(order=SimpleNamespace(course=course))
    )
    monkeypatch.setattr(restart, "read_state", lambda path: {"record": {} if path is None else {"launch": path}})


@pytest.mark.parametrize("wanted", [None, "checkpoint-000100"])
def test_only_what_this_launch_has_saved_goes_before_the_config(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: str | None
) -> None:
    told: list[str] = []

    def chosen(**changes: str) -> str | None:
        return resume_after_restart(tmp_path, wanted, {**ELASTIC, **changes}, told.append)

    folder_with(monkeypatch)
    assert chosen() == wanted, "nothing is saved: as at the first start"
    folder_with(monkeypatch, None, "another's")
    assert chosen() == wanted, "what others have saved is refused, or set back from, as at the first start"
    folder_with(monkeypatch, launch_of(ELASTIC), None)
    assert not told and chosen() == "latest" and len(told) == 1
    assert chosen(TORCHELASTIC_RESTART_COUNT="0") == wanted, "a first start by the same name"
    assert chosen(TORCHELASTIC_RUN_ID="job-8") == wanted
    assert chosen(TORCHELASTIC_RESTART_COUNT="soon") == wanted


def test_launches_have_names_that_outlive_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    again = {**ELASTIC, "TORCHELASTIC_RESTART_COUNT": "2"}
    assert launch_of(ELASTIC) == launch_of(again) != launch_of({**ELASTIC, "TORCHELASTIC_RUN_ID": "job-8"})
    assert launch_of({}) is None and launch_of({**ELASTIC, "TORCHELASTIC_MAX_RESTARTS": "0"}) is None
    unnamed = {**ELASTIC, "TORCHELASTIC_RUN_ID": "none"}
    first = launch_of(unnamed)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert first != launch_of(unnamed), "two launchers that were given no name"
    assert "job" not in json.dumps([first, launch_of(ELASTIC)])
