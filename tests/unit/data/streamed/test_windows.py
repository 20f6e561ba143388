"""Micro-batches of a stream: of one size each, complete, and the same wherever windows are cut."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pixtune.data.order import Use
from pixtune.data.streamed.windows import RowPlace, StreamRow, cut_batches, draw_variant, in_random_order, mixed

SIGNATURES = [((64, 64),), ((96, 48),), ((48, 96), (32, 32))]


@given(st.lists(st.sampled_from(SIGNATURES), max_size=40), st.integers(1, 5), st.integers(0, 40))
def test_batches_are_the_same_wherever_a_window_ends(signatures, size, cut):
    rows = [*enumerate(signatures)]
    whole, left = cut_batches(rows, size)
    first, waiting = cut_batches(rows[:cut], size)
    second, left_later = cut_batches([*waiting, *rows[cut:]], size)
    assert Counter(map(frozenset, [*first, *second])) == Counter(map(frozenset, whole))
    assert left_later == left
    assert sorted([*(number for batch in whole for number in batch), *(number for number, _ in left)]) == [
        number for number, _ in rows
    ]
    assert all(len(batch) == size and len({signatures[number] for number in batch}) == 1 for batch in whole)
    assert all(count < size for count in Counter(signature for _, signature in left).values())


def rows(count: int) -> list[StreamRow]:
    return [StreamRow(RowPlace(0, 0, row), "", (8, 8), ("",)) for row in range(count)]


def test_rows_and_batches_are_mixed_by_the_seed_alone():
    given_rows = rows(50)
    order = in_random_order(given_rows, 3)
    assert order == in_random_order(reversed(given_rows), 3) != in_random_order(given_rows, 4)
    assert order != given_rows and sorted(order, key=lambda each: each.place.row) == given_rows
    batches = [(number,) for number in range(20)]
    assert mixed(batches, 3, 0) == mixed(batches, 3, 0) != mixed(batches, 3, 1)
    assert sorted(mixed(batches, 3, 1)) == batches


def test_variants_are_drawn_by_their_shares():
    drawn = Counter(draw_variant(RowPlace(0, 0, row), 1, Use(shares=(0.75, 0.25)), 2) for row in range(2000))
    assert abs(drawn[0] / 2000 - 0.75) < 0.04  # four standard deviations
