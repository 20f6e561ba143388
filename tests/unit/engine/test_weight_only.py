"""Encoders in 8 and 4 bits: how near their features are, and what they weigh."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from pixtune.engine import weight_only
from pixtune.engine.quantize import QuantizedLinear, quantize_rows
from pixtune.engine.weight_only import WeightOnlyLinear, quantize_encoder
from pixtune.families import family_of
from pixtune.family import Placement, Prompt, TextEncoder
from pixtune.storage.model_folder import open_model_folder
from tests.runs import ROOT

CPU = torch.device("cpu")
MODELS = ("tiny-qwen-image", "tiny-qwen-image-edit", "tiny-flux")


def stored(plain: nn.Linear, linear_format: str) -> WeightOnlyLinear:
    layer = WeightOnlyLinear(plain.in_features, plain.out_features, linear_format, CPU, plain.weight.dtype)
    layer.store(plain.weight)
    layer.bias = plain.bias
    return layer


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


# ---- one layer


@pytest.mark.parametrize(("linear_format", "bound"), [("int8", 0.01), ("nf4", 0.07)])
@torch.no_grad()
def test_outliers_of_the_input_cost_nothing(linear_format: str, bound: float) -> None:
    """Codes of the input would have one scale for features that differ by a factor of 1000."""
    torch.manual_seed(0)
    plain, x = nn.Linear(192, 128), torch.randn(3, 5, 192)
    layer = stored(plain, linear_format)
    assert 0 < error(layer(x), plain(x)) < bound
    x[..., 7] *= 1000
    plain.weight[:, 7] = 0
    assert error(stored(plain, linear_format)(x), plain(x)) < bound
    codes_of_both = QuantizedLinear(192, 128, linear_format, torch.int8, tensor_cores=False)
    codes_of_both.set_weight(plain.weight)
    codes_of_both.bias = plain.bias
    assert error(codes_of_both(x), plain(x)) > 0.5


@pytest.mark.parametrize("linear_format", weight_only.FORMATS)
@torch.no_grad()
def test_pieces_of_a_layer_give_the_whole(linear_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(128, 100), torch.randn(4, 128)
    whole = stored(plain, linear_format)
    monkeypatch.setattr(weight_only, "PIECE_WEIGHTS", 7 * 128)
    pieces = stored(plain, linear_format)
    assert all(map(torch.equal, pieces.buffers(), whole.buffers()))
    torch.testing.assert_close(pieces(x), nn.functional.linear(x, whole.dequantized(0, 100, x.dtype), plain.bias))


def test_a_side_that_four_bits_cannot_pack_gets_eight() -> None:
    assert WeightOnlyLinear(3420, 8, "nf4", CPU, torch.bfloat16).linear_format == "int8"


def test_its_weight_tells_a_format_and_computes_nothing() -> None:
    """Models cast hidden states to the dtype of a layer's weight: codes there would turn them into small integers."""
    layer = stored(nn.Linear(64, 8).bfloat16(), "int8")
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.shape == (8, 64)
    assert layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.randn(2, 64).bfloat16().add(layer.weight.sum()).item()


# ---- whole encoders


def prompts(controls: bool) -> list[Prompt]:
    pictures = (Image.linear_gradient("L").resize((64, 64)).convert("RGB"),) if controls else ()
    return [Prompt(text, pictures) for text in ("a red apple on a table", "cat")]


def load(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[TextEncoder, Path]:
    folder = open_model_folder(str(ROOT / "assets" / name))
    return family_of(folder).load_text_encoder(folder, Placement(CPU, dtype)), folder.path


def features(name: str, encoder: TextEncoder) -> list[dict[str, Tensor]]:
    family = family_of(open_model_folder(str(ROOT / "assets" / name)))
    return family.encode_text(encoder, prompts(family.controls_in_text))


def num_bytes(models: tuple[nn.Module, ...]) -> int:
    return sum(t.nbytes for model in models for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("linear_format", "least_cosine"), [("int8", 0.999), ("nf4", 0.95)])
def test_features_point_where_the_plain_encoders_do(name: str, linear_format: str, least_cosine: float) -> None:
    """Cosine of the worst token, as measured: 0.9997 and 0.9557 (the edit model), 0.99998 and 0.9986 (the others)."""
    encoder, _ = load(name)
    plain = features(name, encoder)
    for model in encoder.models:
        quantize_encoder(model, linear_format, CPU)
    for ours, theirs in zip(features(name, encoder), plain, strict=True):
        for key, exact in theirs.items():
            assert ours[key].dtype == torch.bfloat16
            cosine = nn.functional.cosine_similarity(ours[key].float(), exact.float(), dim=-1)
            assert cosine.min() > least_cosine and not torch.equal(ours[key], exact)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("linear_format", weight_only.FORMATS)
def test_it_weighs_its_codes_and_what_stays(name: str, linear_format: str) -> None:
    encoder, _ = load(name)
    before = num_bytes(encoder.models)
    linears = [
        m for model in encoder.models for p, m in model.named_modules()
        if type(m) is nn.Linear and not p.endswith("lm_head")
    ]  # fmt: skip
    saved = 0.0
    for linear in linears:
        eight = linear_format == "int8" or linear.in_features % 16
        per_row = linear.in_features * (1 if eight else 1 / 2 + 1 / 16) + 4
        saved += linear.weight.nbytes - linear.out_features * per_row
    for model in encoder.models:
        quantize_encoder(model, linear_format, CPU)
    assert num_bytes(encoder.models) == before - saved
    plain = [m for model in encoder.models for m in model.modules() if isinstance(m, nn.Embedding)]
    assert plain and all(m.weight.dtype == torch.bfloat16 for m in plain)


def test_an_output_layer_tied_to_the_embedding_stays_tied() -> None:
    _, path = load("tiny-qwen-image")
    model = AutoModelForImageTextToText.from_pretrained(path / "text_encoder", dtype=torch.bfloat16)
    quantize_encoder(model, "int8", CPU)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_device_never_holds_a_whole_layer_beside_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights go to the device in full precision piece by piece."""
    monkeypatch.setattr(weight_only, "PIECE_WEIGHTS", 1 << 10)
    sent: list[int] = []

    def watched(values: Tensor, codes: torch.dtype) -> tuple[Tensor, Tensor]:
        sent.append(values.numel())
        return quantize_rows(values, codes)

    monkeypatch.setattr(weight_only, "quantize_rows", watched)
    encoder, _ = load("tiny-flux")
    model = copy.deepcopy(encoder.models[1])
    total = sum(m.weight.numel() for m in model.modules() if type(m) is nn.Linear)
    quantize_encoder(model, "int8", CPU)
    assert sum(sent) == total and max(sent) <= 1 << 10
