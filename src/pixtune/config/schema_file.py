"""Writes the JSON schema with which editors complete and check the YAML configs, and docs/config.md: `make schema`.

A YAML file names it in its first line: `# yaml-language-server: $schema=schema.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pixtune.config.keys_page import page
from pixtune.config.schema import FORMER_KEYS, OLDER_NAMES, TrainConfig

DEFAULT_PATH, PAGE_PATH = Path("train_configs/schema.json"), Path("docs/config.md")


def json_schema() -> dict[str, Any]:
    """Returns every key with its type, bounds, default and description; what is older is marked as deprecated."""
    schema = TrainConfig.model_json_schema()
    properties = schema["properties"]
    for older, current in OLDER_NAMES.items():
        described = {**properties[current], "deprecated": True, "description": f"Older name of `{current}`."}
        properties[older] = described
    for former, why in FORMER_KEYS.items():
        properties[former] = {"deprecated": True, "description": f"Has no effect any more: {why}."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "A pixtune config"}


def schema_text() -> str:
    """Returns the content of `schema.json`."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for path, text in ((DEFAULT_PATH, schema_text()), (PAGE_PATH, page())):
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
