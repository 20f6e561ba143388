"""What a family says of its transformer's tensors by arithmetic, against the model that its class builds."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from pixtune.errors import WeightsError
from pixtune.families import FAMILIES
from pixtune.family import ModelFamily

SMALL = {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6],
    "joint_attention_dim": 24, "in_channels": 8, "out_channels": 4,
}  # fmt: skip
CHANGES = {
    "patch_size": 3,
    "in_channels": 12,
    "out_channels": None,
    "num_layers": 3,
    "num_single_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 28,
    "axes_dims_rope": [4, 4, 8],
    "zero_cond_t": True,
    "use_additional_t_cond": True,
    "use_layer3d_rope": True,
}
"""Another value of every key that a class takes, with `axes_dims_rope` for heads of 16 features."""
FOR_WIDER_HEADS = {"axes_dims_rope": [8, 12, 12]}


def assert_shapes_are_the_models(family: ModelFamily, config: dict[str, Any]) -> None:
    built = family.build_transformer(config).state_dict()
    said = family.transformer_shapes(config)
    assert list(said.items()) == [(name, tuple(tensor.shape)) for name, tensor in built.items()]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("config", [{}, SMALL], ids=["full size", "small"])
def test_shapes_are_those_of_the_built_model(name: str, config: dict[str, Any]) -> None:
    assert_shapes_are_the_models(FAMILIES[name], config)


@pytest.mark.parametrize("name", ["qwen_image", "flux"])
def test_every_key_of_the_class_is_taken_into_account(name: str) -> None:
    """A newer class may take more of them: then `CHANGES` lacks one."""
    family = FAMILIES[name]
    kind = type(family.build_transformer(SMALL))
    keys = [key for key in inspect.signature(kind).parameters if key != "guidance_embeds"]
    assert set(keys) <= CHANGES.keys()
    for key in keys:
        around = FOR_WIDER_HEADS if key == "attention_head_dim" else {}
        assert_shapes_are_the_models(family, {**SMALL, **around, key: CHANGES[key]})


def test_a_guidance_distilled_model_has_weights_for_its_guidance() -> None:
    for guidance_embeds in (True, False):
        assert_shapes_are_the_models(FAMILIES["flux"], {**SMALL, "guidance_embeds": guidance_embeds})


def test_a_model_that_its_class_cannot_run_is_refused_before_anything_is_built() -> None:
    family = FAMILIES["qwen_image"]
    for ask in (family.build_transformer, family.transformer_shapes):
        with pytest.raises(WeightsError, match="guidance_embeds"):
            ask({**SMALL, "guidance_embeds": True})


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_measured_activations_are_in_the_order_that_they_must_have(family: ModelFamily) -> None:
    for units in family.activation_units.values():
        assert 0 < units.projections < units.selective < units.kept < units.eager
        assert units.forward < units.forward_quantized < units.working, "a backward pass holds more than a forward one"
        assert units.forward_fused < units.forward_quantized
        assert units.passing < units.passing_quantized
