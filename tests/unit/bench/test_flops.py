"""Operations of a step: against what torch counts on the small models, and at full size against figures by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pixtune.bench.flops import BlockLinear, StepFlops, StepSize, read_linears, step_flops
from pixtune.families import FAMILIES
from tests.full_size import WIDTH, full_size_shapes

ASSETS = Path(__file__).resolve().parents[3] / "assets"
MODELS = {"qwen_image": "tiny-qwen-image", "flux": "tiny-flux"}
DEPTHS = {"qwen_image": ("num_layers",), "flux": ("num_layers", "num_single_layers")}
RANK = 4
LATENT_SIDE, SIZE = 32, StepSize(num_examples=2, num_image_tokens=256, num_text_tokens=40)
TERA = 10**12


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def small_config(family_name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((ASSETS / MODELS[family_name] / "transformer" / "config.json").read_text())
    return config


def few_blocks(family_name: str) -> dict[str, Any]:
    """Of differences no more are needed."""
    return small_config(family_name) | dict.fromkeys(DEPTHS[family_name], 2)


def attention_layers(family_name: str, names: Sequence[str]) -> list[str]:
    """The default targets of a LoRA."""
    return [name for name in names if name.endswith(FAMILIES[family_name].lora_targets)]


def count(family_name: str, config: dict[str, Any], trains_all: bool = False, recompute: bool = False) -> int:
    """What torch counts in a step of the stock model with PEFT's LoRA, attention spelled out as products."""
    family = FAMILIES[family_name]
    model: Any = getattr(diffusers, config["_class_name"]).from_config(config)
    if not trains_all:
        model.requires_grad_(False)
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        model.add_adapter(LoraConfig(r=RANK, target_modules=attention_layers(family_name, linears)))
    if recompute:
        model.train()
        model.enable_gradient_checkpointing()
    batch = SIZE.num_examples
    latents_BCHW = torch.randn(batch, config["in_channels"] // 4, LATENT_SIDE, LATENT_SIDE)
    text = {"prompt_embeds": torch.randn(batch, SIZE.num_text_tokens, config["joint_attention_dim"])}
    if "pooled_projection_dim" in config:
        text["pooled_embeds"] = torch.randn(batch, config["pooled_projection_dim"])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        family.predict_velocity(model, latents_BCHW, torch.full((batch,), 0.5), text).square().mean().backward()
    return counter.get_total_flops()


def compute(family_name: str, config: dict[str, Any], trains_all: bool = False, recompute: bool = False) -> StepFlops:
    """The same by the function, from shapes."""
    family = FAMILIES[family_name]
    shapes = {name: tuple(t.shape) for name, t in family.build_transformer(config).state_dict().items()}
    targets = attention_layers(family_name, [name.removesuffix(".weight") for name in shapes])
    linears = read_linears(family, shapes, () if trains_all else targets, RANK)
    num_blocks = sum(config[depth] for depth in DEPTHS[family_name])
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return step_flops(linears, SIZE, width, num_blocks * recompute, trains_all)


@pytest.mark.parametrize("family_name", MODELS)
@pytest.mark.parametrize("trains_all", [False, True], ids=["lora", "all weights"])
def test_the_models_operations_are_those_that_torch_counts(family_name: str, trains_all: bool) -> None:
    config = small_config(family_name)
    counted = count(family_name, config, trains_all)
    assert compute(family_name, config, trains_all).model == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(("family_name", "depth"), [(name, depth) for name in MODELS for depth in DEPTHS[name]])
@pytest.mark.parametrize("trains_all", [False, True], ids=["lora", "all weights"])
def test_one_more_block_costs_to_the_operation_what_torch_counts(
    family_name: str, depth: str, trains_all: bool
) -> None:
    config = few_blocks(family_name)
    deeper = config | {depth: config[depth] + 1}
    counted = count(family_name, deeper, trains_all) - count(family_name, config, trains_all)
    added = compute(family_name, deeper, trains_all).model - compute(family_name, config, trains_all).model
    assert added == counted


@pytest.mark.parametrize("family_name", MODELS)
def test_recomputed_blocks_are_counted_twice(family_name: str) -> None:
    config = few_blocks(family_name)
    counted = count(family_name, config, recompute=True) - count(family_name, config)
    flops, kept = compute(family_name, config, recompute=True), compute(family_name, config)
    assert flops.model == kept.model
    # Attention spelled out keeps its scores; a fused one computes them again in either case.
    assert flops.hardware - kept.hardware == counted


def test_a_fused_attention_costs_what_torch_says() -> None:
    heads, features, tokens = 24, WIDTH // 24, 4352
    shape = (1, heads, tokens, features)
    forward, backward = sdpa_flop_count(shape, shape, shape), sdpa_backward_flop_count(shape, shape, shape, shape)
    flops = step_flops([linear(image=True)], StepSize(1, 4096, 256), WIDTH, recomputed_blocks=0, trains_all=False)
    assert flops.attention + flops.attention_again == forward + backward
    recomputed = step_flops([linear(image=True)], StepSize(1, 4096, 256), WIDTH, recomputed_blocks=1, trains_all=False)
    assert recomputed.attention + recomputed.attention_again == 2 * forward + backward


def linear(image: bool = False, text: bool = False) -> BlockLinear:
    return BlockLinear(
        0, 10, 0, image, text, quantized=False, begins_attention=False, reads_untrained=False, leads_nowhere=False
    )


# ---- full size


def full_size(family_name: str, num_text_tokens: int, recomputed_blocks: int = 0, **changes: Any) -> StepFlops:
    shapes = full_size_shapes(family_name)
    targets = attention_layers(family_name, [name.removesuffix(".weight") for name in shapes])
    linears = read_linears(FAMILIES[family_name], shapes, targets, rank=16, **changes)
    return step_flops(linears, StepSize(1, 4096, num_text_tokens), WIDTH, recomputed_blocks, trains_all=False)


def test_queries_keys_and_values_made_twice_are_a_sixth_of_the_forward_products() -> None:
    plain = full_size("qwen_image", 256)
    shapes = full_size_shapes("qwen_image")
    linears = read_linears(FAMILIES["qwen_image"], shapes)
    size = StepSize(1, 4096, 256)
    again = step_flops(linears, size, WIDTH, 10, trains_all=False, reprojected_blocks=30)
    whole = step_flops(linears, size, WIDTH, 10, trains_all=False)
    per_token_and_block = 2 * 3 * WIDTH**2
    assert again.plain_again - whole.plain_again == 30 * (4096 + 256) * per_token_and_block
    assert again.model == whole.model and again.hardware > whole.hardware > plain.model


def test_a_full_size_step_is_the_one_that_the_floor_was_computed_for() -> None:
    """Twice 2 x 12 width² a token and block, and 12 width a pair of tokens and block, of 60 blocks."""
    flops = full_size("qwen_image", 256)
    assert flops.plain / TERA == pytest.approx(118, abs=0.5)
    assert flops.attention / TERA == pytest.approx(42, abs=0.5)
    assert (flops.attention + flops.attention_again) / TERA == pytest.approx(49, abs=0.5)
    assert flops.model == flops.plain + flops.attention + flops.lora and flops.lora / flops.model < 0.01


def test_both_kinds_of_blocks_cost_a_token_the_same() -> None:
    """57 blocks of 12 width² weights that each token passes, whether its stream has its own or all share them."""
    flops = full_size("flux", 512)
    assert flops.plain / TERA == pytest.approx(2 * 2 * 12 * WIDTH**2 * 4608 * 57 / TERA, rel=0.005)
    assert flops.attention / TERA == pytest.approx(12 * 4608**2 * WIDTH * 57 / TERA, rel=1e-9)


def test_recomputing_half_the_blocks_adds_half_a_forward_pass() -> None:
    kept, half = full_size("qwen_image", 256), full_size("qwen_image", 256, recomputed_blocks=30)
    assert half.model == kept.model
    added = half.hardware - kept.hardware
    assert added / kept.model == pytest.approx((118 / 2 + 42 / 3) / 2 / 160, rel=0.02)


def test_in_8_bits_are_linear_layers_that_are_not_kept_plain() -> None:
    plain, eight = full_size("qwen_image", 256), full_size("qwen_image", 256, quantized=True)
    assert eight.model == plain.model and eight.plain < 0.001 * plain.plain  # what makes modulations stays plain
    assert eight.quantized_share[0] == pytest.approx(118 / 161, rel=0.01)
    queries = [f"transformer_blocks.{number}.attn.to_q" for number in range(60)]
    some = full_size("qwen_image", 256, quantized=True, plain_layers=queries)
    of_one_layer = 2 * 2 * WIDTH**2 * 4096
    assert eight.quantized - some.quantized == of_one_layer * 60 - of_one_layer // 2  # the first one's input is given


def test_steps_of_more_samples_cost_as_many_times_as_much() -> None:
    one, four = StepSize(1, 256, 40), StepSize(4, 256, 40)
    linears = [linear(image=True), linear(text=True), linear()]
    costs = [step_flops(linears, size, 64, 0, trains_all=True) for size in (one, four)]
    assert costs[1] == StepFlops(**{name: 4 * value for name, value in vars(costs[0]).items()})
    longer = step_flops(linears, replace(one, num_image_tokens=552), 64, 0, trains_all=True)
    assert longer.attention == 4 * costs[0].attention  # twice the tokens
