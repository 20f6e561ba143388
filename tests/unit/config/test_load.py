"""Reading a config: values, overrides, names. Its faults are in test_faults.py."""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pixtune.config import TrainConfig, load_config, resolved_yaml, to_dict
from pixtune.config.schema import NOT_YET, leaf_keys
from pixtune.config.sections import DataConfig
from pixtune.config.sources import override_word
from pixtune.errors import NotYetError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3e-4", 3e-4), ("1E5", 1e5), ("1e-4", 1e-4), ("2.5", 2.5), (".5", 0.5), ("1", 1.0), ("5E+0", 5)],
)
def test_numbers_in_every_common_form(write, minimal, text, expected):
    assert load_config(write(f"{minimal}learning_rate: {text}\n")).learning_rate == expected
    assert load_config(write(minimal), [f"learning_rate={text}"]).learning_rate == expected


def test_words_that_yaml_1_1_would_turn_into_something_else_stay_words(write, minimal):
    config = load_config(write(f"{minimal}mixed_precision: no\ntracker_project_name: 2025-11-16\n"))
    assert (config.mixed_precision, config.tracker_project_name) == ("no", "2025-11-16")


def test_pyyaml_itself_is_left_as_it_was():
    assert yaml.safe_load("[3e-4, no, 2]") == ["3e-4", False, 2]


def test_overrides_win_and_reach_into_sections(write, minimal, tmp_path):
    config = load_config(
        write(f"{minimal}rank: 4\n"),
        ["rank=8", "rank=32", f"data_config.img_dir={tmp_path}", "data_config.img_size=64", "samples={every: 7}"],
    )
    assert (config.rank, config.data_config.img_size, config.samples.every) == (32, 64, 7)
    assert config.data_config.img_dir == tmp_path


def test_an_override_can_take_a_value_back(write, minimal):
    assert load_config(write(f"{minimal}lora_alpha: 4\n"), ["lora_alpha="]).lora_alpha is None
    assert load_config(write(f"{minimal}lora_alpha: 4\n"), ["lora_alpha=null"]).lora_alpha is None


def test_overrides_alone_are_enough(tmp_path):
    words = ["pretrained_model_name_or_path=m", "output_dir=o", f"data_config.img_dir={tmp_path}", "num_train_epochs=1"]
    assert load_config(None, words).num_train_epochs == 1


@pytest.mark.parametrize(
    "text",
    [
        "my cats #2",
        "cats #",
        "# cats",
        "&cats",
        "*cats*",
        "!cats",
        "%cats",
        "@cats",
        "| cats",
        "zwx, ",
        " zwx",
        "50% #1 'a'",
    ],
)
def test_a_word_of_the_command_line_is_taken_whole(text, write, minimal, tmp_path):
    """In a file ` #2` would be a comment: a run trained on ./cats where ./cats #2 was named."""
    (tmp_path / text).mkdir()
    words = [f"data_config.img_dir={tmp_path / text}", f"samples.negative_prompt={text}", f"lora_files.title={text}"]
    config = load_config(write(minimal), words)
    assert config.data_config.img_dir == tmp_path / text
    assert config.samples.negative_prompt == text
    assert config.lora_files.title == text


def test_a_word_still_has_the_types_of_yaml(write, minimal):
    words = ["rank= 8 ", "learning_rate=1e-3", "deterministic=true", "ema=decay: 0.5", "samples.prompts=['a #1', b]"]
    config = load_config(write(minimal), words)
    assert (config.rank, config.learning_rate, config.deterministic, config.ema.decay) == (8, 1e-3, True, 0.5)
    assert config.samples.prompts == ("a #1", "b")


@pytest.mark.parametrize(
    "name", ["my runs/cats #2", "it's", "[new] a", "{a}", '"a"', "7", "null", "cats: b", "$HOME `x`", "-1.5"]
)
def test_a_word_that_an_error_advises_is_read_back_as_it_was_meant(name, write, minimal):
    (word,) = shlex.split(override_word("output_dir", name))
    assert load_config(write(minimal), [word]).output_dir == Path(name)


