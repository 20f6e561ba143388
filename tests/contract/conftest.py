from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.observe import make_scene


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of pictures and one cache, which all observed runs share."""
    folder = tmp_path_factory.mktemp("scene")
    make_scene(folder)
    return folder
