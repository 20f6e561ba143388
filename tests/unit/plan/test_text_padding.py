"""Multiple to which captions are padded: the smallest by which all shapes can be captured."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig
from pixtune.plan.text_padding import (
    MOST_PADDING,
    CaptionedSize,
    Captions,
    choose_text_multiple,
    fitting_multiple,
    num_shapes,
    padded_length,
    padding_share,
)

LONG = range(10, 300, 3)


def pictures(*lengths: int, image_tokens: int = 4096) -> CaptionedSize:
    return CaptionedSize(image_tokens, dict.fromkeys(lengths, 1.0))


def choice(
    *sizes: CaptionedSize, captures: int = 8, batch_size: int = 1, differ: bool = True, passed: bool = True
) -> tuple[int, str]:
    config = TrainConfig(
        pretrained_model_name_or_path="x", output_dir=Path("x"), max_train_steps=1, mixed_precision="bf16",
        train_batch_size=batch_size, data_config=DataConfig(img_dir=Path("x")),
    )  # fmt: skip
    multiple, reasons = choose_text_multiple(config, Captions(differ, sizes), captures, passed)
    return multiple, " ".join(reasons)


def test_lengths_are_the_next_multiple() -> None:
    assert [padded_length(tokens, 64) for tokens in (1, 64, 65)] == [64, 64, 128] and padded_length(7, 1) == 7


def test_what_is_counted() -> None:
    sizes = [pictures(10, 64, 65, 300), pictures(65, image_tokens=100)]
    assert [num_shapes(sizes, multiple) for multiple in (1, 64, 128, 320)] == [5, 4, 3, 2]
    drawn = CaptionedSize(100, {10: 3.0, 60: 1.0})
    assert padding_share([drawn], 64) == pytest.approx((3 * 54 + 4) / (4 * 164))
    assert padding_share([drawn], 1) == 0


@pytest.mark.parametrize(
    ("captures", "multiple"),
    [(64, 64), (5, 64), (4, 128), (3, 128), (2, 256), (1, 320)],
)
def test_the_smallest_multiple_is_taken_by_which_all_shapes_are_captured(captures: int, multiple: int) -> None:
    """The largest is 320, the longest caption's, which makes all captions as long."""
    sizes = [pictures(*LONG, image_tokens=16384)]
    assert fitting_multiple(sizes, captures) == multiple
    assert num_shapes(sizes, multiple) <= captures


def test_where_nothing_is_enough_it_is_the_smallest_that_leaves_fewest_shapes() -> None:
    sizes = [pictures(10, 70, 120, image_tokens=tokens) for tokens in range(9000, 9040)]
    assert fitting_multiple(sizes, 8) == 128 and num_shapes(sizes, 128) == 40
    assert fitting_multiple([*sizes, pictures(300, image_tokens=9000)], 8) == 128, "320 leaves as many shapes"


def test_padding_that_would_cost_a_plain_steps_time_is_left_out() -> None:
    sizes = [pictures(*LONG, image_tokens=1500)]
    assert fitting_multiple(sizes, 1) == 128
    assert padding_share(sizes, 128) <= MOST_PADDING < padding_share(sizes, 256)
    small = [pictures(*LONG, image_tokens=16)]
    assert fitting_multiple(small, 1) == 64, "the least one is always allowed"


def test_the_reason_says_what_is_gained_and_what_it_costs() -> None:
    multiple, reason = choice(pictures(*LONG), captures=3)
    assert multiple == 128
    assert "multiples of 128 tokens" in reason and f"3 instead of {len(LONG)} shapes, and 3 can be captured" in reason
    assert f"{padding_share([pictures(*LONG)], 128):.1%}" in reason


def test_captions_that_share_few_shapes_are_left_alone() -> None:
    multiple, reason = choice(pictures(10, 20), pictures(30), captures=3)
    assert multiple == 1 and "have 3 shapes, and 3 can be captured" in reason
    assert choice(pictures(10, 20), pictures(30), captures=2)[0] == 64


def test_captions_that_stay_apart_are_left_alone() -> None:
    apart = [pictures(10, image_tokens=1000 + number) for number in range(9)] + [pictures(20)]
    multiple, reason = choice(*apart)
    assert multiple == 1 and "10 shapes even so" in reason


def test_a_batch_of_several_captions_is_padded_instead_of_split_or_masked() -> None:
    assert choice(pictures(10, 20), batch_size=2)[0] == 64
    assert choice(pictures(10), pictures(20), batch_size=2)[0] == 1, "each batch is of one length"


def test_lengths_that_are_not_known_get_the_least_multiple() -> None:
    multiple, reason = choice()
    assert multiple == 64 and "in the loop" in reason
    assert choice(differ=False) == choice(passed=False) == choice(captures=0) == (1, "")
