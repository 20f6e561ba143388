"""Both LoRA files load in the stock pipeline and compute there what was trained, at a scale that is not 1."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pixtune.engine.load import load_transformer
from pixtune.errors import CheckpointError, WeightsError
from pixtune.families import FAMILIES
from pixtune.family import Placement
from pixtune.storage.base_reference import BaseReference
from pixtune.storage.checkpoint import save_checkpoint
from pixtune.storage.model_folder import ModelFolder
from pixtune.storage.safetensors_writer import save_without_digest
from pixtune.trained import adapters
from pixtune.trained.export import (
    COMFYUI_FILE,
    DIFFUSERS_FILE,
    FILES,
    KOHYA_FILE,
    LoraDescription,
    diffusers_file,
    export_checkpoint,
    export_lora,
)
from pixtune.trained.saved_lora import attach_saved_lora, read_saved_lora

FAMILY = FAMILIES["qwen_image"]
RANK, ALPHA = 4, 10.0
TARGETS = ("to_q", "add_k_proj", "to_out.0", "img_mlp.net.0.proj")
"""Not the defaults, so that the file and not a default decides; one with a number and one deep in a block."""
ABOUT = LoraDescription(
    rank=RANK,
    alpha=ALPHA,
    targets=TARGETS,
    base=BaseReference("some/base", "fedcba9876543210"),
    family="qwen_image",
    step=1234,
    config_hash="0123456789abcdef",
    trigger_words=["tw3mo", 'a "quoted" word'],
    versions={"pixtune": "9.9", "torch": "1.2"},
)


@pytest.fixture(scope="module")
def folder(repo_root: Path) -> ModelFolder:
    return ModelFolder(repo_root / "assets" / "tiny-qwen-image")


@pytest.fixture(scope="module")
def base(folder: ModelFolder) -> nn.Module:
    """The transformer without a LoRA; copy it before changing it."""
    return load_transformer(FAMILY, folder, Placement(torch.device("cpu"), torch.float32)).module


@pytest.fixture(scope="module")
def adapted(base: nn.Module) -> nn.Module:
    """With a LoRA whose up-projections are not zero, as after training."""
    transformer = copy.deepcopy(base)
    adapters.attach_lora(transformer, TARGETS, RANK, ALPHA, generator_seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapters.lora_weights(transformer).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return transformer


class OnDevice(Tensor):
    """A tensor of a card without room: it can be copied to host memory, and no result of it can be made."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is Tensor.cpu, f"{func} makes a tensor on the device"
        with torch._C.DisableTorchFunctionSubclass():
            return args[0].as_subclass(Tensor).clone()


@pytest.mark.parametrize("name", ["tiny-qwen-image", "tiny-flux"])
def test_files_are_made_in_host_memory(name: str, tmp_path: Path) -> None:
    from pixtune.families import family_of

    family = family_of(ModelFolder(Path(__file__).parents[3] / "assets" / name))
    layer = f"{family.block_paths[0]}.0.attn.to_q"
    weights = {f"{layer}.lora_A.weight": torch.ones(RANK, 8), f"{layer}.lora_B.weight": torch.ones(8, RANK)}
    export_lora(tmp_path, {name: tensor.as_subclass(OnDevice) for name, tensor in weights.items()}, ABOUT, family)
    exported = load_file(tmp_path / DIFFUSERS_FILE)
    assert {name.removeprefix("transformer."): tensor.sum() for name, tensor in exported.items()} == {
        name: tensor.sum() for name, tensor in weights.items()
    }
    assert len(load_file(tmp_path / COMFYUI_FILE)) >= 2


