"""The YAML files in `train_configs/` and the JSON schema by which editors check them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from pixtune.commands.plan import make_report
from pixtune.config import TrainConfig, load_config
from pixtune.config.keys_page import page
from pixtune.config.schema_file import json_schema, schema_text
from pixtune.config.yaml_tree import ConfigLoader
from pixtune.hardware.cards import CARDS
from pixtune.storage.resume import flatten
from tests.contract.key_effects import EFFECTS
from tests.contract.not_yet import needs, refused_keys, without, written_values
from tests.contract.observe import plan_of

CONFIG_DIR = Path(__file__).resolve().parents[3] / "train_configs"
CONFIGS = sorted(CONFIG_DIR.glob("*.yaml"))


CONTRACT: dict[str, dict[str, object]] = {  # contract.md section 1: what each must set
    "train_lora": {},
    "train_lora_4090": {"quantize": True, "adam8bit": True, "save_cache_on_disk": True},
    "train_dgx_spark": {
        "unified_memory": True, "disable_cpu_offload": True, "disable_quantization": True,
        "disable_gradient_checkpointing": True, "cuda_features.enable_cudnn_sdp": True, "pin_memory": False,
        "save_cache_on_disk": False, "cuda_features.enable_fp8_training": False,
        "cuda_features.enable_flash_attention_3": False,
    },
    "train_aarch64_optimized": {
        "unified_memory": True, "cuda_features.enable_cudnn_sdp": True, "cuda_features.enable_flash_attention_3": False,
    },
    "train_cuda13_optimized": {
        "cuda_features.enable_fp8_training": False, "cuda_features.enable_flash_attention_3": True,
        "cuda_features.enable_cudnn_sdp": True,
    },
    "train_flux_config": {},
    "train_lora_qwen_edit": {},
    "train_full_qwen_image": {"method": "full"},
}  # fmt: skip
MODELS = {
    "train_flux_config": "black-forest-labs/FLUX.1-dev",
    "train_lora_qwen_edit": "Qwen/Qwen-Image-Edit-2511",
}


def shipped(stem: str) -> Path:
    return CONFIG_DIR / f"{stem}.yaml"


def own_folders(path: Path, folder: Path) -> list[str]:
    """Words that put a folder in the place of the user's own, which no clone has."""
    keys = written_values(path).keys() & {"data_config.img_dir", "data_config.control_dir"}
    return [f"{key}={folder}" for key in sorted(keys)]


def test_the_contracts_configs_are_shipped():
    assert {shipped(stem) for stem in CONTRACT} <= set(CONFIGS)


AS_SHIPPED = [pytest.param(path, marks=needs(*refused_keys(path)), id=path.stem) for path in CONFIGS]


@pytest.mark.parametrize("path", AS_SHIPPED)
def test_shipped_config_is_right(path, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIG_DIR.parent)  # their paths are relative to the repository
    load_config(path, own_folders(path, tmp_path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_says_what_this_version_refuses_and_nothing_else_is_wrong(path, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIG_DIR.parent)
    status = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# Status")]
    named = status[0].rpartition(": ")[2].rstrip(".").split(", ") if status else []
    assert sorted(named) == sorted(refused_keys(path)), "the header's Status line"
    load_config(path, [*own_folders(path, tmp_path), *without(refused_keys(path))])


@pytest.mark.parametrize("stem", CONTRACT)
def test_shipped_config_sets_what_the_contract_says(stem):
    values = written_values(shipped(stem))
    demanded = {"cuda_features.enable_tf32_compute": True, **CONTRACT[stem]}
    assert {key: values[key] for key in demanded} == demanded
    assert values["pretrained_model_name_or_path"] == MODELS.get(stem, "Qwen/Qwen-Image")


@pytest.mark.parametrize("stem", ["train_lora", "train_flux_config", "train_lora_qwen_edit"])
def test_a_config_that_promises_no_hardware_fits_every_card(stem):
    """README names them to people with any card from 8 GB up: no key stands between them and the planner."""
    config = load_config(shipped(stem), [], folders_must_exist=False)
    unfit = {card.name: [phase.name for phase in make_report(config, card.name).too_large] for card in CARDS}
    assert len(unfit) > 30 and not any(unfit.values()), unfit


def with_fastsafetensors(stem: str) -> pytest.MarkDecorator:
    """Configs that this version refuses for other keys have it already; the others shall run as they are."""
    return needs(*([] if refused_keys(shipped(stem)) else ["use_fastsafetensors"]), raises=KeyError)


@pytest.mark.parametrize("stem", [pytest.param(stem, marks=with_fastsafetensors(stem)) for stem in CONTRACT])
def test_shipped_config_loads_with_fastsafetensors(stem):
    assert written_values(shipped(stem))["use_fastsafetensors"] is True


# ---- every key of every config


CASES = [
    pytest.param(shipped(stem), key, marks=needs(*EFFECTS[key].unbuilt(key)), id=f"{stem}-{key}")
    for stem in CONTRACT
    for key in written_values(shipped(stem))
]


@cache
def loaded(path: Path, folder: Path, *words: str) -> TrainConfig:
    """A config as shipped but for the words, without keys that this version refuses unless they are in the words."""
    named = {word.partition("=")[0] for word in words}
    left_out = [key for key in refused_keys(path) if key not in named]
    return load_config(path, [*own_folders(path, folder), *without(left_out), *words])


@pytest.mark.parametrize(("path", "key"), CASES)
def test_a_key_of_a_shipped_config_is_read(path, key, tmp_path_factory):
    """Changed to another legal value it changes the resolved config, and the plan if it is for the plan.

    What each key does to a run: tests/contract/test_key_effects.py.
    """
    folder, effect, written = tmp_path_factory.getbasetemp(), EFFECTS[key], written_values(path)[key]
    given = [f"{name}={json.dumps(value)}" for name, value in effect.given.items() if effect.part == "plan"]
    other = next(value for value in effect.values if value != written)
    if key in ("data_config.img_dir", "data_config.control_dir"):
        written, other = str(folder), str(folder / "other")
        (folder / "other").mkdir(exist_ok=True)
    before, after = (loaded(path, folder, *given, f"{key}={json.dumps(value)}") for value in (written, other))
    assert flatten(before.model_dump())[key] != flatten(after.model_dump())[key]
    if effect.part == "plan":
        assert plan_of(before) != plan_of(after)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_says_what_it_is_for(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# yaml-language-server: $schema=schema.json"
    header = "\n".join(line for line in lines if line.startswith("#"))
    for word in ("Hardware", "Command", "Result", path.name):
        assert word in header, f"the header of {path.name} lacks {word!r}"


def test_schema_file_is_current():
    assert (CONFIG_DIR / "schema.json").read_text(encoding="utf-8") == schema_text(), "run `make schema`"
    assert (CONFIG_DIR.parent / "docs" / "config.md").read_text(encoding="utf-8") == page(), "run `make schema`"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_editors_know_every_key_of_a_shipped_config(path):
    schema = json_schema()

    def check(values: dict[str, Any], properties: dict[str, Any]) -> None:
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
