"""How a captioner is held: the most exact format that fits one picture, then as many pictures as fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixtune.errors import PlanError
from pixtune.family import CaptionerWeights
from pixtune.hardware.facts import GIB
from pixtune.plan.captioning import MOST_AT_ONCE, CaptionSizes, caption_bytes, plan_captions, weight_bytes
from pixtune.plan.encoders import ON_CPU

# Qwen2.5-VL 7B by hand: 28 layers of width 3584 with 28 heads, 4 of keys, and an MLP of 18944; 152064 words; a tower of
# 0.68 billion weights; keys and values of 28 x 4 x 128 numbers each.
LINEAR = 28 * (3584 * 3584 * 2 + 2 * 3584 * 512 + 3 * 3584 * 18944)
WEIGHTS = CaptionerWeights(LINEAR, 152064 * 3584, 152064 * 3584 + 676_550_144)
NUM_WEIGHTS = WEIGHTS.linear + WEIGHTS.output + WEIGHTS.plain
SIZES = CaptionSizes(WEIGHTS, 2 * 28 * 4 * 128, question_tokens=1400, answer_tokens=256)


@pytest.mark.parametrize(
    ("usable_gib", "text_format", "most"),
    [(130, None, MOST_AT_ONCE), (22.5, None, 8), (15, "int8", 7), (10, "int8", 1), (9, "nf4", 3), (7, ON_CPU, 4)],
)
def test_each_size_of_card_gets_the_most_exact_that_fits(usable_gib: float, text_format: str | None, most: int) -> None:
    plan = plan_captions(round(usable_gib * GIB), SIZES, 99)
    assert (plan.text_format, plan.at_once) == (text_format, most)


def test_weights_by_hand() -> None:
    assert weight_bytes(SIZES, None) / GIB == pytest.approx(15.4, abs=0.1)  # the published files have 16.6 GB
    in_int8 = LINEAR + 152064 * 3584 + 2 * WEIGHTS.plain
    assert weight_bytes(SIZES, "int8") == in_int8
    assert caption_bytes(SIZES, "int8", 0) - in_int8 == GIB // 4 and caption_bytes(SIZES, None, 0) == 2 * NUM_WEIGHTS
    assert weight_bytes(SIZES, "nf4") == in_int8 - LINEAR + LINEAR * 9 // 16


def test_what_is_asked_for_is_done() -> None:
    assert plan_captions(130 * GIB, SIZES, 99, quantize=True).text_format == "int8"
    assert plan_captions(15 * GIB, SIZES, 99, quantize=False).text_format == ON_CPU
    assert plan_captions(130 * GIB, SIZES, 99, at_once=3).at_once == 3
    assert plan_captions(130 * GIB, SIZES, 99, at_once=40).at_once == 40
    assert plan_captions(130 * GIB, SIZES, 5).at_once == plan_captions(None, SIZES, 3).at_once + 2 == 5


def test_a_small_card_is_told_the_way_out() -> None:
    plan = plan_captions(round(6.8 * GIB), SIZES, 9)
    assert plan.text_format == ON_CPU and "--picture-tokens 320" in plan.reasons[0]
    fewer = replace(SIZES, question_tokens=SIZES.question_tokens - 1280 + 320)
    assert plan_captions(round(6.8 * GIB), fewer, 9).text_format == "nf4"
    assert "--captioner FOLDER" in plan_captions(5 * GIB, SIZES, 9).reasons[0]
    assert "not quantized" in plan_captions(None, SIZES, 9, quantize=True).reasons[0]


def test_without_room_on_gpu_or_host_the_error_says_how_much_is_missing() -> None:
    with pytest.raises(
        PlanError, match=r"needs 7\.\d GiB of a GPU that has 4\.0 usable, or 16\.\d.*8\.\d GiB are missing"
    ):
        plan_captions(4 * GIB, SIZES, 99, host_bytes=8 * GIB)
    with pytest.raises(PlanError, match=r"needs 16\.\d GiB of host memory"):
        plan_captions(None, SIZES, 99, host_bytes=8 * GIB)
    assert plan_captions(None, SIZES, 99, host_bytes=17 * GIB).at_once == 1


@given(st.integers(1, 140), st.integers(1, 20), st.sampled_from([2, 4]), st.sampled_from([None, True, False]))
def test_a_plan_on_the_gpu_fits_and_one_picture_more_does_not(
    usable_gib: int, tokens: int, element: int, quantize: bool | None
) -> None:
    sizes = replace(SIZES, question_tokens=100 * tokens, element_bytes=element)
    plan = plan_captions(usable_gib * GIB, sizes, 99, quantize)
    if plan.text_format == ON_CPU:
        return
    assert plan.expected_peak_bytes == caption_bytes(sizes, plan.text_format, plan.at_once) <= usable_gib * GIB
    more = caption_bytes(sizes, plan.text_format, plan.at_once + 1)
    assert plan.at_once == MOST_AT_ONCE or more > usable_gib * GIB
