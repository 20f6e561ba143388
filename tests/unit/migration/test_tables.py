"""The tables of all trainers: they agree with the schema, the page and the names that errors suggest."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from pixtune.config.other_names import OTHER_NAMES
from pixtune.config.schema import leaf_keys
from pixtune.config.sections import FolderConfig
from pixtune.errors import MigrationError
from pixtune.migration.engine import migrate
from pixtune.migration.page import PAGE, page
from pixtune.migration.peer import Options, Part, Peer
from pixtune.migration.peers import PEERS
from pixtune.migration.reading import read_source
from pixtune.migration.rules import Rule
from pixtune.migration.writing import config_text
from tests.runs import ROOT
from tests.unit.migration.importing import FIXTURES

BY_NAME = pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
WITH_FOLDERS = {
    "ai-toolkit": "ai_toolkit/qwen_24gb.yaml",
    "musubi-tuner": "musubi_tuner/edit_2511.toml",
    "sd-scripts": "sd_scripts/guide.sh",
    "diffusion-pipe": "diffusion_pipe/flux.toml",
    "SimpleTuner": "simpletuner/flux.json",
    "OneTrainer": "one_trainer/flux.json",
    "diffusers' scripts": "diffusers/flux_lora.sh",
}
VALUES: tuple[Any, ...] = (
    True, False, 0, 1, -1, 0.5, "x", "", [], {}, "1e-4", float("nan"), [1, "a"], {"a": 1}, "512", 1e30, "a\nb: c", None
)  # fmt: skip


def test_the_page_is_current():
    assert (ROOT / PAGE).read_text(encoding="utf-8") == page(), "run `make schema`"


@BY_NAME
def test_our_keys_are_keys_of_the_schema(peer):
    known = set(leaf_keys())
    for rule in (*peer.settings, *peer.folders):
        for key in rule.ours.split():
            of_folder = rule in peer.folders and "." not in key
            assert key in (FolderConfig.model_fields if of_folder else known) or key in known, (rule.theirs, key)


@BY_NAME
def test_a_config_with_any_value_is_imported_or_refused_and_no_key_is_dropped(peer, monkeypatch):
    """Half of a table's keys, each with one odd value; the config's check, which takes most time, has its own tests."""
    monkeypatch.setattr("pixtune.migration.engine._check", lambda imported: None)
    draws = random.Random(7)
    source = read_source(FIXTURES / WITH_FOLDERS[peer.name])
    parts = peer.take_apart(source, Options())
    for in_folder, key in _keys(peer):
        for value in draws.sample(VALUES, draws.randrange(2)):
            if in_folder:
                first = parts.folders[0]
                folders = (Part({**first.written, key: value}, first.label), *parts.folders[1:])
                changed = replace(parts, folders=folders)
            else:
                changed = replace(parts, settings=Part({**parts.settings.written, key: value}))
            try:
                text = config_text(migrate(source, replace(peer, take_apart=lambda *_, to=changed: to), Options()))
            except MigrationError as refused:
                assert "\n" not in str(refused)
                continue
            assert value is None or f"{key} =" in text.replace("\n#     ", " "), (key, value)


def _keys(peer: Peer) -> list[tuple[bool, str]]:
    def of(rules: tuple[Rule, ...], in_folder: bool) -> list[tuple[bool, str]]:
        names = dict.fromkeys(rule.theirs for rule in rules)
        return [(in_folder, name) for name in names if not any(mark in name for mark in "*(") and name != "script"]

    return of(peer.settings, False) + of(peer.folders, True)


WORDS_OF_MANY = {"type", "samples", "enable", "tensorboard", "dropout_probability", "ema", "unload_text_encoder"}
"""Last parts of keys that mean a key of ours in one place of one trainer alone."""
ANOTHER_MEANING = {
    "optimizer_args": "a list, of which one key can be suggested",
    "network_args": "a list, of which no one key can be suggested",
    "conditioning_data_dir": "masks in sd-scripts, controls elsewhere",
    "weight_dtype": "of the transformer, or of everything",
    "diffusers_path": "the base, or what gives the parts beside its file",
    "instance_prompt": "a caption, or a prefix",
}


def test_names_that_errors_suggest_are_those_of_the_tables():
    """Who writes another trainer's key into a config of ours is led to where the import puts it."""
    own = {key.rpartition(".")[2] for key in leaf_keys()} | set(FolderConfig.model_fields)
    wrong = []
    for peer in PEERS:
        ours = _by_last_part(peer)
        for name, keys in ours.items():
            if name in WORDS_OF_MANY | set(ANOTHER_MEANING) | own:
                continue
            if not any(_same(OTHER_NAMES.get(name, ""), key) for key in keys):
                wrong.append((peer.name, name, OTHER_NAMES.get(name), sorted(keys)))
    assert not wrong


def _by_last_part(peer: Peer) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for rule in (*peer.settings, *peer.folders):
        if rule.ours and not rule.theirs.startswith("("):
            found.setdefault(rule.theirs.rpartition(".")[2], set()).update(rule.ours.split())
    return found


def _same(name: str, key: str) -> bool:
    return name.rpartition(".")[2] == key.rpartition(".")[2]
