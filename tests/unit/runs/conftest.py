"""One small run that was recorded once; each test has a copy of its folder to do harm to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import overrides, pixtune, write_config

NUM_STEPS = 6
SETTINGS: dict[str, object] = {
    "max_train_steps": NUM_STEPS,
    "logging_steps": 1,
    "checkpointing_steps": 3,
    "validation__held_out": 0.2,
    "validation__num_draws": 1,
    "validation__every": 2,
    "samples__prompts": "['a [cat]', 'a dog']",
    "samples__num_steps": 1,
    "samples__every": 6,
    "samples__width": 64,
    "samples__height": 64,
}


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Path:
    """The folder of a finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("recorded")
    outcome = pixtune("train", "--config", write_config(folder), *overrides(folder / "run", warm_cache, **SETTINGS))
    assert outcome.returncode == 0, outcome.stdout
    return folder / "run"


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of the recorded run under a name."""

    def make(name: str = "run") -> Path:
        return Path(shutil.copytree(recorded, tmp_path / name))

    return make
