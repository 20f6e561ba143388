"""Modulation layers off the device: what they make of coming steps is computed ahead, many steps in one pass.

A modulation layer sees one row an example: SiLU of the time embedding. In the 20-billion-weight model these layers hold
a third of all weights. While the base is frozen, the rows of coming steps are known: sigmas are pure functions of the
step. So the weights stay in their file, and stream through the device layer by layer to fill a table with the rows of
the next hundred draws. Rows are large, 4.4 MB in that model, so the table is in host memory, and each step has its own
on the device. While a table is in use the next one is filled, a few layers at each step: reading 13.6 GB at once would
stop the run for seconds.

Numbers are those of the plain layers within rounding of the format: the same product runs on more rows at once.
Tables of a training run are cut at fixed step numbers, so a resumed run computes the very same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pixtune.engine.modulation_filling import Filling, ModulationRows, Passage, ReadWeight
from pixtune.engine.transfer import host_buffer
from pixtune.storage.model_folder import read_header

LARGEST_DISTANCE = 0.02
"""Relative, of a time embedding from the nearest one in the table. The same sigma embedded in a batch of another size
differs by rounding (bf16: 0.004); another sigma by more than this, or its rows are the same within rounding, too."""


def read_from_files(files: Sequence[Path]) -> ReadWeight:
    """Reads single tensors from safetensors files: mapped, so that host memory holds them as page cache only."""
    file_of = {name: file for file in files for name in read_header(file)}

    def read(name: str) -> Tensor:
        with safe_open(file_of[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    return read


class ModulationTable:
    """Rows of all modulation layers for up to `num_rows` time embeddings, and the choice among them.

    There are two tables, so that one is filled while the other is in use, or serves pictures between steps.

    Args:
        embedder: the module whose output is the time embedding; each call of it chooses the rows for the blocks behind.
        layers: paths of the modulation layers in the model's files, each with its stand-in.
        num_rows: of each table.
    """

    def __init__(
        self, embedder: nn.Module, layers: dict[str, ModulationRows], read_weight: ReadWeight, num_rows: int
    ) -> None:
        self._layers, self._read_weight, self.num_rows = layers, read_weight, num_rows
        self._passage: Passage | None = None
        self._memory: list[Tensor | None] = [None, None]
        self._tables: list[Filling | None] = [None, None]
        self._used = 0
        """Place of the table that the steps use."""
        self._asking: Filling | None = None
        """Of this table any row may be asked for; None: of those that are shown."""
        # These three keep their memory once they have it: captured steps read and write it (capture.py).
        self._shown_RD: Tensor | None = None
        self._shown_RO: Tensor | None = None
        self._worst: Tensor | None = None
        self._shown: list[tuple[object, int] | None] = []
        """What is there: of which table, and at which place of it."""
        self._computing = False
        embedder.register_forward_hook(self._choose)

    # ---- for steps, which may be captured and wait for nothing

    def use(self, purpose: object, embed: Callable[[], Tensor]) -> None:
        """From now on rows of this table are shown; filled now, so far as it has not been ahead.

        Args:
            embed: returns the time embeddings to prepare for, shape (N, D) with N up to `num_rows`.

        Raises:
            RuntimeError: a forward pass since the last time used an embedding that was not in the table.
        """
        current = self._tables[self._used]
        if current is None or current.purpose != purpose:
            self.check()
            self.prepare(purpose, embed)
            self._used = 1 - self._used
            current = self._tables[self._used]
        assert current is not None
        current.finish()
        self._asking = None

    def prepare(self, purpose: object, embed: Callable[[], Tensor], share: float = 0.0) -> None:
        """Fills a share of the table that is used after the current one."""
        place = 1 - self._used
        coming = self._tables[place]
        if coming is None or coming.purpose != purpose:
            coming = self._begin(place, purpose, embed)
        coming.advance(math.ceil(share * coming.num_layers))

    @torch.no_grad()
    def show(self, places: Sequence[int]) -> None:
        """Copies rows of the table in use to where steps look for theirs; their number is always the same.

        Args:
            places: in the table; -1 is the last one.
        """
        table = self._tables[self._used]
        assert table is not None
        if self._shown_RD is None or self._shown_RO is None:
            self._shown_RD = table.embeddings_ND.new_empty(len(places), table.embeddings_ND.shape[1])
            self._shown_RO = table.embeddings_ND.new_empty(len(places), table.rows_NO.shape[1])
            self._shown = [None] * len(places)
        for target, place in enumerate(places):
            place %= len(table.embeddings_ND)
            if self._shown[target] == (table.purpose, place):
                continue
            self._shown[target] = table.purpose, place
            self._shown_RD[target] = table.embeddings_ND[place]
            self._shown_RO[target].copy_(table.rows_NO[place], non_blocking=True)

    # ---- for pictures and validation between steps

    def answer(self, purpose: object, embed: Callable[[], Tensor]) -> None:
        """From now on any row of this table is found, until `use` is called; each pass then waits for the device.

        Raises:
            RuntimeError: see `use`.
        """
        self.check()
        self.prepare(purpose, embed)
        asking = self._tables[1 - self._used]
        assert asking is not None
        asking.finish()
        self._asking = asking

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

    def _begin(self, place: int, purpose: object, embed: Callable[[], Tensor]) -> Filling:
        if (earlier := self._tables[place]) is not None:
            earlier.drop()
            self._tables[place] = None
        self._computing = True
        try:
            with torch.no_grad():
                embeddings_ND = embed()
        finally:
            self._computing = False
        assert len(embeddings_ND) <= self.num_rows, (len(embeddings_ND), self.num_rows)
        if self._passage is None:
            self._passage = Passage(self._layers, self._read_weight, self.num_rows, embeddings_ND)
            self._worst = torch.zeros((), device=embeddings_ND.device)
        if self._memory[place] is None:
            numbers = self.num_rows * sum(layer.out_features for layer in self._layers.values())
            memory = host_buffer(numbers * embeddings_ND.element_size(), embeddings_ND.device)
            self._memory[place] = memory.view(embeddings_ND.dtype).view(self.num_rows, -1)
        rows_NO = self._memory[place]
        assert rows_NO is not None
        filling = Filling(self._passage, embeddings_ND, rows_NO, purpose)
        self._tables[place] = filling
        return filling

    @torch.no_grad()
    def _choose(self, embedder: nn.Module, arguments: tuple[Any, ...], embedding_BD: Tensor) -> None:
        """Finds each embedding; among those that are shown, on the device and without waiting for it."""
        if self._computing:
            return
        known_RD = self._shown_RD if self._asking is None else self._asking.embeddings_ND
        if known_RD is None or self._worst is None:
            raise RuntimeError("the modulation table is empty: it is prepared before the first forward pass")
        distance_BN = torch.stack([(known_RD.float() - row_D).norm(dim=1) for row_D in embedding_BD.float()])
        nearest_B, index_B = distance_BN.min(dim=1)
        relative = (nearest_B / embedding_BD.float().norm(dim=1)).max()
        torch.maximum(self._worst, relative, out=self._worst)
        if self._asking is None:
            assert self._shown_RO is not None
            chosen_BO = self._shown_RO[index_B]
        else:
            chosen_BO = self._asking.rows_NO[index_B.cpu()].to(embedding_BD.device)
        columns = chosen_BO.split([stand_in.out_features for stand_in in self._layers.values()], dim=1)
        for stand_in, rows in zip(self._layers.values(), columns, strict=True):
            stand_in.rows = rows
