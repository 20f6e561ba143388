"""Footprints, from headers: against counts by hand, models that are loaded and LoRAs that are attached."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig
from pixtune.engine.load import Layout, load_transformer
from pixtune.families import FAMILIES, family_of
from pixtune.family import Placement
from pixtune.plan.footprint import Footprint, read_footprint
from pixtune.plan.rungs import Rung, weight_bytes
from pixtune.planning import footprint_of
from pixtune.storage.model_folder import ModelFolder, weight_files
from pixtune.trained.adapters import attach_lora
from tests.full_size import build_full_size_folder, full_size_footprint, full_size_shapes
from tests.runs import ROOT
from tests.shallow import shallow_model

CONFIG = TrainConfig(
    pretrained_model_name_or_path="m",
    output_dir=Path("o"),
    max_train_steps=1,
    data_config=DataConfig(img_dir=Path("d")),
)
TINY = ("tiny-qwen-image", "tiny-qwen-image-edit", "tiny-flux")
H = 3072
ATTENTION_AND_MLP = 8 * H * H + 4 * H * 4 * H
"""Weights of both streams: q, k, v and output; two linears from and to four times the width."""


@pytest.mark.parametrize(
    ("family", "total", "kinds"),
    [
        ("qwen_image", 20_430_401_088, {"transformer_blocks": (60, ATTENTION_AND_MLP, 2 * 6 * H)}),
        (
            "flux",
            11_901_408_320,
            {
                "transformer_blocks": (19, ATTENTION_AND_MLP, 2 * 6 * H),
                # q, k, v, into the MLP, and one output for attention and MLP together
                "single_transformer_blocks": (38, 3 * H * H + 4 * H * H + 5 * H * H, 3 * H),
            },
        ),
    ],
)
def test_full_size_models_are_counted_as_by_hand(
    family: str, total: int, kinds: dict[str, tuple[int, int, int]]
) -> None:
    footprint = full_size_footprint(CONFIG, family)
    assert footprint.num_weights == total
    found = {kind.path: (kind.count, kind.linear_weights, kind.modulation_outputs) for kind in footprint.kinds}
    assert found == kinds
    assert all(kind.modulation_weights == kind.modulation_outputs * (H + 1) for kind in footprint.kinds)


@pytest.mark.parametrize("family", ["qwen_image", "flux"])
def test_headers_alone_tell_what_the_architecture_does(family: str, tmp_path: Path) -> None:
    """A folder of full size without data: the files' headers are all there is to read."""
    folder = ModelFolder(build_full_size_folder(tmp_path, family))
    of_headers = footprint_of(CONFIG, FAMILIES[family], folder, 4096 + (256 if family == "qwen_image" else 512))
    assert of_headers == full_size_footprint(CONFIG, family)
    config = CONFIG.model_copy(update={"random_weights": True})
    assert footprint_of(config, FAMILIES[family], folder, of_headers.num_tokens) == of_headers


@pytest.mark.parametrize("name", TINY)
def test_a_small_model_is_counted_as_its_file_holds_it(name: str) -> None:
    path = ROOT / "assets" / name
    folder = ModelFolder(path)
    count = 0
    for file in weight_files(path / "transformer"):
        with safe_open(file, framework="pt") as tensors:
            count += sum(tensors.get_tensor(each).numel() for each in tensors.keys())  # noqa: SIM118
    assert footprint_of(CONFIG, family_of(folder), folder, 64).num_weights == count


@pytest.mark.parametrize("rows", [0, 8])
@pytest.mark.parametrize(
    ("weights_format", "compute_format"),
    [("bf16", "bf16"), ("int8", "bf16"), ("fp8", "bf16"), ("nf4", "bf16"), ("fp32", "fp32"), ("int8", "fp32"),
     ("nf4", "fp32")],
)  # fmt: skip
@pytest.mark.parametrize("name", TINY)
def test_weights_take_as_many_bytes_as_a_loaded_model_holds(
    name: str, weights_format: str, compute_format: str, rows: int
) -> None:
    folder = ModelFolder(shallow_model(name))
    family = family_of(folder)
    layout = Layout(None if weights_format == compute_format else weights_format, rows)
    placement = Placement(torch.device("cpu"), torch.bfloat16 if compute_format == "bf16" else torch.float32)
    model = load_transformer(family, folder, placement, layout).module
    footprint = footprint_of(CONFIG, family, folder, 64)
    rung = Rung(weights_format, rows)
    assert weight_bytes(rung, footprint, compute_format) == stored_bytes(model, footprint_names(folder))


