"""Samples that a config asks for: its prompts at its sizes, and a file's, whose faults are reported together."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pixtune.config import load_config
from pixtune.config.schema import TrainConfig
from pixtune.data.sample_prompts import AskedPrompt, asked_prompts, read_prompts
from pixtune.errors import ConfigError, DataError
from tests.runs import overrides, write_config


def config_of(folder: Path, **samples: object) -> TrainConfig:
    changes = {f"samples__{key}": value for key, value in samples.items()}
    return load_config(write_config(folder), overrides(folder / "run", folder / "cache", **changes))


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_without_new_keys_prompts_are_as_ever(tmp_path: Path) -> None:
    assert asked_prompts(config_of(tmp_path)) == []
    plain = config_of(tmp_path, prompts="[a, b]", controls="[[x.png], [y.png, z.png]]")
    assert asked_prompts(plain) == [
        AskedPrompt("a", controls=(Path("x.png"),)), AskedPrompt("b", controls=(Path("y.png"), Path("z.png")))
    ]  # fmt: skip
    assert asked_prompts(config_of(tmp_path, prompts="[a]", width=96))[0].size == (96, 64)


def test_each_prompt_is_asked_for_at_each_size(tmp_path: Path) -> None:
    asked = asked_prompts(config_of(tmp_path, prompts="[a, b]", sizes="[[64, 96], [128, 64]]"))
    assert [(each.text, each.size) for each in asked] == [
        ("a", (64, 96)), ("a", (128, 64)), ("b", (64, 96)), ("b", (128, 64))
    ]  # fmt: skip


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = written(tmp_path, "prompts.txt", "\ufeffa cat, {not} json\r\n\n  # the next one is hard\n  ein Hündchen  ")
    config = config_of(tmp_path, prompts="[first]", prompts_file=file, negative_prompt="blurry")
    assert asked_prompts(config) == [AskedPrompt(t, "blurry") for t in ("first", "a cat, {not} json", "ein Hündchen")]


def test_options_of_other_trainers_are_no_words_of_a_prompt(tmp_path: Path) -> None:
    text = "a horse --w 64 --h sixty\nfur -- long and grey\na cat --n ugly\nan ar--b sign\n"
    with pytest.raises(DataError) as refused:
        read_prompts(written(tmp_path, "prompts.txt", text))
    assert [fault.split(" is an option")[0].rsplit("prompts.txt", 1)[1] for fault in refused.value.faults] == [
        ":1: '--w 64'",
        ":3: '--n ugly'",
    ]


def test_rows_of_jsonl_have_settings_of_their_own(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "a", "negative": "", "seed": [1, 2], "width": 64, "height": 96, "control": "c.png"},
        {"prompt": "b", "seed": 7, "control": ["c.png", "/d.png"]},
    ]
    file = written(tmp_path, "prompts.jsonl", "\n".join(map(json.dumps, rows)))
    config = config_of(tmp_path, prompts_file=file, negative_prompt="blurry", sizes="[[32, 32]]")
    assert asked_prompts(config) == [
        AskedPrompt("a", "", (tmp_path / "c.png",), (64, 96), (1, 2)),
        AskedPrompt("b", "blurry", (tmp_path / "c.png", Path("/d.png")), (32, 32), (7,)),
    ]


FAULTY = {
    "{": "is no JSON",
    "[1]": "is no JSON object",
    '{"prompts": "a"}': "'prompts' is no key of a prompt",
    '{"seed": 1}': "it has no prompt",
    '{"prompt": "  "}': "it has no prompt",
    '{"prompt": 3}': "it has no prompt",
    '{"prompt": "\\ud800"}': "it has no prompt",
    '{"prompt": "a", "negative": null}': "its negative prompt is no text",
    '{"prompt": "a", "seed": true}': "its seed is True",
    '{"prompt": "a", "seed": [1, -1]}': "its seed is [1, -1]",
    '{"prompt": "a", "width": 64}': "it has one of width and height",
    '{"prompt": "a", "width": 64, "height": 1e9}': "its height is 1000000000.0",
    '{"prompt": "a", "control": [""]}': "its control is no path",
}


def test_all_faulty_rows_are_reported_together_by_line(tmp_path: Path) -> None:
    file = written(tmp_path, "prompts.jsonl", "\n".join(['{"prompt": "right"}', *FAULTY]))
    with pytest.raises(DataError) as report:
        read_prompts(file)
    printed = str(report.value)
    for number, words in enumerate(FAULTY.values(), 2):
        assert any(f"{file}:{number}: " in line and words in line for line in printed.splitlines()), words


def test_files_that_hold_no_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "latin.txt").write_bytes("ein Hündchen".encode("latin-1"))
    (tmp_path / "huge.txt").write_bytes(b"a" * (1 << 21))
    written(tmp_path, "empty.txt", "\n# nothing\n")
    written(tmp_path, "many.txt", "a\n" * 1001)
    for name in ("pipe.txt", "latin.txt", "huge.txt", "empty.txt", "many.txt", "absent.txt", "folder"):
        with pytest.raises(DataError, match=name):
            read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ({"sizes": "[[64]]"}, "samples.sizes"),
        ({"sizes": "[64, 64]"}, "samples.sizes"),
        ({"sizes": "[[64, 8]]"}, "samples.sizes"),
        ({"sizes": "[[64, 64]]", "height": 64}, "leave out one or the other"),
        ({"strengths": "[]"}, "samples.strengths"),
        ({"strengths": "[0.5, 0.5]"}, "none is given twice"),
        ({"strengths": "[.inf]"}, "samples.strengths"),
        ({"strengths": "0.5"}, "samples.strengths"),
        ({"negative_prompt": "[a]"}, "samples.negative_prompt"),
    ],
)
def test_keys_that_cannot_be_are_refused_by_name(tmp_path: Path, samples: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(tmp_path, **samples)


def test_strengths_need_a_lora(tmp_path: Path) -> None:
    words = overrides(tmp_path / "run", tmp_path / "cache", method="full", samples__strengths="[0.5]")
    with pytest.raises(ConfigError, match="has no LoRA whose strength could vary"):
        load_config(write_config(tmp_path), words)
