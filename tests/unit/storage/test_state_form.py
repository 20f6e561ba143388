"""A state whose own checksum is right can still be anybody's: its form is checked value by value."""

from __future__ import annotations

from typing import Any

import pytest

from pixtune.errors import CheckpointError
from pixtune.plan.encoders import EncoderPlan
from pixtune.storage.checkpoint import read_decision
from pixtune.storage.state_form import fault_of_record, fault_of_state

SHA = "0" * 64
STATE = {"step": 3, "files": {"optimizer-00001-of-00002.safetensors": {"bytes": 5, "sha256": SHA}}, "record": {}}
RECORD = {
    "config": {"train_batch_size": None, "data_config": {"train_batch_size": 2}, "trigger_words": []},
    "data": "x",
    "plan": {},
    "optimizer_plain": {"layer": {"step": 3}},
    "num_processes": 1,
    "versions": {"torch": "2"},
}


def test_what_pixtune_writes_has_no_fault() -> None:
    assert fault_of_state(STATE) is None and fault_of_record(RECORD) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": -1}, "step is -1"),
        ({"step": True}, "step is True"),
        ({"step": "3"}, "step is '3'"),
        ({"step": 10**13}, "step is 1000"),
        ({"files": []}, "files are a list"),
        ({"record": []}, "no record"),
        *(
            ({"files": {name: {"bytes": 1, "sha256": SHA}}}, "names the file")
            for name in (
                "../x.safetensors",
                "/x.safetensors",
                "a/b.safetensors",
                "..\\x.safetensors",
                "x.bin",
                ".safetensors",
                "C:x.safetensors",
                "a\n.safetensors",
                "\x1b.safetensors",
            )
        ),
        *(
            ({"files": {"x.safetensors": written}}, "no size and SHA-256")
            for written in (
                [1],
                None,
                {"bytes": -1, "sha256": SHA},
                {"bytes": 1},
                {"bytes": 1, "sha256": "x"},
                {"bytes": 1.5, "sha256": SHA},
            )
        ),
    ],
)
def test_each_fault_of_a_state_is_named(changes: dict[str, Any], words: str) -> None:
    assert words in (fault_of_state({**STATE, **changes}) or "")


def deep(levels: int) -> Any:
    return [deep(levels - 1)] if levels else 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": [1]}, "config of its record"),
        ({"plan": None}, "plan of its record"),
        ({"data": 5}, "data of its record"),
        ({"num_processes": "1"}, "num_processes"),
        ({"num_steps": True}, "num_steps"),
        ({"versions": {"torch": 2}}, "versions"),
        ({"optimizer_plain": {"a": 1}}, "optimizer_plain"),
        ({"optimizer_plain": {"a": {"step": [1]}}}, "optimizer_plain"),
        ({"config": {"train_batch_size": "2"}}, "train_batch_size of its config"),
        ({"more": deep(30)}, "levels deep"),
        ({"config": {"data_config": {"train_batch_size": {}}}}, "data_config.train_batch_size of its config"),
    ],
)
def test_each_fault_of_a_record_is_named(changes: dict[str, Any], words: str) -> None:
    assert words in (fault_of_record({**RECORD, **changes}) or "")
    for key in ("config", "data", "plan", "optimizer_plain"):
        assert f"no {key}" in (fault_of_record({name: value for name, value in RECORD.items() if name != key}) or "")


@pytest.mark.parametrize("change", [{"tile_pixels": -1}, {"tile_pixels": "9"}, {"text_format": "os"}, {"reasons": [1]}])
def test_a_stored_decision_of_other_values_is_refused_by_the_field(change: dict[str, Any]) -> None:
    values = {"text_format": "int8", "tile_pixels": 512, "reasons": ["a"]}
    assert read_decision(EncoderPlan, values, "encoders") == EncoderPlan("int8", 512, ("a",))
    with pytest.raises(CheckpointError, match=f"encoders cannot be used: {next(iter(change))}"):
        read_decision(EncoderPlan, {**values, **change}, "encoders")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guard": 5}, "guard of its record is 5"),
        ({"doubtful": [3]}, "doubtful of its record"),
        ({"examples": {"a": "x"}}, "examples of its record"),
        ({"examples": {"a": "x-y-z"}}, "examples of its record"),
        ({"log": {"bytes": "3", "sha256": SHA}}, "log of its record has no size"),
        ({"log": {"bytes": 3}}, "log of its record has no size"),
    ],
)
def test_what_came_later_has_a_form_as_well(changes: dict[str, Any], words: str) -> None:
    good = {"guard": {}, "doubtful": ["a"], "examples": {"a": "x-y"}, "log": {"bytes": 3, "sha256": SHA}}
    assert fault_of_record({**RECORD, **good}) is None
    assert fault_of_record({**RECORD, "examples": None, "log": None}) is None
    assert words in (fault_of_record({**RECORD, **good, **changes}) or "")
