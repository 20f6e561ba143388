"""Fills a modulation table layer by layer: weights go from their file through the device, products to the host.

Each layer takes three steps, and those of neighbouring layers overlap: a thread reads it into page-locked memory, it is
copied to the device beside the computation, and the product is copied back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from pixtune.engine.transfer import CopyLane, Mark, host_buffer

ReadWeight = Callable[[str], Tensor]
"""Function from a tensor's name to the tensor on the CPU."""


class ModulationRows(nn.Module):
    """Stand-in for a modulation layer, which hands out the rows that were chosen for this forward pass."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rows: Tensor | None = None

    def forward(self, activated_BD: Tensor) -> Tensor:
        assert self.rows is not None, "a modulation layer ran before its table was computed"
        return self.rows[: activated_BD.shape[0]]

    def extra_repr(self) -> str:
        return f"out_features={self.out_features}"


class Passage:
    """Buffers, thread and copy lane by which one layer's weights at a time pass through the device, for all tables.

    One layer is read while the one before it is copied, so there are two buffers on the host and one on the device.

    Args:
        layers: paths in the model's files, each with its stand-in.
        num_rows: number of rows at most.
        like: a tensor on the device and in the format in which the products are computed.
    """

    def __init__(
        self, layers: Mapping[str, ModulationRows], read_weight: ReadWeight, num_rows: int, like: Tensor
    ) -> None:
        self.layers, self._read_weight = list(layers.items()), read_weight
        self.lane = CopyLane(like.device)
        largest = max(layers.values(), key=lambda layer: layer.out_features * (layer.in_features + 1))
        numbers = largest.out_features * (largest.in_features + 1)
        self._weights = like.new_empty(numbers)
        self._products = like.new_empty(num_rows * max(layer.out_features for layer in layers.values()))
        self._on_host = [host_buffer(numbers * like.element_size(), like.device).view(like.dtype) for _ in range(2)]
        self._sent: list[Mark] = [None, None]
        """Mark after which each host buffer may be written again."""
        self._multiplied = self.lane.reached()
        """Mark after which the device's buffer may be written again."""
        self._returned: Mark = None
        """Mark after which all products are on the host."""
        self._reader = ThreadPoolExecutor(1, "modulation")

    def read(self, number: int) -> Future[None]:
        """Begins to read a layer's weights into one of the two host buffers, which alternate."""
        return self._reader.submit(self._read, number)

    def _read(self, number: int) -> None:
        path, layer = self.layers[number]
        place = number % 2
        if (sent := self._sent[place]) is not None:
            sent.synchronize()
        weight_OD, bias_O = split(self._on_host[place], layer)
        weight_OD.copy_(self._read_weight(f"{path}.weight"))
        bias_O.copy_(self._read_weight(f"{path}.bias"))

    def send(self, number: int) -> Mark:
        """Begins to copy a layer's weights, which have been read, to the device, beside the step that has just begun.

        If they were copied after it, the next step's rows would wait for a hundred times as many bytes.
        """
        size = self.layers[number][1].out_features * (self.layers[number][1].in_features + 1)
        source = self._on_host[number % 2][:size]
        self._sent[number % 2] = arrived = self.lane.copy(self._weights[:size], source, after=self._multiplied)
        return arrived

    def multiply(self, number: int, arrived: Mark, activated_ND: Tensor, targets: Sequence[Tensor]) -> None:
        """Multiplies with a layer's weights and begins to copy each row to its target on the host."""
        layer = self.layers[number][1]
        weight_OD, bias_O = split(self._weights, layer)
        products_NO = self._products[: len(activated_ND) * layer.out_features].view(-1, layer.out_features)
        self.lane.wait(arrived)
        self.lane.wait(self._returned)
        torch.addmm(bias_O, activated_ND, weight_OD.T, out=products_NO)
        self._multiplied = self.lane.reached()
        self._returned = self.lane.copy_all(targets, products_NO.unbind(), after=self._multiplied)

    def wait_for_products(self) -> None:
        """Makes work that is launched from now on run after all products are on the host."""
        self.lane.wait(self._returned)


def split(flat: Tensor, layer: ModulationRows) -> tuple[Tensor, Tensor]:
    """Returns views of a layer's weight and bias in memory that has room for both."""
    size = layer.out_features * layer.in_features
    return flat[:size].view(layer.out_features, layer.in_features), flat[size : size + layer.out_features]


class Filling:
    """One table, which is filled layer by layer.

    Args:
        embeddings_ND: the time embeddings to prepare for, on the device.
        rows_NO: memory on the host for at least as many rows.
        purpose: a key of what the rows are for.
    """

    def __init__(self, passage: Passage, embeddings_ND: Tensor, rows_NO: Tensor, purpose: object) -> None:
        self.embeddings_ND, self.rows_NO, self.purpose = embeddings_ND, rows_NO, purpose
        self._passage, self._activated_ND = passage, nn.functional.silu(embeddings_ND)
        self._done = self._column = 0
        self._reading: Future[None] | None = passage.read(0)

    @property
    def num_layers(self) -> int:
        return len(self._passage.layers)

    @torch.no_grad()
    def advance(self, num_layers: int) -> None:
        """Fills until `num_layers` layers are done. The next one is then being read."""
        while self._done < num_layers:
            assert self._reading is not None
            self._reading.result()
            number, width = self._done, self._passage.layers[self._done][1].out_features
            arrived = self._passage.send(number)
            self._reading = self._passage.read(number + 1) if number + 1 < self.num_layers else None
            columns = self.rows_NO[: len(self.embeddings_ND), self._column : self._column + width]
            self._passage.multiply(number, arrived, self._activated_ND, columns.unbind())
            self._done, self._column = number + 1, self._column + width

    def finish(self) -> None:
        self.advance(self.num_layers)
        self._passage.wait_for_products()

    def drop(self) -> None:
        """Stops filling, after which the memory may be used for another table."""
        if self._reading is not None:
            self._reading.result()
        self._passage.wait_for_products()
