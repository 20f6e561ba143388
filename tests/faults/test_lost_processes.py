"""Two processes of a run, of which one fails: both end, the first says why, and a restart by the launcher goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pixtune.storage.checkpoint_state import find_checkpoints
from pixtune.tracking.metrics import read_metrics
from tests.runs import end_of, overrides, start_ranks, write_config


def second_fails() -> None:
    """The seventh step of the second process cannot read its picture."""
    from pixtune import train
    from pixtune.errors import DataError

    take = train.train_step

    def fail(run: Any, micro_batches: Any, step: int) -> Any:
        if step == 6 and os.environ["RANK"] == "1":
            raise DataError("1 picture cannot be used", ["a.png is damaged"])
        return take(run, micro_batches, step)

    vars(train)["train_step"] = fail


def test_one_error_is_told_once_and_a_restart_goes_on_by_itself(
    tmp_path: Path, warm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    words = overrides(tmp_path / "run", warm_cache, max_train_steps=12, checkpointing_steps=4, logging_steps=1)
    command = ["train", "--config", write_config(tmp_path), *words]
    (code, printed), (other_code, other) = map(end_of, start_ranks(*command, before=second_fails))
    assert (code, other_code) == (1, 1), printed + other
    assert "error:" not in other, "the first process prints it"
    told = "error: process 1 of 2 (pid "
    assert printed.count("error:") == 2 and told in printed  # of the block, and of what it quotes
    assert "has ended with an error: 1 picture cannot be used:\n  - a.png is damaged" in printed
    assert [path.name for path in find_checkpoints(tmp_path / "run")][-1] == "checkpoint-000006", "the steps before"

    (code, printed), (other_code, _) = map(end_of, start_ranks(*command))
    assert code == 1 and "already holds a run" in printed, "a new launch by the same command is refused"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (code, printed), (other_code, other) = map(end_of, start_ranks(*command))
    assert (code, other_code) == (0, 0), printed + other
    assert "restart 1 of 3 by the launcher: going on from what this run has saved" in printed
    assert "resuming after step 6 of 12" in printed
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert steps == [*range(1, 13)], "none is lost, and none is taken twice"


def second_has_another_torch() -> None:
    from pixtune.hardware.facts import package_versions
    from pixtune.launch import agreement

    if os.environ["RANK"] == "1":
        versions = {**package_versions(), "torch": "2.11.0"}
        vars(agreement)["package_versions"] = lambda: versions


def test_processes_with_different_versions_are_refused_by_name(tmp_path: Path, warm_cache: Path) -> None:
    command = ["train", "--config", write_config(tmp_path), *overrides(tmp_path / "run", warm_cache)]
    (code, printed), (other_code, other) = map(end_of, start_ranks(*command, before=second_has_another_torch))
    assert (code, other_code) == (1, 1) and "error:" not in other, printed + other
    assert "process 1 of this run would train something else than process 0" in printed
    assert "the version of torch: process 0 has " in printed and ", process 1 has 2.11.0" in printed
    assert not (tmp_path / "run").exists()
