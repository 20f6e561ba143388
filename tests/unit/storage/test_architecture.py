"""Where a plan finds a model's architecture, and whether what pixtune ships is that of the published models."""

from __future__ import annotations

import fnmatch
import importlib
import json
import math
import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pixtune.commands.plan import make_report
from pixtune.config import load_config
from pixtune.config.schema import TrainConfig
from pixtune.errors import WeightsError
from pixtune.families import FAMILIES, family_of
from pixtune.planning import count_text_weights
from pixtune.storage.architecture import CONFIG_PATTERNS, CONFIGS, ShippedModel, find_architecture, find_shipped
from pixtune.storage.model_folder import HUB_PATTERNS, ModelFolder, download_command, open_model_folder
from pixtune.storage.shipped import shipped_names, spelling_hint
from tests.full_size import AUTOENCODER, TEXT_ENCODER, UNREAD, write_empty_file
from tests.runs import DEMO_TRAIN, ROOT, TINY_MODEL, pixtune

QWEN, EDIT, FLUX = "Qwen/Qwen-Image", "Qwen/Qwen-Image-Edit", "black-forest-labs/FLUX.1-dev"
PUBLISHED = {
    QWEN: ("qwen-image", "qwen_image"),
    "Qwen/Qwen-Image-2512": ("qwen-image", "qwen_image"),
    EDIT: ("qwen-image-edit", "qwen_image_edit"),
    "Qwen/Qwen-Image-Edit-2509": ("qwen-image-edit-2509", "qwen_image_edit_plus"),
    "Qwen/Qwen-Image-Edit-2511": ("qwen-image-edit-2511", "qwen_image_edit_plus"),
    FLUX: ("flux", "flux"),
    "black-forest-labs/FLUX.1-Krea-dev": ("flux", "flux"),
    "black-forest-labs/FLUX.1-schnell": ("flux-schnell", "flux"),
    "black-forest-labs/FLUX.1-Kontext-dev": ("flux-kontext", "flux_kontext"),
}
"""Names in benchmarks/architectures.py and of the family."""
TRANSFORMER_PARAMETERS = {"qwen": 20_430_401_088, "flux": 11_901_408_320}
"""Numbers of parameters in the published files."""
GUIDANCE_EMBEDDER = 256 * 3072 + 3072 + 3072 * 3072 + 3072
"""Parameters that FLUX.1-schnell, which has no guidance, lacks."""


def config_of(model: Path | str, *words: str) -> TrainConfig:
    """Builds a config whose data set is not there yet."""
    required = (f"pretrained_model_name_or_path={model}", "output_dir=o", "data_config.img_dir=not/there")
    return load_config(None, [*required, "max_train_steps=1", *words], folders_must_exist=False)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache of a machine that never downloaded anything."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


# ---- what is shipped


def test_every_model_that_is_shipped_has_a_family() -> None:
    found = {name: family_of(shipped(name)).name for name in shipped_names()}
    assert found == {name: family for name, (_, family) in PUBLISHED.items()}


def shipped(name: str) -> ShippedModel:
    model = find_shipped(name)
    assert model is not None
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_of_the_published_files(name: str) -> None:
    model, family = shipped(name), FAMILIES[PUBLISHED[name][1]]
    kind = "flux" if family.name.startswith("flux") else "qwen_image"
    shapes = family.transformer_shapes(model.component_config("transformer"))
    lacking = GUIDANCE_EMBEDDER if name.endswith("schnell") else 0
    assert sum(map(math.prod, shapes.values())) == TRANSFORMER_PARAMETERS[kind.split("_")[0]] - lacking
    read = sum(TEXT_ENCODER[kind].values())
    if family.controls_in_text:  # their text encoder sees pictures
        read += UNREAD[kind]["visual.all"]
    assert count_text_weights(family, model) == read
    assert model.count_parameters("vae") == AUTOENCODER[kind]
    assert model.count_parameters("scheduler") is None


@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_hold_nothing_that_their_class_does_not_take(name: str, part: str) -> None:
    import diffusers

    config = shipped(name).component_config(part)
    kind = getattr(diffusers, config["_class_name"])
    taken = kind._get_init_keys(kind)
    assert {key for key in config if not key.startswith("_")} <= taken


