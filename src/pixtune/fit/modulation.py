"""Modulation layers off the device: what they make of coming steps is computed ahead, many steps in one pass.

A modulation layer sees one row a sample: SiLU of the time embedding. In the 20-billion-weight model these layers hold
a third of all weights. While the base is frozen, the rows of coming steps are known: sigmas are pure functions of the
step. So the weights stay in their file, and every so often they stream through the device once, layer by layer, and
fill a table with the rows of the next hundreds of draws.

Numbers are those of the plain layers within rounding of the format: the same product runs on more rows at once.
Tables of a training run are cut at fixed step numbers, so a resumed run computes the very same ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pixtune.families.base import Conditioning, ModelFamily
from pixtune.weights import read_header

ReadWeight = Callable[[str], Tensor]
"""Tensor name -> the tensor on the CPU."""

LARGEST_DISTANCE = 0.02
"""Relative, of a time embedding from the nearest one in the table. The same sigma embedded in a batch of another size
differs by rounding (bf16: 0.004); another sigma by more than this, or its rows are the same within rounding, too."""


class ModulationRows(nn.Module):
    """Stands where a modulation layer stood and hands out the rows that were chosen for this forward pass."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.rows: Tensor | None = None

    def forward(self, activated_BD: Tensor) -> Tensor:
        assert self.rows is not None, "a modulation was asked for before its table was computed"
        return self.rows[: activated_BD.shape[0]]

    def extra_repr(self) -> str:
        return f"out_features={self.out_features}"


