"""Modulation tables filled beside the steps: every row is right at its step, whatever is under way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pixtune.engine.modulation import ModulationTable
from pixtune.engine.modulation_filling import ModulationRows

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
NUM_LAYERS, WIDTH, OUTPUTS, STRETCH = 24, 3072, 9216, 16


def giving(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def test_rows_are_right_at_every_step_of_several_stretches() -> None:
    """Weights have a real size, so that copies are under way while steps run; one table serves pictures between."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).bfloat16()

    layers = {f"blocks.{number}": ModulationRows(WIDTH, OUTPUTS) for number in range(NUM_LAYERS)}
    weights = {f"{path}.weight": (draw(OUTPUTS, WIDTH) / WIDTH**0.5).cpu() for path in layers}
    weights |= {f"{path}.bias": draw(OUTPUTS).cpu() for path in layers}
    embedder = nn.Identity()
    table = ModulationTable(embedder, layers, weights.__getitem__, STRETCH + 1)
    stretches, pictures = draw(3, STRETCH + 1, WIDTH), draw(5, WIDTH)

    def expect(embedding_BD: Tensor) -> None:
        embedder(embedding_BD)
        for path, layer in layers.items():
            weight, bias = (weights[f"{path}.{part}"].to(DEVICE) for part in ("weight", "bias"))
            wanted = nn.functional.linear(nn.functional.silu(embedding_BD), weight, bias)
            torch.testing.assert_close(layer(embedding_BD), wanted, rtol=2**-7, atol=2**-7)

    busy = draw(4096, 4096)
    for number, embeddings_ND in enumerate(stretches):
        for row in range(STRETCH):
            table.use(number, giving(embeddings_ND))
            table.show([row, -1])
            if number < 2:
                following = stretches[number + 1]
                table.prepare(number + 1, giving(following), (row + 1) / STRETCH)
            for _ in range(20):  # the host is ahead of the device, as it is in training
                busy = torch.tanh(busy @ busy)
            if row in (0, 3, STRETCH - 1):
                expect(embeddings_ND[row : row + 1])
                expect(embeddings_ND[[row, STRETCH]])
            if row == 9:
                table.answer("pictures", giving(pictures))
                expect(pictures[2:3])
    table.check()
