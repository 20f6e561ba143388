"""A transformer in one file, under other names and in 8 bits, is the transformer of its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pixtune.config.model_parts import ModelParts
from pixtune.engine import quantize
from pixtune.engine.load import PLAIN, Layout, LoadedTransformer, load_transformer
from pixtune.engine.modulation_ahead import announce
from pixtune.engine.quantize import QuantizedLinear, quantize_rows
from pixtune.errors import WeightsError
from pixtune.families import family_of
from pixtune.families.file_names import flux_names
from pixtune.families.opening import find_model, open_model
from pixtune.families.stock_call import load_stock_transformer
from pixtune.family import Placement
from pixtune.planning import check_transformer, shapes_of_config
from pixtune.storage.base_reference import steps_fingerprint
from pixtune.storage.loading import read
from pixtune.storage.model_folder import ModelFolder
from tests import single_files
from tests.runs import ROOT
from tests.single_files import Tensors

MODELS = ("tiny-qwen-image", "tiny-flux")
BF16 = Placement(torch.device("cpu"), torch.bfloat16)
FORMS: Mapping[str, Callable[[Tensors], Tensors]] = {
    "fp8": single_files.fp8_cast,
    "fp8_scaled": single_files.fp8_scaled,
    "fp8_scaled, older": single_files.fp8_scaled_old,
    "int8 convrot": single_files.int8_convrot,
    "int8 convrot in groups of 64": lambda tensors: single_files.int8_convrot(tensors, 64),
}


def place(model: str) -> Path:
    return ROOT / "assets" / model


def opened(model: str, file: Path) -> ModelFolder:
    return open_model(str(file), ModelParts(others=str(place(model))))


def loaded(folder: ModelFolder, layout: Layout = PLAIN) -> LoadedTransformer:
    return load_transformer(family_of(folder), folder, BF16, layout)


def config_of(folder: ModelFolder) -> Mapping[str, Any]:
    """The config that the loaded transformer has."""
    module: Any = loaded(folder).module
    return module.config


def by_hand(written: Tensors) -> Tensors:
    """The numbers that a file's tensors stand for, in fp32 and rounded once: those that are not read are left out."""
    numbers: Tensors = {}
    for name, tensor in written.items():
        layer = name.removesuffix(".weight")
        scale = written.get(f"{layer}.weight_scale", written.get(f"{layer}.scale_weight"))
        if name == "scaled_fp8" or name.endswith(single_files.BESIDE):
            continue
        plain = tensor.float()
        if name.endswith(".weight") and scale is not None:
            plain = plain * scale
            if tensor.dtype == torch.int8:
                group = 64 if single_group(written, layer) == 64 else 256
                turned = single_files.hadamard(group)
                plain = torch.cat([part @ turned for part in plain.split(group, dim=1)], dim=1)
        numbers[name] = plain.to(torch.bfloat16)
    return numbers


def single_group(written: Tensors, layer: str) -> int:
    return 64 if b"64" in bytes(written[f"{layer}.comfy_quant"].tolist()) else 256


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_in_16_bits_every_bit_is_the_folders(model: str, prefix: str, tmp_path: Path) -> None:
    tensors = {f"{prefix}{name}": tensor for name, tensor in single_files.published(model).items()}
    others = {"vae.encoder.conv_in.weight": torch.zeros(1), "text_encoders.t5xxl.logit_scale": torch.zeros(1)}
    folder = opened(model, single_files.write({**tensors, **(others if prefix else {})}, tmp_path / "m.safetensors"))
    usual = open_model(str(place(model)))
    check_transformer(family_of(folder), folder)
    ours, theirs = (loaded(each).module.state_dict() for each in (folder, usual))
    assert ours.keys() == theirs.keys() and not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert steps_fingerprint(folder) == steps_fingerprint(usual), "a run goes on with either"
    assert dict(folder.component_config("transformer")) == dict(usual.component_config("transformer"))


