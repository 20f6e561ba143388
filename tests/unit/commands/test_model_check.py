"""`pixtune doctor --model`: sound models pass, and what is planted in others is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pixtune.cli import app
from pixtune.commands import model_check
from pixtune.commands.model_check import (
    GRADIENT_BOUND,
    STOCK_BOUND,
    ModelCheck,
    check_model,
    compare_with_stock,
    layers_to_keep,
)
from pixtune.commands.quantization_errors import LayerErrors, median_channel_error
from pixtune.config.load import load_config
from pixtune.config.schema import TrainConfig
from pixtune.engine.apply import layout_of
from pixtune.engine.load import Layout, load_transformer
from pixtune.engine.on_demand import load_on_demand
from pixtune.engine.quantize import QuantizedLinear
from pixtune.errors import ConfigError, WeightsError
from pixtune.families import family_of, flux, qwen_image
from pixtune.families.flow_schedule import rounded_timestep
from pixtune.families.stock_call import load_stock_transformer, random_inputs
from pixtune.family import Placement
from pixtune.hardware.facts import GIB, HardwareFacts
from pixtune.plan.footprint import Footprint
from pixtune.plan.rungs import Rung, weight_bytes
from pixtune.plan.training import TrainingPlan, plan_training
from pixtune.planning import footprint_of
from pixtune.storage.checkpoint import read_decision
from pixtune.storage.model_folder import ModelFolder
from tests.runs import ROOT
from tests.shallow import shallow_model
from tests.unit.engine.test_load import MODELS, WEIGHTS, model

CPU = torch.device("cpu")
BF16 = Placement(CPU, torch.bfloat16)
PIPELINES = [(name, None) for name in MODELS] + [
    ("tiny-qwen-image-edit", "QwenImageEditPlusPipeline"),
    ("tiny-flux", "FluxKontextPipeline"),
]
"""Model, and the pipeline that its folder is made one of."""
AMPERE = HardwareFacts("cuda", "an Ampere GPU", (8, 6), 24 * GIB, 23 * GIB)


# ---- the config key


def config_with(keep_plain: str, *more: str) -> TrainConfig:
    _, folder = model("tiny-qwen-image")
    words = [
        f"pretrained_model_name_or_path={folder.path}", "output_dir=out", f"data_config.img_dir={folder.path}",
        "max_train_steps=1", "quantize=true", f"keep_plain={keep_plain}",
    ]  # fmt: skip
    return load_config(None, [*words, *more])


def footprint_with(config: TrainConfig) -> Footprint:
    return footprint_of(config, *model("tiny-qwen-image"), 64)


def plan_with(keep_plain: str, *more: str) -> TrainingPlan:
    config = config_with(keep_plain, *more)
    return plan_training(AMPERE, footprint_with(config), config)


def test_layers_that_are_kept_plain_are_not_quantized() -> None:
    family, folder = model("tiny-qwen-image")
    plan = plan_with("[to_q, transformer_blocks.1.img_mlp.*]")
    layout = layout_of(plan, family.block_shape(folder)[0])
    transformer = load_transformer(family, folder, Placement(CPU, torch.bfloat16), layout).module
    linears = {name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {n for n, m in transformer.named_modules() if isinstance(m, QuantizedLinear)}
    kept = {n for n in linears if n.endswith(".to_q") or n.startswith("transformer_blocks.1.img_mlp.")}
    assert len(kept) == 5 + 2 and set(plan.plain_layers) == kept
    assert quantized.isdisjoint(kept) and "transformer_blocks.0.attn.to_k" in quantized
    everything = load_transformer(family, folder, Placement(CPU, torch.bfloat16), layout_of(plan_with("[]"), 5)).module
    assert {n for n, m in everything.named_modules() if isinstance(m, QuantizedLinear)} == quantized | kept
    assert any("7 linear layers are not quantized" in reason for reason in plan.reasons)
    assert read_decision(TrainingPlan, plan.to_dict(), "plan") == plan


def test_layers_that_are_kept_plain_are_counted() -> None:
    family, folder = model("tiny-qwen-image")
    transformer = load_transformer(family, folder, Placement(CPU, torch.bfloat16)).module
    weights = sum(p.numel() for n, p in transformer.named_parameters() if n.endswith(".to_q.weight"))
    kept, quantized = plan_with("[to_q]"), plan_with("[]")
    assert quantized.kept_transposes, "so a weight in 8 bits takes two bytes, as one in bf16 does"
    assert kept.expected_peak_bytes == quantized.expected_peak_bytes
    of_plain, of_codes = (
        weight_bytes(Rung("int8", 32), footprint_with(config_with(names)), "bf16") for names in ("[to_q]", "[]")
    )
    assert of_plain - of_codes == weights, "one byte a weight more than in 8 bits"


def test_a_pattern_that_matches_nothing_is_an_error_of_the_key() -> None:
    with pytest.raises(ConfigError, match=r"keep_plain names layers.*\n.*'to_x' matches no linear layer"):
        plan_with("[to_x]")


def test_nothing_is_kept_plain_where_all_weights_are_trained() -> None:
    with pytest.raises(ConfigError, match="keep_plain given and method is full"):
        plan_with("[to_q]", "method=full")


# ---- a model of any size


@pytest.mark.parametrize("linear_format", [None, "int8"])
def test_blocks_that_are_read_when_they_run_compute_the_same(linear_format: str | None) -> None:
    family, folder = model("tiny-flux")
    inputs = random_inputs(family, folder, 64, 7, CPU)
    layout = Layout(linear_format)
    velocities = [
        model_check.velocity_of(family, transformer, inputs, torch.tensor([0.4]))
        for transformer in (
            load_transformer(family, folder, BF16, layout).module,
            load_on_demand(family, folder, BF16, layout),
        )
    ]
    assert velocities[0].equal(velocities[1])


def test_weights_are_there_only_while_their_block_runs() -> None:
    family, folder = model("tiny-qwen-image")
    held: list[int] = []

    def visit(path: str, block: torch.nn.Module, args: object, kwargs: object) -> None:
        sizes = [sum(p.untyped_storage().nbytes() for p in b.parameters()) for b in blocks.children()]
        held.append(sum(size > 1000 for size in sizes))
        assert all(bool(parameter.isfinite().all()) for parameter in block.parameters())

    transformer = load_on_demand(family, folder, BF16, visit=visit)
    blocks = transformer.get_submodule("transformer_blocks")
    model_check.velocity_of(family, transformer, random_inputs(family, folder, 64, 7, CPU), torch.tensor([0.4]))
    assert held == [1] * 5
    assert all(bool(parameter.isnan().all()) for parameter in blocks.parameters())


def changed(
    name: str, folder: Path, scales: Sequence[tuple[str, int, float]] = (), drop: str | None = None
) -> ModelFolder:
    """A copy of a model's first blocks with a thousandth of a tensor's channels, at least one, scaled along an axis."""
    shutil.copytree(shallow_model(name, 2 if name == "tiny-flux" else 3), folder)
    file = folder / "transformer" / WEIGHTS
    tensors = load_file(file)
    for tensor, axis, scale in scales:
        count = max(round(tensors[tensor].shape[axis] / 1000), 1)
        tensors[tensor].narrow(axis, 7, count).mul_(scale)
    file.unlink()
    save_file({name: tensor for name, tensor in tensors.items() if name != drop}, file)
    return ModelFolder(folder)


def test_a_tensor_that_is_missing_in_a_block_is_named(tmp_path: Path) -> None:
    name = "transformer_blocks.2.attn.to_k.weight"
    folder = changed("tiny-qwen-image", tmp_path / "model", drop=name)
    with pytest.raises(WeightsError, match=rf"lacks 1 tensors of transformer_blocks\.2, {name}"):
        check_model(folder, family_of(folder), CPU)


# ---- sound models


@pytest.mark.parametrize(("name", "pipeline"), PIPELINES)
def test_a_sound_model_passes(name: str, pipeline: str | None, tmp_path: Path) -> None:
    folder = changed(name, tmp_path / "model")
    if pipeline is not None:
        index = json.loads((folder.path / "model_index.json").read_text())
        (folder.path / "model_index.json").write_text(json.dumps({**index, "_class_name": pipeline}))
    folder = ModelFolder(folder.path)
    family = family_of(folder)
    check = check_model(folder, family, CPU)
    assert check.faults == [] and check.verdict.startswith("Sound")
    assert check.stock.error == 0, "on a CPU the two compute the same, bit for bit"
    assert {layer.linear_format for layer in check.layers} == {"fp8", "int8"}
    assert len(check.blocks) == 2 * family.block_shape(folder)[0]
    least = {"fp8": 0.98, "int8": 0.99}
    assert all(least[quantized.linear_format] < quantized.cosine < 0.99999 for quantized in check.formats)
    # Uniform rounding of a normal row to 127 steps; fp8 rounds each number to 3 bits of mantissa: 2 ** -4 / sqrt(6).
    for layer in check.layers:
        low, high = (0.02, 0.03) if layer.linear_format == "fp8" else (0.0039, 0.015)
        assert low < layer.weight_channel < high, layer


# ---- conventions


def test_another_timestep_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen_image, "rounded_timestep", lambda sigma_B, dtype: rounded_timestep(sigma_B, dtype) / 2)
    assert_differs("tiny-qwen-image")


def test_other_positions_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = flux.image_positions
    monkeypatch.setattr(
        flux, "image_positions", lambda rows, columns, number, device: positions(rows, columns, number, device).flip(-1)
    )
    assert_differs("tiny-flux")


def test_another_scale_in_the_transformer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline would load other weights than we do."""

    def scaled(folder: ModelFolder, placement: Placement) -> torch.nn.Module:
        transformer = load_stock_transformer(folder, placement)
        transformer.get_parameter("transformer_blocks.2.attn.to_out.0.weight").mul_(3)
        return transformer

    monkeypatch.setattr(model_check, "load_stock_transformer", scaled)
    assert_differs("tiny-qwen-image")


