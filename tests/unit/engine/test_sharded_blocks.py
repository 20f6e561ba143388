"""Blocks that several processes hold in parts compute what whole ones do, bit for bit, also for the first one alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes

from pixtune.engine.activations import recompute_blocks
from pixtune.engine.load import Layout, load_transformer
from pixtune.engine.sharded_blocks import ShardedBlocks, ShardGroup
from pixtune.families import family_of
from pixtune.family import Placement
from pixtune.storage.model_folder import ModelFolder
from tests.unit.engine.tiny import ASSETS, assert_same, attach, blocks_of, loaded_once, plain_step, step, velocity

NAME = "tiny-qwen-image"
SHARDS = 2
CPU = torch.device("cpu")


def load_in_parts(group: ShardGroup, linear_format: str | None) -> tuple[nn.Module, Any]:
    folder = ModelFolder(ASSETS / NAME)
    family = family_of(folder)
    num_blocks, _ = family.block_shape(folder)
    sharded = ShardedBlocks(group, CPU, num_slots=2)
    layout = Layout(linear_format, streamed=tuple(range(num_blocks)))
    loaded = load_transformer(family, folder, Placement(CPU, torch.float32), layout, take=sharded.take)
    return loaded.module, sharded.stream()


def work(rank: int, num_processes: int, linear_format: str | None, meeting: Path) -> None:
    """One process's work. What a test asserts is asserted here, in each of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=num_processes)
    group = ShardGroup(SHARDS, CPU)
    model, stream = load_in_parts(group, linear_format)
    whole = max(stream.block_bytes)
    parts = stream._source._parts
    assert sum(part.nbytes for part in parts) * SHARDS == sum(stream.block_bytes) and whole % SHARDS == 0
    blocks = blocks_of(NAME, model)
    recompute_blocks(blocks, offload=False)
    attach(NAME, model)
    for seed in (0, 1):
        assert_same(step(NAME, model, seed), plain_step(NAME, linear_format, seed))
    with stream.apart(), torch.no_grad():
        if rank == 0:  # alone: another number of passes than the others make, and out of order
            with stream.apart():
                expected = velocity(NAME, model)
                stream.bring(blocks[3])
                assert torch.equal(velocity(NAME, model), expected)
    assert_same(step(NAME, model, 2), plain_step(NAME, linear_format, 2))
    with pytest.raises(KeyError), stream.apart():
        raise KeyError  # in all of them, as where all see the same error
    assert_same(step(NAME, model, 3), plain_step(NAME, linear_format, 3))
    dist.destroy_process_group()


@pytest.mark.parametrize(("num_processes", "linear_format"), [(2, None), (2, "int8"), (4, "int8")])
def test_a_step_equals_the_plain_one(num_processes: int, linear_format: str | None, tmp_path: Path) -> None:
    """With 4 processes in groups of 2, the second group works while the first one supplies the first process."""
    loaded_once(NAME, linear_format)  # and is there after a fork
    arguments = (num_processes, linear_format, tmp_path / "meeting")
    start_processes(work, arguments, num_processes, start_method="fork")
