"""What a LoRA file says about itself: by the modelspec convention, with a thumbnail, and nothing that is private."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixtune.families import FAMILIES
from pixtune.storage.base_reference import BaseReference
from pixtune.storage.safetensors_writer import save_without_digest
from pixtune.trained import adapters
from pixtune.trained.base import Base
from pixtune.trained.export import DIFFUSERS_FILE, FILES, LoraDescription, diffusers_file, export_lora
from pixtune.trained.methods import LoraWeights
from pixtune.trained.model_spec import model_spec
from pixtune.trained.read_back_lora import read_back_lora
from pixtune.trained.scheme import Scheme
from tests.unit.engine import tiny

QWEN, FLUX = FAMILIES["qwen_image"], FAMILIES["flux"]
BASE = BaseReference("org/Qwen-Image", "0" * 16)
CONFIG: dict[str, Any] = {
    "rank": 8, "lora_alpha": None, "trigger_words": ["ohwx", "cat"],
    "data_config": {"img_size": [512, 1024], "img_dir": "/mnt/mine/pictures"}, "output_dir": "/mnt/mine/runs/x",
    "samples": {"prompts": ["a secret caption"]},
}  # fmt: skip


def spec_with(
    family: Any = QWEN, base: BaseReference = BASE, folder: Path | None = None, **changes: Any
) -> dict[str, str]:
    return model_spec({**CONFIG, **changes}, family, base, 40, folder)


def test_the_entries_are_the_convention_s() -> None:
    spec = spec_with()
    written = datetime.fromisoformat(spec.pop("modelspec.date"))
    assert abs((datetime.now(UTC) - written).total_seconds()) < 60
    assert spec == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "qwen-image/lora",
        "modelspec.implementation": "https://github.com/QwenLM/Qwen-Image",
        "modelspec.title": "ohwx, cat (org/Qwen-Image LoRA)",
        "modelspec.license": "Apache-2.0",
        "modelspec.trigger_phrase": "ohwx, cat",
        "modelspec.resolution": "1024x1024",
        "ss_base_model_version": "qwen_image",
        "ss_sd_model_name": "org/Qwen-Image",
        "ss_network_module": "networks.lora_qwen_image",
        "ss_network_dim": "8",
        "ss_network_alpha": "8",
        "ss_output_name": "ohwx, cat (org/Qwen-Image LoRA)",
        "ss_steps": "40",
    }


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_family_has_an_architecture_and_nothing_private_is_stated(family: Any) -> None:
    spec = spec_with(family)
    assert spec["modelspec.architecture"].endswith("/lora") and spec["ss_network_module"].startswith("networks.lora_")
    assert not [text for text in spec.values() if "/mnt" in text or "secret" in text]


@pytest.mark.parametrize(
    ("base", "architecture"),
    [
        ("black-forest-labs/FLUX.1-dev", "flux-1-dev"), ("black-forest-labs/FLUX.1-schnell", "flux-1-schnell"),
        ("black-forest-labs/FLUX.1-Krea-dev", "flux-1-dev"), ("flux1-schnell-fp8.safetensors", "flux-1-schnell"),
        ("my-flux", "flux-1"), ("dev/my-flux", "flux-1"),
    ],
)  # fmt: skip
def test_the_variant_of_flux_by_its_name(base: str, architecture: str) -> None:
    """The words of kohya's trainers, which LoRA managers read; where a name does not tell, the one for either."""
    spec = spec_with(FLUX, BaseReference(base, None))
    assert spec["modelspec.architecture"] == f"{architecture}/lora" and spec["ss_base_model_version"] == "flux1"


def test_what_is_asked_for_is_stated() -> None:
    asked = {"title": "Mine", "author": "Me", "description": "A cat", "license": "CC0"}
    spec = spec_with(lora_files={"formats": ["diffusers"], **asked})
    assert {key: spec[f"modelspec.{key}"] for key in asked} == asked and spec["ss_output_name"] == "Mine"
    untitled = spec_with(trigger_words=[])
    assert untitled["modelspec.title"] == "org/Qwen-Image LoRA" and "modelspec.trigger_phrase" not in untitled


