"""Blocks that stay gathered between their passes give the same gradients, and stay for no other pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from pixtune.engine.sharding import keep_gathered, shard_transformer, whole_of


class Blocks(nn.Module):
    """Three blocks, of which the second is recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.gathered: list[bool] = []

    def weights(self) -> list[Tensor]:
        return [block.get_parameter("0.weight") for block in self.blocks]

    def forward(self, x_BC: Tensor) -> tuple[Tensor]:
        first, second, last = self.blocks
        x_BC = checkpoint(second, first(x_BC), use_reentrant=False)
        self.gathered = [not isinstance(weight, DTensor) for weight in self.weights()]
        return (last(x_BC),)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())  # type: ignore[attr-defined]
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_blocks_stay_gathered_from_their_forward_to_their_backward_pass(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    plain = Blocks()
    x_BC = torch.randn(4, 6)
    plain(x_BC)[0].square().sum().backward()
    for keeps in (False, True):
        model = Blocks()
        model.load_state_dict(plain.state_dict())
        shard_transformer(model, list(model.blocks), mesh)
        if keeps:
            keep_gathered(model, list(model.blocks))
        with torch.no_grad():
            model(x_BC)
        assert model.gathered == [False, False, False], "a pass without gradients has nothing to stay for"
        for _ in range(2):
            model.zero_grad()
            output = model(x_BC)[0]
            assert model.gathered == [keeps, keeps, False], "the last one has not run yet"
            output.square().sum().backward()
            assert all(isinstance(weight, DTensor) for weight in model.weights())
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(whole_of(parameter.grad), plain.get_parameter(name).grad, rtol=1e-5, atol=1e-6)
