"""One small run, recorded once for all tests of what reads runs from outside; each works on a copy of its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from pixtune.storage.output_lock import FILE_NAME, Holder, this_process
from tests.runs import overrides, pixtune, write_config

NUM_STEPS = 6
SETTINGS: dict[str, object] = {
    "max_train_steps": NUM_STEPS,
    "logging_steps": 1,
    "checkpointing_steps": 3,
    "validation__held_out": 0.2,
    "validation__num_draws": 1,
    "validation__every": 2,
    "validation__judge_captions": "false",
    "samples__prompts": "['a [cat]', 'a dog']",
    "samples__num_steps": 1,
    "samples__every": 6,
    "samples__width": 64,
    "samples__height": 64,
}


def record(folder: Path, cache: Path) -> Path:
    """Trains, and returns the run's folder, which is not to be changed."""
    outcome = pixtune("train", "--config", write_config(folder), *overrides(folder / "run", cache, **SETTINGS))
    assert outcome.returncode == 0, outcome.stdout
    return folder / "run"


def leave_lock(folder: Path, **changes: object) -> Holder:
    """The lock's file as a process leaves it that was killed: by default of one whose number is free."""
    dead = {"pid": 2**22 + 5, "started": "1"}
    holder = replace(this_process(), **{**dead, **changes})  # type: ignore[arg-type]
    (folder / FILE_NAME).write_text(json.dumps(asdict(holder)).ljust(1023) + "\n")
    return holder