def test_the_licence_is_the_base_s_where_it_is_known() -> None:
    assert "Non-Commercial" in spec_with(FLUX, BaseReference("black-forest-labs/FLUX.1-dev", None))["modelspec.license"]
    assert spec_with(FLUX, BaseReference("FLUX.1-schnell", None))["modelspec.license"] == "Apache-2.0"
    assert "modelspec.license" not in spec_with(FLUX, BaseReference("my-own-mix", None))


def thumbnail_of(spec: dict[str, str]) -> Image.Image:
    kind, _, data = spec["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_thumbnail_is_the_newest_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Up to the step, at full strength, of the pictures that can be read."""
    for step, name, colour in (
        (0, "000", "red"), (20, "000-strength0.5", "blue"), (20, "000", "green"), (50, "000", "black")
    ):  # fmt: skip
        (folder := tmp_path / "samples" / f"step-{step:06d}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (512, 256), colour).save(folder / f"{name}.png")
    (tmp_path / "samples" / "step-x").mkdir()
    picture = thumbnail_of(spec_with(folder=tmp_path))
    assert picture.size == (256, 128)
    assert all(abs(a - b) < 3 for a, b in zip(picture.getpixel((9, 9)), (0, 128, 0), strict=True))  # type: ignore[arg-type]
    for name in ("000", "000-strength0.5"):
        (tmp_path / "samples" / "step-000020" / f"{name}.png").write_bytes(b"no picture")
    assert thumbnail_of(spec_with(folder=tmp_path)).getpixel((9, 9))[0] > 250  # type: ignore[index]
    assert "cannot be the LoRA's thumbnail" in caplog.text
    assert "modelspec.thumbnail" not in spec_with(folder=tmp_path, lora_files={"thumbnail": False})
    assert "modelspec.thumbnail" not in spec_with(folder=tmp_path / "nowhere")


def test_a_damaged_record_s_wishes_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    damaged: dict[str, Any] = {"lora_files": ["x"], "trigger_words": [1], "data_config": 3}
    assert spec_with(**damaged)["modelspec.title"] == "org/Qwen-Image LoRA"
    assert "lora_files of the checkpoint's config cannot be read" in caplog.text


# ---- the files


@pytest.mark.parametrize("name", ["tiny-qwen-image", "tiny-flux"])
def test_each_file_does_what_the_weights_do_and_one_that_does_not_is_found(name: str, tmp_path: Path) -> None:
    family, model = tiny.family_named(name), tiny.load_model(name)
    tiny.attach(name, model)
    weights = adapters.lora_weights(model)
    about = LoraDescription(4, 4.0, ["to_q"], BASE, family.name, 7, "0" * 16, [], {})
    paths = export_lora(tmp_path, weights, about, family, tuple(FILES), {"modelspec.title": "x"})
    (checkpoint := tmp_path / "checkpoint").mkdir()
    save_without_digest(checkpoint / DIFFUSERS_FILE, *diffusers_file(weights, about))
    for path in paths:
        header = int.from_bytes(path.read_bytes()[:8], "little")
        digest = hashlib.sha256(path.read_bytes()[8 + header :]).hexdigest()
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["modelspec.hash_sha256"] == f"0x{digest}", path.name

    def velocity() -> Tensor:
        with torch.no_grad():
            return tiny.velocity(name, model)

    base = Base(None, family, Loaded(model))  # type: ignore[arg-type]
    before = {key: weight.clone() for key, weight in weights.items()}
    sound = read_back_lora(base, Scheme(4, 4.0), checkpoint, velocity, paths)
    assert sound.effect > 1e-3 and sound.distance < 1e-6 and not sound.unequal
    for path in paths[1:]:
        whole, metadata = path.read_bytes(), safe_open(path, framework="pt").metadata()
        tensors = load_file(path)
        key = next(key for key in tensors if key.endswith(("alpha", "lora_B.weight")))
        save_file({**tensors, key: tensors[key] * 1.5}, path, metadata)
        found = read_back_lora(base, Scheme(4, 4.0), checkpoint, velocity, paths)
        assert found.file == path and found.unequal and found.distance > 1e-6, key
        save_file({**tensors, key: tensors[key] * 1.5}, path, {**metadata, "pixtune.step": "6"})
        assert read_back_lora(base, Scheme(4, 4.0), checkpoint, velocity, paths).file is None, "of an earlier step"
        path.write_bytes(whole)
    assert all(weight.equal(before[key]) for key, weight in adapters.lora_weights(model).items())


class Loaded:
    """A loaded transformer of which the module alone is used."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module


def test_a_run_writes_the_formats_it_is_asked_for_and_takes_back_what_it_no_longer_is(tmp_path: Path) -> None:
    from pixtune.config import load_config
    from tests.runs import overrides, write_config

    model = tiny.load_model("tiny-qwen-image")
    tiny.attach("tiny-qwen-image", model)
    base = Base(None, QWEN, Loaded(model))  # type: ignore[arg-type]
    for formats, names in (
        ("[kohya, diffusers, kohya]", {"kohya_lora.safetensors", DIFFUSERS_FILE}),
        ("[comfyui, diffusers]", {"comfyui_lora.safetensors", DIFFUSERS_FILE}),
    ):
        words = overrides(tmp_path, tmp_path / "cache", lora_files__formats=formats)
        config = load_config(write_config(tmp_path.parent), words)
        lora = adapters.AttachedLora((), ("to_q",), 0, Scheme(4, 4.0))
        weights = LoraWeights(config, base, BASE, lora, MappingProxyType({}), None)  # type: ignore[arg-type]
        assert {path.name for path in weights.export(tmp_path, 3)} == names
        assert {path.name for path in tmp_path.glob("*.safetensors")} == names


@pytest.mark.parametrize("damage", ["another scale", "another number", "a lost layer"])
def test_what_is_exported_is_read_back(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever export it is: after a checkpoint, of the best weights, or at the run's end."""
    from pixtune.config import load_config
    from pixtune.errors import WriteError
    from pixtune.trained import export
    from pixtune.trained.lora_formats import comfyui_tensors
    from tests.runs import overrides, write_config

    def damaged(layers: Any, family: Any) -> Any:
        named = comfyui_tensors(layers, family)
        name = next(name for name in named.tensors if "lora_B" in name)
        tensors = dict(named.tensors)
        if damage == "a lost layer":
            tensors = {key: each for key, each in tensors.items() if name.rpartition(".lora_B")[0] not in key}
        elif damage == "another scale":
            tensors = {key: each / 2 if key.endswith(".alpha") else each for key, each in tensors.items()}
        else:
            tensors[name] = tensors[name] + 1e-3
        return replace(named, tensors=tensors)

    monkeypatch.setattr(export, "comfyui_tensors", damaged)
    model = tiny.load_model("tiny-qwen-image")
    tiny.attach("tiny-qwen-image", model)
    with torch.no_grad():
        for weight in adapters.lora_weights(model).values():
            weight.normal_()
    base = Base(None, QWEN, Loaded(model))  # type: ignore[arg-type]
    config = load_config(write_config(tmp_path.parent), overrides(tmp_path, tmp_path / "cache"))
    lora = adapters.AttachedLora((), ("to_q",), 0, Scheme(4, 8.0))
    weights = LoraWeights(config, base, BASE, lora, MappingProxyType({}), None)  # type: ignore[arg-type]
    with pytest.raises(WriteError, match=r"comfyui_lora\.safetensors.* is not the LoRA that was written"):
        weights.export(tmp_path, 3)
    monkeypatch.setattr(export, "comfyui_tensors", comfyui_tensors)
    weights.export(tmp_path, 3)


def test_formats_of_a_lora_are_refused_where_none_is_trained(tmp_path: Path) -> None:
    from pixtune.config import load_config
    from pixtune.errors import ConfigError
    from tests.runs import overrides, write_config

    for formats, method, words in (
        ("[diffusers, kohya]", "full", "lora_files.formats is .* and method is full"),
        ("[kohya]", "lora", "must hold diffusers"),
        ("[diffusers, a1111]", "lora", "lora_files.formats"),
        ("[]", "lora", "must hold diffusers"),
    ):
        changes = {"lora_files__formats": formats, "method": method}
        with pytest.raises(ConfigError, match=words):
            load_config(write_config(tmp_path), overrides(tmp_path / "run", tmp_path / "cache", **changes))