def assert_differs(name: str) -> None:
    family, folder = model(name)
    facts = HardwareFacts("cpu", "", (0, 0), 0, 0, host_available_bytes=100 * GIB)
    stock = compare_with_stock(folder, family, facts, random_inputs(family, folder, 256, 64, CPU), CPU)
    assert stock.error is not None and stock.error > STOCK_BOUND and not stock.passed


def test_what_has_no_room_is_not_compared_and_says_so() -> None:
    family, folder = model("tiny-flux")
    facts = HardwareFacts("cpu", "", (0, 0), 0, 0, host_available_bytes=GIB)
    stock = compare_with_stock(folder, family, facts, random_inputs(family, folder, 64, 7, CPU), CPU)
    assert stock.error is None and stock.passed and "neither GPU nor host" in stock.note


# ---- outliers

VALUE, OUT = "transformer_blocks.2.attn.to_v", "transformer_blocks.2.attn.to_out.0"
UP, DOWN = "transformer_blocks.2.img_mlp.net.0.proj", "transformer_blocks.2.img_mlp.net.2"


FLUX_VALUE, FLUX_OUT = "transformer_blocks.1.attn.to_v", "transformer_blocks.1.attn.to_out.0"
FLUX_UP, FLUX_DOWN = "transformer_blocks.1.ff.net.0.proj", "transformer_blocks.1.ff.net.2"


