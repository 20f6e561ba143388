"""Whole configs of other trainers, with key names and shapes as they are published: what becomes of each key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from pixtune.config.load import load_config
from pixtune.errors import MigrationError
from pixtune.migration.engine import Imported
from pixtune.migration.peer import Options
from pixtune.migration.peers import peer_of
from pixtune.migration.reading import read_source
from pixtune.migration.writing import config_text, summary
from tests.unit.migration.importing import FIXTURES, MAIN_PATHS, left, named, take, take_text, values

CONFIGS = pytest.mark.parametrize("path", MAIN_PATHS, ids=named)


@CONFIGS
def test_no_written_key_is_dropped(path):
    """Each key of the main file and of its data sets stands in a comment or in the lists at the foot."""
    source = read_source(path)
    parts = peer_of(source).take_apart(source, Options())
    text = config_text(take(path)).replace("\n#     ", " ")
    written = [
        key
        for part in (parts.settings, *parts.folders, *parts.regularization)
        for key, value in part.written.items()
        if value is not None
    ]
    assert written
    missing = [key for key in written if not re.search(rf"(?<!\w){re.escape(key)} = ", text)]
    assert not missing


@CONFIGS
def test_the_text_is_a_config_with_the_values_of_the_lines(path, tmp_path):
    imported = take(path)
    file = tmp_path / "imported.yaml"
    file.write_text(config_text(imported), encoding="utf-8")
    config = load_config(file, [], folders_must_exist=False)
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    for line in imported.lines:
        assert _at(tree, line.key) == line.value, line.key
        assert _attribute(config, line.key) is not None or line.value is None, line.key
    for number, lines in enumerate(imported.folders):
        assert tree["data_config"]["folders"][number] == {line.key: line.value for line in lines}


@CONFIGS
def test_each_line_says_what_it_came_from(path):
    body = config_text(take(path)).split("# ----")[0]
    lines = [line for line in body.splitlines() if line.strip() and not line.startswith("#")]
    sections = re.compile(r"^(\w+:|  folders:|\s+- .*)$")
    assert all("  # " in line or sections.match(line) for line in lines), lines


@CONFIGS
def test_the_terminal_says_what_the_foot_says(path):
    imported = take(path)
    foot = config_text(imported).replace("\n#     ", " ")
    assert all(line.strip().rstrip(":") in foot for line in summary(imported))
    assert len(imported.leftovers) >= len(set(imported.leftovers)) > 0


@pytest.mark.parametrize("folder", sorted(path.name for path in FIXTURES.iterdir()))
def test_a_file_of_the_data_set_is_refused_with_the_file_to_give(folder):
    others = [path for path in (FIXTURES / folder).iterdir() if path not in MAIN_PATHS and path.suffix != ".txt"]
    for path in others:
        with pytest.raises(MigrationError, match=r"describes the data set.* give .*, which names it"):
            take(path)


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _attribute(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


# ---- values, worked out by hand from what each trainer's documents and code say of the key

LN_2_2, LN_3 = 0.788457, 1.098612
EXPECTED: dict[str, dict[str, Any]] = {
    "ai_toolkit/flux_24gb.yaml": {
        "pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev",
        "output_dir": "out/pottery_v2",
        "rank": 24,
        "lora_alpha": 12.0,
        "lora_targets": ["all_linear"],
        "trigger_words": ["p0ttery"],
        "data_config.caption_prefix": "p0ttery",
        "data_config.caption_type": "txt",
        "data_config.img_size": [512, 768, 1024],
        "data_config.caption_dropout_rate": 0.04,
        "ema.decay": 0.98,
        "objective.sigma_distribution": "sigmoid",
        "objective.shift": "none",
        "adam_epsilon": 1e-6,
        "samples.prompts": ["p0ttery on a kitchen table", "a bicycle, leaning on a wall"],
        "quantize": True,
    },
    "ai_toolkit/qwen_24gb.yaml": {
        "gradient_accumulation_steps": 2,
        "folder.repeats": 2.0,
        "prior_preservation.folder": "data/reg",
        "prior_preservation.loss_weight": 0.5,
        "learning_rate": 1e-4,
        "samples.negative_prompt": "blurry",
    },
    "ai_toolkit/qwen_edit_2509.yaml": {
        "data_config.control_dir": ["data/person", "data/cloth"],
        "samples.controls": [["data/one.png", "data/two.png"]],
        "objective.shift": "model",
    },
    "musubi_tuner/qwen_image.sh": {
        "pretrained_model_name_or_path": "Qwen/Qwen-Image",
        "model_parts.transformer": "models/qwen_image_bf16.safetensors",
        "lora_alpha": 1.0,  # its default, whatever the rank
        "objective.shift": LN_2_2,  # discrete_flow_shift multiplies, ours is a logarithm
        "objective.sigma_distribution": "logit_normal",
        "data_config.img_size": 723,  # the root of 960 * 544
        "folder.repeats": 3.0,
        "lora_targets": ["attention_mlp"],
        "output_dir": "out/woodcut",
        "num_train_epochs": 12,
    },
    "musubi_tuner/edit_2511.toml": {
        "pretrained_model_name_or_path": "Qwen/Qwen-Image-Edit-2511",
        "lr_warmup_share": 0.05,
        "adam_beta2": 0.99,
        "adam_weight_decay": 0.02,
        "train_batch_size": 2,  # of the data set
        "objective.min_sigma": 0.1,  # 100 of 1000
        "checkpoints_total_limit": 3,  # 600 steps of checkpoints at each 200
        "data_config.control_size": 1024,
    },
    "diffusion_pipe/flux.toml": {
        "pretrained_model_name_or_path": "models/FLUX.1-dev",
        "folder.repeats": 4.0,  # 2, of each of two sizes
        "folder.img_size": [512, 1024],
        "quantize": True,
        "objective.shift": "model",
        "train_batch_size": 2,
    },
    "diffusion_pipe/kontext_full.toml": {
        "pretrained_model_name_or_path": "black-forest-labs/FLUX.1-Kontext-dev",
        "model_parts.transformer": "models/flux1-kontext-dev.safetensors",
        "method": "full",
        "objective.sigma_distribution": "uniform",
        "objective.shift": LN_3,
        "data_config.control_dir": "data/before",
    },
    "sd_scripts/guide.sh": {
        "data_config.img_size": [512, 1024],  # one folder at two sizes
        "folder.repeats": 6.0,  # 4 + 2
        "data_config.keep_tags": 1,
        "prior_preservation.folder": "data/bowls",
        "mixed_precision": "bf16",
        "objective.guidance": 1.0,
    },
    "sd_scripts/prodigy.toml": {
        "learning_rate": 1.0,
        "optimizer": "prodigy",
        "prodigy.d_coef": 2.0,
        "objective.logit_mean": -0.5,  # there towards clean, here towards noise
        "objective.guidance": 3.5,  # its default
        "data_config.caption_type": "caption",  # its default
        "data_config.img_size": 512,
        "samples.width": 768,
        "samples.height": 1024,
        "samples.seeds": [3],
        "samples.num_steps": 24,
    },
    "simpletuner/flux.json": {
        "folder.repeats": 10.0,  # 9 more times
        "folder.caption_source": "lines",
        "objective.shift": LN_3,
        "checkpoints_total_limit": 5,
        "adam8bit": False,
        "quantize": True,
    },
    "simpletuner/kontext.json": {"data_config.control_dir": "data/before", "objective.shift": LN_3},
    "simpletuner/qwen_image.json": {"samples.sizes": [[1024, 1024], [1328, 800]], "ema.decay": 0.995},
    "one_trainer/flux.json": {
        "lr_warmup_steps": 50,  # 100 batches, of which a step has two
        "ema.decay": 0.9998,  # 0.999 of every fifth step
        "ema.on_host": True,
        "max_grad_norm": 0.0,  # null: no limit
        "objective.logit_mean": 0.2,
        "objective.logit_std": 1.1,
        "objective.shift": "model",
        "folder.repeats": 2.5,
        "validation.held_out_dir": "data/held_out",
        "data_config.caption_dropout_rate": 0.05,
    },
    "one_trainer/qwen_24gb.json": {
        "lora_alpha": 1.0,
        "lora_targets": ["*attn*", "*img_mlp*", "*txt_mlp*"],
        "num_train_epochs": 100,
        "lr_warmup_steps": 200,
    },
    "diffusers/flux_lora.sh": {
        "learning_rate": 1.0,
        "optimizer": "prodigy",
        "prodigy.safeguard_warmup": True,  # its default
        "data_config.caption_text": "a photo of my dog",
        "samples.seeds": [0, 1, 2, 3],
        "objective.sigma_distribution": "uniform",
        "objective.shift": "none",
        "data_config.img_dir": "data/dog",  # by a variable of the script
    },
    "diffusers/kontext_lora.sh": {
        "rank": 16,
        "lora_alpha": 4.0,  # its default, whatever the rank
        "folder.dataset": "me/pairs",
        "folder.control_column": "file_name",
        "adam8bit": True,
    },
    "diffusers/qwen_lora.sh": {
        "prior_preservation.prompts": ["a photo of a dog"],
        "objective.logit_mean": -0.4,
        "lr_warmup_steps": 500,
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_values(name):
    found = values(take(FIXTURES / name))
    assert {key: found.get(key) for key in EXPECTED[name]} == EXPECTED[name]


CHANGES: dict[str, tuple[str, ...]] = {
    "ai_toolkit/qwen_24gb.yaml": ("timestep_type = weighted", "qtype = uint3|"),
    "musubi_tuner/edit_2511.toml": ("loraplus_lr_ratio=4",),
    "sd_scripts/guide.sh": ("mixed_precision = fp16", "class_tokens = p0ttery bowl", "enable_bucket = false"),
    "sd_scripts/prodigy.toml": (
        "network_dropout = 0.05",
        "default of sd-scripts: model_prediction_type = sigma_scaled",
        "default of sd-scripts: network_train_unet_only = false",
    ),
    "simpletuner/qwen_image.json": ("optimizer = optimi-lion", "max_grad_norm = 0.01", "lora_dropout = 0.1"),
    "one_trainer/flux.json": ("enable_random_rotate = true", "weight_dtype = NFLOAT_4"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_result_is_listed(name):
    listed = left(take(FIXTURES / name), "changes the result")
    for text in CHANGES[name]:
        assert any(text in each for each in listed), (text, listed)


TO_FILL_IN: dict[str, tuple[str, ...]] = {
    "musubi_tuner/kontext.sh": ("elsewhere.toml", "data_config.img_dir", "save_every_n_epochs = 1"),
    "diffusion_pipe/qwen_image.toml": ("not_here.toml", "data_config.img_dir"),
    "simpletuner/qwen_image.json": ("not/here.json",),
}


@pytest.mark.parametrize("name", TO_FILL_IN)
def test_what_is_to_be_filled_in_is_listed(name):
    listed = left(take(FIXTURES / name), "to fill in")
    for text in TO_FILL_IN[name]:
        assert any(text in each for each in listed), (text, listed)


def test_secrets_are_not_copied():
    for name, secret in (("one_trainer/flux.json", "hf_private"), ("diffusion_pipe/flux.toml", "abc-secret")):
        assert secret not in config_text(take(FIXTURES / name))
        assert secret not in "\n".join(summary(take(FIXTURES / name)))


def test_a_config_imported_from_text_is_as_from_its_file():
    path = FIXTURES / "ai_toolkit" / "qwen_edit_2509.yaml"
    assert values(take_text(path.read_text(encoding="utf-8"))) == values(take(path))


def _folders(imported: Imported) -> Iterator[str]:
    yield from (str(line.value) for lines in imported.folders for line in lines if line.key == "img_dir")


DATA_SETS = {
    "musubi_tuner/kontext.sh": "[[datasets]]\nimage_directory='a'\nresolution=512\n{}=3\n",
    "sd_scripts/notebook.toml": "[[datasets]]\nresolution=512\n[[datasets.subsets]]\nimage_dir='a'\n{}=3\n",
    "diffusion_pipe/flux.toml": "resolutions=[512]\n[[directory]]\npath='a'\n{}=3\n",
    "simpletuner/flux.json": '[{{"id": "a", "type": "local", "instance_data_dir": "a", "{}": 3}}]',
    "one_trainer/flux.json": '[{{"path": "a", "{}": 3}}]',
}
"""A data set of one folder for each main file, with a place for a key."""


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_key_of_the_data_set_is_named_with_its_file_and_one_of_the_main_file_without(name, tmp_path):
    form = DATA_SETS[name]
    dataset = tmp_path / f"mine.{'json' if form.startswith('[{{') else 'toml'}"
    dataset.write_text(form.format("colour_of_the_sky"))
    imported = take(FIXTURES / name, dataset)
    assert [each.origin for each in imported.leftovers if each.kind == "not known"] == [
        f"{dataset.name}: colour_of_the_sky = 3"
    ]
    origins = {line.key: line.origin for line in imported.lines}
    assert origins["data_config.img_dir"].startswith(f"{dataset.name}: ")
    assert dataset.name not in origins["output_dir"]


def test_a_folder_that_flags_name_is_of_no_file():
    imported = take_text(
        "accelerate launch flux_train_network.py --pretrained_model_name_or_path flux1-dev.safetensors "
        "--network_module networks.lora_flux --train_data_dir not/here --resolution 512 --keep_tokens 2"
    )
    origins = {line.key: line.origin for line in imported.lines}
    assert origins["data_config.img_dir"] == "image_dir = not/here"
    assert origins["data_config.keep_tags"] == "keep_tokens = 2"


def test_the_file_of_the_data_set_can_be_given(tmp_path):
    path = FIXTURES / "musubi_tuner" / "kontext.sh"
    dataset = tmp_path / "mine.toml"
    dataset.write_text(
        "[[datasets]]\nimage_directory='a'\ncontrol_directory='b'\nresolution=512\nnum_repeats=2\n"
        "[[datasets]]\nimage_directory='c'\ncontrol_directory='d'\nresolution=512\n"
    )
    imported = take(path, dataset)
    assert list(_folders(imported)) == ["a", "c"]
    assert values(imported)["data_config.img_size"] == 512
    assert "elsewhere.toml" not in "".join(left(imported, "to fill in"))