def read_from_files(files: Sequence[Path]) -> ReadWeight:
    """Reads single tensors from safetensors files: mapped, so that host memory holds them as page cache only."""
    file_of = {name: file for file in files for name in read_header(file)}

    def read(name: str) -> Tensor:
        with safe_open(file_of[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    return read


class ModulationTable:
    """Rows of all modulation layers for up to `num_rows` time embeddings, and the choice among them.

    Args:
        embedder: the module whose output is the time embedding; each call of it chooses the rows for the blocks behind.
        layers: paths of the modulation layers in the model's files, each with its stand-in.
        num_rows: most rows at once.
    """

    def __init__(
        self, embedder: nn.Module, layers: dict[str, ModulationRows], read_weight: ReadWeight, num_rows: int
    ) -> None:
        self._layers, self._read_weight, self.num_rows = layers, read_weight, num_rows
        # These three keep their memory once they have it: recorded steps read and write it (capture.py).
        self._embeddings_ND: Tensor | None = None
        self._table_NO: Tensor | None = None
        self._worst: Tensor | None = None
        self._computing = False
        self.purpose: object = None
        """What the rows were computed for."""
        embedder.register_forward_hook(self._choose)

    @property
    def row_bytes(self) -> int:
        """Of one row of the table in bf16."""
        return 2 * sum(stand_in.out_features for stand_in in self._layers.values())

    @torch.no_grad()
    def compute(self, embed: Callable[[], Tensor], purpose: object) -> None:
        """Replaces the table.

        Args:
            embed: returns the time embeddings to prepare for, shape (N, D) with N up to `num_rows`.
            purpose: kept beside the table.

        Raises:
            RuntimeError: a forward pass since the last time used an embedding that was not in the table.
        """
        self.check()
        self._computing = True
        try:
            embeddings_ND = embed()
        finally:
            self._computing = False
        assert len(embeddings_ND) <= self.num_rows, (len(embeddings_ND), self.num_rows)
        total = sum(stand_in.out_features for stand_in in self._layers.values())
        if self._table_NO is None or self._embeddings_ND is None:
            self._table_NO = embeddings_ND.new_empty(self.num_rows, total)
            self._embeddings_ND = embeddings_ND.new_empty(self.num_rows, embeddings_ND.shape[1])
            self._worst = torch.zeros((), device=embeddings_ND.device)
        self._embeddings_ND.fill_(torch.inf)  # rows without a draw are near to none
        self._embeddings_ND[: len(embeddings_ND)] = embeddings_ND
        activated_ND = nn.functional.silu(embeddings_ND)
        columns = self._table_NO[: len(embeddings_ND)].split([s.out_features for s in self._layers.values()], dim=1)
        for target_NO, (weight_OD, bias_O) in zip(columns, self._stream(embeddings_ND), strict=True):
            target_NO.copy_(nn.functional.linear(activated_ND, weight_OD, bias_O))
        self.purpose = purpose

    def _stream(self, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Weight and bias of each layer on the device, the next one being read meanwhile."""
        on_gpu = like.device.type == "cuda"

        def read(path: str) -> tuple[Tensor, Tensor]:
            parts = [self._read_weight(f"{path}.{part}").to(like.dtype) for part in ("weight", "bias")]
            if on_gpu:  # a copy out of a mapped file is slow, so it goes through page-locked memory
                parts = [torch.empty_like(part, pin_memory=True).copy_(part) for part in parts]
            return parts[0], parts[1]

        with ThreadPoolExecutor(1) as reader:
            paths = list(self._layers)
            coming = reader.submit(read, paths[0])
            for following in [*paths[1:], None]:
                weight, bias = coming.result()
                if following is not None:
                    coming = reader.submit(read, following)
                yield weight.to(like.device, non_blocking=True), bias.to(like.device, non_blocking=True)

    @torch.no_grad()
    def _choose(self, embedder: nn.Module, arguments: tuple[Any, ...], embedding_BD: Tensor) -> None:
        """Finds each embedding in the table, on the device and without waiting for it."""
        if self._computing:
            return
        if self._embeddings_ND is None or self._table_NO is None or self._worst is None:
            raise RuntimeError("the modulation table is empty: compute() comes before the first forward pass")
        known_ND, wanted_BD = self._embeddings_ND.float(), embedding_BD.float()
        distance_BN = torch.stack([(known_ND - row_D).norm(dim=1) for row_D in wanted_BD])
        nearest_B, index_B = distance_BN.min(dim=1)
        relative = (nearest_B / wanted_BD.norm(dim=1)).max()
        torch.maximum(self._worst, relative, out=self._worst)
        chosen_BO = self._table_NO[index_B]
        columns = chosen_BO.split([stand_in.out_features for stand_in in self._layers.values()], dim=1)
        for stand_in, rows in zip(self._layers.values(), columns, strict=True):
            stand_in.rows = rows

    def check(self) -> None:
        """Waits for the device.

        Raises:
            RuntimeError: a forward pass used an embedding that was not in the table.
        """
        if self._worst is None:
            return
        worst = float(self._worst)
        self._worst.zero_()
        if not worst < LARGEST_DISTANCE:
            raise RuntimeError(
                f"a forward pass used a time embedding that is {worst:.1%} away from the nearest prepared one: "
                "its sigma was not among those announced. This is a fault of pixtune; please report it."
            )


def attach_table(
    transformer: nn.Module, family: ModelFamily, layers: dict[str, ModulationRows], read: ReadWeight, num_rows: int
) -> None:
    """Connects the stand-ins of a loaded transformer; `table_of` finds the table again."""
    embedder = transformer.get_submodule(family.time_embedder)
    transformer.modulation_table = ModulationTable(embedder, layers, read, num_rows)  # type: ignore[assignment]


def table_of(transformer: nn.Module) -> ModulationTable | None:
    """The transformer's table; None where its modulation layers are in place."""
    return getattr(transformer, "modulation_table", None)


def most_announced(transformer: nn.Module) -> int:
    """How many samples `announce` takes at a time."""
    table = table_of(transformer)
    return sys.maxsize if table is None else table.num_rows - 1


def announce(
    transformer: nn.Module, family: ModelFamily, sigma_N: Tensor, conditioning: Conditioning, guidance: float = 1.0
) -> None:
    """Prepares the forward passes to come. Does nothing where the modulation layers are in place, or nothing changes.

    Args:
        sigma_N: of all samples of those passes, on the model's device; N below the table's number of rows.
        conditioning: stacked, of the same samples; only what `family.time_features` names is read.
    """
    table = table_of(transformer)
    if table is None:
        return
    features = {name: conditioning[name] for name in family.time_features}
    purpose = (sigma_N.tolist(), guidance, {name: tensor.tolist() for name, tensor in features.items()})
    if table.purpose != purpose:
        table.compute(lambda: family.embed_time(transformer, sigma_N, features, guidance), purpose)


@dataclass
class StepsAhead:
    """Keeps the table of a training run ahead of its steps, in stretches cut at fixed step numbers.

    Args:
        times_of: step -> sigmas of all this process's samples in it and their `time_features`, stacked; on the CPU.
        samples_per_step: of this process.
    """

    transformer: nn.Module
    family: ModelFamily
    times_of: Callable[[int], tuple[Tensor, Conditioning]]
    samples_per_step: int
    num_steps: int
    guidance: float
    device: torch.device

    def reach(self, step: int) -> None:
        """Makes sure that the rows of a step are there."""
        table = table_of(self.transformer)
        if table is None:
            return
        stretch = (table.num_rows - 1) // self.samples_per_step  # one row is for pictures that are seen as clean
        first = step - step % stretch
        purpose = ("steps from", first)
        if table.purpose == purpose:
            return
        steps = range(first, min(first + stretch, self.num_steps))
        sigmas, features = zip(*(self.times_of(number) for number in steps), strict=True)
        sigma_N = torch.cat(sigmas).to(self.device)
        stacked = {name: torch.cat([row[name] for row in features]).to(self.device) for name in features[0]}
        table.compute(lambda: self.family.embed_time(self.transformer, sigma_N, stacked, self.guidance), purpose)