def test_the_wheel_holds_every_file_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["pixtune"]
    package = ROOT / "src" / "pixtune"
    data = [path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()]
    data = [path for path in data if not path.endswith((".py", ".pyc"))]
    assert "storage/architectures.json" in data
    assert not [path for path in data if not any(fnmatch.fnmatch(path, pattern) for pattern in patterns)]


# ---- the plans of what is shipped


@pytest.fixture(scope="module")
def benchmarks() -> ModuleType:
    """benchmarks/random_folders.py: full-size models as their own classes build them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("random_folders")


@pytest.fixture(scope="module")
def full_size(benchmarks: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that writes a benchmark's full-size model without data: true headers, no bytes of weights."""
    architectures = importlib.import_module("architectures")
    root = tmp_path_factory.mktemp("full_size")

    def write(name: str) -> Path:
        folder, model = root / name, architectures.ARCHITECTURES[name]
        if folder.exists():
            return folder
        architectures.write_model_folder(folder, model)
        if not model.text_encoders:
            model = replace(
                model, text_encoders={"text_encoder": architectures.QWEN_TEXT}, small_model="tiny-qwen-image"
            )
        for part in benchmarks.parts_of(model, with_transformer=True):
            shapes = {
                benchmarks.name_in_file(name, part.names_in_files): tuple(parameter.shape)
                for name, parameter in part.model.named_parameters()
            }
            write_empty_file(folder / part.name / f"{part.stem}.safetensors", shapes)
        return folder

    return write


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("card", ["RTX 4090", "H100"])
@pytest.mark.usefixtures("empty_cache")
def test_the_plan_of_a_shipped_model_is_that_of_its_files(
    name: str, card: str, full_size: Callable[[str], Path]
) -> None:
    words = ('samples.prompts=["a cat"]',)
    of_files = make_report(config_of(full_size(PUBLISHED[name][0]), *words), card)
    of_shipped = make_report(config_of(name, *words), card)
    expected: dict[str, Any] = {"assumptions": of_shipped.assumptions}
    assert of_shipped == replace(of_files, **expected) and of_shipped.phases
    assert of_shipped.assumptions[0] == (
        f"architecture: shipped with pixtune; fetch the model for training: `{download_command(name)}`"
    )
    assert of_shipped.assumptions[1:] == of_files.assumptions


# ---- the order of places


CACHED_CONFIGS = {
    "model_index.json": {"_class_name": "QwenImagePipeline", "vae": ["diffusers", "Part"]},
    "transformer/config.json": {"num_layers": 1},
    "vae/config.json": {},
}


