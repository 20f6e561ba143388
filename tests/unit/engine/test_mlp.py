"""MLPs as one function: what they replace and where they must not. The function itself runs on GPUs (tests/gpu)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig
from pixtune.engine import mlp as module
from pixtune.engine.mlp import are_fused, fuse_mlps, mlp
from pixtune.engine.quantize import FP8, INT8, QuantizedLinear
from pixtune.hardware.cards import facts_as
from pixtune.plan.demands import demands_of
from pixtune.plan.footprint import with_fused_mlps
from pixtune.plan.rungs import Rung
from pixtune.plan.situation import situation_of
from pixtune.plan.training import plan_training
from tests.full_size import full_size_footprint


class OnGpu:
    """All that `are_fused` asks of a tensor."""

    dtype = torch.bfloat16


def layer(linear_format: str = FP8, tensor_cores: bool = True) -> QuantizedLinear:
    codes = torch.int8 if linear_format == INT8 else torch.float8_e4m3fn
    made = QuantizedLinear(32, 32, linear_format, codes, tensor_cores)
    made.set_weight(torch.randn(32, 32))
    made.bias = nn.Parameter(torch.zeros(32), requires_grad=False)  # PEFT looks for the device of a parameter
    return made


def with_lora(linear: nn.Module) -> nn.Module:
    holder = nn.Module()
    holder.layer = linear
    inject_adapter_in_model(LoraConfig(target_modules=["layer"]), holder)
    return holder.layer


def test_only_frozen_float8_layers_around_a_tanh_gelu_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_triton", lambda states: isinstance(states, OnGpu))
    tanh, on_gpu = nn.GELU("tanh"), cast(torch.Tensor, OnGpu())
    assert are_fused(on_gpu, layer(), tanh, layer())
    others: list[tuple[nn.Module, nn.GELU, nn.Module]] = [
        (layer(INT8), tanh, layer(INT8)),
        (layer(), tanh, layer(tensor_cores=False)),
        (layer(), nn.GELU(), layer()),
        (with_lora(layer()), tanh, layer()),
        (layer(), tanh, with_lora(layer())),
        (nn.Linear(32, 32), tanh, layer()),
    ]
    assert not any(are_fused(on_gpu, *other) for other in others)
    assert not are_fused(torch.ones(1, dtype=torch.bfloat16), layer(), tanh, layer())


def test_what_is_not_fused_is_computed_by_its_layers() -> None:
    from diffusers.models.attention import FeedForward

    torch.manual_seed(0)
    block: Any = nn.Module()
    block.ff = FeedForward(16, activation_fn="gelu-approximate")
    block.other = FeedForward(16, activation_fn="geglu")
    states = torch.randn(2, 5, 16)
    wanted = block.ff(states), block.other(states)
    fuse_mlps([block])
    assert "forward" in vars(block.ff) and "forward" not in vars(block.other)
    assert block.ff(states).equal(wanted[0]) and block.other(states).equal(wanted[1])

    beside, first, last = torch.randn(2, 5, 3), nn.Linear(16, 8), nn.Linear(11, 4)
    hidden = nn.functional.gelu(first(states), approximate="tanh")
    assert mlp(states, first, nn.GELU("tanh"), last, beside).equal(last(torch.cat([beside, hidden], dim=2)))


def test_a_plan_counts_less_for_fused_mlps_where_the_gpu_and_the_lora_allow_them() -> None:
    config = TrainConfig(
        pretrained_model_name_or_path="model",
        output_dir=Path("out"),
        max_train_steps=1,
        data_config=DataConfig(img_dir=Path("data")),
        quantize=True,
    )
    new, old = facts_as("RTX 4090"), facts_as("RTX 3090")
    footprint = full_size_footprint(config)
    assert footprint.mlps_are_frozen
    assert with_fused_mlps(footprint, new).fused_formats == ("fp8", "nf4")
    assert with_fused_mlps(footprint, old) == footprint
    everywhere = config.model_copy(update={"lora_targets": ("attention_mlp",)})
    assert not full_size_footprint(everywhere).mlps_are_frozen
    assert not full_size_footprint(config.model_copy(update={"keep_plain": ("img_mlp.net.2",)})).mlps_are_frozen
    unfused = replace(footprint, mlps_are_frozen=False)
    rung, demands = Rung("fp8", 128, selective=True, reprojected_blocks=59), demands_of(config)
    assert situation_of(new, footprint, demands).peak(rung) < situation_of(new, unfused, demands).peak(rung)
    without_compiler = [plan_training(new, kind, config, can_compile=False) for kind in (footprint, unfused)]
    assert without_compiler[0] == without_compiler[1], "no compiler, no kernels"
