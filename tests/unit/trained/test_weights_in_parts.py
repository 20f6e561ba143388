"""Weights that processes hold rows of: stepped as whole ones are, written in pieces, read by any number of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from pixtune.config.schema import TrainConfig
from pixtune.engine.sharding import Rows
from pixtune.engine.together import Together
from pixtune.errors import DamagedError
from pixtune.plan.optimizers import TrainedTensors
from pixtune.storage.checkpoint import joined, load_checkpoint, save_checkpoint
from pixtune.storage.safetensors_writer import TensorFile
from pixtune.storage.slices import SlicedTensor, map_file, put_together, rows_in, slice_metadata, whole
from pixtune.trained import optim
from pixtune.trained.optimizers import build_optimizer
from pixtune.trained.sharded_files import states_in_rows, states_of_part, weights_of_part
from pixtune.trained.weight_update import WeightUpdate
from tests.unit.plan.test_all_weights import CONFIG

SHAPES = {"even": (16, 512), "uneven": (10, 512), "short": (1, 512), "narrow": (48, 90), "bias": (6144,)}
"""All parts are whole vectors of the processor, whose AdamW computes the rest of a tensor number by number.

Of two processes, "short" has no row for the second one; 8-bit states keep blocks of 256 in "even" and "uneven".
"""
SOUND = torch.tensor(0.0)


def values(step: int, name: str) -> Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(1000 * step + sum(name.encode())))


def whole_weights() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(values(0, name).bfloat16()) for name in SHAPES}


@pytest.fixture
def part() -> Iterator[Callable[[int, int], Together]]:
    """Makes this process one of several for the code under test; nothing is sent anywhere."""

    def become(rank: int, num: int) -> Together:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=num, store=FakeStore())
        return cast(Together, SimpleNamespace(part=rank, num_parts=num))

    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


def rows_of_part(shape: tuple[int, ...], part: int, num: int) -> Rows:
    """By torch.chunk, as FSDP2's documentation has it."""
    chunks = torch.arange(shape[0]).chunk(num)
    mine = chunks[part] if part < len(chunks) else torch.arange(0)
    return Rows(shape, int(mine[0]) if len(mine) else shape[0], int(mine[-1]) + 1 if len(mine) else shape[0])


def parts_of(weights: dict[str, nn.Parameter], part: int, num: int) -> dict[str, nn.Parameter]:
    mesh = init_device_mesh("cpu", (num,))
    parts = {}
    for name, weight in weights.items():
        own = rows_of_part(SHAPES[name], part, num).of(weight.detach()).clone()
        tensor = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=weight.shape, stride=weight.stride())
        parts[name] = nn.Parameter(tensor)
    return parts


def build(optimizer: str) -> Callable[[str, Any], optim.Optimizer]:
    config: TrainConfig = CONFIG.model_copy(update={"learning_rate": 1e-2})

    def of(name: str, stand_in: Any) -> optim.Optimizer:
        # Where processes hold parts, a whole weight's states are those that its parts have.
        return build_optimizer(config, optimizer, stand_in, True, TrainedTensors(SHAPES[name], in_parts=True))

    return of


def take_steps(update: WeightUpdate, rows: dict[str, Rows], steps: range) -> None:
    for step in steps:
        update.begin_step()
        for name in SHAPES:
            gradient = rows[name].of(values(step + 1, name)).contiguous()
            update.step_weight(name, gradient, torch.tensor(0.5), SOUND)
        update.end_step()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("has_masters", [False, True], ids=["rounded by chance", "fp32 copies"])
def test_parts_are_stepped_saved_and_resumed_bit_for_bit_as_whole_weights(
    optimizer: str, has_masters: bool, part: Callable[[int, int], Together]
) -> None:
    """Two steps in two parts, then two in three; given equal gradients, every bit is that of one process."""
    straight = whole_weights()
    alone = WeightUpdate(straight, build(optimizer), 3, 0, has_masters)
    take_steps(alone, {name: rows_of_part(shape, 0, 1) for name, shape in SHAPES.items()}, range(4))
    states, plain = optim.optimizer_state(alone, straight)

    files: list[tuple[dict[str, Tensor], dict[str, int]]] = []
    kept: dict[str, dict[str, Any]] = {}
    for num, steps in ((2, range(2)), (3, range(2, 4))):
        found = put_together([tensors for tensors, _ in files], [firsts for _, firsts in files])
        files, before = [], kept
        for rank in range(num):
            together = part(rank, num)
            parts = parts_of(whole_weights(), rank, num)
            rows = {name: rows_of_part(shape, rank, num) for name, shape in SHAPES.items()}
            update = WeightUpdate(parts, build(optimizer), 3, steps.start, has_masters, together=together)
            assert {name: update.rows(name) for name in SHAPES} == rows
            for name in parts if found else ():
                own = {k.split("/")[1]: v for k, v in found.items() if k.startswith(f"{name}/")}
                states_of_rows = states_in_rows(own, rows[name])
                stored = {f"{name}/{key}": state.clone() for key, state in states_of_rows.items()}
                value = rows_in(found[name], rows[name].start, rows[name].end)
                update.restore(name, value, stored, before.get(name, {}))
            take_steps(update, rows, steps)
            state, mine = optim.optimizer_state(update, parts)
            kept = mine if rank == 0 else kept
            for tensors, firsts in (weights_of_part(update.truest, rows), states_of_part(state, rows, rank)):
                files.append(({name: tensor.clone() for name, tensor in tensors.items()}, firsts))
    found = put_together([tensors for tensors, _ in files], [firsts for _, firsts in files])
    assert kept == plain
    assert not [name for name in SHAPES if not whole(found[name]).equal(alone.truest(name))]
    assert found.keys() == states.keys() | SHAPES.keys()
    assert all(whole(found[path]).equal(state) for path, state in states.items())
    if optimizer == "adamw_8bit":
        eight = {path.split("/")[0] for path, state in states.items() if state.dtype == torch.uint8}
        assert eight == {"even", "uneven"}, "rows of 512 numbers are two whole blocks"


