"""A new key is not done before people can read of it: in its docstring, and in the table of docs/contract.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from pixtune.config.schema import TrainConfig, item_keys, leaf_keys, section_of, sections
from pixtune.config.section import Section

PAGE = Path(__file__).resolve().parents[3] / "docs" / "contract.md"


def field_of(key: str) -> FieldInfo:
    section, _, name = key.rpartition(".")
    return (section_of(section) or TrainConfig).model_fields[name]


def description_of(key: str) -> str:
    description = field_of(key).description
    assert description, f"{key} has no docstring under it in config/schema.py"
    return description


@pytest.mark.parametrize("key", [*leaf_keys(), *item_keys(), *sections()])
def test_a_key_is_described_in_sentences(key):
    description = description_of(key)
    assert description[0].isupper() and description.endswith((".", ")")), description


@pytest.mark.parametrize("key", [key for key in (*leaf_keys(), *item_keys()) if field_of(key).default is None])
def test_a_key_that_may_be_absent_says_what_holds_then(key):
    assert "absent" in description_of(key).lower(), f"{key}: who decides, and how?"


@pytest.mark.parametrize("key", [key for key in leaf_keys() if field_of(key).default == ()])
def test_a_list_says_what_an_empty_one_means(key):
    assert "Empty:" in description_of(key)


@pytest.mark.parametrize("section", Section.__subclasses__(), ids=lambda section: section.__name__)
def test_a_section_is_described(section):
    assert (section.__doc__ or "").strip()


def test_the_contract_page_has_a_line_for_every_key_in_the_order_of_the_schema():
    rows = re.findall(r"^\| `([\w.]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == list(leaf_keys()), "docs/contract.md, the table under 'Every key of the config'"
