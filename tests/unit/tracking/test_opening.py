"""What is said of a run before its first step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pixtune.config import load_config
from pixtune.data.order import BatchOrder
from pixtune.tracking.opening import opening_lines
from tests.runs import overrides, write_config


@pytest.mark.parametrize(
    ("sizes", "batch_size", "num_steps", "words"),
    [
        # Three shapes, a picture each, in batches of 8: 16 uses of 3 pictures, though not one epoch of 24 uses is over.
        ([(64, 64), (48, 80), (80, 48)], 8, 2, "2 steps of 8 pictures each; every picture about 5 times"),
        ([(64, 64)] * 40, 2, 6, "6 steps of 2 pictures each; every picture 0.3 times"),
        ([(64, 64)] * 40, 1, 1, "1 step of 1 picture each; every picture 0.025 times"),  # not 0.0
        ([(64, 64)] * 40, 2, 20, "20 steps of 2 pictures each; every picture 1.0 times"),
    ],
)
def test_the_mean_number_of_uses_is_that_of_the_pictures(
    tmp_path: Any, sizes: list[tuple[int, int]], batch_size: int, num_steps: int, words: str
) -> None:
    config = load_config(
        write_config(tmp_path), overrides(tmp_path / "run", tmp_path / "cache", train_batch_size=batch_size)
    )
    buckets = [[(size,)] for size in sizes]
    order = BatchOrder(buckets, batch_size, seed=0)
    source: Any = SimpleNamespace(order=order, reader=SimpleNamespace(names=[str(n) for n in range(len(sizes))]))
    data: Any = SimpleNamespace(buckets=buckets, held_out=[], stream=None)
    assert f"length: {words}" in opening_lines(config, data, source, num_steps, "a LoRA", [])