def footprint_names(folder: ModelFolder) -> set[str]:
    """Names of what files hold: buffers that a model makes for itself are no weights."""
    names: set[str] = set()
    for file in weight_files(folder.path / "transformer"):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names


def stored_bytes(model: nn.Module, names: set[str]) -> int:
    """Counts the bytes of weights with their scales."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return sum(t.nbytes for name, t in tensors.items() if name in names or name.endswith("scale"))


@pytest.mark.parametrize("targets", [None, ("attention_mlp",), ("all_linear",), ("transformer_blocks.1.*",)])
@pytest.mark.parametrize("name", TINY)
def test_a_lora_has_as_many_weights_as_peft_attaches(name: str, targets: tuple[str, ...] | None) -> None:
    folder = ModelFolder(shallow_model(name))
    family = family_of(folder)
    config = CONFIG.model_copy(update={"lora_targets": targets, "rank": 3})
    footprint = footprint_of(config, family, folder, 64)
    model = load_transformer(family, folder, Placement(torch.device("cpu"), torch.float32)).module
    attached = attach_lora(model, targets or family.lora_targets, 3, 3.0, 0, family.lora_presets)
    assert footprint.trained_weights == attached.num_parameters
    on_modulation = any(path.endswith(family.modulation_layers) for path in attached.modules)
    assert footprint.trains_modulation is on_modulation


def test_a_lora_on_the_mlp_keeps_its_inputs_too() -> None:
    plain = full_size_footprint(CONFIG)
    more = full_size_footprint(CONFIG.model_copy(update={"lora_targets": ("attention_mlp",)}))
    every = full_size_footprint(CONFIG.model_copy(update={"lora_targets": ("all_linear",)}))
    assert (plain.extra_units, more.extra_units) == (0, 5)  # 1 + 4 widths of image tokens, as many of text tokens
    assert every.extra_units == 5 + 1.5, "a modulation layer's input is one row, and its gates multiply what is kept"
    assert [each.selective_extra_units for each in (plain, more, every)] == [0, 2, 3]


def test_a_lora_keeps_the_outputs_of_its_down_projections() -> None:
    """Of four layers in each block, two bytes for each token and rank; counted beside 13.4 units of the rest."""
    found = [full_size_footprint(CONFIG.model_copy(update={"rank": rank})).rank_units for rank in (4, 16, 64, 256)]
    assert found == [0, 0, 4 * (64 - 16) / H, 4 * (256 - 16) / H]
    more = full_size_footprint(CONFIG.model_copy(update={"rank": 256, "lora_targets": ("attention_mlp",)}))
    assert more.rank_units == (6 * 256 - 4 * 16) / H, "text tokens pass others, but no more of them"
    flux = full_size_footprint(CONFIG.model_copy(update={"rank": 256}), "flux")
    assert flux.rank_units == pytest.approx(((19 * 4 + 38 * 3) / 57 * 256 - 4 * 16) / H)


def test_all_weights_are_trained_weights() -> None:
    footprint = full_size_footprint(CONFIG.model_copy(update={"method": "full"}))
    assert footprint.trains_all and footprint.trained_weights == footprint.num_weights


def test_a_unit_is_a_bf16_tensor_of_all_tokens() -> None:
    footprint = full_size_footprint(CONFIG.model_copy(update={"train_batch_size": 3}))
    assert footprint.unit_bytes == torch.empty(3, 4352, 3072, dtype=torch.bfloat16).nbytes


def test_weights_outside_of_blocks_are_what_is_left() -> None:
    shapes = full_size_shapes("qwen_image")
    footprint: Footprint = read_footprint(FAMILIES["qwen_image"], shapes, H, 64)
    outside = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("transformer_blocks."))
    assert footprint.outside_weights == outside and footprint.trained_weights == 0