LARGER_WEIGHTS = [(f"{DOWN}.weight", 1, 1000.0)]


def outliers_in_weights(scale: float, up: str = UP, down: str = DOWN) -> list[tuple[str, int, float]]:
    """Larger weights for what comes in smaller, through a GELU that is a half of so small an input. Larger ones alone
    would make a model whose gradients hang on the last bit of bf16, so on the machine."""
    return [(f"{up}.weight", 0, 1 / scale), (f"{up}.bias", 0, 1 / scale), (f"{down}.weight", 1, scale)]


def outliers_in_activations(scale: float, value: str, out: str) -> list[tuple[str, int, float]]:
    """The function stays what it is: what comes in larger is multiplied by smaller weights."""
    return [(f"{value}.weight", 0, scale), (f"{value}.bias", 0, scale), (f"{out}.weight", 1, 1 / scale)]


@dataclass(frozen=True)
class Plant:
    """Outliers in 0.1% of a layer's input channels."""

    model: str
    layer: str
    scale: float
    fp8_cosine: float
    """Least cosine of the LoRA's gradients in fp8, where no layer is kept plain. Sound models have 0.988."""
    value: str | None = None
    """The layer whose output is enlarged."""
    up: str | None = None
    """Or: that whose output is made smaller, and the layer's weights larger."""

    @property
    def scales(self) -> list[tuple[str, int, float]]:
        if self.value is not None:
            return outliers_in_activations(self.scale, self.value, self.layer)
        assert self.up is not None
        return outliers_in_weights(self.scale, self.up, self.layer)

    def __str__(self) -> str:
        return f"{self.model}-{self.layer}-{self.scale:g}"