def test_a_mapping_takes_over_what_another_has(write, minimal, tmp_path):
    """`<<: *name` spares writing the same for each folder; what stands beside it wins."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    config = load_config(
        write(
            f"pretrained_model_name_or_path: m\noutput_dir: o\nmax_train_steps: 1\ndata_config:\n  folders:\n"
            f"    - &first {{img_dir: {tmp_path}/a, repeats: 3, flip: true}}\n"
            f"    - {{repeats: 5, <<: *first, img_dir: {tmp_path}/b}}\n"
            "  loss_weights: {<<: &all {x: 0.5, y: 2}, x: 0.25}\n"
        )
    )
    first, second = config.data_config.folders
    assert (first.repeats, first.flip, second.repeats, second.flip) == (3, True, 5, True)
    assert second.img_dir == tmp_path / "b"
    assert config.data_config.loss_weights == {"x": 0.25, "y": 2}


def test_lists_and_text_with_special_characters(write, minimal):
    config = load_config(write(minimal), ['samples.prompts=["a cat: black", "ein Bär"]', "output_dir=a=b"])
    assert config.samples.prompts == ("a cat: black", "ein Bär")
    assert config.output_dir == Path("a=b")


def test_a_section_whose_keys_are_all_commented_out_is_empty(write, minimal):
    assert (
        load_config(write(f"{minimal}cuda_features:\n  # enable_cudnn_sdp: true\n")).cuda_features.enable_cudnn_sdp
        is None
    )


def test_home_folder_is_expanded(write, minimal, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(write(minimal), ["data_config.img_dir=~/pictures", "output_dir=~/out"])
    assert (config.data_config.img_dir, config.output_dir) == (tmp_path / "pictures", tmp_path / "out")


def test_byte_order_mark_and_windows_line_ends(tmp_path, minimal):
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + minimal.replace("\n", "\r\n").encode())
    assert load_config(path).max_train_steps == 10


def test_older_names_mean_the_same(write, minimal):
    config = load_config(write(f"{minimal}use_8bit_adam: true\ncuda_13_features: {{enable_cudnn_sdp: true}}\n"))
    assert (config.adam8bit, config.cuda_features.enable_cudnn_sdp) == (True, True)
    assert load_config(write(f"{minimal}use_8bit_adam: true\nadam8bit: true\n")).adam8bit is True
    assert load_config(write(f"{minimal}adam8bit: true\n"), ["use_8bit_adam=false"]).adam8bit is False


def test_a_former_key_is_accepted_with_a_warning_and_changes_nothing(write, minimal, caplog):
    path = write("\nencode_batch_size: 8\n" + minimal)
    assert load_config(path, ["encode_batch_size=2"]) == load_config(write(minimal))
    for place in (f"{path}:2", "command line"):
        assert f"{place}: encode_batch_size has no effect any more: captions and pictures are encoded" in caplog.text


def test_batch_size_from_either_place(write, minimal):
    assert load_config(write(minimal)).batch_size == 1
    assert load_config(write(minimal), ["train_batch_size=2"]).batch_size == 2
    assert load_config(write(minimal), ["data_config.train_batch_size=3"]).batch_size == 3
    assert load_config(write(minimal), ["data_config.train_batch_size=3", "train_batch_size=3"]).batch_size == 3


def test_resolved_config_loads_to_the_same_config(write, minimal, tmp_path):
    config = load_config(
        write(minimal),
        [
            "learning_rate=1e-8",
            'tracker_project_name="1e4"',
            "mixed_precision=no",
            'trigger_words=["null", "007", "ß"]',
        ],
    )
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(resolved_yaml(config), encoding="utf-8")
    assert load_config(resolved) == config
    assert set(to_dict(config)) == set(TrainConfig.model_fields)


def test_config_is_frozen(write, minimal):
    with pytest.raises(ValidationError, match="frozen"):
        load_config(write(minimal)).rank = 3


def test_contradictions_are_found_without_a_file_too(pictures):
    with pytest.raises(ValidationError, match="set one of them"):
        TrainConfig(pretrained_model_name_or_path="m", output_dir=Path("o"), data_config=DataConfig(img_dir=pictures))


# ---- what this version does not have


def test_a_missing_feature_is_refused_by_name_and_place(write, minimal):
    with pytest.raises(NotYetError) as caught:
        load_config(write(f"{minimal}freeze_text_encoder: false\n"))
    assert "run.yaml:5: freeze_text_encoder is false" in str(caught.value)


@pytest.mark.parametrize("key", NOT_YET)
def test_the_table_of_missing_features_names_keys_whose_defaults_work(write, minimal, key):
    assert key in set(leaf_keys())
    config = to_dict(load_config(write(minimal)))
    section, _, name = key.rpartition(".")
    assert (config[section] if section else config)[name] in NOT_YET[key]


def test_disable_quantization_wins_with_a_notice(write, minimal, caplog):
    with caplog.at_level(logging.WARNING, "pixtune"):
        config = load_config(write(f"{minimal}quantize: true\ndisable_quantization: true\n"))
    assert config.quantize is False
    assert "disable_quantization is true and wins over quantize" in caplog.text


def test_importing_the_config_imports_nothing_heavy():
    code = "import sys, pixtune.config; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "pydantic" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "PIL"}
