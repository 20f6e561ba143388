"""The captions of a picture and the forms that training makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixtune.config.folders import CaptionRules, folders_of
from pixtune.config.sections import DataConfig
from pixtune.data.captions import caption_without_file, forms_of, split_lines, with_prefix
from pixtune.errors import DataError


def rules(**keys: object) -> CaptionRules:
    return folders_of(DataConfig.model_validate({"img_dir": "x", **keys}))[0].captions


@pytest.mark.parametrize(
    ("prefix", "caption", "made"),
    [
        ("sks", "a cat", "sks, a cat"),
        ("sks,", "a cat", "sks, a cat"),
        (" sks style. ", "a cat", "sks style. a cat"),
        ("sks", "a photo of SKS", "a photo of SKS"),
        ("sks", "", "sks"),
        ("", "a cat", "a cat"),
    ],
)
def test_a_prefix_stands_in_front_once(prefix, caption, made):
    assert with_prefix(caption, rules(caption_prefix=prefix)) == made


def test_captions_come_from_names_or_one_text_where_no_file_is_wanted():
    by_name, by_text = (
        caption_without_file(rules(caption_source="file_name")), caption_without_file(rules(caption_text=" a cat\r\n")),
    )  # fmt: skip
    assert by_name and by_text
    assert by_name(Path("folder/red__car_7.v2.png")) == "red car 7.v2"
    assert by_text(Path("any.png")) == "a cat"
    assert caption_without_file(rules()) is None and caption_without_file(rules(caption_source="lines")) is None


def test_each_line_of_a_file_is_a_caption_where_that_is_asked_for():
    file = Path("a.txt")
    assert split_lines("one\n\n  two \n", rules(caption_source="lines"), file) == ("one", "two")
    assert split_lines("", rules(caption_source="lines"), file) == ("",)
    assert split_lines("one\ntwo", rules(), file) == ("one\ntwo",)
    with pytest.raises(DataError, match=r"a\.txt has 257 lines, and caption_source is lines; at most 256"):
        split_lines("x\n" * 257, rules(caption_source="lines"), file)


def test_tags_are_shuffled_behind_those_that_are_kept_and_none_is_lost():
    asked = rules(shuffle_tags=True, keep_tags=1, caption_variants=64, caption_prefix="sks")
    forms = forms_of(["cat, a, b , c"], asked, seed=1, name="x.png")
    assert len(forms) == 64
    assert {form.split(", ")[:2] == ["sks", "cat"] for form in forms} == {True}
    orders = {tuple(form.split(", ")[2:]) for form in forms}
    assert orders == {(x, y, z) for x in "abc" for y in "abc" for z in "abc" if len({x, y, z}) == 3}
    assert forms == forms_of(["cat, a, b , c"], asked, seed=1, name="x.png")
    assert forms != forms_of(["cat, a, b , c"], asked, seed=2, name="x.png")
    assert forms != forms_of(["cat, a, b , c"], asked, seed=1, name="y.png")


def test_tags_are_left_out_at_the_rate_and_in_their_order():
    asked = rules(tag_dropout_rate=0.25, keep_tags=2, caption_variants=256)
    forms = [form.split(", ") for form in forms_of(["k, l, a, b, c, d"], asked, seed=1, name="x")]
    assert all(form[:2] == ["k", "l"] and form == sorted(form, key="klabcd".index) for form in forms)
    kept = sum(len(form) - 2 for form in forms) / (4 * 256)
    assert abs(kept - 0.75) < 0.05  # 1024 draws: deviation 0.014
    assert len(set(map(tuple, forms))) > 10
    assert forms_of(["a, b"], rules(tag_dropout_rate=1.0, caption_variants=2), 1, "x") == ("", "")


def test_each_of_several_captions_has_its_forms():
    assert forms_of(["one", "two"], rules(caption_prefix="p"), 1, "x") == ("p, one", "p, two")
    asked = rules(shuffle_tags=True, caption_variants=3)
    forms = forms_of(["a, b, c, d, e, f", "1, 2"], asked, 1, "x")
    assert ["a" in form for form in forms] == [True] * 3 + [False] * 3
    assert len(set(forms[:3])) > 1, "each form is a draw of its own"
