"""The words of a command that takes a config: a file, and keys that win over it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer


def config_and_overrides(words: Sequence[str] | None, config: Path | None) -> tuple[Path, list[str]]:
    """Finds the config file among a command's words: given as --config, or the first word that is no key=value.

    Raises:
        BadParameter: it is missing.
    """
    overrides = [*(words or [])]
    if config is None:
        files = [word for word in overrides if not word.startswith("-") and ("=" not in word or Path(word).is_file())]
        if not files:
            raise typer.BadParameter("name a config file, for example train_configs/train_lora.yaml")
        overrides.remove(files[0])
        config = Path(files[0])
    return config, overrides
