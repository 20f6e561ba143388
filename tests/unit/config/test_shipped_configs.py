"""The YAML files in `train_configs/` and the JSON schema by which editors check them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pixtune.config import load_config
from pixtune.config.schema_file import json_schema, schema_text
from pixtune.config.sources import ConfigLoader

CONFIG_DIR = Path(__file__).resolve().parents[3] / "train_configs"
CONFIGS = sorted(CONFIG_DIR.glob("*.yaml"))


def test_there_are_shipped_configs():
    assert "train_lora.yaml" in {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_is_right(path, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIG_DIR.parent)  # their paths are relative to the repository
    folders = [f"data_config.img_dir={tmp_path}"]
    if "control_dir:" in path.read_text(encoding="utf-8"):  # the user's own folders, which no clone has
        folders.append(f"data_config.control_dir={tmp_path}")
    config = load_config(path, folders)
    assert config.cuda_features.enable_tf32_compute is not False


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_says_what_it_is_for(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# yaml-language-server: $schema=schema.json"
    header = "\n".join(line for line in lines if line.startswith("#"))
    for word in ("Hardware", "Command", "Result", path.name):
        assert word in header, f"the header of {path.name} lacks {word!r}"


def test_schema_file_is_current():
    assert (CONFIG_DIR / "schema.json").read_text(encoding="utf-8") == schema_text(), "run `make schema`"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_editors_know_every_key_of_a_shipped_config(path):
    schema = json_schema()

    def check(values: dict, properties: dict) -> None:
        for key, value in values.items():
            assert properties[key].get("description"), f"{key} has no description"
            if isinstance(value, dict):
                check(value, schema["$defs"][properties[key]["$ref"].rpartition("/")[2]]["properties"])

    check(yaml.load(path.read_text(encoding="utf-8"), ConfigLoader), schema["properties"])


def test_editors_reject_what_the_loader_rejects():
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert all(section["additionalProperties"] is False for section in schema["$defs"].values())
    assert schema["properties"]["use_8bit_adam"]["deprecated"] is True
    assert json.loads(schema_text()) == schema
