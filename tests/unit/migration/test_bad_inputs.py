"""Files that cannot be imported: one error that says what the file is, and what to give instead."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path

import pytest
import yaml

from pixtune.errors import MigrationError
from pixtune.migration.reading import LARGEST_FILE_BYTES
from pixtune.migration.writing import config_text
from tests.runs import ROOT
from tests.unit.migration.importing import take, take_text

AI_TOOLKIT = """
job: extension
config:
  name: run
  process:
  - type: sd_trainer
    network: {type: lora, linear: 16, linear_alpha: 16}
    datasets: [{folder_path: data, resolution: 512}]
    train: {steps: 100, lr: 1e-4, batch_size: 1, optimizer: adamw8bit}
    model: {name_or_path: MODEL}
"""
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


def refusal(path: Path) -> str:
    with pytest.raises(MigrationError) as caught:
        take(path)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700, text
    return text


def refusal_of(text: str) -> str:
    with pytest.raises(MigrationError) as caught:
        take_text(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


UNKNOWN = "config of ai-toolkit, musubi-tuner, diffusion-pipe, sd-scripts, SimpleTuner, OneTrainer or the command"
TEXTS = {
    "keys of nobody": ("colour: red\nsize: 3\n", UNKNOWN),
    "a list": ("- 1\n- 2\n", UNKNOWN),
    "broken YAML": ("job: extension\nconfig: [1, 2\n", "cannot be read"),
    "broken TOML": ("[model]\ntype = 'flux\n", "cannot be read"),
    "broken JSON": ('{"model_family": "flux",,}', "cannot be read"),
    "JSON cut off": ('{"model_family": "flux", "a": [1, 2', "cannot be read"),
    "a key twice": ("job: a\njob: b\nconfig: {process: []}\n", "job"),
    "a YAML bomb": (BOMB, "alias|too many|expands"),
    "a recursive alias": ("a: &a [*a]\n", ""),
    "deep brackets": ("[" * 20_000, "nested|deep|cannot be read"),
    "deep braces": ('{"a":' * 5_000 + "1" + "}" * 5_000, "nested|deep|cannot be read"),
    "a Python tag": ("job: !!python/object/apply:os.system ['true']\n", "cannot be read"),
    "nothing": ("", "empty"),
    "blanks": ("  \n\t\n", "empty"),
    "comments": ("# job: extension\n", ""),
    "a web page": ("<!doctype html><html><body>404</body></html>", ""),
    "prose": ("To train a LoRA, write a config first.\n", ""),
    "our own": ("pretrained_model_name_or_path: x\noutput_dir: y\ndata_config: {img_dir: z}\n", "of pixtune already"),
    "a workflow": (json.dumps({"1": {"class_type": "KSampler", "inputs": {}}}), "ComfyUI workflow"),
    "a saved workflow": (json.dumps({"nodes": [{"type": "KSampler", "outputs": []}], "links": []}), "ComfyUI workflow"),
    "a model's config": (json.dumps({"_class_name": "FluxTransformer2DModel", "num_layers": 19}), "describes a model"),
    "the launcher's config": ("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\n", "accelerate's launcher"),
    "a window's preset": (json.dumps({"LoRA_type": "Flux1", "network_dim": 4}), "print the training command"),
    "another script": ("python generate.py --prompt x\n", ""),
    "a command that names its config": ("python run.py config/mine.yaml\n", "config/mine.yaml"),
    "two trainings": (
        "accelerate launch train_dreambooth_lora_flux.py --rank 4\n"
        "accelerate launch train_dreambooth_lora_qwen_image.py --rank 4\n",
        "2 trainings",
    ),
    "variables that double one another": (
        "A=" + "x" * 99 + "\n" + "A=$A$A\n" * 40 + "accelerate launch train_dreambooth_lora_flux.py --output_dir=$A\n",
        "20,000 characters",
    ),
    "a command of more words than any": (
        "accelerate launch train_dreambooth_lora_flux.py " + "--x " * 20_000,
        "20,000 words",
    ),
    "an open quote before many lines": (
        "accelerate launch train_dreambooth_lora_flux.py --a='\n" + "--x y \n" * 20_000,
        "quotation",
    ),
    "a text in JSON that does not end": ('["' + '\\"' * 200_000, "cannot be read"),
    "an open quote": ('accelerate launch train_dreambooth_lora_flux.py --output_dir="x\n', "quote|cannot be read"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_is_no_config_of_theirs(name):
    text, expected = TEXTS[name]
    refused = refusal_of(text)
    assert re.search(expected, refused), refused


def test_a_folder(tmp_path):
    assert "folder" in refusal(tmp_path)


def test_a_file_that_is_not_there(tmp_path):
    assert "not" in refusal(tmp_path / "nothing.yaml")


def test_names_of_files_that_cannot_be(tmp_path):
    assert refusal(Path("x" * 5000))
    assert refusal(Path("a\0b"))


def test_a_picture(tmp_path):
    path = tmp_path / "picture.yaml"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + bytes(17))
    assert "picture" in refusal(path)


def test_weights(tmp_path):
    path = tmp_path / "lora.toml"
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for numbers in (4, 2 * LARGEST_FILE_BYTES):
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(numbers))
        assert "safetensors" in refusal(path)


@pytest.mark.parametrize("content", [bytes(range(256)) * 8, zlib.compress(b"x" * 9999), b"PK\x03\x04" + bytes(99)])
def test_binary_content(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert refusal(path)


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "config.yaml"
    with path.open("wb") as file:
        file.truncate(LARGEST_FILE_BYTES * 1000)
    assert "more than 1 MiB" in refusal(path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="a system without /dev")
def test_a_device_is_no_file():
    assert "file" in refusal(Path("/dev/zero"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_other_encodings(tmp_path, encoding):
    path = tmp_path / "config.yaml"
    path.write_bytes(AI_TOOLKIT.replace("MODEL", "black-forest-labs/FLUX.1-dev").encode(encoding))
    if encoding == "utf-16-le":  # nothing says so
        assert refusal(path)
    else:
        assert take(path).value_of("max_train_steps") == 100


@pytest.mark.parametrize("ending", ["\r\n", "\r"])
def test_other_ends_of_lines(ending):
    text = AI_TOOLKIT.replace("MODEL", "black-forest-labs/FLUX.1-dev").replace("\n", ending)
    assert take_text(text).value_of("rank") == 16


# ---- models that are not trained

NOT_TRAINED = {
    "stabilityai/stable-diffusion-xl-base-1.0": "SDXL",
    "stabilityai/stable-diffusion-3.5-large": "Stable Diffusion 3",
    "Wan-AI/Wan2.2-T2V-A14B": "Wan",
    "lodestones/Chroma1-HD": "Chroma",
    "black-forest-labs/FLUX.2-dev": r"FLUX\.2",
    "Tongyi-MAI/Z-Image-Turbo": "Z-Image",
    "runwayml/stable-diffusion-v1-5": "Stable Diffusion 1",
    "tencent/HunyuanVideo": "Hunyuan",
    "HiDream-ai/HiDream-I1-Full": "HiDream",
}


@pytest.mark.parametrize("name", NOT_TRAINED)
def test_a_model_that_is_not_trained_is_one_error_with_its_name(name):
    with pytest.raises(MigrationError, match=NOT_TRAINED[name]) as caught:
        take_text(AI_TOOLKIT.replace("MODEL", name))
    assert str(caught.value).count("not train") == 1


OTHERS = {
    "musubi-tuner, Wan": (
        "accelerate launch src/musubi_tuner/wan_train_network.py --task t2v-14B --dit w.safetensors "
        "--network_module networks.lora_wan --network_dim 32 --dataset_config d.toml\n",
        "Wan",
    ),
    "sd-scripts, SDXL": (
        "accelerate launch sdxl_train_network.py --pretrained_model_name_or_path x.safetensors --network_dim 8 "
        "--network_module networks.lora\n",
        "SDXL",
    ),
    "sd-scripts, SD3": (
        "accelerate launch sd3_train_network.py --pretrained_model_name_or_path x --network_module networks.lora_sd3\n",
        "Stable Diffusion 3",
    ),
    "diffusion-pipe, Wan": ("dataset='d.toml'\n[model]\ntype='wan'\n[optimizer]\ntype='adamw'\n", "Wan"),
    "diffusion-pipe, SDXL": ("dataset='d.toml'\n[model]\ntype='sdxl'\n[optimizer]\ntype='adamw'\n", "SDXL"),
    "SimpleTuner, SDXL": (json.dumps({"model_family": "sdxl", "data_backend_config": "x.json"}), "SDXL"),
    "SimpleTuner, SD3": (json.dumps({"model_family": "sd3", "data_backend_config": "x.json"}), "Stable Diffusion 3"),
    "OneTrainer, SDXL": (
        json.dumps({"training_method": "LORA", "model_type": "STABLE_DIFFUSION_XL_10_BASE", "base_model_name": "x",
                    "concept_file_name": "y"}),
        "SDXL",
    ),
    "diffusers, SDXL": (
        "accelerate launch train_dreambooth_lora_sdxl.py --pretrained_model_name_or_path=x --output_dir=y\n", "SDXL"
    ),
    "diffusers, SD3": ("accelerate launch train_dreambooth_lora_sd3.py --output_dir=y\n", "Stable Diffusion 3"),
    "diffusers, SD1": ("accelerate launch train_dreambooth_lora.py --output_dir=y\n", "Stable Diffusion"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_is_not_trained_in_each_trainer(name):
    text, model = OTHERS[name]
    assert model in refusal_of(text)


def test_no_model_at_all():
    assert "model" in refusal_of(AI_TOOLKIT.replace("MODEL", "''"))
    assert "model" in refusal_of(AI_TOOLKIT.replace("MODEL", "someone/some-name"))


# ---- values


def changed(old: str, new: str) -> str:
    return AI_TOOLKIT.replace("MODEL", "black-forest-labs/FLUX.1-dev").replace(old, new)


def test_wrong_values_are_named_together_with_their_keys():
    text = changed("linear: 16", "linear: many").replace("steps: 100", "steps: [1]").replace("lr: 1e-4", "lr: .nan")
    refused = refusal_of(text)
    for key in ("network.linear is many", "train.steps is [1]", "train.lr is NaN"):
        assert key in refused, refused


def test_a_value_that_is_out_of_bounds_here_names_its_key_there():
    refused = refusal_of(changed("linear: 16", "linear: 0"))
    assert "network.linear = 0" in refused


def test_sections_of_a_wrong_shape():
    for old, new in (("datasets: [{folder_path: data, resolution: 512}]", "datasets: 3"),
                     ("network: {type: lora, linear: 16, linear_alpha: 16}", "network: [1, 2]"),
                     ("train: {steps: 100, lr: 1e-4, batch_size: 1, optimizer: adamw8bit}", "train: x"),
                     ("  process:\n  - type: sd_trainer", "  process:\n  - 5\n  - type: sd_trainer")):  # fmt: skip
        text = changed(old, new)
        try:
            take_text(text)
        except MigrationError as refused:
            assert "\n" not in str(refused)


def test_control_characters_do_not_reach_the_file():
    text = changed("  process:\n", "  trigger: x\n  process:\n").replace(
        "    train:",
        '    odd: "a\\n  b: 3"\n    "k\\nc: 4": 1\n    sample: {prompts: ["p \\e[31m\\nrank: 9"]}\n    train:',
    )
    written = config_text(take_text(text))
    assert "\x1b" not in written
    tree = yaml.safe_load(written)
    assert "b" not in tree
    assert "c" not in tree
    assert tree["rank"] == 16
    assert tree["samples"]["prompts"] == ["p \x1b[31m\nrank: 9"]


def test_a_name_that_cannot_be_printed_is_refused_with_its_key():
    assert "datasets.folder_path" in refusal_of(changed("folder_path: data", 'folder_path: "da\\nta"'))


def test_every_shipped_config_of_ours_is_told_apart():
    for path in sorted((ROOT / "train_configs").glob("*.yaml")):
        assert "of pixtune already" in refusal(path)
