"""The LoRA trains, the base does not, and it computes base + alpha / rank * up(down(x))."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixtune.engine.load import load_transformer
from pixtune.errors import ConfigError
from pixtune.families import FAMILIES
from pixtune.family import Placement
from pixtune.storage.model_folder import ModelFolder
from pixtune.trained.adapters import attach_lora, load_lora_weights, lora_weights, trainable_parameters
from pixtune.trained.targets import resolve_targets
from tests.gradients import gradient_of

FAMILY = FAMILIES["qwen_image"]
TARGETS = ("to_q", "to_out.0")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(repo_root: Path) -> ModelFolder:
    return ModelFolder(repo_root / "assets" / "tiny-qwen-image")


@pytest.fixture(scope="module")
def fresh(folder: ModelFolder) -> Callable[..., nn.Module]:
    """A new transformer without a LoRA."""
    bases: dict[torch.dtype, nn.Module] = {}

    def make(dtype: torch.dtype = torch.float32) -> nn.Module:
        if dtype not in bases:
            bases[dtype] = load_transformer(FAMILY, folder, Placement(CPU, dtype)).module
        return copy.deepcopy(bases[dtype])

    return make


def velocity(transformer: nn.Module, folder: ModelFolder) -> Tensor:
    noisy_BCHW = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    text = FAMILY.stack_conditioning([FAMILY.random_text(folder, 5, seed=0)])
    return FAMILY.predict_velocity(transformer, noisy_BCHW, torch.tensor([0.4]), text)


def test_exactly_the_targets_get_a_lora_and_only_the_lora_trains(fresh: Callable[..., nn.Module]) -> None:
    transformer = fresh()
    expected = {
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and (name.endswith(".to_q") or name.endswith(".to_out.0"))
    }
    base_names = {name for name, _ in transformer.named_parameters()}
    attached = attach_lora(transformer, TARGETS, rank=4, alpha=4, generator_seed=0)
    assert set(attached.modules) == expected and len(expected) == 10
    trained = trainable_parameters(transformer)
    wanted = {f"{module}.lora_{matrix}.default.weight" for module in expected for matrix in "AB"}
    assert trained.keys() == wanted
    assert attached.num_parameters == sum(p.numel() for p in trained.values()) == 10 * (256 * 4 + 4 * 256)
    frozen = {n.replace(".base_layer", "") for n, p in transformer.named_parameters() if not p.requires_grad}
    assert frozen == base_names


def test_gradients_reach_every_part_of_the_lora_and_nothing_of_the_base(
    fresh: Callable[..., nn.Module], folder: ModelFolder
) -> None:
    transformer = fresh()
    attach_lora(transformer, FAMILY.lora_targets, rank=2, alpha=2, generator_seed=0)
    with torch.no_grad():
        for tensor in lora_weights(transformer).values():
            tensor.normal_(0, 0.1)
    velocity(transformer, folder).square().mean().backward()
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_a_new_lora_changes_nothing(fresh: Callable[..., nn.Module], folder: ModelFolder) -> None:
    transformer = fresh()
    with torch.no_grad():
        before = velocity(transformer, folder)
        attach_lora(transformer, TARGETS, rank=4, alpha=8, generator_seed=0)
        assert torch.equal(velocity(transformer, folder), before)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 10.0), (4, 4.0), (8, 1.5)])
def test_the_scale_is_alpha_over_rank(fresh: Callable[..., nn.Module], rank: int, alpha: float) -> None:
    transformer = fresh()
    attach_lora(transformer, ["transformer_blocks.1.attn.to_q"], rank, alpha, generator_seed=0)
    layer: Any = transformer.get_submodule("transformer_blocks.1.attn.to_q")
    weights = lora_weights(transformer)
    down = weights["transformer_blocks.1.attn.to_q.lora_A.weight"]
    up = weights["transformer_blocks.1.attn.to_q.lora_B.weight"]
    with torch.no_grad():
        up.normal_()
        inputs = torch.randn(3, 256)
        expected = layer.base_layer(inputs) + alpha / rank * (inputs @ down.T @ up.T)
        torch.testing.assert_close(layer(inputs), expected, rtol=1e-4, atol=1e-4)


def test_down_starts_gaussian_with_deviation_one_over_rank_and_up_zero(fresh: Callable[..., nn.Module]) -> None:
    transformer = fresh()
    attach_lora(transformer, TARGETS, rank=8, alpha=8, generator_seed=0)
    weights = lora_weights(transformer)
    downs = torch.cat([w.flatten() for name, w in weights.items() if name.endswith("lora_A.weight")])
    assert abs(downs.mean()) < 0.005 and downs.std().item() == pytest.approx(1 / 8, rel=0.03)
    assert all((w == 0).all() for name, w in weights.items() if name.endswith("lora_B.weight"))


def test_lora_is_fp32_over_a_bf16_base_which_stays_bf16(fresh: Callable[..., nn.Module], folder: ModelFolder) -> None:
    transformer = fresh(torch.bfloat16)
    attach_lora(transformer, FAMILY.lora_targets, rank=4, alpha=4, generator_seed=0)
    assert {p.dtype for p in transformer.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in transformer.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert transformer.dtype == torch.bfloat16, "inputs are cast to this"
    velocity(transformer, folder).float().square().mean().backward()
    assert {p.grad.dtype for p in trainable_parameters(transformer).values() if p.grad is not None} == {torch.float32}


def test_no_fp32_copy_of_a_bf16_input_is_kept_for_the_backward_pass(fresh: Callable[..., nn.Module]) -> None:
    """PEFT's own cast keeps one a layer: 10 GiB of a full-size step."""
    transformer = fresh(torch.bfloat16)
    attach_lora(transformer, TARGETS, rank=4, alpha=8, generator_seed=0)
    layer = transformer.get_submodule("transformer_blocks.0.attn.to_q")
    inputs = torch.randn(7, 256).bfloat16().requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        outputs = layer(inputs)
    assert outputs.dtype == torch.bfloat16
    sizes = {(tensor.dtype, tuple(tensor.shape)) for tensor in kept if tensor.shape[0] == 7}
    assert sizes and not any(dtype == torch.float32 for dtype, _ in sizes), sizes


