"""Numbers that no model has are found in a config before a library builds what they describe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pixtune.errors import WeightsError
from pixtune.storage.config_bounds import check_config
from pixtune.storage.shipped import read_shipped
from tests.runs import ROOT

FILE = Path("model") / "config.json"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "assets").rglob("*config.json")), ids=lambda path: str(path.parent.name)
)
def test_the_small_models_configs_are_within_bounds(path: Path) -> None:
    if not path.name.startswith(("tokenizer", "generation", "preprocessor")):
        check_config(path, json.loads(path.read_text()))


def test_the_published_architectures_are_within_bounds() -> None:
    for of_component in read_shipped()["configs"].values():
        for config in of_component.values():
            check_config(FILE, config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"text_config": {"num_hidden_layers": 1001}}, "1001"),
        ({"vision_config": {"depth": 10**6}}, "depth"),
        ({"num_res_blocks": 10**5}, "num_res_blocks"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"a": [{"b": -5}]}, "b is -5"),
        ({"num_layers": "5"}, "num_layers is '5'"),
        ({"temperal_downsample": 7}, "temperal_downsample is 7"),
        ({"latents_mean": ["x"]}, "latents_mean"),
        ({"a": [1] * 1001}, "lists 1,001"),
        ({"a": 10**4000}, "a is 1000"),
        ({"num_layers": True}, "num_layers is True"),
    ],
)
def test_each_value_that_no_model_has_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(WeightsError, match=words) as caught:
        check_config(FILE, config)
    assert str(FILE) in str(caught.value) and len(str(caught.value)) < 300


def test_values_within_values_without_end_are_refused() -> None:
    whole: dict[str, Any] = {}
    for _ in range(300):
        whole = {"a": whole}
    with pytest.raises(WeightsError, match="levels deep"):
        check_config(FILE, whole)
