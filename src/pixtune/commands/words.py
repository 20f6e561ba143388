"""The words of a command that takes a config: a file, and keys that win over it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
TAKES_KEYS = {**HELP_OPTIONS, "ignore_unknown_options": True}  # --rank 8 is answered with rank=8

Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="The config file, where it is not the first word.")
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG KEY=VALUE", show_default=False,
        help="YAML file, for example one of train_configs/; then keys for this time, as rank=32 or "
        "data_config.img_dir=./pictures. `pixtune keys` lists them.",
    ),
]  # fmt: skip


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
