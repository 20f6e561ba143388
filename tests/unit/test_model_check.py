"""`pixtune doctor --model`: sound models pass, and what is planted in others is found and named."""

from __future__ import annotations

import pytest
import torch

from pixtune.config.load import load_config
from pixtune.errors import ConfigError
from pixtune.families.base import Placement
from pixtune.fit.apply import layout_of
from pixtune.fit.load import load_transformer
from pixtune.fit.plan import MemoryPlan, plan_memory
from pixtune.fit.quantize import QuantizedLinear
from pixtune.hardware.facts import GIB, HardwareFacts
from pixtune.planning import footprint_of
from tests.unit.fit.test_load import model

CPU = torch.device("cpu")
AMPERE = HardwareFacts("cuda", "an Ampere GPU", (8, 6), 24 * GIB, 23 * GIB)


# ---- the config key


def plan_with(keep_plain: str, *more: str) -> MemoryPlan:
    family, folder = model("tiny-qwen-image")
    words = [
        f"pretrained_model_name_or_path={folder.path}", "output_dir=out", f"data_config.img_dir={folder.path}",
        "max_train_steps=1", "quantize=true", f"keep_plain={keep_plain}",
    ]  # fmt: skip
    config = load_config(None, [*words, *more])
    return plan_memory(AMPERE, footprint_of(config, family, folder, 64), config)


def test_layers_that_are_kept_plain_are_not_quantised() -> None:
    family, folder = model("tiny-qwen-image")
    plan = plan_with("[to_q, transformer_blocks.1.img_mlp.*]")
    layout = layout_of(plan, family.block_shape(folder)[0])
    transformer = load_transformer(family, folder, Placement(CPU, torch.bfloat16), layout)
    linears = {name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {n for n, m in transformer.named_modules() if isinstance(m, QuantizedLinear)}
    kept = {n for n in linears if n.endswith(".to_q") or n.startswith("transformer_blocks.1.img_mlp.")}
    assert len(kept) == 5 + 2 and set(plan.plain_layers) == kept
    assert quantized.isdisjoint(kept) and "transformer_blocks.0.attn.to_k" in quantized
    everything = load_transformer(family, folder, Placement(CPU, torch.bfloat16), layout_of(plan_with("[]"), 5))
    assert {n for n, m in everything.named_modules() if isinstance(m, QuantizedLinear)} == quantized | kept
    assert any("7 linear layers are not quantised" in reason for reason in plan.reasons)
    assert MemoryPlan.from_dict(plan.to_dict()) == plan


def test_layers_that_are_kept_plain_are_counted() -> None:
    family, folder = model("tiny-qwen-image")
    transformer = load_transformer(family, folder, Placement(CPU, torch.bfloat16))
    weights = sum(m.weight.numel() for n, m in transformer.named_modules() if n.endswith(".to_q"))  # type: ignore[union-attr, operator]
    more = plan_with("[to_q]").expected_peak_bytes - plan_with("[]").expected_peak_bytes
    assert more == weights, "one byte a weight more than in 8 bits"


def test_a_pattern_that_matches_nothing_is_an_error_of_the_key() -> None:
    with pytest.raises(ConfigError, match=r"keep_plain names layers.*\n.*'to_x' matches no linear layer"):
        plan_with("[to_x]")


def test_nothing_is_kept_plain_where_all_weights_are_trained() -> None:
    with pytest.raises(ConfigError, match="keep_plain given and method is full"):
        plan_with("[to_q]", "method=full")