@pytest.mark.parametrize(
    ("form", "model"),
    [*((form, "tiny-flux") for form in FORMS), ("fp8_scaled", MODELS[0]), ("int8 convrot", MODELS[0])],
)
def test_8_bits_are_the_numbers_that_they_stand_for(model: str, form: str, tmp_path: Path) -> None:
    written = FORMS[form](single_files.published(model))
    file = single_files.write(single_files.with_prefix(written), tmp_path / "8.safetensors")
    plain = single_files.write(by_hand(written), tmp_path / "16.safetensors")
    ours, theirs = (loaded(opened(model, each)).module.state_dict() for each in (file, plain))
    # The product with a rotation adds up in another order.
    tolerance = {"rtol": 2**-7, "atol": 1e-6} if "convrot" in form else {"rtol": 0, "atol": 0}
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], **tolerance)
    exact = single_files.transformer_of(model)
    bound = {"fp8": 0.06, "int": 0.02}[form[:3]]
    errors = {
        name: float((ours[name].float() - exact[name].float()).norm() / exact[name].float().norm().clamp_min(1e-6))
        for name in exact
    }
    assert max(errors.values()) < bound, max(errors, key=errors.__getitem__)


@pytest.mark.parametrize("model", MODELS)
def test_codes_of_the_planned_format_are_kept_as_they_are(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is rounded a second time, and no 16-bit copy is made of what is kept."""
    written = single_files.fp8_scaled(single_files.published(model))
    folder = opened(model, single_files.write(written, tmp_path / "m.safetensors"))
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "quantize_rows", None)
        transformer = loaded(folder, Layout("fp8")).module
    assert folder.file is not None
    layers = {n: m for n, m in transformer.named_modules() if isinstance(m, QuantizedLinear)}
    assert layers
    for path, layer in layers.items():
        stored = folder.file.places[f"{path}.weight"]
        rows = slice(*stored.rows) if stored.rows else slice(None)
        assert torch.equal(layer.weight, written[stored.name].view(torch.uint8)[rows]), path
        scale = written[stored.name.replace(".weight", ".weight_scale")]
        assert layer.scale.shape == (layer.out_features, 1) and (layer.scale == scale).all(), path


def test_rotated_codes_are_turned_back_and_rounded_anew(tmp_path: Path) -> None:
    written = single_files.int8_convrot(single_files.published("tiny-flux"))
    folder = opened("tiny-flux", single_files.write(written, tmp_path / "m.safetensors"))
    layer: Any = loaded(folder, Layout("int8")).module.get_submodule("transformer_blocks.0.attn.to_k")
    name, width = "double_blocks.0.img_attn.qkv", 256
    turned = (written[f"{name}.weight"].float() * written[f"{name}.weight_scale"]) @ single_files.hadamard(width)
    codes, scale = quantize_rows(turned[width : 2 * width], torch.int8)
    assert (layer.weight.view(torch.int8) - codes).abs().max() <= 1
    torch.testing.assert_close(layer.scale, scale)


@pytest.mark.parametrize("model", MODELS)
def test_the_velocity_and_modulation_computed_ahead_are_the_folders(model: str, tmp_path: Path) -> None:
    file = single_files.write(single_files.published(model), tmp_path / "m.safetensors")
    velocities = []
    for folder, layout in ((opened(model, file), Layout(modulation_rows=4)), (open_model(str(place(model))), PLAIN)):
        family, transformer = family_of(folder), loaded(folder, layout)
        noisy_BCHW = torch.randn(1, *family.latent_shape(folder, 64, 64), generator=torch.Generator().manual_seed(1))
        text = family.stack_conditioning([family.random_text(folder, 8, 0)])
        announce(transformer, family, torch.tensor([0.6]), text)
        with torch.no_grad():
            velocities.append(family.predict_velocity(transformer.module, noisy_BCHW, torch.tensor([0.6]), text))
    torch.testing.assert_close(*velocities, rtol=2**-6, atol=0.02)


def test_the_names_are_diffusers_own_conversion() -> None:
    """Its function knows the full width alone, so the tensors have one column, and each number its own place."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    width = 3072
    own = {name: (shape[0],) if len(shape) == 1 else (shape[0], 1) for name, shape in flux_shapes_of(width).items()}
    tensors = {name: torch.rand(shape, generator=torch.Generator().manual_seed(7)) for name, shape in own.items()}
    file = single_files.original_flux(tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in file.items()}
    found: dict[str, Tensor] = {}
    for name in file:
        for target, each in flux_names(name, shapes):
            tensor = file[each.name] if each.rows is None else file[each.name][slice(*each.rows)]
            found[target] = torch.cat(tensor.chunk(2)[::-1]) if each.halves_swapped else tensor
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(file))
    assert theirs.keys() == found.keys()
    assert not [name for name in theirs if not torch.equal(theirs[name], found[name])]


