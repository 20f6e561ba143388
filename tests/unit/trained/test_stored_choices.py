"""A resumed run keeps the pictures that its checkpoint trains on, where its config leaves the choice open."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pixtune.config import load_config
from pixtune.trained.resume_point import with_stored_choices


def held_out(stored: Any, *words: str) -> Any:
    own = ["pretrained_model_name_or_path=x", "output_dir=x", "data_config.img_dir=x", "max_train_steps=1", *words]
    checkpoint: Any = None if stored is None else SimpleNamespace(record={"config": stored})
    return with_stored_choices(load_config(None, own, folders_must_exist=False), checkpoint).validation.held_out


def test_a_checkpoint_from_before_there_was_a_choice_holds_out_what_it_did() -> None:
    assert held_out({"validation": {"held_out": 0.0}}) == 0.0
    assert held_out({"validation": {"held_out": 0.25}}) == 0.25
    assert held_out({"validation": {"held_out": "auto"}}) == "auto"
    assert held_out(None) == "auto", "a new run"


def test_what_the_config_says_is_compared_and_not_replaced() -> None:
    assert held_out({"validation": {"held_out": 0.25}}, "validation.held_out=0.5") == 0.5
    assert held_out({"validation": {"held_out": 0.25}}, "validation.held_out_dir=y") == "auto"


OTHER_FORMS = [
    {},
    {"validation": None},
    {"validation": {}},
    *({"validation": {"held_out": value}} for value in (7, float("nan"), [0])),
]


@pytest.mark.parametrize("stored", OTHER_FORMS)
def test_records_of_another_form_decide_nothing(stored: Any) -> None:
    assert held_out(stored) == "auto"
