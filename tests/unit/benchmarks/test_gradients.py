"""benchmarks/gradients.py at the size of a toy: what it compares is the same but for the format, and what it says."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pixtune.bench.flops import StepSize, read_linears
from pixtune.commands.quantization_errors import relative_error
from pixtune.engine import load
from pixtune.engine.quantize import FP8, QuantizedLinear
from pixtune.plan.training import TrainingPlan
from tests.runs import ROOT

CPU = torch.device("cpu")
SIDES = {"num_layers": 4, "num_attention_heads": 1, "attention_head_dim": 128, "joint_attention_dim": 64}
FLUX_SIDES = {**SIDES, "num_layers": 1, "num_single_layers": 2, "pooled_projection_dim": 32, "guidance_embeds": True}
TOYS = {"toy": ("qwen-image", SIDES), "toy-flux": ("flux", FLUX_SIDES)}
SIZE_PIXELS = 64
Result = dict[str, Any]


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with toys beside the full sizes."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    architectures = importlib.import_module("architectures")
    for name, (model, sides) in TOYS.items():
        full = architectures.ARCHITECTURES[model]
        toy = replace(full, transformer=full.transformer | sides, num_text_tokens=8)
        monkeypatch.setitem(architectures.ARCHITECTURES, name, toy)
    return importlib.import_module("gradients")


def passes_of(gradients: ModuleType, model: str) -> Any:
    return gradients.Passes(gradients.prepare(model, SIZE_PIXELS, CPU))


def test_formats_are_told_apart_by_depth(
    gradients: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["gradients.py", "--output", str(tmp_path), "--size", str(SIZE_PIXELS)]
    monkeypatch.setattr("sys.argv", [*words, "toy", "toy-flux,bf16", "toy-flux,fp8"])
    gradients.main()
    printed = capsys.readouterr().out
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert results.keys() == {*(cell.name for cell in gradients.parse_cells(["toy"])), "toy-flux-bf16", "toy-flux-fp8"}
    for name, result in results.items():
        assert {"machine", "versions", "commit", "date", "wall_seconds", "size_pixels"} <= result.keys()
        if name == "toy-products":
            (kind,) = result["kinds"]
            assert all(ms > 0 for ms in (*kind["forward_ms"].values(), *kind["backward_ms"].values()))
            continue
        assert result["relative_to"].keys() == ({"fp32"} if "bf16" in name else {"fp32", "bf16"})
        for found in result["relative_to"].values():
            num_blocks, num_layers = (3, 4 + 3 + 3) if "flux" in name else (4, 4 * 4)
            assert len(found["blocks"]) == num_blocks and len(found["matrices"]) == 2 * num_layers
            assert found["all_gradients"]["cosine"] >= min(row["cosine"] for row in found["blocks"])
            assert 0 < found["velocity_relative_error"] < 0.5

    def error_of(way: str) -> float:
        return float(results[f"toy-{way}"]["relative_to"]["fp32"]["all_gradients"]["relative_error"])

    assert 0 < error_of("bf16") < error_of("int8") < error_of("fp8") < error_of("nf4") < 0.6
    assert 1.05 * error_of("fp8-unfused-mlp") < error_of("fp8-e5m2-gradients")
    assert error_of("fp8-lean") != error_of("fp8-eager")
    assert printed.count("\n") == 2 + (1 + 2 * 8) + 1 + (1 + 2)

    monkeypatch.setattr(gradients, "prepare", lambda *_: pytest.fail("what is there is not measured again"))
    monkeypatch.setattr("sys.argv", [*words, "--table", "toy", "toy-flux,bf16", "toy-flux,fp8"])
    gradients.main()
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("model", TOYS)
def test_the_exact_pass_is_that_of_the_whole_model_in_fp32(gradients: ModuleType, model: str) -> None:
    passes = passes_of(gradients, model)
    module = importlib.import_module("gradient_passes")
    exact = passes.run_exactly()
    plan = gradients.BF16.plan(passes.setting.plan, len(passes.blocks))
    transformer, fingerprint = module.build(passes.setting, plan)
    whole = module.forward_backward(passes.setting, transformer.float(), fingerprint)
    assert exact.velocity_BCHW.dtype == torch.float32
    torch.testing.assert_close(exact.velocity_BCHW, whole.velocity_BCHW, rtol=1e-5, atol=1e-6)
    found = gradients.errors(exact, whole, passes.blocks)
    assert all(pair["relative_error"] < 1e-5 for pair in found["matrices"].values())


def test_blocks_change_their_streams(gradients: ModuleType) -> None:
    """Else errors of early blocks would not reach later ones: with weights as drawn it is a hundredth."""
    passes = passes_of(gradients, "toy")
    module = importlib.import_module("gradient_passes")
    transformer, _ = module.build(passes.setting, passes.setting.plan)
    changes = []

    def see(block: Any, args: Any, kwargs: dict[str, Any], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        before = kwargs["hidden_states"].float()
        changes.append(float((output[1].float() - before).norm() / before.norm()))

    for block in transformer.transformer_blocks:
        block.register_forward_hook(see, with_kwargs=True)
    module.forward_backward(passes.setting, transformer, {})
    assert len(changes) == 4 and all(0.1 < change < 3 for change in changes), changes


def test_other_weights_are_noticed(gradients: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = passes_of(gradients, "toy")
    fp8 = next(way for way in gradients.WAYS if way.name == "fp8")
    exact = passes.run(gradients.BF16)
    gradients.check_weights(passes.run(fp8), exact)
    passes.forget()

    drawn = load.random_tensor
    monkeypatch.setattr(load, "random_tensor", lambda name, *rest: drawn(f"other.{name}", *rest))
    with pytest.raises(ValueError, match="have other weights than in the exact pass"):
        gradients.check_weights(passes.run(fp8), exact)


@pytest.mark.parametrize("model", TOYS)
def test_the_timed_products_are_those_of_a_block(gradients: ModuleType, model: str) -> None:
    """By the counting of operations, which is written independently."""
    setting = gradients.prepare(model, SIZE_PIXELS, CPU)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in setting.family.build_transformer(setting.transformer_config).state_dict().items()
    }
    size = StepSize(1, setting.inputs.num_image_tokens, setting.inputs.num_text_tokens)
    linears = [linear for linear in read_linears(setting.family, shapes, quantized=True) if linear.quantized]
    first_of_kind = {"toy": [0], "toy-flux": [0, 1]}[model]
    found = gradients.block_products(setting)
    for products, number in zip(found.values(), first_of_kind, strict=True):
        expected = sum(size.rows(linear) * linear.num_weights for linear in linears if linear.block == number)
        assert sum(product.rows * product.summed * product.columns for product in products) == expected
        assert all(product.backward.backward == product for product in products)


def test_a_variant_changes_what_it_says_and_nothing_afterwards(
    gradients: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("gradient_passes")
    seen: list[bool] = []
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, use_fast_accum, **kwargs: seen.append(use_fast_accum))
    some = torch.empty(0)
    with module.exact_sums():
        torch._scaled_mm(some, some, some, some, use_fast_accum=True)
    torch._scaled_mm(some, some, some, some, use_fast_accum=True)
    assert seen == [False, True]
    before = module.FrozenProduct.backward
    with module.e5m2_gradients():
        assert module.FrozenProduct.backward is module.e5m2_backward
    assert module.FrozenProduct.backward is before


def test_e5m2_gradients_are_the_same_with_tensor_cores(gradients: ModuleType) -> None:
    module = importlib.import_module("gradient_passes")
    torch.manual_seed(0)
    weight_NK, x_MK, gradient_MN = torch.randn(48, 32), torch.randn(20, 32), torch.randn(20, 48).bfloat16()
    found = {}
    for tensor_cores in (True, False):
        layer = QuantizedLinear(32, 48, FP8, torch.float8_e4m3fn, tensor_cores)
        layer.set_weight(weight_NK)
        for name, around in (("e5m2", module.e5m2_gradients), ("e4m3", module.nullcontext)):
            leaf = x_MK.bfloat16().requires_grad_()
            with around():
                (found[name, tensor_cores],) = torch.autograd.grad(layer.product(leaf), leaf, gradient_MN)
    exact = gradient_MN.float() @ layer.dequantized()
    assert relative_error(found["e5m2", True], found["e5m2", False]) < 0.005
    coarse, fine = (relative_error(found[name, True], exact) for name in ("e5m2", "e4m3"))
    assert 1.7 < coarse / fine < 2.3, "one bit of mantissa less"


def test_a_way_that_is_not_as_planned_recomputes_every_block(gradients: ModuleType) -> None:
    planned: TrainingPlan = replace(passes_of(gradients, "toy").setting.plan, kept_transposes=True, compile=True)
    plans = {way.name: way.plan(planned, 4) for way in gradients.WAYS}
    assert plans["fp8"] == planned and plans["nf4"].compile
    assert not plans["nf4"].kept_transposes and not plans["int8"].kept_transposes
    others = [plan for name, plan in plans.items() if name not in ("fp8", "nf4")]
    assert all(plan.recomputed_blocks == 4 and not plan.compile for plan in others)
    assert [name for name, plan in plans.items() if plan.selective] == ["fp8-lean"]


def test_each_quarter_shows_its_worst(gradients: ModuleType) -> None:
    rows = [
        {"block": str(n), "cosine": 1 - n / 100, "worst_matrix": f"m{n}", "worst_matrix_cosine": 0.5 + n / 100}
        for n in range(10)
    ]
    found = [(row["block"], row["worst_matrix"]) for row in gradients.quarters(rows)]
    assert found == [("1", "m0"), ("4", "m2"), ("6", "m5"), ("9", "m7")]


def test_cells_that_do_not_exist_are_refused(gradients: ModuleType) -> None:
    with pytest.raises(ValueError, match="the model is one of"):
        gradients.parse_cells(["no-model"])
    with pytest.raises(ValueError, match="a cell is one of bf16, fp8"):
        gradients.parse_cells(["flux,fp4"])
