"""Imported configs plan as they are, with the small models in place of the real ones."""

from __future__ import annotations

import pytest

from pixtune.commands.plan import make_report
from pixtune.config.load import load_config
from pixtune.migration.writing import config_text
from tests.runs import ROOT
from tests.unit.migration.importing import MAIN_PATHS, named, take


def small_model(name: str) -> str:
    """Returns the name of the small model of a model's kind."""
    if "flux" in name.casefold():
        return "tiny-flux"
    return "tiny-qwen-image-edit" if "edit" in name.casefold() else "tiny-qwen-image"


@pytest.mark.parametrize("path", MAIN_PATHS, ids=named)
def test_an_imported_config_passes_pixtune_plan(path, tmp_path):
    imported = take(path)
    file = tmp_path / "imported.yaml"
    file.write_text(config_text(imported), encoding="utf-8")
    model = ROOT / "assets" / small_model(imported.value_of("pretrained_model_name_or_path"))
    words = [f"pretrained_model_name_or_path={model}", "model_parts.transformer=null"]
    report = make_report(load_config(file, words, folders_must_exist=False), "RTX 4090")
    assert report.plan.to_dict()
    assert not report.too_large
