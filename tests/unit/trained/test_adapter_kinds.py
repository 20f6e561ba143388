"""DoRA, LoKr, rsLoRA and ranks by layer compute what PEFT computes, in every format, and their files load elsewhere."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pixtune.engine.activations import recompute_blocks
from pixtune.engine.load import load_transformer
from pixtune.engine.quantize import QuantizedLinear
from pixtune.engine.streaming import stream_blocks
from pixtune.errors import ConfigError, WeightsError
from pixtune.families import FAMILIES
from pixtune.family import Placement
from pixtune.storage.base_reference import BaseReference
from pixtune.storage.model_folder import ModelFolder
from pixtune.trained import adapters
from pixtune.trained.export import COMFYUI_FILE, DIFFUSERS_FILE, LoraDescription, export_lora
from pixtune.trained.saved_lora import attach_saved_lora, read_saved_lora
from pixtune.trained.scheme import Scheme
from pixtune.trained.targets import ranks_of_layers
from pixtune.trained.training_adapter import TrainingAdapter
from tests.runs import ROOT

FAMILY = FAMILIES["qwen_image"]
TARGETS = ("to_q", "to_k", "to_out.0", "img_mlp.net.0.proj")
FIRST = "transformer_blocks.0.attn.to_q"
CPU = torch.device("cpu")
SCHEMES = {
    "rslora": Scheme(4, 6.0, use_rslora=True),
    "ranks": Scheme(4, 6.0, ranks={FIRST: 2}, alphas={FIRST: 5.0}),
    "dora": Scheme(4, 6.0, "dora"),
    "lokr": Scheme(64, 64.0, "lokr", factor=16),
    "lokr, larger of low rank": Scheme(2, 2.0, "lokr", factor=4),
    "lokr, both of low rank": Scheme(2, 3.0, "lokr", factor=16, decompose_both=True),
}


@functools.cache
def folder() -> ModelFolder:
    return ModelFolder(ROOT / "assets" / "tiny-qwen-image")


@functools.cache
def base() -> nn.Module:
    """The transformer without an adapter; copy it before changing it."""
    return load_transformer(FAMILY, folder(), Placement(CPU, torch.float32)).module


def velocity(transformer: nn.Module) -> Tensor:
    noisy_BCHW = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    text = FAMILY.stack_conditioning([FAMILY.random_text(folder(), count, seed=0) for count in (5, 9)])
    return FAMILY.predict_velocity(transformer, noisy_BCHW, torch.tensor([0.3, 0.8]), text)


def trained(weights: Mapping[str, Tensor]) -> None:
    """Makes weights what some training would."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        drawn = torch.randn(weight.shape, generator=generator) * 0.1
        weight.copy_(weight * (1 + drawn) if name.endswith("magnitude_vector") else weight + drawn)


@functools.cache
def adapted(kind: str) -> nn.Module:
    """With a trained adapter; copy it before changing it."""
    transformer = copy.deepcopy(base())
    adapters.attach_adapter(transformer, TARGETS, SCHEMES[kind], 3)
    trained(adapters.lora_weights(transformer))
    return transformer


def of_peft(scheme: Scheme, model: Any) -> Any:
    """The same adapter by PEFT alone, which computes it in its own way."""
    from peft import LoKrConfig, LoraConfig

    entries = {key: value for key, value in scheme.entries(TARGETS).items() if key != "peft_type"}
    model.add_adapter((LoKrConfig if scheme.kind == "lokr" else LoraConfig)(**entries))
    return model


