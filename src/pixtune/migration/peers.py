"""All trainers whose configs are read, and which of them a config belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pixtune.errors import MigrationError
from pixtune.migration.ai_toolkit import AI_TOOLKIT
from pixtune.migration.diffusers_scripts import DIFFUSERS
from pixtune.migration.diffusion_pipe import DIFFUSION_PIPE
from pixtune.migration.musubi_tuner import MUSUBI_TUNER
from pixtune.migration.one_trainer import ONE_TRAINER
from pixtune.migration.peer import Peer
from pixtune.migration.reading import EXPECTED, Source
from pixtune.migration.sd_scripts import SD_SCRIPTS
from pixtune.migration.simpletuner import SIMPLETUNER

PEERS: tuple[Peer, ...] = (
    AI_TOOLKIT, MUSUBI_TUNER, DIFFUSION_PIPE, SD_SCRIPTS, SIMPLETUNER, ONE_TRAINER, DIFFUSERS,
)  # fmt: skip


def peer_of(source: Source) -> Peer:
    """Returns the trainer that a config is for, by its keys.

    Raises:
        MigrationError: it is for none of them; says what the file is where that can be seen.
    """
    for peer in PEERS:
        if peer.recognizes(source):
            return peer
    raise MigrationError(f"{source.name} {_what_it_is(source)}")


def _what_it_is(source: Source) -> str:
    if source.form == "command":
        scripts = ", ".join(dict.fromkeys(command.script for command in source.commands)) or "no Python script"
        for command in source.commands:
            config = command.arguments.get("config") or command.arguments.get("config_file")
            if isinstance(config, str):
                return f"calls {command.script} with {config}: give that file"
            if command.file:
                return f"calls {command.script} with {command.file}: give that file"
        return f"calls {scripts}, which is no training script that is known. {EXPECTED}"
    for peer in PEERS:
        if (instead := peer.describes_data(source.tree)) is not None:
            return f"describes the data set (or samples) of a config of {peer.name}: give {instead}, which names it"
    if (kind := _foreign(source.tree)) is not None:
        return kind
    keys = ", ".join(str(key) for key in list(source.tree)[:6]) if isinstance(source.tree, Mapping) else "a list"
    return f"is of a trainer that is not known (its first keys: {keys}). {EXPECTED}"


def _foreign(tree: Any) -> str | None:
    """Returns what a file is that people may take for a config."""
    if isinstance(tree, Mapping):
        nodes = tree.get("nodes", tree.values())
        if any(isinstance(node, Mapping) and ("class_type" in node or "outputs" in node) for node in _items(nodes)):
            return "is a ComfyUI workflow, which draws pictures and trains nothing"
        if {"pretrained_model_name_or_path", "data_config"} <= set(tree):
            return "is a config of pixtune already"
        if "_class_name" in tree or "_diffusers_version" in tree or "architectures" in tree:
            return "describes a model, and no training"
        if "LoRA_type" in tree or ("train_data_dir" in tree and "gradio" in str(tree)[:2000].casefold()):
            return (
                "is a preset of kohya_ss' window: print the training command there (the button of that name), save it "
                "as a file, and import that"
            )
        if {"compute_environment", "distributed_type"} & set(tree):
            return "is a config of accelerate's launcher, not of a training"
        if "project" in tree and "build-system" in tree:
            return "is a Python project's pyproject.toml"
    return None


def _items(nodes: Any) -> list[Any]:
    return list(nodes) if isinstance(nodes, list | tuple) or hasattr(nodes, "__iter__") else []
