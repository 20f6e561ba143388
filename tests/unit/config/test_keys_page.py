"""What a person reads of the keys: on the page, and from `pixtune keys`."""

from __future__ import annotations

import pytest

from pixtune.commands.keys import list_keys
from pixtune.config.keys_page import describe_keys, find_keys, page
from pixtune.config.schema import TrainConfig, item_keys, leaf_keys


def names(*words: str) -> list[str]:
    return [key.name for key in find_keys(words)[0]]


def test_every_key_stands_on_the_page_with_its_values_and_default():
    text = page()
    rows = [line for line in text.split("## Names in other trainers")[0].splitlines() if line.startswith("| `")]
    written = sorted(row.split("`")[1] for row in rows)
    assert written == sorted(key.rpartition(".")[2] for key in (*leaf_keys(), *item_keys()))
    assert "| `rank` | a whole number from 1 to 65,536 | `16` | Rank of the LoRA. |" in text
    assert "| `img_dir` | a path |  | Folder of pictures" in text
    assert "| `repeats` | a number from 0 to 10,000 | `1.0` | Number of times" in text
    assert '| `report_to` | "tensorboard" \\| "wandb" |  | Tracker' in text


def test_lists_are_of_plurals():
    text = page()
    assert "a list of lists of whole numbers from 16 to 16,384" in text and "a list of numbers from -10" in text
    assert "numberss" not in text and "list of list of" not in text and "list of number from" not in text


def test_defaults_are_those_of_the_schema():
    plain = {key.name: key.default for key in describe_keys()}
    assert plain["learning_rate"] == "0.0001" and plain["samples.seeds"] == "[0]" and plain["adam8bit"] == "null"
    required = {name for name, field in TrainConfig.model_fields.items() if field.is_required()} - {"data_config"}
    assert {key for key, default in plain.items() if default == "required"} == required


@pytest.mark.parametrize(
    ("word", "key"),
    [("network_dim", "rank"), ("LR", "learning_rate"), ("resolution", "data_config.img_size"), ("--rank", "rank"),
     ("warmup", "lr_warmup_steps"), ("curriculum", ""), ("text encoder", "freeze_text_encoder"), ("rnak", "rank")],
)  # fmt: skip
def test_a_word_finds_the_key_that_it_means(word, key):
    assert (key in names(word)) if key else not names(word)


def test_the_command_wraps_at_the_terminals_width_and_says_where_nothing_is_found(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines: list[str] = []
    assert list_keys([], lines.extend) is True  # all keys
    lines.clear()
    assert list_keys(["adam8bit"], lambda text: lines.extend(text.split("\n")))
    assert lines[0].startswith("adam8bit: true or false; default null") and max(map(len, lines)) <= 80
    assert list_keys(["lora_dropout"], lines.append) is False and "leave it out" in lines[-1]
