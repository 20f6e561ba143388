"""Files that a user hands on carry no path, caption, name or token of the machine that wrote them."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.runs import DEMO_TRAIN, ROOT, TINY_MODEL, environment, overrides, pixtune, write_config

PRIVATE = ("zyxwilhelmina", "zyxgräfin", "zyxdrawer", "zyxcaption", "zyxproject", "zyxtoken", "zyxsecret", "zyxhost")
"""Beginnings of what must stay here. The umlaut stands for text that JSON writes as an escape."""
SECRETS = {"HF_TOKEN": "hf_zyxtoken", "WANDB_API_KEY": "zyxsecret1", "AWS_SECRET_ACCESS_KEY": "zyxsecret2"}
TRIGGER = "zzztrigger"
WRITTEN = ROOT / "tests" / "fixtures" / "written_by_0.1.0"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's home with pictures and a base model whose own files name folders, as those of most tools do."""
    home = tmp_path_factory.mktemp("home") / "zyxwilhelmina-zyxgräfin"
    pictures, model = home / "zyxdrawer" / "pictures", home / "zyxdrawer" / "tiny-base"
    pictures.mkdir(parents=True)
    for number, path in enumerate(sorted(DEMO_TRAIN.glob("*.png"))[:4]):
        shutil.copy(path, pictures / f"zyxdrawer-{number}.png")
        (pictures / f"zyxdrawer-{number}.txt").write_text("zyxcaption of a face")
    shutil.copytree(TINY_MODEL, model)
    for name, key in {
        "model_index.json": "_name_or_path",
        "transformer/config.json": "_name_or_path",
        "vae/config.json": "_name_or_path",
        "text_encoder/config.json": "_name_or_path",
        "tokenizer/tokenizer_config.json": "tokenizer_file",
    }.items():
        path = model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), key: str(model / "zyxdrawer" / "file.json")}))
    return home


def train(home: Path, name: str, **changes: object) -> Path:
    """A run from this home, with the base under `~`; returns its output folder."""
    project = home / "zyxproject"
    project.mkdir(exist_ok=True)
    words = overrides(
        project / name, project / "cache", pretrained_model_name_or_path="~/zyxdrawer/tiny-base", max_train_steps=1,
        data_config__img_dir=home / "zyxdrawer" / "pictures", trigger_words=f"[{TRIGGER}]",
        samples__prompts="[a zyxcaption]", samples__num_steps=1, **changes,
    )  # fmt: skip
    outcome = pixtune("train", "--config", write_config(project), *words, env=user(home), before=on_another_host)
    assert outcome.returncode == 0, outcome.stdout
    return project / name


def user(home: Path) -> dict[str, str]:
    return environment(HOME=str(home), USER="zyxwilhelmina", LOGNAME="zyxwilhelmina", HOSTNAME="zyxhost", **SECRETS)


def on_another_host() -> None:
    """First thing in a run's process: the machine has a name that can be looked for."""
    socket.gethostname = lambda: "zyxhost"
    platform.node = lambda: "zyxhost"


def export(home: Path, source: Path, output: Path) -> None:
    outcome = pixtune("export", source, "--output", output, env=user(home))
    assert outcome.returncode == 0, outcome.stdout


def texts_of(path: Path) -> Iterator[str]:
    """All of a file, byte by byte and with every JSON text in it decoded, also where JSON stands within JSON."""
    yield path.read_bytes().decode("latin-1")
    yield path.read_bytes().decode(errors="replace")
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            yield from decoded(file.metadata() or {})
    elif path.suffix == ".json":
        yield from decoded(json.loads(path.read_text()))


def decoded(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from (key, *decoded(item))
    elif isinstance(value, list):
        for item in value:
            yield from decoded(item)
    elif isinstance(value, str):
        yield value
        if value[:1] in ("{", "["):
            with contextlib.suppress(ValueError):
                yield from decoded(json.loads(value))


def leaks_of(paths: list[Path], words: tuple[str, ...] = PRIVATE) -> list[str]:
    return [
        f"{path.name}: {word} in {text[max(0, text.find(word) - 40) :][:80]!r}"
        for path in paths
        for text in texts_of(path)
        for word in words
        if word in text
    ]


def test_the_search_finds_what_it_looks_for(home: Path) -> None:
    assert leaks_of([home / "zyxdrawer" / "tiny-base" / "model_index.json"])


def test_lora_files_are_private(home: Path) -> None:
    run = train(home, "lora")
    export(home, run / "checkpoint-000001", run.parent / "exported-lora")
    paths = [*run.glob("*.safetensors"), *(run.parent / "exported-lora").iterdir()]
    paths.append(run / "checkpoint-000001" / "pytorch_lora_weights.safetensors")
    assert len(paths) == 5
    assert not leaks_of(paths)
    whole_run = [path for path in run.rglob("*") if path.is_file()]
    assert len(whole_run) > 5 and not leaks_of(whole_run, ("zyxtoken", "zyxsecret", "zyxhost")), "no secret anywhere"
    for path in paths:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        assert metadata["pixtune.base_model"] == "tiny-base"
        assert re.fullmatch(r"[0-9a-f]{16}", metadata["pixtune.base_model_hash"])
        assert json.loads(metadata["pixtune.trigger_words"]) == [TRIGGER], "asked for"


def test_model_folders_are_private(home: Path) -> None:
    run = train(home, "model", method="full", mixed_precision="bf16")
    export(home, run / "checkpoint-000001", run.parent / "exported-model")
    folders = [run / "model", run.parent / "exported-model" / "model"]
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(paths) > 20
    assert not leaks_of(paths)
    one, other = (json.loads((folder / "pixtune.json").read_text()) for folder in folders)
    assert one == other, "an export of the checkpoint says the same as the run"
    assert one["base_model"] == "tiny-base" and one["trigger_words"] == [TRIGGER]
    assert re.fullmatch(r"[0-9a-f]{16}", one["config_hash"]) and one["step"] == 1
    assert json.loads((run / "model" / "vae" / "config.json").read_text())["_name_or_path"] == "file.json"


@pytest.mark.parametrize("name", ["qwen-image", "flux-8-bit"])
def test_a_path_in_an_older_file_is_not_repeated(name: str, home: Path, tmp_path: Path) -> None:
    """Version 0.1.0 wrote the config's own text: here, a folder relative to the one where it ran."""
    source = WRITTEN / name / "checkpoint-000002"
    assert leaks_of([source / "pytorch_lora_weights.safetensors"], ("assets/",))
    export(home, source, tmp_path)
    paths = list(tmp_path.iterdir())
    assert len(paths) == 2 and not leaks_of(paths, ("assets/", "/tmp"))