PLANTS = [
    Plant("tiny-qwen-image", DOWN, 100, 0.98, up=UP), Plant("tiny-qwen-image", OUT, 1000, 0.985, VALUE),
    Plant("tiny-flux", FLUX_DOWN, 1000, 0.985, up=FLUX_UP), Plant("tiny-flux", FLUX_OUT, 100, 0.96, FLUX_VALUE),
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS, ids=str)
def test_planted_outlier_channels_are_named_and_keeping_their_layer_plain_helps(plant: Plant, tmp_path: Path) -> None:
    folder = changed(plant.model, tmp_path / "model", plant.scales)
    check = check_model(folder, family_of(folder), CPU)
    (int8,) = (quantized for quantized in check.formats if quantized.linear_format == "int8")
    (fp8,) = (quantized for quantized in check.formats if quantized.linear_format == "fp8")
    of_text = plant.layer.replace("to_out.0", "to_add_out")  # gets to_v's output, too
    assert plant.layer in int8.keep_plain and set(int8.keep_plain) <= {plant.layer, of_text}
    assert int8.cosine_kept is not None and int8.cosine_kept > 0.996 and int8.cosine_kept > int8.cosine
    if plant.scale == 1000:
        assert 1 - int8.cosine > 3 * (1 - int8.cosine_kept), "the layer did most of the harm"
    assert fp8.keep_plain == (), "numbers with an exponent hold both the large and the small"
    assert fp8.cosine > plant.fp8_cosine
    assert (fp8.fault is not None) == (fp8.cosine < GRADIENT_BOUND), "what is worse than that is not trained in silence"
    assert f"keep_plain: [{plant.layer}" in check.verdict


def test_a_product_is_blind_to_what_the_channels_show(tmp_path: Path) -> None:
    """The reason for looking at channels: all but one of the layer's inputs are lost, and its product is 5% off."""
    folder = changed("tiny-qwen-image", tmp_path / "model", LARGER_WEIGHTS)
    check = check_model(folder, family_of(folder), CPU)
    (layer,) = (layer for layer in check.layers if layer.path == DOWN and layer.linear_format == "int8")
    assert max(layer.product, layer.gradient) < 0.06 and layer.weight_channel > 0.8
    assert layer.weight_outlier > 90


def test_a_channels_error_is_beside_its_own_size() -> None:
    exact_MK = torch.tensor([[1.0, 100.0, 0.0], [1.0, -100.0, 0.0]])
    assert median_channel_error(exact_MK + 0.5, exact_MK) == pytest.approx(0.005)
    assert median_channel_error(torch.full_like(exact_MK, torch.nan), exact_MK) == float("inf")


