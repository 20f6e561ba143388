"""Blocks that several processes hold in parts compute what whole ones do, bit for bit, also for the first one alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes

from pixtune.engine import sharded_blocks
from pixtune.engine.activations import recompute_blocks
from pixtune.engine.load import Layout, load_transformer
from pixtune.engine.sharded_blocks import ReadParts, ShardedBlocks, ShardGroup, SharedPart
from pixtune.engine.transfer import CopyLane
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


# ---- GPUs that read each other's memory, played by one process


class Played(ShardGroup):
    """A group whose other processes are played: what they write is there once all have waited, until all do again."""

    def __init__(self, size: int, rank: int, written: dict[int, int] | None = None, device: torch.device = CPU) -> None:
        self.size, self.rank, self._device = size, rank, device
        self.written = {each: each + 1 for each in range(size)} | (written or {})
        self.num_waits = 0
        self.asked: list[bool] = []
        self.theirs: list[tuple[int, torch.Tensor]] = []

    def share(self, part: torch.Tensor) -> SharedPart:
        of_all = [part if rank == self.rank else torch.zeros_like(part) for rank in range(self.size)]
        self.theirs += [(rank, each) for rank, each in enumerate(of_all) if rank != self.rank]
        return SharedPart(tuple(of_all), part)

    def wait_for_all(self) -> None:
        self.num_waits += 1
        for rank, part in self.theirs:
            part.fill_(self.written[rank] if self.num_waits == 1 else 0)

    def _all(self, here: bool) -> bool:
        self.asked.append(here)
        return here


@pytest.fixture
def small_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the memory that is tried ordinary memory, and little."""
    monkeypatch.setattr(sharded_blocks, "TRIED_BYTES", 64)
    monkeypatch.setattr(
        sharded_blocks, "allocate_readable", lambda size, device: torch.empty(size, dtype=torch.uint8, device=device)
    )


@pytest.mark.usefixtures("small_tries")
@pytest.mark.parametrize(("size", "rank"), [(2, 0), (2, 1), (4, 2)])
def test_memory_is_read_after_all_have_written_and_kept_until_all_have_read(size: int, rank: int) -> None:
    group = Played(size, rank)
    assert group._try_to_read() and group.num_waits == 2


@pytest.mark.usefixtures("small_tries")
def test_memory_that_holds_other_numbers_or_cannot_be_shared_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (0, 1, 3):
        group = Played(4, 2, {wrong: 77})
        assert not group._try_to_read() and group.num_waits == 2, "the others wait, whatever this one has found"

    def fail(part: torch.Tensor) -> SharedPart:
        raise RuntimeError("no such thing here")

    monkeypatch.setattr(group, "share", fail)
    assert not group._try_to_read()


@pytest.mark.parametrize(
    ("on_host", "unreachable", "works", "expected", "asked"),
    [
        ("4", None, True, True, [True, True]),
        ("8", None, True, True, [True, True]),
        ("4", None, False, False, [True, False]),
        ("4", 4, True, False, [False]),
        ("4", 7, True, False, [False]),
        ("4", 6, True, True, [True, True]),  # its own number, which it need not ask for
        ("6", None, True, False, []),
    ],
)
def test_all_gpus_of_a_group_are_asked_for_and_all_processes_decide_alike(
    on_host: str,
    unreachable: int | None,
    works: bool,
    expected: bool,
    asked: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The third process of the second group of four has GPU 6, and its neighbours have 4, 5 and 7."""
    group = Played(4, 2, device=torch.device("cuda", 6))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", on_host)
    monkeypatch.setattr(group, "_try_to_read", lambda: works)
    seen: list[tuple[int, int]] = []

    def can_access(own: int, other: int) -> bool:
        seen.append((own, other))
        return other != unreachable

    monkeypatch.setattr(sharded_blocks, "can_access", can_access)
    assert group._can_all_read() is expected and group.asked == asked
    assert set(seen) <= {(6, 4), (6, 5), (6, 7)} and (not expected or len(seen) == 3)


@pytest.mark.parametrize("rank", range(3))
def test_a_block_is_read_from_all_parts_in_their_order(rank: int) -> None:
    group = Played(3, rank)
    parts = [torch.full((size,), rank + 1, dtype=torch.uint8) for size in (4, 2)]
    source = ReadParts(group, CopyLane(CPU), parts)
    assert group.num_waits == 1 and source.outside_bytes == 6
    for index, size in enumerate((4, 2)):
        slot = torch.full((16,), 9, dtype=torch.uint8)  # that of the largest block
        source.fill(index, slot, None)
        assert slot.tolist() == [1] * size + [2] * size + [3] * size + [9] * (16 - 3 * size)
    with source.apart():
        pass
    assert group.num_waits == 1, "nobody has to wait for anybody"
