"""Marks for rows that this version does not have: they go by themselves when a key leaves `schema.NOT_YET`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pixtune.config.schema import NOT_YET
from pixtune.config.yaml_tree import ConfigLoader
from pixtune.errors import NotYetError
from pixtune.storage.resume import flatten


def needs(*keys: str, raises: type[Exception] = NotYetError) -> pytest.MarkDecorator:
    """The test cannot pass before all of `keys` are built, and must pass from then on."""
    missing = [key for key in keys if key in NOT_YET]
    return pytest.mark.xfail(
        bool(missing), reason=f"this version does not have {', '.join(missing)}", raises=raises, strict=True
    )


def written_values(config: Path) -> dict[str, Any]:
    """What stands in a config file, by dotted key."""
    return flatten(yaml.load(config.read_text(encoding="utf-8"), ConfigLoader))


def refused_keys(config: Path) -> list[str]:
    """Keys of a config file that this version refuses by name."""
    values = written_values(config)
    return [key for key, honoured in NOT_YET.items() if key in values and values[key] not in honoured]


def without(keys: list[str]) -> list[str]:
    """`key=value` words that leave refused keys out of a config."""
    return [f"{key}=null" for key in keys]
