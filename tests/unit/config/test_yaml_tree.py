"""YAML within bounds: what is small on disk and huge once it is read ends in a sentence at once."""

from __future__ import annotations

import time

import pytest
import yaml

from pixtune.config.yaml_tree import MOST_LEVELS, MOST_NODES, BoundsError, ConfigLoader, compose


def laughs(levels: int, opening: str = "[", closing: str = "]") -> str:
    """The "billion laughs": each line names the line before ten times."""
    last = "x: &a0 [y]\n"
    for level in range(levels):
        entries = ",".join(f"*a{level}" for _ in range(10))
        last += f"x{level}: &a{level + 1} {opening}{entries}{closing}\n"
    return last


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (laughs(9), "aliases"),
        (laughs(40), "aliases"),
        ("base: &a {k: [" + "x," * 500 + "]}\n" + "".join(f"k{i}: {{<<: *a, z: *a}}\n" for i in range(20)), "aliases"),
        ("a: " + "[" * 5000 + "]" * 5000, "levels"),
        ("a: " + "{b: " * 3000 + "1" + "}" * 3000, "levels"),
        ("\n".join(f"{' ' * depth}k:" for depth in range(3000)), "levels"),
        ("- " * 3000 + "x", "levels"),
        ("a: &a [*a]", "holds itself"),
        ("a: &a {b: &b [*a, *b]}", "holds itself"),
        ("a: [" + "1," * (MOST_NODES + 1) + "]", "more than 10,000 values"),
    ],
)
def test_more_than_a_config_needs_is_refused_at_once(text, words):
    started = time.monotonic()
    with pytest.raises(BoundsError) as caught:
        compose(text)
    assert words in caught.value.sentence and caught.value.line >= 1
    assert time.monotonic() - started < 2


def test_ordinary_aliases_and_the_deepest_allowed_level_are_read():
    text = "base: &base [1, 2]\nagain: *base\n" + "deep: " + "[" * (MOST_LEVELS - 1) + "]" * (MOST_LEVELS - 1)
    node = compose(text)
    assert ConfigLoader("").construct_document(node)["again"] == [1, 2]
    assert yaml.safe_load(text)["again"] == [1, 2]


def test_an_empty_text_has_no_nodes():
    assert compose("# nothing\n") is None
