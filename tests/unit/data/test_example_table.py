"""Examples as arrays are the examples that were put in, whatever their names hold, in a few hundred bytes each."""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixtune import randomness
from pixtune.data.buckets import build_buckets, frame_picture
from pixtune.data.example_table import Example, Examples, chosen_from, signatures_of
from pixtune.data.masks import MaskFile
from pixtune.data.order import BatchOrder, Turn, Use

BUCKETS = build_buckets(64, 16)
SIZES = ((64, 64), (96, 64), (40, 80))
NAMES = st.text(st.characters(exclude_characters="\0/"), min_size=1, max_size=8)  # lone surrogates included
CAPTIONS = st.text(max_size=20)


@st.composite
def some_example(draw: st.DrawFn) -> Example:
    width, height = draw(st.sampled_from(SIZES))
    framing, caption = frame_picture(width, height, BUCKETS), draw(CAPTIONS)
    forms = draw(st.sampled_from(["none", "itself", "others"]))
    mask = MaskFile(Path(draw(NAMES)), "alpha", (8, 8), (width, height), draw(st.sampled_from([0.0, 0.5])))
    controls = tuple(Path("c") / name for name in draw(st.lists(NAMES, max_size=2)))
    known = draw(st.booleans())
    return Example(
        name=draw(NAMES),
        image_path=Path("/pictures") / draw(NAMES),
        caption=caption,
        framings=(framing, replace(framing, flipped=True))[: draw(st.integers(1, 2))],
        control_paths=controls,
        use=Use(draw(st.sampled_from([1.0, 0.5, 3.0])), (), 1),
        caption_forms={"none": (), "itself": (caption,), "others": tuple(draw(st.lists(CAPTIONS, min_size=2)))}[forms],
        folder=draw(st.sampled_from(["", "a/"])),
        mask=mask if draw(st.booleans()) else None,
        loss_weight=draw(st.sampled_from([1.0, 0.25])),
        known_digests=tuple(f"{n + 1:064x}" for n in range(1 + len(controls))) if known else (),
    )


@given(st.lists(some_example(), max_size=6))
def test_what_was_put_in_comes_out(examples: list[Example]) -> None:
    table = Examples(examples)
    assert [*table] == examples == [table[number] for number in range(len(examples))] and table == examples
    assert table[1:] == examples[1:] and table + examples == examples * 2
    heavy = chosen_from(table, lambda each: each.loss_weight == 1)
    assert [*heavy] == [each for each in examples if each.loss_weight == 1]
    assert [*Examples(heavy).where(lambda each: each.mask is None)] == [
        each for each in examples if each.loss_weight == 1 and each.mask is None
    ]


def test_digests_that_are_known_reach_all_selections_and_no_file_is_read() -> None:
    framing = frame_picture(64, 64, BUCKETS)
    controls = ((), (Path("c0"), Path("c1")), ())
    table = Examples(
        Example(f"{n}.png", Path(f"/no/{n}.png"), "x", (framing,), each) for n, each in enumerate(controls)
    )
    odd = table.where(lambda each: each.name == "1.png")
    table.know_digests(f"{number:064x}" for number in range(1, 6))
    assert [each.image_digest for each in table] == [f"{number:064x}" for number in (1, 2, 5)]
    assert odd[0].control_digests == (f"{3:064x}", f"{4:064x}")
    table.extend([Example("3.png", Path("/no/3.png"), "x", (framing,))])
    assert table[3].known_digests == () and table[2].known_digests == (f"{5:064x}",)
    with pytest.raises(IndexError):
        table[4]
    assert table[-1].name == "3.png"


def test_a_row_takes_a_few_hundred_bytes() -> None:
    framings = [frame_picture(*size, BUCKETS) for size in SIZES]

    def num_bytes_of(num_rows: int) -> int:
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        table = Examples(
            Example(f"{n:07}.png", Path(f"/data/pictures/{n:07}.png"), f"a thing, number {n}", (framings[n % 3],))
            for n in range(num_rows)
        )
        table.know_digests("ab" * 32 for _ in range(len(table)))
        order = BatchOrder(signatures_of(table), 8, 1, [each.use for each in table])
        order.micro_batch(0)
        assert signatures_of(table[:3]) == [[(framing.size,)] for framing in framings]
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before

    tracemalloc.start()
    try:
        few, many = num_bytes_of(1_000), num_bytes_of(21_000)
    finally:
        tracemalloc.stop()
    # 200 of their own; the interpreter may enlarge its table of names of files meanwhile.
    assert (many - few) / 20_000 < 1_000, "as objects they take 2,000"


@given(
    st.lists(st.tuples(st.sampled_from([1, 1, 2]), st.sampled_from([0.5, 1.0, 1.5, 2.0])), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_the_order_is_that_of_sorting_the_turns_one_by_one(
    rows: list[tuple[int, float]], batch_size: int, epoch: int
) -> None:
    """The arrays against the plain rule: sort by draws, gather by size, fill the last batch, shuffle the batches."""
    seed, sizes = 5, [((64, 64),), ((64, 48),), ((32, 32), (16, 16))]
    buckets = [[sizes[(number + variant) % 3] for variant in range(count)] for number, (count, _) in enumerate(rows)]
    uses = [Use(repeats, (), 1 + number % 2) for number, (_, repeats) in enumerate(rows)]
    order = BatchOrder(buckets, batch_size, seed, uses)

    turns: list[tuple[int, ...]] = []
    for example, (_, repeats) in enumerate(rows):
        start = randomness.uniform(seed, "repeats", example)
        extra = int((epoch + 1) * (repeats % 1) + start) - int(epoch * (repeats % 1) + start) if repeats % 1 else 0
        turns += [(example, use) if use else (example,) for use in range(int(repeats) + extra)]
    turns.sort(key=lambda turn: randomness.draw_key(seed, "order", epoch, *turn))
    by_size: dict[object, list[Turn]] = {}
    for turn in turns:
        variant = int(randomness.uniform(seed, "ratio", epoch, *turn) * rows[turn[0]][0])
        caption = int(randomness.uniform(seed, "caption", epoch, *turn) * uses[turn[0]].num_captions)
        by_size.setdefault(buckets[turn[0]][variant], []).append(Turn(turn[0], variant, caption))
    batches = [
        [(members * batch_size)[place] for place in range(start, start + batch_size)]
        for members in by_size.values()
        for start in range(0, len(members), batch_size)
    ]
    expected = [batches[place] for place in randomness.shuffled(len(batches), seed, "order", epoch, "batches")]
    assert [*order.epoch(epoch)] == expected
