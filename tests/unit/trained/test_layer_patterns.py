"""Patterns give each layer the value that PEFT gives it, and none takes longer than its estimate allows."""

from __future__ import annotations

import random
import time

import pytest
from peft.utils.other import get_pattern_key

from pixtune.trained.layer_patterns import MOST_STEPS, as_patterns, steps_of, values_by_layer

LAYERS = [
    f"transformer_blocks.{block}.{layer}"
    for block in range(12)
    for layer in ("attn.to_q", "attn.to_k", "attn.to_out.0", "img_mlp.net.0.proj", "txt_mod.1")
]
PATTERNS = [
    "to_q",
    "attn.to_k",
    "0",
    "proj",
    r"attn\.to_out\.0",
    "transformer_blocks.1.attn.to_q",
    ".*attn.*",
    r"blocks\.1.*",
    r"transformer_blocks\.(1|3|11)\.attn\.(to_q|to_k)",
    r".*\.[0-5]\..*mlp.*",
    "^transformer_blocks.2.txt_mod.1",
    "absent",
    r"transformer_blocks\.\d\..*",
    "(?:to_q|to_k)",
]


@pytest.mark.parametrize("seed", range(20))
def test_each_layer_gets_what_peft_gives_it(seed: int) -> None:
    draw = random.Random(seed)
    patterns = {pattern: number + 1 for number, pattern in enumerate(draw.sample(PATTERNS, 6))}
    expected = {layer: patterns.get(get_pattern_key(patterns, layer), 0) for layer in LAYERS}
    found = values_by_layer(patterns, LAYERS, 0)
    assert found == expected
    handed_on = as_patterns(found, 0)
    assert {layer: handed_on.get(get_pattern_key(handed_on, layer), 0) for layer in LAYERS} == expected


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*$",
        "(.|.)*x",
        ".*" * 12 + "x",
        "a?" * 500 + "a" * 500,
        "(a{1,9999}){1,9999}",
        "(.|.)" * 60 + "x",
        "((.|.)|(.|.))" * 20,
        r"(.*)(.*)\1\2x",
        "(?P<n>.*)(?P=n)x",
        "[ab]*" * 6,
        "(x+x+)+y",
    ],
)
def test_a_pattern_that_could_take_for_ever_is_refused_at_once(pattern: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="too intricate"):
        values_by_layer({pattern: 1}, LAYERS, 0)
    assert time.monotonic() - began < 1


def test_many_patterns_share_one_bound_and_plain_names_cost_nothing() -> None:
    with pytest.raises(ValueError, match="too intricate"):
        values_by_layer({f".*a.*{number}.*": 1 for number in range(1000)}, LAYERS, 0)
    began = time.monotonic()
    found = values_by_layer({f"x{number}": number for number in range(100_000)} | {"to_q": -1}, LAYERS, 0)
    assert {layer for layer, value in found.items() if value} == {layer for layer in LAYERS if layer.endswith("to_q")}
    assert time.monotonic() - began < 2


def test_a_pattern_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"'\(' is none"):
        values_by_layer({"(": 1}, LAYERS, 0)


def test_steps_are_counted_from_above() -> None:
    assert steps_of("(a|b|c)x") == 3 and steps_of("(a|b)(c|d|e)?") > MOST_STEPS
    assert steps_of(r"\*[*+]\(") == 1  # escaped letters and sets repeat nothing
    assert steps_of("a*b?") == 60 * 2 and steps_of("(a)*") > MOST_STEPS
