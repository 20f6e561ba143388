"""Rare shapes: how often each picture is drawn, against hand-made counts, and who is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from pixtune.data.order import BatchOrder
from pixtune.data.shares import draws_an_epoch, uneven_note

SQUARE, TALL, WIDE = ((64, 64),), ((48, 80),), ((80, 48),)


def order(shapes: Sequence[tuple[tuple[int, int], ...]], batch_size: int) -> BatchOrder:
    return BatchOrder([[shape] for shape in shapes], batch_size, 42)


def names(number: int) -> list[str]:
    return [f"p{i}.png" for i in range(number)]


def test_a_lone_portrait_among_nine_squares_at_a_batch_of_eight_is_named_with_its_draws() -> None:
    note = uneven_note(order([SQUARE] * 9 + [TALL], 8), names(10))
    assert note is not None and "1 picture of a rare shape" in note
    assert "p9.png (8.0 times an epoch)" in note
    assert "33% of all draws" in note  # 8 of 16 + 8
    assert "others come 1.8 times an epoch" in note  # a square: 16 places for 9


def test_draws_are_those_of_the_order_itself() -> None:
    plan = order([SQUARE] * 5 + [TALL, WIDE, WIDE], 4)
    counted = Counter(turn.example for epoch in range(400) for batch in plan.epoch(epoch) for turn in batch)
    assert draws_an_epoch(plan) == pytest.approx([counted[example] / 400 for example in range(8)], rel=0.05)
    assert draws_an_epoch(plan)[5] == 4 and draws_an_epoch(plan)[6:] == [2, 2]


@pytest.mark.parametrize(
    ("shapes", "batch_size"),
    [
        ([SQUARE] * 10 + [TALL], 1),
        ([SQUARE] * 16, 8),
        ([SQUARE] * 8 + [TALL] * 8, 8),
        ([SQUARE], 4),
        ([TALL] * 3, 8),
        ([SQUARE] * 3 + [TALL], 2),
    ],
)
def test_even_shares_are_not_worth_a_word(shapes: Sequence[tuple[tuple[int, int], ...]], batch_size: int) -> None:
    assert uneven_note(order(shapes, batch_size), names(len(shapes))) is None


def test_pictures_that_change_their_shape_are_counted_over_several_epochs() -> None:
    plan = BatchOrder([[SQUARE, TALL]] * 6, 4, 1)
    draws = draws_an_epoch(plan)
    counted = Counter(turn.example for epoch in range(8) for batch in plan.epoch(epoch) for turn in batch)
    assert draws == [counted[example] / 8 for example in range(6)]


def test_epochs_of_one_length_are_counted_by_arithmetic_as_by_counting() -> None:
    even = order([SQUARE] * 9 + [TALL] * 3, 4)
    lengths = [len(even.epoch(epoch)) for epoch in range(5)]
    assert [even.epoch_end(epoch) for epoch in range(5)] == [sum(lengths[: epoch + 1]) for epoch in range(5)]
    assert even.epoch_end(10**9) == (10**9 + 1) * 4  # at once
    assert [even.epoch_of(index) for index in (0, 3, 4, 4 * 10**9)] == [0, 0, 1, 10**9]


def test_the_few_of_a_common_shape_among_many_of_rare_ones_are_the_measure() -> None:
    shapes = [((16 * side, 64),) for side in range(4, 14)] + [((64, 256),)] * 8
    note = uneven_note(order(shapes, 8), names(18))
    assert note is not None and "10 pictures of rare shapes" in note and "others come 1.0 times" in note
