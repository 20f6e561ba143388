"""Steps of two processes exchange what the arithmetic of docs/scale.md says: so many bytes, so many times."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from pixtune.plan.exchange_cost import Exchange, gathering_exchanges, lora_exchanges
from tests.recorded_exchanges import record
from tests.runs import TINY_MODEL, end_of, overrides, start_ranks, write_config

NUM_SLOTS = 3
"""Whole blocks that a process holds where the base is in parts (`engine/sharded_blocks.py`)."""


def steps_of_two(folder: Path, cache: Path, **changes: object) -> list[dict[str, Any]]:
    """What each of two processes has recorded of a run of two steps."""
    words = overrides(folder / "run", cache, **{"max_train_steps": 2, "gradient_accumulation_steps": 2, **changes})
    command = ["train", "--config", write_config(folder), *words]
    for process in start_ranks(*command, before=functools.partial(record, folder)):
        code, printed = end_of(process)
        assert code == 0, printed
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def block_bytes() -> list[int]:
    """Bytes of the small model's blocks in fp32, by their weights' file."""
    bytes_of: dict[int, int] = {}
    for path in (TINY_MODEL / "transformer").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                first, number, *_ = name.split(".")
                if first == "transformer_blocks":
                    size = file.get_slice(name).get_shape()
                    bytes_of[int(number)] = bytes_of.get(int(number), 0) + 4 * functools.reduce(int.__mul__, size, 1)
    return [bytes_of[number] for number in sorted(bytes_of)]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_lora_exchanges_its_gradients_once_and_a_base_in_parts_its_blocks(
    tmp_path: Path, warm_cache: Path, shards: int
) -> None:
    both = steps_of_two(tmp_path, warm_cache, distributed__shards=shards)
    assert both[0] == both[1]
    first, second = ([Exchange(*each) for each in step] for step in both[0]["steps"])
    blocks = block_bytes()
    gathers = gathering_exchanges(blocks, shards, num_micro_batches=2, kept_blocks=NUM_SLOTS)
    assert second == gathers + lora_exchanges(both[0]["trained"], 2), "gradients once, whatever the accumulation"
    filled = [Exchange("all_gather", each, 2) for each in blocks[:NUM_SLOTS]] if shards > 1 else []
    assert first == filled + second