@pytest.mark.parametrize("kind", SCHEMES)
def test_each_kind_computes_what_peft_computes(kind: str) -> None:
    from peft import set_peft_model_state_dict

    ours, scheme = copy.deepcopy(adapted(kind)), SCHEMES[kind]
    peft = of_peft(scheme, copy.deepcopy(base()))
    outcome = set_peft_model_state_dict(peft, dict(adapters.lora_weights(ours)))
    assert not outcome.unexpected_keys
    found, expected = velocity(ours), velocity(peft)
    assert (expected - velocity(base())).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.square().mean().backward()
    expected.square().mean().backward()
    gradients = [
        adapters.named_by_layer(
            {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        )
        for model in (ours, peft)
    ]
    assert gradients[0].keys() == gradients[1].keys() == adapters.lora_weights(ours).keys()
    for name, gradient in gradients[1].items():
        error = (gradients[0][name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, name


@pytest.mark.parametrize("kind", ["dora", "lokr", "lokr, both of low rank"])
def test_a_new_one_and_one_of_strength_0_change_nothing(kind: str) -> None:
    transformer = copy.deepcopy(base())
    with torch.no_grad():
        before = velocity(transformer)
        adapters.attach_adapter(transformer, TARGETS, SCHEMES[kind], 3)
        assert velocity(transformer).equal(before)
        trained(weights := adapters.lora_weights(transformer))
        kept, whole = {name: weight.clone() for name, weight in weights.items()}, velocity(transformer)
        for strength, expected in ((0.0, before), (1.0, whole)):
            with adapters.at_strength(transformer, adapters.adapter_names(transformer), strength):
                assert velocity(transformer).equal(expected)
        with adapters.at_strength(transformer, adapters.adapter_names(transformer), 0.5):
            half = velocity(transformer)
        assert (half - before).norm() < (whole - before).norm() and not half.equal(before)
        assert all(weights[name].equal(weight) for name, weight in kept.items())


@pytest.mark.parametrize("linear_format", ["fp8", "int8", "nf4"])
@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_on_quantized_weights_it_is_what_peft_adds_to_what_they_stand_for(linear_format: str, kind: str) -> None:
    """The frozen product is in 8 bits, so what is added to it is compared, and of a DoRA the gain."""
    from peft import set_peft_model_state_dict

    torch.manual_seed(0)
    plain = nn.Linear(64, 96)
    codes = torch.int8 if linear_format == "int8" else torch.float8_e4m3fn
    quantized = QuantizedLinear(64, 96, linear_format, codes, tensor_cores=False)
    quantized.set_weight(plain.weight.detach())
    quantized.bias = nn.Parameter(plain.bias.detach().clone(), requires_grad=False)
    scheme = Scheme(4, 6.0, "dora") if kind == "dora" else Scheme(64, 64.0, "lokr", factor=16)
    model = Holder(quantized)
    layers = adapters.attach_config(model, ("layer",), scheme)
    with torch.no_grad():
        trained(weights := adapters.weights_of(layers, "default"))
    stands_for = nn.Linear(64, 96)
    stands_for.load_state_dict({"weight": quantized.dequantized(), "bias": plain.bias})
    reference: Any = of_peft_alone(scheme, Holder(stands_for))
    set_peft_model_state_dict(reference, {name: weight.clone() for name, weight in weights.items()})
    states = torch.randn(5, 64)
    product, ours, theirs = quantized(states), layers["layer"], reference.layer
    if kind == "lokr":
        added = theirs(states) - theirs.base_layer(states)
        torch.testing.assert_close(ours(states) - product, added, rtol=1e-4, atol=1e-4)
    upstream, gradients = torch.randn(5, 96), []
    for layer in (ours, theirs):
        layer(states).backward(upstream)
        gradients.append({n: p.grad for n, p in layer.named_parameters() if p.requires_grad})
    for name, gradient in gradients[1].items():
        error = (gradients[0][name] - gradient).norm() / gradient.norm()
        assert error < (1e-5 if kind == "lokr" else 0.1 if "magnitude" in name else 1e-2), name
    if kind == "lokr":
        return
    magnitude = theirs.lora_magnitude_vector["default"].weight
    low = states @ weights["layer.lora_A.weight"].t() @ weights["layer.lora_B.weight"].t() * scheme.scale_of("layer")
    weight = (
        stands_for.weight + scheme.scale_of("layer") * weights["layer.lora_B.weight"] @ weights["layer.lora_A.weight"]
    )
    gain = magnitude / weight.norm(dim=1)
    expected = gain * (product - plain.bias + low) + plain.bias
    torch.testing.assert_close(ours(states), expected, rtol=3e-3, atol=3e-3)  # lengths from a product in 8 bits


class Holder(nn.Module):
    """A model of one layer that takes adapters as diffusers' models do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.requires_grad_(False)

    def add_adapter(self, config: Any, adapter_name: str = "default") -> None:
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, self, adapter_name)


def of_peft_alone(scheme: Scheme, model: Holder) -> Holder:
    from peft import LoKrConfig, LoraConfig

    entries = {key: value for key, value in scheme.entries(("layer",)).items() if key != "peft_type"}
    model.add_adapter((LoKrConfig if scheme.kind == "lokr" else LoraConfig)(**entries))
    return model


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_streamed_and_recomputed_it_is_the_same_to_the_bit(kind: str) -> None:
    resident, streamed = copy.deepcopy(adapted(kind)), copy.deepcopy(base())
    blocks = list(streamed.get_submodule("transformer_blocks").children())
    stream = stream_blocks(blocks, CPU)
    adapters.attach_adapter(streamed, TARGETS, SCHEMES[kind], 3, stream)
    weights = adapters.lora_weights(resident)
    adapters.load_lora_weights(streamed, weights)
    recompute_blocks(blocks, offload=False)
    gradients = []
    for model in (resident, streamed):
        velocity(model).square().mean().backward()
        gradients.append({name: p.grad for name, p in adapters.trainable_parameters(model).items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, gradients[1][name]), name  # type: ignore[arg-type]
    scales = adapters.dora_scales(resident, weights), adapters.dora_scales(streamed, weights, stream)
    assert scales[0].keys() == scales[1].keys() and all(scales[0][n].equal(scales[1][n]) for n in scales[0])


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_a_training_adapter_stands_beside_it(kind: str) -> None:
    """What both add is the sum: the adapter's own product is added after a DoRA's gain, as PEFT does."""
    transformer = copy.deepcopy(adapted(kind))
    weights = {f"{FIRST}.lora_A.weight": torch.randn(2, 256) * 0.1, f"{FIRST}.lora_B.weight": torch.randn(256, 2)}
    lora = read_like(weights)
    names = set(adapters.lora_weights(transformer))
    layer: Any = transformer.get_submodule(FIRST)
    states = torch.randn(1, 3, 256)
    with torch.no_grad():
        alone = layer(states)
        adapter = TrainingAdapter(transformer, lora, torch.float32)
        both: Any = transformer.get_submodule(FIRST)
        added = states @ weights[f"{FIRST}.lora_A.weight"].t() @ weights[f"{FIRST}.lora_B.weight"].t()
        torch.testing.assert_close(both(states), alone + added, rtol=1e-4, atol=1e-4)
        with adapter.off():
            torch.testing.assert_close(both(states), alone, rtol=1e-5, atol=1e-5)
    assert set(adapters.lora_weights(transformer)) == names


def read_like(weights: Mapping[str, Tensor]) -> Any:
    from pixtune.trained.saved_lora import SavedLora

    return SavedLora(Path("x"), weights, 2, 2.0, {FIRST: 2}, {FIRST: 2.0}, False)


# ---- files


@functools.cache
def about(kind: str) -> LoraDescription:
    scheme = SCHEMES[kind]
    return LoraDescription(
        scheme.rank, scheme.alpha, TARGETS, BaseReference("base", None), FAMILY.name, 1, "0" * 16, [], {}, scheme
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of each kind in a folder of its own."""
    path = tmp_path_factory.mktemp("kinds")
    for kind in SCHEMES:
        weights = adapters.lora_weights(adapted(kind))
        (path / kind).mkdir()
        export_lora(path / kind, weights, about(kind), FAMILY, dora_scales=adapters.dora_scales(adapted(kind), weights))
    return path


@pytest.mark.parametrize("kind", SCHEMES)
def test_stock_diffusers_loads_its_file_and_computes_the_same(
    kind: str, written: Path, diffusers_warnings: pytest.LogCaptureFixture
) -> None:
    from diffusers import QwenImagePipeline

    pipeline: Any = QwenImagePipeline.from_pretrained(
        folder().path, transformer=copy.deepcopy(base()), vae=None, text_encoder=None, tokenizer=None
    )
    path = written / kind / DIFFUSERS_FILE
    if SCHEMES[kind].kind == "lokr":
        with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):  # as the file's metadata say
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
        with safe_open(path, framework="pt") as file:
            assert f"weight_name='{path.name}', prefix='transformer')" in file.metadata()["pixtune.loading"]
        pipeline.transformer.load_lora_adapter(path.parent, weight_name=path.name, prefix="transformer")
    else:
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
    assert not [r.getMessage() for r in diffusers_warnings.records if "key" in r.getMessage().lower()]
    with torch.no_grad():
        torch.testing.assert_close(velocity(pipeline.transformer), velocity(adapted(kind)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SCHEMES)
def test_a_saved_one_put_on_a_base_is_the_trained_one(kind: str, written: Path) -> None:
    transformer, lora = copy.deepcopy(base()), read_saved_lora(written / kind / DIFFUSERS_FILE, FAMILY)
    lora.refuse_other_model({name: tuple(tensor.shape) for name, tensor in base().state_dict().items()})
    attach_saved_lora(transformer, lora)
    with torch.no_grad():
        assert velocity(transformer).equal(velocity(adapted(kind)))


@pytest.mark.parametrize("kind", SCHEMES)
def test_comfyuis_file_is_the_same_weight_by_its_own_formulas(kind: str, written: Path) -> None:
    """ComfyUI's arithmetic of each kind, on the names that it looks for; no tensor is left over."""
    tensors, layer = load_file(written / kind / COMFYUI_FILE), f"diffusion_model.{FIRST}"
    own = {name.removeprefix(f"{layer}."): tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")}
    weight = base().get_parameter(f"{FIRST}.weight").detach()
    if SCHEMES[kind].kind == "lokr":
        factors, rank = [], None
        for name in ("lokr_w1", "lokr_w2"):
            if name in own:
                factors.append(own.pop(name))
            else:
                down = own.pop(f"{name}_b")
                factors.append(own.pop(f"{name}_a") @ down)
                rank = len(down)
        scale = 1.0 if rank is None else own.pop("alpha").item() / rank
        changed = weight + scale * torch.kron(*factors)
    else:
        down, up = own.pop("lora_A.weight"), own.pop("lora_B.weight")
        changed = weight + own.pop("alpha").item() / len(down) * up @ down
        if kind == "dora":
            changed = changed * own.pop("dora_scale") / weight.norm(dim=1, keepdim=True)
    assert not own
    states = torch.eye(256)
    bias = base().get_parameter(f"{FIRST}.bias")
    with torch.no_grad():
        ours = adapted(kind).get_submodule(FIRST)(states) - bias
    torch.testing.assert_close(ours.t(), changed, rtol=1e-4, atol=1e-5)
    assert (changed - weight).norm() > 0.05 * weight.norm(), "too little to tell by"


def test_files_that_do_not_hold_what_they_state_are_refused(written: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def spoiled(kind: str, change: Any) -> Path:
        path = written / kind / DIFFUSERS_FILE
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors, settings = load_file(path), json.loads(metadata["lora_adapter_metadata"])
        change(tensors, settings)
        save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
        return tmp_path / "x.safetensors"

    name = f"transformer.{FIRST}"
    for kind, change, words in (
        ("lokr", lambda t, s: t.pop(f"{name}.lokr_w1"), "has matrices of shapes"),
        ("lokr", lambda t, s: s.update({"transformer.decompose_factor": 7}), "has matrices of shapes"),
        ("lokr", lambda t, s: s.update({"transformer.decompose_factor": 0}), "damaged lora_adapter_metadata"),
        ("lokr", lambda t, s: s.update({"transformer.r": 1}), "has matrices of shapes"),
        ("lokr", lambda t, s: s.update({"transformer.rank_dropout": 0.5}), "rank_dropout=0.5"),
        ("lokr", lambda t, s: t.update({f"{name}.lora_A.weight": torch.ones(2, 2)}), "state a LoKr"),
        ("dora", lambda t, s: t.pop(f"{name}.lora_magnitude_vector"), "lengths of shape None"),
        ("dora", lambda t, s: t.update({f"{name}.lora_magnitude_vector": torch.ones(3)}), "magnitudes of shape [3]"),
        ("dora", lambda t, s: s.pop("transformer.use_dora"), "a plain LoRA alone"),
    ):
        with pytest.raises(WeightsError) as caught:
            read_saved_lora(spoiled(kind, change), FAMILY)
        assert words in str(caught.value)


# ---- names


def test_ranks_are_of_the_layers_that_names_mean() -> None:
    layers = [f"blocks.{number}.attn.{name}" for number in range(2) for name in ("to_q", "to_k")]
    presets = {"attention": ("to_q", "to_k")}
    assert ranks_of_layers(layers, {}, presets) == {}
    assert ranks_of_layers(layers, {"blocks.1.*": 2, "to_q": 8}, presets) == {
        "blocks.1.attn.to_q": 2, "blocks.1.attn.to_k": 2, "blocks.0.attn.to_q": 8,
    }  # fmt: skip
    assert set(ranks_of_layers(layers, {"attention": 3}, presets).values()) == {3}
    with pytest.raises(ConfigError, match=r"adapter\.rank_pattern names layers that this model does not have"):
        ranks_of_layers(layers, {"to_v": 2}, presets)
    with pytest.raises(ConfigError, match="names only layers that an earlier name has"):
        ranks_of_layers(layers, {"attention": 2, "to_q": 8}, presets)


def test_a_plain_loras_metadata_are_what_they_were() -> None:
    assert Scheme(4, 6.0).entries(("to_q", "to_k")) == {
        "r": 4, "lora_alpha": 6.0, "target_modules": ["to_k", "to_q"], "peft_type": "LORA",
    }  # fmt: skip
    assert math.isclose(Scheme(4, 6.0, use_rslora=True).scale_of("x"), 3.0)
