"""The words of a command that takes a config: a file, and keys that win over it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from pixtune.config.model_parts import ModelParts
from pixtune.config.schema import leaf_keys
from pixtune.inputs.printing import one_line

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
TAKES_KEYS = {**HELP_OPTIONS, "ignore_unknown_options": True}  # --rank 8 is answered with rank=8

Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="The config file, where it is not the first word.")
]

Part = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=PATH", help="With --model: a key of model_parts, as others=FOLDER; may be repeated."),
]
"""Option of a command that takes a model: its parts that lie elsewhere."""


def forgotten_command(words: Sequence[str]) -> str | None:
    """Returns a hint for words that begin with a config file where a command should stand; None for all others."""
    name = words[0] if words else ""
    if not name.endswith((".yaml", ".yml")) or name.startswith("-"):
        return None
    rest = shlex.join(["pixtune", "train", *words])
    return (
        f"{one_line(name)} is no command. To train by it: {one_line(rest)}. To see first whether it fits: pixtune plan"
    )


def complete_words(incomplete: str) -> list[str]:
    """Completes a word of a command that takes a config: its file, or the name of a key with its equals sign."""
    if "=" in incomplete:
        return []
    files = [*_paths(incomplete, (".yaml", ".yml"))]
    return files + [f"{key}=" for key in leaf_keys() if key.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    """Completes the folder of a run: a path, or a name below ./runs."""
    below = [path.name for path in sorted(Path("runs").glob("*")) if path.is_dir()]
    return [name for name in below if name.startswith(incomplete)] + [*_paths(incomplete, ())]


def _paths(incomplete: str, endings: tuple[str, ...]) -> Iterator[str]:
    """Yields folders, and files of these endings, whose paths begin so."""
    folder, _, begin = incomplete.rpartition("/")
    root = Path(folder or ("/" if incomplete.startswith("/") else "."))
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        is_hidden = path.name.startswith(".") and not begin.startswith(".")
        if path.name.startswith(begin) and not is_hidden and (path.is_dir() or path.name.endswith(endings)):
            yield incomplete[: len(incomplete) - len(begin)] + path.name + ("/" if path.is_dir() else "")


Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG KEY=VALUE", show_default=False, autocompletion=complete_words,
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


def refuse_options(words: Sequence[str]) -> None:
    """Checks that no word of a command without a config is an option that it does not know.

    Raises:
        BadParameter: one is.
    """
    for word in words:
        if word.startswith("-") and not Path(word).exists():
            raise typer.BadParameter(f"{word.partition('=')[0]} is no option of this command: --help lists them")


def model_parts(words: Sequence[str]) -> ModelParts:
    """Reads the parts of a model that a command names, each as NAME=PATH.

    Raises:
        BadParameter: one has another form, or no part has its name.
    """
    pairs = [word.partition("=") for word in words]
    if wrong := [word for word, (name, _, path) in zip(words, pairs, strict=True) if not name or not path]:
        raise typer.BadParameter(f"--part {wrong[0]}: NAME=PATH is needed, for example --part vae=models/vae")
    try:
        return ModelParts.model_validate({name: path for name, _, path in pairs})
    except ValidationError as error:
        name = error.errors()[0]["loc"][0]
        known = ", ".join(ModelParts.model_fields)
        raise typer.BadParameter(f"--part {name}: {error.errors()[0]['msg']}. The parts are {known}") from error