def test_gradients_over_a_bf16_base_are_those_of_fp32_within_rounding(fresh: Callable[..., nn.Module]) -> None:
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        transformer = fresh(dtype)
        attach_lora(transformer, TARGETS, rank=4, alpha=8, generator_seed=0)
        layer = transformer.get_submodule("transformer_blocks.0.attn.to_q")
        weights = trainable_parameters(layer)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            weights["lora_B.default.weight"].copy_(torch.randn(256, 4, generator=generator) * 0.1)
        inputs, towards = (torch.randn(64, 256, generator=generator).to(dtype) for _ in range(2))
        (layer(inputs) * towards).float().sum().backward()
        grads.append({name: gradient_of(parameter) for name, parameter in weights.items()})
    for name, expected in grads[1].items():
        error = (grads[0][name] - expected).norm() / expected.norm()
        assert 0 < error < 0.01, f"{name}: {error}"


def test_the_seed_decides_the_start_and_the_global_generator_is_left_alone(fresh: Callable[..., nn.Module]) -> None:
    starts = []
    for global_seed, seed in ((1, 7), (2, 7), (1, 8)):
        transformer = fresh()
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        attach_lora(transformer, TARGETS, rank=4, alpha=4, generator_seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        starts.append(lora_weights(transformer))
    name = "transformer_blocks.0.attn.to_q.lora_A.weight"
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])
    assert not torch.equal(starts[0][name], starts[2][name])


def test_names_are_in_a_stable_order(fresh: Callable[..., nn.Module]) -> None:
    """Gradients of several processes are exchanged in this order."""
    names = []
    for targets in (TARGETS, TARGETS[::-1]):
        transformer = fresh()
        attach_lora(transformer, targets, rank=2, alpha=2, generator_seed=0)
        names.append(list(trainable_parameters(transformer)))
    assert names[0] == names[1]


