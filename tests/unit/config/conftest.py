from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pixtune.config import load_config
from pixtune.errors import ConfigError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder


@pytest.fixture
def minimal(pictures: Path) -> str:
    """The shortest config that is right, 4 lines."""
    return (
        f"pretrained_model_name_or_path: some/model\noutput_dir: out\nmax_train_steps: 10\n"
        f"data_config: {{img_dir: {pictures}}}\n"
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def faults_of(write: Callable[[str], Path]) -> Callable[..., list[str]]:
    """The faults of a config text with overrides, paths shortened to the file's name."""

    def faults_of(text: str, *overrides: str) -> list[str]:
        path = write(text)
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides)
        return [fault.replace(str(path), "run.yaml") for fault in caught.value.faults]

    return faults_of