def fill_cache(cache: Path, name: str, *files: str) -> None:
    """Puts files of a model into the hub's cache, as an interrupted or partial download leaves it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for file in files:
        path = repository / "snapshots" / "0" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(CACHED_CONFIGS[file]))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0")


def test_what_is_in_the_cache_goes_before_what_is_shipped(empty_cache: Path) -> None:
    assert isinstance(find_architecture(QWEN), ShippedModel)
    fill_cache(empty_cache, QWEN, *CONFIGS)
    found = find_architecture(QWEN)
    assert not isinstance(found, ShippedModel) and found.component_config("transformer") == {"num_layers": 1}


def test_a_part_of_a_shipped_model_in_the_cache_does_not_stop_its_plan(empty_cache: Path) -> None:
    fill_cache(empty_cache, QWEN, CONFIGS[0])
    assert isinstance(find_architecture(QWEN), ShippedModel)


def test_a_folder_goes_before_what_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Qwen").mkdir()
    (tmp_path / QWEN).symlink_to(TINY_MODEL)
    monkeypatch.chdir(tmp_path)
    assert find_architecture(QWEN) == ModelFolder(Path(QWEN))


# ---- models that are not here

COMMAND = re.escape(
    '`hf download Some/Model --include "model_index.json" --include "*/config.json" --include "*.index.json"`'
)
FILES_OF_THE_HUB = (
    "model_index.json", "README.md", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
    "text_encoder/config.json", "text_encoder/model-00001-of-00004.safetensors",
    "text_encoder/model.safetensors.index.json", "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "transformer/diffusion_pytorch_model-00001-of-00009.safetensors", "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors", "whole-model.safetensors",
)  # fmt: skip


def fetched(patterns: tuple[str, ...]) -> set[str]:
    """Which files of a model on the hub a download takes."""
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    return set(filter_repo_objects(FILES_OF_THE_HUB, allow_patterns=list(patterns)))


def test_the_command_for_a_plan_fetches_what_is_needed_and_no_weights() -> None:
    taken = fetched(CONFIG_PATTERNS)
    assert taken >= {*CONFIGS, "text_encoder/model.safetensors.index.json"}
    assert all(file.endswith(".json") and "vocab" not in file for file in taken)


def test_a_download_takes_the_components_and_not_the_weights_beside_them() -> None:
    left = {"README.md", "whole-model.safetensors"}
    assert fetched(HUB_PATTERNS) == {*FILES_OF_THE_HUB} - left
    patterns = tuple(re.findall('--include "(.*?)"', download_command(QWEN)))
    assert fetched(patterns) == {*FILES_OF_THE_HUB} - left


@pytest.mark.usefixtures("empty_cache")
def test_a_model_that_was_not_downloaded_is_not_downloaded() -> None:
    needs = r"model_index\.json, transformer/config\.json, vae/config\.json"
    with pytest.raises(WeightsError, match=rf"downloads nothing\. It needs {needs}.* Fetch them with {COMMAND}"):
        find_architecture("Some/Model")


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        (["vae/config.json"], "model_index.json and transformer/config.json"),
        (["model_index.json"], "transformer/config.json and vae/config.json"),
        (["model_index.json", "transformer/config.json"], "vae/config.json"),
    ],
)
def test_a_part_of_a_model_in_the_cache_is_told_what_it_lacks(
    files: list[str], missing: str, empty_cache: Path
) -> None:
    fill_cache(empty_cache, "Some/Model", *files)
    with pytest.raises(WeightsError, match=rf"lacks {missing}\. It needs .*{COMMAND}"):
        make_report(config_of("Some/Model"), "RTX 4090")


@pytest.mark.parametrize("name", ["./models/here", "a/b/c"])
def test_a_folder_that_is_not_there_is_no_name_of_the_hub(name: str) -> None:
    with pytest.raises(WeightsError, match=r"no folder here \(.*\) and no name of the hub"):
        find_architecture(name)


def test_a_folder_of_another_kind_is_told_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(WeightsError, match="holds one AutoencoderKL"):
        find_architecture(str(tmp_path))


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("qwen/qwen-image", QWEN),
        ("Qwen-Image", QWEN),
        ("Qwen/QwenImage-Edit", EDIT),
        ("Qwen/Qwen-Image-Edit2511", "Qwen/Qwen-Image-Edit-2511"),
        ("FLUX.1-dev", FLUX),
        ("black-forest-lab/flux1-dev", FLUX),
        ("black-forest-labs/FLUX.1-Kontext", "black-forest-labs/FLUX.1-Kontext-dev"),
    ],
)
@pytest.mark.usefixtures("empty_cache")
def test_a_misspelt_name_is_answered_with_the_one_that_it_resembles(misspelt: str, meant: str) -> None:
    with pytest.raises(WeightsError, match=rf" Did you mean {re.escape(meant)}\?"):
        find_architecture(misspelt)


@pytest.mark.parametrize("name", ["Some/Model", "stabilityai/stable-diffusion-xl-base-1.0", QWEN])
def test_a_name_that_resembles_none_gets_no_hint(name: str) -> None:
    assert spelling_hint(name) == ""


# ---- training


@pytest.mark.usefixtures("empty_cache")
def test_weights_are_needed_to_open_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=re.escape(f"fetch the model with `{download_command(QWEN)}`")):
        open_model_folder(QWEN)
    with pytest.raises(WeightsError, match=rf" Did you mean {re.escape(FLUX)}\?"):
        open_model_folder("FLUX.1-dev")


def test_a_run_of_a_shipped_model_that_is_not_here_ends_with_the_command(tmp_path: Path) -> None:
    words = (f"output_dir={tmp_path}", f"data_config.img_dir={DEMO_TRAIN}", f"pretrained_model_name_or_path={QWEN}")
    run = pixtune(
        "train", "--config", ROOT / "train_configs" / "train_lora.yaml", *words,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode != 0 and download_command(QWEN) in " ".join(run.stdout.split())