SOUND = LayerErrors("blocks.0.to_q", "int8", 0.01, 0.01, 0.01, 0.01, 5, 5)


@pytest.mark.parametrize(
    ("errors", "kept"),
    [
        ({}, False),
        ({"product": 0.09}, False),
        ({"product": 0.11}, True),
        ({"gradient": float("inf")}, True),
        ({"input_channel": 0.19}, False),
        ({"input_channel": 0.21}, True),
        ({"weight_channel": 0.11}, True),
    ],
)
def test_a_layer_is_kept_for_an_error_out_of_bounds_and_out_of_proportion(errors: dict[str, Any], kept: bool) -> None:
    kind = [replace(SOUND, path=f"blocks.{number}.to_q") for number in range(3)]
    odd = replace(SOUND, path="blocks.3.to_q", **errors)
    assert layers_to_keep([*kind, odd]) == (("blocks.3.to_q",) if kept else ())
    all_alike = [replace(layer, **errors) for layer in kind]
    is_hopeless = max(errors.values(), default=0) > 0.3
    assert bool(layers_to_keep(all_alike)) is is_hopeless, "what all of a kind have is its nature, up to a point"


def test_weights_that_are_no_numbers_are_found(tmp_path: Path) -> None:
    folder = changed("tiny-flux", tmp_path / "model", [("single_transformer_blocks.1.proj_out.weight", 1, torch.nan)])
    check = check_model(folder, family_of(folder), CPU)
    assert check.not_finite[0] == "single_transformer_blocks.1" and "Fetch the model again" in check.verdict
    assert json.loads(check.to_json())["ok"] is False


# ---- the command


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> ModelCheck:
    scales = [(f"{DOWN}.weight", 1, 300.0)]  # with 1000, no choice of plain layers helps
    folder = changed("tiny-qwen-image", tmp_path_factory.mktemp("planted") / "model", scales)
    return check_model(folder, family_of(folder), CPU)


def test_the_answer_tells_nothing_that_is_the_users_own(planted: ModelCheck) -> None:
    values = json.loads(planted.to_json())
    assert values["folder_name"] == "model" and values["ok"] is False
    assert {"torch", "diffusers"} <= values["versions"].keys() and values["facts"]["device"] == "cpu"
    texts: list[str] = []

    def collect(value: object) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                collect(name)
                collect(inner)
        elif isinstance(value, list):
            assert len(value) < 200, "so many numbers could be weights"
            for inner in value:
                collect(inner)
        elif isinstance(value, str):
            texts.append(value)

    collect(values)
    assert not [text for text in texts if "/" in text]


def test_the_command_shows_the_worst_layers_and_ends_with_its_verdict(
    planted: ModelCheck, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(model_check, "check_model", lambda folder, family, device: planted)
    arguments = ["doctor", "--model", str(ROOT / "assets" / "tiny-qwen-image"), "--output", str(tmp_path / "c.json")]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 1, outcome.output
    shown = "".join(outcome.output.split())
    assert DOWN in shown and "keep_plain:[" in shown and "0.00%apart" in shown
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads(planted.to_json())
    for_programs = CliRunner().invoke(app, [*arguments, "--json"])
    assert for_programs.exit_code == 1 and json.loads(for_programs.output)["verdict"] == planted.verdict


def test_a_sound_model_ends_the_command_with_zero() -> None:
    outcome = CliRunner().invoke(app, ["doctor", "--model", str(ROOT / "assets" / "tiny-flux")])
    assert outcome.exit_code == 0 and "Sound" in outcome.output, outcome.output


def test_an_output_without_a_model_is_refused() -> None:
    outcome = CliRunner().invoke(app, ["doctor", "--output", "x.json"])
    assert outcome.exit_code == 2 and "--model" in outcome.output