@pytest.fixture(scope="module")
def files(adapted: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files."""
    path = tmp_path_factory.mktemp("export")
    written = export_lora(path, adapters.lora_weights(adapted), ABOUT, FAMILY, tuple(FILES))
    assert written == (path / DIFFUSERS_FILE, path / COMFYUI_FILE, path / KOHYA_FILE)
    return path


def stock_pipeline(folder: ModelFolder, base: nn.Module) -> Any:
    from diffusers import QwenImagePipeline

    return QwenImagePipeline.from_pretrained(
        folder.path, transformer=copy.deepcopy(base), vae=None, text_encoder=None, tokenizer=None
    )


def velocity(transformer: nn.Module, folder: ModelFolder) -> Tensor:
    noisy_BCHW = torch.randn(2, 16, 8, 4, generator=torch.Generator().manual_seed(1))
    text = FAMILY.stack_conditioning([FAMILY.random_text(folder, count, seed=0) for count in (5, 9)])
    with torch.no_grad():
        return FAMILY.predict_velocity(transformer, noisy_BCHW, torch.tensor([0.3, 0.8]), text)


def lora_modules(transformer: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("file_name", FILES.values())
def test_stock_pipeline_loads_every_key_and_computes_the_same(
    files: Path,
    folder: ModelFolder,
    base: nn.Module,
    adapted: nn.Module,
    diffusers_warnings: pytest.LogCaptureFixture,
    file_name: str,
) -> None:
    pipeline = stock_pipeline(folder, base)
    pipeline.load_lora_weights(files, weight_name=file_name)
    complaints = [r.getMessage() for r in diffusers_warnings.records if "key" in r.getMessage().lower()]
    assert not complaints
    loaded, ours = lora_modules(pipeline.transformer), lora_modules(adapted)
    assert loaded.keys() == ours.keys() and loaded
    expected, found = velocity(adapted, folder), velocity(pipeline.transformer, folder)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # velocities of about 3, two orders of products
    change = (expected - velocity(base, folder)).abs().max()
    assert change > 1e-2, "a LoRA without effect would prove nothing"


def test_diffusers_file_carries_weights_untouched_and_the_scale_beside(
    files: Path, folder: ModelFolder, base: nn.Module, adapted: nn.Module
) -> None:
    pipeline = stock_pipeline(folder, base)
    pipeline.load_lora_weights(files, weight_name=DIFFUSERS_FILE, adapter_name="default")
    ours = lora_modules(adapted)
    for name, module in lora_modules(pipeline.transformer).items():
        assert module.scaling == {"default": ALPHA / RANK}
        assert torch.equal(module.lora_A["default"].weight, ours[name].lora_A["default"].weight)
        assert torch.equal(module.lora_B["default"].weight, ours[name].lora_B["default"].weight)


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_no_file_has_the_scale_twice(files: Path) -> None:
    tensors = {name: load_file(files / name) for name in (DIFFUSERS_FILE, COMFYUI_FILE)}
    assert not any(key.endswith(".alpha") for key in tensors[DIFFUSERS_FILE])
    assert "lora_adapter_metadata" in read_metadata(files / DIFFUSERS_FILE)
    assert "lora_adapter_metadata" not in read_metadata(files / COMFYUI_FILE)
    layers = {key.removesuffix(".lora_A.weight") for key in tensors[COMFYUI_FILE] if key.endswith(".lora_A.weight")}
    assert {key for key in tensors[COMFYUI_FILE] if key.endswith(".alpha")} == {f"{layer}.alpha" for layer in layers}
    assert {tensors[COMFYUI_FILE][f"{layer}.alpha"].item() for layer in layers} == {ALPHA}


def test_keys_begin_as_each_program_wants_them(files: Path, adapted: nn.Module) -> None:
    weights = adapters.lora_weights(adapted)
    diffusers_tensors, comfyui_tensors = load_file(files / DIFFUSERS_FILE), load_file(files / COMFYUI_FILE)
    assert diffusers_tensors.keys() == {f"transformer.{name}" for name in weights}
    assert {key for key in comfyui_tensors if not key.endswith(".alpha")} == {
        f"diffusion_model.{name}" for name in weights
    }
    for name, tensor in weights.items():
        assert torch.equal(comfyui_tensors[f"diffusion_model.{name}"], tensor)
    assert "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight" in diffusers_tensors
    assert diffusers_tensors["transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight"].dtype == torch.float32


@pytest.mark.parametrize("file_name", FILES.values())
def test_metadata_says_where_the_lora_comes_from(files: Path, file_name: str) -> None:
    metadata = read_metadata(files / file_name)
    metadata.pop("lora_adapter_metadata", None)
    assert metadata == {
        "format": "pt",
        "pixtune.base_model": "some/base",
        "pixtune.base_model_hash": "fedcba9876543210",
        "pixtune.family": "qwen_image",
        "pixtune.step": "1234",
        "pixtune.config_hash": "0123456789abcdef",
        "pixtune.trigger_words": '["tw3mo", "a \\"quoted\\" word"]',
        "pixtune.versions": '{"pixtune": "9.9", "torch": "1.2"}',
        "pixtune.rank": "4",
        "pixtune.alpha": "10.0",
    }


def test_a_checkpoint_exports_to_the_same_two_files(files: Path, adapted: nn.Module, tmp_path: Path) -> None:
    tensors = diffusers_file(adapters.lora_weights(adapted), ABOUT)
    checkpoint = save_checkpoint(tmp_path, 1234, {Path(DIFFUSERS_FILE).stem: tensors}, {})
    for source in (checkpoint, files / DIFFUSERS_FILE):
        for path in export_checkpoint(source, tmp_path / f"from {source.name}"):
            assert load_file(path).keys() == load_file(files / path.name).keys()
            assert all(torch.equal(load_file(path)[key], value) for key, value in load_file(files / path.name).items())
            ours, expected = read_metadata(path), read_metadata(files / path.name)
            assert ours["modelspec.architecture"] == "qwen-image/lora"
            ours = {key: text for key, text in ours.items() if not key.startswith(("modelspec.", "ss_"))}
            scale, expected_scale = (json.loads(m.pop("lora_adapter_metadata", "0")) for m in (ours, expected))
            if expected_scale:  # targets are sorted in the file
                assert scale.pop("transformer.target_modules") == sorted(TARGETS)
                expected_scale.pop("transformer.target_modules")
            assert (ours, scale) == (expected, expected_scale)


def test_exporting_what_is_no_lora_of_ours_is_refused(files: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        export_checkpoint(tmp_path, tmp_path)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"transformer.x.lora_A.weight": torch.zeros(1)}, foreign)
    for source in (foreign, files / COMFYUI_FILE):  # the second has its scale elsewhere
        with pytest.raises(CheckpointError, match=source.name):
            export_checkpoint(source, tmp_path / "out")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(WeightsError, match=r"text\.safetensors is no safetensors file"):
        export_checkpoint(tmp_path / "text.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file_name", FILES.values())
def test_a_saved_lora_put_on_a_base_is_the_trained_one(
    files: Path, folder: ModelFolder, base: nn.Module, adapted: nn.Module, file_name: str
) -> None:
    transformer = copy.deepcopy(base)
    attach_saved_lora(transformer, read_saved_lora(files / file_name, FAMILY))
    assert torch.equal(velocity(transformer, folder), velocity(adapted, folder))


def test_a_lora_of_half_a_layer_is_not_put_on(base: nn.Module, adapted: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere\.safetensors is missing"):
        attach_saved_lora(copy.deepcopy(base), read_saved_lora(tmp_path / "nowhere.safetensors", FAMILY))
    weights = adapters.lora_weights(adapted)
    weights.pop(next(iter(weights)))
    save_without_digest(tmp_path / DIFFUSERS_FILE, *diffusers_file(weights, ABOUT))
    with pytest.raises(WeightsError, match=r"has matrices of shapes \[\(.*, where \(rank, in\) and \(out, rank\)"):
        read_saved_lora(tmp_path / DIFFUSERS_FILE, FAMILY)