def test_8_bit_states_that_rows_cut_become_the_fp32_numbers_that_they_stand_for() -> None:
    """A bias of a run in one process has 8 bits; of three processes none has whole blocks of it."""
    from bitsandbytes import functional

    config: TrainConfig = CONFIG.model_copy(update={"learning_rate": 1e-2})
    weight = nn.Parameter(torch.zeros(SHAPES["bias"]))
    optimizer = build_optimizer(config, "adamw_8bit", [weight])
    weight.grad = values(1, "bias")
    optimizer.step()
    states = {key: value for key, value in optimizer.state[weight].items() if isinstance(value, Tensor)}
    assert states["state1"].dtype == torch.uint8
    rows = rows_of_part(SHAPES["bias"], 1, 5)
    stock = functional.dequantize_blockwise(
        states["state1"], absmax=states["absmax1"], code=states["qmap1"], blocksize=256
    )
    assert states_in_rows(states, rows)["state1"].equal(rows.of(stock.float()))
    halves = states_in_rows(states, rows_of_part(SHAPES["bias"], 1, 2))
    assert halves["state1"].dtype == torch.uint8 and halves["absmax1"].equal(states["absmax1"][12:])


# ---- pieces


def test_pieces_come_back_from_files_and_damage_is_told(tmp_path: Any) -> None:
    tensor = torch.arange(40.0).view(10, 4)
    for number, (first, end) in enumerate(((0, 4), (4, 9), (9, 10))):
        piece = {"w": tensor[first:end].contiguous(), "s": torch.tensor(3.0)}
        save_file(piece, tmp_path / f"{number}", slice_metadata({"w": first, "s": 0}, piece))
    read = [map_file(tmp_path / f"{number}") for number in range(3)]
    found = put_together([tensors for tensors, _ in read], [firsts for _, firsts in read])
    sliced = found["w"]
    assert isinstance(sliced, SlicedTensor) and whole(sliced).equal(tensor) and float(whole(found["s"])) == 3
    for start, end in ((0, 10), (3, 5), (4, 9), (9, 10), (5, 5), (10, 10)):
        assert sliced.rows(start, end).equal(tensor[start:end])
    with pytest.raises(DamagedError, match="rows of w from 4 on are missing"):
        put_together([read[0][0], read[2][0]], [read[0][1], read[2][1]])
    with pytest.raises(DamagedError, match="rows of w"):
        put_together([read[0][0], read[0][0]], [read[0][1], read[0][1]])


NOWHERE = (
    "x", "[]", "{}", '{"w": {"saved_offsets": [-1, 0]}}', '{"w": {"saved_offsets": [0]}}',
    '{"w": {"saved_offsets": [0, 1]}}', '{"w": {"saved_offsets": ["a", 0]}}', "[" * 9999,
)  # fmt: skip


@pytest.mark.parametrize("places", NOWHERE)
def test_a_file_whose_pieces_have_no_place_is_damaged(tmp_path: Any, places: str) -> None:
    save_file({"w": torch.zeros(2, 2)}, tmp_path / "file", {"DCP_SHARDING_INFO": places})
    with pytest.raises(DamagedError, match="does not say where its pieces of tensors belong"):
        map_file(tmp_path / "file")


def test_a_checkpoint_of_pieces_is_read_as_one_whose_gaps_are_told(tmp_path: Any) -> None:
    tensor = torch.arange(40.0).view(10, 4)

    def save(step: int, second_from: int) -> Any:
        files = {}
        for number, (first, end) in enumerate(((0, 4), (second_from, 10)), start=1):
            piece = {"w": tensor[first:end]}
            files[f"transformer-{number:05d}-of-00002"] = TensorFile(piece, slice_metadata({"w": first}, piece))
        return save_checkpoint(tmp_path, step, files, {})

    read: Any = joined(load_checkpoint(save(1, 4)).tensors, "transformer")
    assert whole(read["w"]).equal(tensor)
    with pytest.raises(DamagedError, match=r"checkpoint-000002 is damaged: the rows of w from 4 on are missing"):
        load_checkpoint(save(2, 5))