def test_a_target_that_matches_nothing_is_named_with_what_there_is(fresh: Callable[..., nn.Module]) -> None:
    transformer = fresh()
    with pytest.raises(ConfigError) as caught:
        attach_lora(transformer, ("to_q", "q_proj", "o_q"), rank=4, alpha=4, generator_seed=0)
    faults = caught.value.faults
    assert [fault.split()[0] for fault in faults] == ["'q_proj'", "'o_q'"], "an ending is whole words"
    candidates = faults[0].split("Layers end with: ")[1].rstrip(".").split(", ")
    assert {"attn.to_q", "attn.to_out.0", "img_mod.1", "img_mlp.net.0.proj", "proj_out"} <= set(candidates)
    assert not any(p.requires_grad for p in transformer.parameters()), "nothing is half attached"
    attach_lora(transformer, candidates, rank=1, alpha=1, generator_seed=0)  # each of them is a target


LINEARS = ("blocks.0.attn.to_q", "blocks.0.mlp.2", "blocks.1.attn.to_q", "blocks.1.mlp.2", "proj_out")
PRESETS = {"attention": ("to_q",), "late": ("blocks.1.*", "proj_out")}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["attention"], ["to_q"]),
        (["late"], ["blocks.1.attn.to_q", "blocks.1.mlp.2", "proj_out"]),
        (["blocks.*.mlp.2"], ["blocks.0.mlp.2", "blocks.1.mlp.2"]),
        (["blocks.[0].*", "attention"], ["blocks.0.attn.to_q", "blocks.0.mlp.2", "to_q"]),
        (["mlp.2", "mlp.2"], ["mlp.2"]),
    ],
)
def test_targets_are_presets_patterns_or_endings(targets: list[str], expected: list[str]) -> None:
    assert list(resolve_targets(LINEARS, targets, PRESETS)) == expected


@pytest.mark.parametrize("target", ["blocks.*.mlp", "o_q", "attentoin", "*.to_k"])
def test_a_pattern_that_matches_nothing_is_named_with_the_presets(target: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_targets(LINEARS, ["attention", target], PRESETS)
    (fault,) = caught.value.faults
    assert fault.startswith(repr(target)) and "Presets: attention, late." in fault


@pytest.mark.parametrize("preset", FAMILY.lora_presets)
def test_presets_attach_to_more_and_more(fresh: Callable[..., nn.Module], preset: str) -> None:
    transformer = fresh()
    linears = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    attached = attach_lora(transformer, [preset], 1, 1, generator_seed=0, presets=FAMILY.lora_presets)
    in_blocks = {name for name in linears if name.startswith("transformer_blocks.")}
    num_blocks = len(list(transformer.get_submodule("transformer_blocks").children()))
    layers_per_block = {"attention": 4, "attention_mlp": 12, "all_linear": len(in_blocks) // num_blocks}[preset]
    assert set(attached.modules) <= in_blocks and len(attached.modules) == layers_per_block * num_blocks


def test_weights_come_back_from_where_they_went(fresh: Callable[..., nn.Module]) -> None:
    one, other = fresh(), fresh()
    for seed, transformer in enumerate((one, other)):
        attach_lora(transformer, TARGETS, rank=4, alpha=4, generator_seed=seed)
    weights = lora_weights(one)
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in weights)
    assert not any(tensor.requires_grad for tensor in weights.values())
    with torch.no_grad():
        for tensor in weights.values():
            tensor.normal_()
    saved = {name: tensor.clone() for name, tensor in weights.items()}
    load_lora_weights(other, saved)
    assert all(torch.equal(lora_weights(other)[name], saved[name]) for name in saved)
    assert all(parameter.requires_grad for parameter in trainable_parameters(other).values())


def test_weights_of_other_layers_are_refused(fresh: Callable[..., nn.Module]) -> None:
    transformer = fresh()
    attach_lora(transformer, TARGETS, rank=4, alpha=4, generator_seed=0)
    weights = {name: tensor.clone() + 1 for name, tensor in lora_weights(transformer).items()}
    before = {name: tensor.clone() for name, tensor in lora_weights(transformer).items()}
    name = next(iter(weights))
    missing = {key: tensor for key, tensor in weights.items() if key != name}
    for wrong in (missing, {**weights, "transformer_blocks.0.attn.to_v.lora_A.weight": torch.zeros(4, 256)}):
        with pytest.raises(KeyError, match="LoRA layers differ"):
            load_lora_weights(transformer, wrong)
    assert all(torch.equal(lora_weights(transformer)[key], before[key]) for key in before)
