"""Imports of configs in tests: of the fixtures, or of a text with files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pixtune.migration.engine import Imported, migrate
from pixtune.migration.peer import Options
from pixtune.migration.peers import peer_of
from pixtune.migration.reading import parse_source, read_source

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "other_trainers"
MAIN_FILES = {
    "ai_toolkit": ("flux_24gb.yaml", "qwen_24gb.yaml", "qwen_edit_2509.yaml"),
    "musubi_tuner": ("qwen_image.sh", "kontext.sh", "edit_2511.toml"),
    "diffusion_pipe": ("flux.toml", "qwen_image.toml", "kontext_full.toml"),
    "sd_scripts": ("guide.sh", "notebook.toml", "prodigy.toml"),
    "simpletuner": ("flux.json", "qwen_image.json", "kontext.json"),
    "one_trainer": ("flux.json", "qwen_24gb.json", "qwen_finetune.json"),
    "diffusers": ("flux_lora.sh", "kontext_lora.sh", "qwen_lora.sh"),
}
"""Files to give to `pixtune import`, by folder; the others in these folders are named by them."""
MAIN_PATHS = [FIXTURES / folder / name for folder, names in MAIN_FILES.items() for name in names]


def named(path: Path) -> str:
    """Returns a test's id."""
    return f"{path.parent.name}/{path.name}"


def take(path: Path, dataset: Path | None = None, model: str | None = None) -> Imported:
    """Imports a file."""
    source = read_source(path)
    return migrate(source, peer_of(source), Options(dataset), model)


def take_text(text: str, folder: Path = Path("/nowhere")) -> Imported:
    """Imports a text as if it were a file in a folder."""
    source = parse_source(text, "the text", folder)
    return migrate(source, peer_of(source), Options())


def values(imported: Imported) -> dict[str, Any]:
    """Returns our keys with their values; those of the first of several folders as `folder.KEY`."""
    found = {line.key: line.value for line in imported.lines}
    return found | {f"folder.{line.key}": line.value for line in (imported.folders[0] if imported.folders else ())}


def left(imported: Imported, kind: str) -> list[str]:
    """Returns what is left over of a kind, as "KEY = VALUE: why"."""
    return [f"{each.origin}: {each.why}" for each in imported.leftovers if each.kind == kind]