def flux_shapes_of(width: int) -> Mapping[str, tuple[int, ...]]:
    from pixtune.families.transformer_shapes import flux_shapes

    heads = {"num_attention_heads": width // 128, "attention_head_dim": 128}
    config = {**heads, "num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
    return {name: tuple(shape) for name, shape in flux_shapes(config).items()}


@pytest.mark.parametrize("model", MODELS)
def test_a_plan_reads_the_header_alone(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = single_files.int8_convrot(single_files.published(model))
    file = single_files.write(single_files.with_prefix(written), tmp_path / "m.safetensors")
    monkeypatch.setattr(read, "safe_open", None)
    folder = find_model(str(file), ModelParts(others=str(place(model))))
    family = family_of(folder)
    assert check_transformer(family, folder) == shapes_of_config(family, open_model(str(place(model))))
    assert folder.num_parameters("transformer") == open_model(str(place(model))).num_parameters("transformer")


def test_a_plan_takes_the_sizes_of_the_other_parts_from_what_is_shipped(tmp_path: Path) -> None:
    folder = find_model(str(single_file_of_full_heads(tmp_path)), ModelParts(others="black-forest-labs/FLUX.1-dev"))
    assert folder.has_weights("transformer") and not folder.has_weights("text_encoder_2")
    assert check_transformer(family_of(folder), folder) == flux_shapes_of(128)
    assert (folder.count_parameters("text_encoder_2") or 0) > 4e9 and folder.num_parameters("transformer") < 4e6


def test_another_scale_is_another_base(tmp_path: Path) -> None:
    written = single_files.fp8_scaled(single_files.published("tiny-flux"))
    before = steps_fingerprint(opened("tiny-flux", single_files.write(written, tmp_path / "m.safetensors")))
    older = single_files.with_prefix(single_files.fp8_scaled_old(single_files.published("tiny-flux")))
    assert steps_fingerprint(opened("tiny-flux", single_files.write(older, tmp_path / "o.safetensors"))) == before
    written["single_blocks.4.linear2.weight_scale"] = written["single_blocks.4.linear2.weight_scale"] * 1.01
    assert steps_fingerprint(opened("tiny-flux", single_files.write(written, tmp_path / "m.safetensors"))) != before


def test_what_the_shapes_tell_wins_over_the_folders_config(tmp_path: Path) -> None:
    """A FLUX.1 without guidance, of fewer blocks, beside the parts of the other."""
    tensors = single_files.published("tiny-flux")
    left = {n: t for n, t in tensors.items() if not n.startswith(("guidance_in", "single_blocks.4", "double_blocks.1"))}
    folder = opened("tiny-flux", single_files.write(left, tmp_path / "m.safetensors"))
    config = folder.component_config("transformer")
    assert (config["num_layers"], config["num_single_layers"], config["guidance_embeds"]) == (1, 4, False)
    assert config_of(folder)["guidance_embeds"] is False


def test_a_mark_of_qwen_image_edit_2511_is_a_key_of_its_config(tmp_path: Path) -> None:
    tensors = {**single_files.published("tiny-qwen-image-edit"), "__index_timestep_zero__": torch.zeros(())}
    folder = opened("tiny-qwen-image-edit", single_files.write(tensors, tmp_path / "m.safetensors"))
    assert folder.component_config("transformer")["zero_cond_t"] is True
    assert config_of(folder)["zero_cond_t"] is True


def test_the_stock_pipelines_transformer_is_filled_from_the_file(tmp_path: Path) -> None:
    written = single_files.fp8_scaled(single_files.published("tiny-flux"))
    folder = opened("tiny-flux", single_files.write(written, tmp_path / "m.safetensors"))
    ours, stock = loaded(folder).module.state_dict(), load_stock_transformer(folder, BF16).state_dict()
    assert ours.keys() == stock.keys() and all(torch.equal(ours[name], stock[name]) for name in ours)


def test_parts_may_come_one_by_one_without_a_folder(tmp_path: Path) -> None:
    model = place("tiny-flux")
    (tmp_path / "m").mkdir()
    tensors = single_files.published("tiny-flux")
    file = single_files.write(tensors, tmp_path / "m" / "m.safetensors")
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    parts: dict[str, Any] = {name: model / name for name in names}
    # The full-size model's positions do not fit heads of 64 features: the small one needs its own config beside it.
    with pytest.raises(Exception, match=r"axes_dims_rope.*model_parts\.others"):
        open_model(str(file), ModelParts(**parts))
    assert open_model(str(single_file_of_full_heads(tmp_path)), ModelParts(**parts)).pipeline_class == "FluxPipeline"
    folder = open_model(str(model), ModelParts(transformer=file, **parts))
    assert folder.part("vae") == model / "vae" and folder.pipeline_class == "FluxPipeline"


def single_file_of_full_heads(folder: Path) -> Path:
    """A FLUX.1 of one block of each kind whose heads have the published ones' 128 features."""
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in flux_shapes_of(128).items()}
    return single_files.write(single_files.original_flux(tensors), folder / "heads.safetensors")


def test_a_model_needs_no_transformer_of_its_own_where_a_file_has_it(tmp_path: Path) -> None:
    from shutil import copytree, ignore_patterns

    others = copytree(place("tiny-qwen-image"), tmp_path / "others", ignore=ignore_patterns("transformer"))
    file = single_files.write(single_files.published("tiny-qwen-image"), tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match="axes_dims_rope"):  # the published config, since there is no other
        open_model(str(file), ModelParts(others=str(others)))
    (others / "transformer").mkdir()
    (others / "transformer" / "config.json").write_bytes(
        (place("tiny-qwen-image") / "transformer" / "config.json").read_bytes()
    )
    assert steps_fingerprint(open_model(str(file), ModelParts(others=str(others)))) == steps_fingerprint(
        open_model(str(place("tiny-qwen-image")))
    )


def test_another_folders_part_is_the_one_that_is_read(tmp_path: Path) -> None:
    from shutil import copytree

    vae = copytree(place("tiny-qwen-image") / "vae", tmp_path / "vae")
    (weights,) = vae.glob("*.safetensors")
    changed = {name: tensor * 2 for name, tensor in load_file(weights).items()}
    single_files.write(changed, weights, {"format": "pt"})
    usual = open_model(str(place("tiny-qwen-image")))
    folder = open_model(str(place("tiny-qwen-image")), ModelParts(vae=vae))
    family = family_of(folder)
    ours, theirs = (family.load_autoencoder(each, BF16).state_dict() for each in (folder, usual))
    assert all(torch.equal(ours[name], theirs[name] * 2) for name in theirs)
    assert folder.fingerprint("vae") != usual.fingerprint("vae"), "the encodings are others"
    assert folder.fingerprint("text_encoder") == usual.fingerprint("text_encoder")
