"""A loaded transformer has the planned form, and nothing missing or foreign passes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pixtune.engine.load import PLAIN, Layout, LoadedTransformer, load_transformer, random_tensor, random_transformer
from pixtune.engine.modulation_ahead import announce
from pixtune.engine.modulation_filling import ModulationRows
from pixtune.engine.quantize import FORMATS, QuantizedLinear
from pixtune.errors import WeightsError
from pixtune.families import family_of
from pixtune.family import ModelFamily, Placement
from pixtune.storage.model_folder import ModelFolder
from tests.runs import ROOT

MODELS = ("tiny-qwen-image", "tiny-qwen-image-edit", "tiny-flux")
CPU = torch.device("cpu")
FP32, BF16 = Placement(CPU, torch.float32), Placement(CPU, torch.bfloat16)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def model(name: str) -> tuple[ModelFamily, ModelFolder]:
    folder = ModelFolder(ROOT / "assets" / name)
    return family_of(folder), folder


def velocity(family: ModelFamily, folder: ModelFolder, transformer: LoadedTransformer, sigmas: Tensor) -> Tensor:
    """Velocity of the same inputs at each call."""
    generator = torch.Generator().manual_seed(4)
    channels, height, width = family.latent_shape(folder, 128, 192)
    noisy_BCHW = torch.randn(len(sigmas), channels, height, width, generator=generator)
    text = family.stack_conditioning([family.random_text(folder, 11, seed) for seed in range(len(sigmas))])
    announce(transformer, family, sigmas, text)
    with torch.no_grad():
        return family.predict_velocity(transformer.module, noisy_BCHW, sigmas, text)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("linear_format", FORMATS)
def test_blocks_are_quantized_and_nothing_else(name: str, linear_format: str) -> None:
    family, folder = model(name)
    transformer = load_transformer(family, folder, BF16, Layout(linear_format)).module
    blocks = tuple(f"{path}." for path in family.block_paths)
    quantized = {n for n, m in transformer.named_modules() if isinstance(m, QuantizedLinear)}
    plain = {n for n, m in transformer.named_modules() if type(m) is nn.Linear}
    assert quantized and all(n.startswith(blocks) and not n.endswith(family.modulation_layers) for n in quantized)
    assert all(n.endswith(family.modulation_layers) for n in plain if n.startswith(blocks))
    assert transformer.dtype == torch.bfloat16, "what predict_velocity computes in"
    sigmas = torch.tensor([0.2, 0.9])
    exact = velocity(family, folder, load_transformer(family, folder, FP32), sigmas)
    ours = velocity(family, folder, load_transformer(family, folder, FP32, Layout(linear_format)), sigmas)
    similarity = torch.cosine_similarity(ours.flatten(), exact.flatten(), dim=0)
    assert 0.95 < similarity < 0.9999999, "wrong, or not quantized at all"


@pytest.mark.parametrize("linear_format", FORMATS)
def test_random_blocks_have_weights_of_their_own_that_were_quantized_once(
    linear_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, folder = model("tiny-flux")
    quantized: list[torch.Size] = []
    set_weight = QuantizedLinear.set_weight

    def note(layer: QuantizedLinear, weight_NK: Tensor) -> None:
        quantized.append(weight_NK.shape)
        set_weight(layer, weight_NK)

    monkeypatch.setattr(QuantizedLinear, "set_weight", note)
    keeps = linear_format != "nf4"
    layout = Layout(linear_format, modulation_rows=4, streamed=(0,), keeps_transposes=keeps)
    transformer = random_transformer(family, folder.component_config("transformer"), BF16, layout).module
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(quantized) == len(set(quantized)) < len(layers)
    shape = next(iter(layers.values())).weight.shape
    of_a_shape = [layer.dequantized() for layer in layers.values() if layer.weight.shape == shape]
    first, *others = of_a_shape
    for number, other in enumerate(others):
        assert not any(other.equal(earlier) for earlier in of_a_shape[: number + 1])
        assert other.sum(dim=1).sort().values.equal(first.sum(dim=1).sort().values), "the same rows"
    if keeps:
        assert all(
            torch.equal(layer.transpose, layer.weight.T) for layer in layers.values() if layer.transpose is not None
        )


@pytest.mark.parametrize("name", MODELS)
def test_modulation_ahead_gives_the_same_velocity(name: str) -> None:
    """Velocities agree within rounding in fp32, the same products over more rows, and within one step in bf16."""
    family, folder = model(name)
    sigmas = torch.tensor([0.1, 0.6, 0.97])
    for placement, bound in ((FP32, 2e-6), (BF16, 2**-8)):
        ahead = load_transformer(family, folder, placement, Layout(modulation_rows=4))
        plain = load_transformer(family, folder, placement)
        absent = tuple(f"{path}.weight" for path in family.modulation_layers)
        assert not any(name.endswith(absent) for name in ahead.module.state_dict())
        expected = velocity(family, folder, plain, sigmas)
        ours = velocity(family, folder, ahead, sigmas)
        assert (ours - expected).norm() <= bound * expected.norm()
        assert ahead.table is not None and plain.table is None
        ahead.table.check()


def test_control_tokens_of_2511_are_modulated_as_clean(tmp_path: Path) -> None:
    """`zero_cond_t`: the table holds one more row, and image and text layers take different numbers of rows."""
    family, folder = model("tiny-qwen-image-edit")
    path = shutil.copytree(folder.path, tmp_path / "2511", ignore=shutil.ignore_patterns("text_encoder", "vae"))
    config = {**folder.component_config("transformer"), "zero_cond_t": True}
    (path / "transformer" / "config.json").write_text(json.dumps(config))
    same_weights = ModelFolder(path)
    velocities = []
    for layout in (PLAIN, Layout(modulation_rows=3)):
        transformer = load_transformer(family, same_weights, FP32, layout)
        channels, height, width = family.latent_shape(folder, 64, 64)
        generator = torch.Generator().manual_seed(1)
        noisy_BCHW, control_BCHW = torch.randn(2, 2, channels, height, width, generator=generator)
        text = family.stack_conditioning([family.random_text(folder, 5, seed) for seed in range(2)])
        sigmas = torch.tensor([0.3, 0.8])
        announce(transformer, family, sigmas, text)
        with torch.no_grad():
            velocities.append(family.predict_velocity(transformer.module, noisy_BCHW, sigmas, text, [control_BCHW]))
    torch.testing.assert_close(velocities[1], velocities[0], rtol=1e-5, atol=1e-5)


def test_a_sigma_that_was_not_announced_is_noticed() -> None:
    family, folder = model("tiny-flux")
    transformer = load_transformer(family, folder, FP32, Layout(modulation_rows=4))
    velocity(family, folder, transformer, torch.tensor([0.2]))
    table = transformer.table
    assert table is not None
    table.check()
    channels, height, width = family.latent_shape(folder, 64, 64)
    text = family.stack_conditioning([family.random_text(folder, 11, 0)])
    with torch.no_grad():
        family.predict_velocity(transformer.module, torch.zeros(1, channels, height, width), torch.tensor([0.7]), text)
    with pytest.raises(RuntimeError, match="was not among those announced"):
        table.check()


def test_no_table_is_recomputed_for_the_same_sigmas(monkeypatch: pytest.MonkeyPatch) -> None:
    family, folder = model("tiny-qwen-image")
    transformer = load_transformer(family, folder, FP32, Layout(modulation_rows=4))
    table = transformer.table
    assert table is not None
    passes: list[str] = []
    read_weight = table._read_weight

    def read(name: str) -> Tensor:
        passes.append(name)
        return read_weight(name)

    monkeypatch.setattr(table, "_read_weight", read)
    velocity(family, folder, transformer, torch.tensor([0.2, 0.4]))
    velocity(family, folder, transformer, torch.tensor([0.2, 0.4]))
    layers = [module for module in transformer.module.modules() if isinstance(module, ModulationRows)]
    assert len(passes) == len(set(passes)) == 2 * len(layers)


@pytest.mark.parametrize("fault", ["missing", "foreign", "shape"])
def test_weights_that_do_not_fit_are_named(tmp_path: Path, fault: str) -> None:
    family, folder = model("tiny-qwen-image")
    shutil.copytree(folder.path / "transformer", tmp_path / "transformer")
    path = tmp_path / "transformer" / WEIGHTS
    tensors = load_file(path)
    name = "transformer_blocks.0.attn.to_q.weight"
    words = {"missing": f"lacks 1 tensors .*{name}", "foreign": "holds other.weight", "shape": rf"{name} has shape"}
    if fault == "missing":
        del tensors[name]
    elif fault == "foreign":
        tensors["other.weight"] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(3, 3)
    path.unlink()
    save_file(tensors, path)
    for layout in (PLAIN, Layout("int8")):
        with pytest.raises(WeightsError, match=words[fault]):
            load_transformer(family, ModelFolder(tmp_path), FP32, layout)


def test_loaded_weights_do_not_hang_on_their_file(tmp_path: Path) -> None:
    family, folder = model("tiny-qwen-image")
    shutil.copytree(folder.path / "transformer", tmp_path / "transformer")
    transformer = load_transformer(family, ModelFolder(tmp_path), FP32).module
    before = transformer.get_parameter("img_in.weight").clone()
    with (tmp_path / "transformer" / WEIGHTS).open("r+b") as file:
        file.seek(-1000, 2)
        file.write(bytes(1000))
    assert all(p.untyped_storage().filename is None for p in transformer.parameters())
    assert transformer.get_parameter("img_in.weight").equal(before)


@pytest.mark.parametrize("linear_format", [None, "int8"])
def test_random_blocks_are_whole_when_they_are_taken(linear_format: str | None) -> None:
    """Quantized layers of one shape are made of one that is drawn, so its block must not be taken before they are."""
    family, folder = model("tiny-qwen-image")
    taken: dict[int, bool] = {}

    def take(number: int, block: nn.Module) -> None:
        tensors = [tensor for tensor in (*block.parameters(), *block.buffers()) if tensor.is_floating_point()]
        taken[number] = all(bool(tensor.isfinite().all()) for tensor in tensors)
        for tensor in tensors:
            tensor.data = torch.full((), torch.nan).expand(tensor.shape)

    num_blocks, _ = family.block_shape(folder)
    layout = Layout(linear_format, streamed=tuple(range(num_blocks)))
    random_transformer(family, folder.component_config("transformer"), FP32, layout, take=take)
    assert taken == dict.fromkeys(range(num_blocks), True)


def test_random_weights_are_the_same_each_time_and_others_for_each_name() -> None:
    place, shape = Placement(torch.device("cpu"), torch.float32), torch.Size((8, 16))
    first = random_tensor("a.weight", shape, place)
    torch.randn(3)  # whatever was drawn in between
    assert first.equal(random_tensor("a.weight", shape, place))
    assert not first.equal(random_tensor("b.weight", shape, place))
