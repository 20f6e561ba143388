"""The words of commands that take a folder or a config."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from pixtune.commands.caption import find_source
from pixtune.commands.validate import FolderRequest, check


@pytest.mark.parametrize("words", [["--mask-dir", "masks"], ["--bogus=3"], ["--over-write"]])
def test_an_option_that_a_command_lacks_is_named(tmp_path: Path, words: list[str]) -> None:
    """Not taken for a second folder: these commands take `--key value` beside a config, to answer with `key=value`."""
    option = words[0].partition("=")[0]
    with pytest.raises(typer.BadParameter, match=f"^{option} is no option of this command: --help lists them$"):
        check([str(tmp_path), *words], None, None, FolderRequest())
    with pytest.raises(typer.BadParameter, match=f"^{option} is no option of this command: --help lists them$"):
        find_source([str(tmp_path), *words], None, "some/model", None, None, ())
