"""Modulation layers off the device, whose outputs are computed ahead, for many steps in one pass.

A modulation layer sees one row per example: SiLU of the time embedding. In the 20-billion-weight model these layers
hold a third of all weights. While the base is frozen, the rows of coming steps are known: sigmas are pure functions of
the step. So the weights stay in their file, and pass through the device layer by layer to fill a table with the rows of
the next hundred draws. Rows are large, 4.4 MB in that model, so the table is in host memory, and the current step's
rows on the device. While a table is in use the next one is filled, a few layers at each step: reading 13.6 GB at once
would stop the run for seconds.

Numbers are those of the plain layers within rounding of the format: the same product runs on more rows at once.
Tables of a training run are cut at fixed step numbers, so a resumed run computes exactly the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.modulation_filling import Filling, ModulationRows, Passage, ReadWeight
from pixtune.engine.transfer import host_buffer

MAX_DISTANCE = 0.02
"""Largest relative distance of a time embedding from the nearest one in the table. The same sigma embedded in a batch
of another size differs by rounding (bf16: 0.004); another sigma differs by more than this, unless its rows are the same
within rounding too."""

STEPS, SAMPLES = "steps", "samples"
"""Passes that are shown rows."""


class ShownRows:
    """Rows on the device among which the passes of one kind, training steps or samples, find their own.

    All memory here is kept once it is there: captured passes read and write it (`capture.py`).

    Args:
        num_rows: number of rows, which is always the same.
    """

    def __init__(self, table: Filling, num_rows: int) -> None:
        self.embeddings_RD = table.embeddings_ND.new_empty(num_rows, table.embeddings_ND.shape[1])
        self._rows_RO = table.embeddings_ND.new_empty(num_rows, table.rows_NO.shape[1])
        self._places: list[tuple[object, int] | None] = [None] * num_rows
        """Purpose of the table and place in it that each row has come from."""
        self._chosen: dict[int, Tensor] = {}

    def show(self, table: Filling, places: Sequence[int]) -> None:
        """Copies rows of a table, without waiting for the device."""
        for target, place in enumerate(places):
            place %= len(table.embeddings_ND)
            if self._places[target] == (table.purpose, place):
                continue
            self._places[target] = table.purpose, place
            self.embeddings_RD[target] = table.embeddings_ND[place]
            self._rows_RO[target].copy_(table.rows_NO[place], non_blocking=True)

    def choose(self, index_B: Tensor) -> Tensor:
        """Returns the rows with these indices, on the device; valid until the next call for as many."""
        if len(index_B) not in self._chosen:
            self._chosen[len(index_B)] = self._rows_RO.new_empty(len(index_B), self._rows_RO.shape[1])
        return torch.index_select(self._rows_RO, 0, index_B, out=self._chosen[len(index_B)])


class ModulationTable:
    """Rows of all modulation layers for up to `num_rows` time embeddings, and the choice among them.

    There are two tables, so that one is filled, or serves passes between steps, while the other is in use.

    Args:
        embedder: the module whose output is the time embedding; each call of it chooses the rows for the blocks after
            it.
        layers: paths of the modulation layers in the model's files, each with its stand-in.
        num_rows: number of rows of each table.
    """

    def __init__(
        self, embedder: nn.Module, layers: dict[str, ModulationRows], read_weight: ReadWeight, num_rows: int
    ) -> None:
        self._layers, self._read_weight, self.num_rows = layers, read_weight, num_rows
        self._passage: Passage | None = None
        self._memory: list[Tensor | None] = [None, None]
        self._tables: list[Filling | None] = [None, None]
        self._used = 0
        """Index of the table that the steps use."""
        self._searched: Filling | None = None
        """Table in which every row is searched; None: only the shown rows are."""
        self._source = STEPS, 0
        """Passes whose rows are shown, and the index of the table that they come from."""
        self._shown: ShownRows | None = None
        self._kept: dict[tuple[str, int], ShownRows] = {}
        """Shown rows by the passes that look for them and by their number."""
        self._worst: Tensor | None = None  # captured passes write here
        self._computing = False
        embedder.register_forward_hook(self._choose)

    # ---- for steps and samples, which may be captured and wait for nothing

    def use(self, purpose: object, embed: Callable[[], Tensor]) -> None:
        """Makes this table the one whose rows are shown, and fills what has not been filled ahead.

        Args:
            embed: returns the time embeddings to prepare for, shape (N, D) with N up to `num_rows`.

        Raises:
            RuntimeError: a forward pass since the last check used an embedding that was not in the table.
        """
        current = self._tables[self._used]
        if current is None or current.purpose != purpose:
            self.check()
            self.prepare(purpose, embed)
            self._used = 1 - self._used
            current = self._tables[self._used]
        assert current is not None
        current.finish()
        self._searched, self._source = None, (STEPS, self._used)

    def use_for_samples(self, purpose: object, embed: Callable[[], Tensor]) -> None:
        """Makes this table the one whose rows are shown until `use` is called, and leaves the steps' own in place.

        Raises:
            RuntimeError: see `use`.
        """
        self._fill_beside(purpose, embed)
        self._searched, self._source = None, (SAMPLES, 1 - self._used)

    def prepare(self, purpose: object, embed: Callable[[], Tensor], share: float = 0.0) -> None:
        """Fills a share of the table that will be used after the current one."""
        place = 1 - self._used
        coming = self._tables[place]
        if coming is None or coming.purpose != purpose:
            coming = self._begin(place, purpose, embed)
        coming.advance(math.ceil(share * coming.num_layers))

    @torch.no_grad()
    def show(self, places: Sequence[int]) -> None:
        """Copies rows of the table in use to where passes look for theirs.

        Steps show the same number of rows each time. Samples may show other numbers, for other passes.

        Args:
            places: indices of the rows in the table; -1 is the last one.
        """
        passes, number = self._source
        table = self._tables[number]
        assert table is not None
        key = (passes, len(places))
        if key not in self._kept:
            self._kept[key] = ShownRows(table, len(places))
        self._shown = self._kept[key]
        self._shown.show(table, places)

    # ---- for held-out losses between steps

    def answer(self, purpose: object, embed: Callable[[], Tensor]) -> None:
        """Makes every row of this table available until `use` is called. Each pass then waits for the device.

        Raises:
            RuntimeError: see `use`.
        """
        self._searched = self._fill_beside(purpose, embed)

    def _fill_beside(self, purpose: object, embed: Callable[[], Tensor]) -> Filling:
        """Fills the table that the steps do not use, and returns it."""
        self.check()
        self.prepare(purpose, embed)
        beside = self._tables[1 - self._used]
        assert beside is not None
        beside.finish()
        return beside

    def check(self) -> None:
        """Checks that all passes found their embeddings. Waits for the device.

        Raises:
            RuntimeError: a forward pass used an embedding that was not in the table.
        """
        if self._worst is None:
            return
        worst = float(self._worst)
        self._worst.zero_()
        if not worst < MAX_DISTANCE:
            raise RuntimeError(
                f"a forward pass used a time embedding that is {worst:.1%} away from the nearest prepared one: "
                "its sigma was not among those announced. This is a bug in pixtune; please report it."
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
        """Hands out the rows of each embedding. Shown rows are found on the device, without waiting for it."""
        if self._computing:
            return
        known = self._shown if self._searched is None else self._searched
        if known is None or self._worst is None:
            raise RuntimeError("the modulation table is empty: it is prepared before the first forward pass")
        known_RD = known.embeddings_RD if isinstance(known, ShownRows) else known.embeddings_ND
        distance_BN = torch.stack([(known_RD.float() - row_D).norm(dim=1) for row_D in embedding_BD.float()])
        nearest_B, index_B = distance_BN.min(dim=1)
        relative = (nearest_B / embedding_BD.float().norm(dim=1)).max()
        torch.maximum(self._worst, relative, out=self._worst)
        if isinstance(known, ShownRows):
            chosen_BO = known.choose(index_B)
        else:
            chosen_BO = known.rows_NO[index_B.cpu()].to(embedding_BD.device)
        columns = chosen_BO.split([stand_in.out_features for stand_in in self._layers.values()], dim=1)
        for stand_in, rows in zip(self._layers.values(), columns, strict=True):
            stand_in.rows = rows
