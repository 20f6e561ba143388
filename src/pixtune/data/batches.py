"""Batches: encodings and random numbers of the turns of `order.py`, as a pure function of a seed and their position.

Of each global micro-batch process r makes its contiguous share.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from pixtune import randomness
from pixtune.config.sections import ObjectiveConfig
from pixtune.data.order import Turn, Use
from pixtune.errors import DataError
from pixtune.family import Conditioning, LatentDistribution
from pixtune.objective import fit_into_range, shift_sigmas, sigmas_from_uniform
from pixtune.sizes import LatentShape

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """One process's share of a micro-batch: everything a step needs, its random numbers included."""

    latents_BCHW: Tensor
    noise_BCHW: Tensor
    sigma_B: Tensor
    conditioning: Conditioning
    controls: tuple[Tensor, ...]
    """Clean latents of the control pictures, each of shape BCHW with a size of its own."""
    names: list[str]
    weights_B1HW: Tensor | None = None
    """Weights of the latents' positions in their examples' losses. None, in all batches of a run: they are equal."""
    example_weight_B: Tensor | None = None
    """Factors of the examples' losses. None, in all batches of a run: they are 1."""

    @property
    def shapes(self) -> Hashable:
        """Shapes of all tensors: equal for batches that the same computation serves."""
        conditioning = tuple((name, tensor.shape) for name, tensor in self.conditioning.items())
        return self.latents_BCHW.shape, conditioning, tuple(control.shape for control in self.controls)

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.names)

    def parts(self, num_parts: int) -> list[Batch]:
        """Cuts the batch into parts of nearly equal size, each with one example at least."""
        places = torch.arange(len(self)).tensor_split(min(num_parts, len(self)))
        return [self._cut(slice(int(part[0]), int(part[-1]) + 1)) for part in places]

    def _cut(self, rows: slice) -> Batch:
        return replace(self.map(lambda tensor: tensor[rows]), names=self.names[rows])

    def tensors(self) -> tuple[Tensor, ...]:
        weights = (tensor for tensor in (self.weights_B1HW, self.example_weight_B) if tensor is not None)
        return (
            self.latents_BCHW, self.noise_BCHW, self.sigma_B, *self.conditioning.values(), *self.controls, *weights,
        )  # fmt: skip

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Returns the batch with `change` applied to each tensor."""
        return Batch(
            change(self.latents_BCHW),
            change(self.noise_BCHW),
            change(self.sigma_B),
            {name: change(tensor) for name, tensor in self.conditioning.items()},
            tuple(change(control) for control in self.controls),
            self.names,
            None if self.weights_B1HW is None else change(self.weights_B1HW),
            None if self.example_weight_B is None else change(self.example_weight_B),
        )

    def to(self, device: torch.device) -> Batch:
        """Copies the batch to the device, without waiting for the copy where memory is pinned."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Moves the batch to page-locked memory, from which copies to the device run in the background."""
        return self.map(Tensor.pin_memory)


MIN_TOKENS_TO_SPLIT = 1024
"""Image tokens per example from which a micro-batch is split by caption length, so that it needs no mask.

A mask costs 20 to 25% of a step, since the fast attention kernels take none. Examples of this many tokens fill a GPU
one by one; smaller ones are faster when they are padded and masked together. Captions that are padded to a multiple
need no mask, and as one batch they have the fewest shapes.
"""


@dataclass(frozen=True)
class ExampleReader:
    """Access to examples' encodings, wherever they live. Arguments of the functions stand before each arrow."""

    read_latents: Callable[[int, int], LatentDistribution]
    """Example, variant -> distribution with batch size 1."""
    read_text: Callable[[int, int, int | None], Conditioning]
    """Example, variant, which of its captions -> features of that caption; None: of the dropped caption."""
    read_controls: Callable[[int, int], Sequence[Tensor]]
    """Example, variant -> latents of its control pictures, each with batch size 1."""
    latent_shape: Callable[[int, int], LatentShape]
    """Example, variant -> shape of its latents, without reading them."""
    stack: Callable[[Sequence[Conditioning], int], Conditioning]
    """Examples' features and the multiple to pad them to -> a batch's; see `ModelFamily.stack_conditioning`."""
    time_shift: Callable[[int, int], float]
    """Latent height, width -> mu of the model's own shift."""
    num_image_tokens: Callable[[int, int], int]
    """Latent height, width -> number of tokens."""
    names: Sequence[str]
    read_weights: Callable[[int, int], Tensor] | None = None
    """Example, variant -> weights of its latents' positions, shape 11HW; None where no example has a mask."""
    example_weights: Sequence[float] | None = None
    """Factor of each example's loss; None where all are 1."""


class Order(Protocol):
    """The order of turns of a whole run: `BatchOrder`, or that of a stream."""

    seed: int
    global_batch_size: int

    @property
    def uses(self) -> Sequence[Use]: ...

    @property
    def an_example(self) -> int: ...

    def micro_batch(self, index: int) -> list[Turn]:
        """Returns the turns of global micro-batch `index` of the run. Asked for in one thread."""


@dataclass(frozen=True)
class BatchSource:
    """Source of this process's batches by the number of the micro-batch: position alone decides everything."""

    order: Order
    reader: ExampleReader
    objective: ObjectiveConfig
    caption_dropout_rate: float
    rank: int = 0
    world_size: int = 1
    text_multiple: int = 1
    """Number of tokens to whose multiples captions are padded."""

    def parts(self, index: int, members: Sequence[Turn]) -> list[Batch]:
        """Makes this process's share of global micro-batch `index`, whose turns are `members`.

        Returns:
            One batch, or several that together are the micro-batch; see `MIN_TOKENS_TO_SPLIT`.
        """
        singles = [self._draw(index, slot, members[slot]) for slot in self._slots]
        tokens = self.reader.num_image_tokens(*singles[0].latents_BCHW.shape[-2:])
        is_split = tokens >= MIN_TOKENS_TO_SPLIT and self.text_multiple == 1
        by_length: dict[object, list[_Single]] = {}
        for single in singles:
            text_shapes = tuple(tensor.shape for tensor in single.text.values())
            by_length.setdefault(text_shapes if is_split else None, []).append(single)
        return [self._join(group) for group in by_length.values()]

    def times(self, index: int, features: Sequence[str]) -> tuple[Tensor, Conditioning]:
        """Reads what the time embedding depends on in this process's share of micro-batch `index`.

        Args:
            features: entries of the conditioning to read.

        Returns:
            Sigmas, and the features of all examples, stacked.
        """
        members, reader = self.order.micro_batch(index), self.reader
        sigmas, rows = [], []
        for slot in self._slots:
            turn = members[slot]
            uniform = randomness.uniform(self.order.seed, "sigma", index, slot)
            _, height, width = reader.latent_shape(turn.example, turn.variant)
            sigmas.append(self._sigma(uniform, height, width))
            if features:
                rows.append(reader.read_text(turn.example, turn.variant, self._caption(index, slot, turn)))
        return torch.cat(sigmas), {name: torch.stack([row[name] for row in rows]) for name in features}

    def times_of_step(self, step: int, accumulation: int, features: Sequence[str]) -> tuple[Tensor, Conditioning]:
        """Joins the `times` of all micro-batches of an optimizer step."""
        parts = [self.times(step * accumulation + number, features) for number in range(accumulation)]
        sigmas, rows = zip(*parts, strict=True)
        return torch.cat(sigmas), {name: torch.cat([row[name] for row in rows]) for name in features}

    @property
    def _slots(self) -> range:
        """Places of this process in a global micro-batch."""
        share = self.order.global_batch_size // self.world_size
        return range(self.rank * share, (self.rank + 1) * share)

    def _caption(self, index: int, slot: int, turn: Turn) -> int | None:
        """Returns which of its captions a turn has; None where it is dropped."""
        rate = self.order.uses[turn.example].drops(self.caption_dropout_rate)
        is_dropped = randomness.uniform(self.order.seed, "caption dropout", index, slot) < rate
        return None if is_dropped else turn.caption

    def _draw(self, index: int, slot: int, turn: Turn) -> _Single:
        seed, reader = self.order.seed, self.reader
        distribution = reader.read_latents(turn.example, turn.variant)
        shape = distribution.mean_BCHW.shape
        return _Single(
            latents_BCHW=distribution.latents(randomness.normal(shape, seed, "latents", index, slot)),
            noise_BCHW=randomness.normal(shape, seed, "noise", index, slot),
            sigma=self._sigma(randomness.uniform(seed, "sigma", index, slot), *shape[-2:]),
            text=reader.read_text(turn.example, turn.variant, self._caption(index, slot, turn)),
            controls=reader.read_controls(turn.example, turn.variant),
            name=reader.names[turn.example],
            weights=reader.read_weights(turn.example, turn.variant) if reader.read_weights else None,
            example_weight=reader.example_weights[turn.example] if reader.example_weights else 1.0,
        )

    def _join(self, singles: Sequence[_Single]) -> Batch:
        return Batch(
            torch.cat([single.latents_BCHW for single in singles]),
            torch.cat([single.noise_BCHW for single in singles]),
            torch.cat([single.sigma for single in singles]),
            self.reader.stack([single.text for single in singles], self.text_multiple),
            tuple(torch.cat(column) for column in zip(*(single.controls for single in singles), strict=True)),
            [single.name for single in singles],
            torch.cat([single.weights for single in singles if single.weights is not None])
            if self.reader.read_weights
            else None,
            torch.tensor([single.example_weight for single in singles]) if self.reader.example_weights else None,
        )

    def _sigma(self, uniform: float, height: int, width: int) -> Tensor:
        """Computes one example's sigma from a uniform number; shape (1,)."""
        objective = self.objective
        sigma = sigmas_from_uniform(
            objective.sigma_distribution,
            torch.tensor([uniform]),
            logit_mean=objective.logit_mean,
            logit_std=objective.logit_std,
            mode_scale=objective.mode_scale,
        )
        if objective.shift == "model":
            sigma = shift_sigmas(sigma, self.reader.time_shift(height, width))
        elif objective.shift != "none":
            sigma = shift_sigmas(sigma, objective.shift)
        return fit_into_range(sigma, objective.min_sigma, objective.max_sigma)


@dataclass(frozen=True)
class _Single:
    """One example with its random numbers, with batch size 1."""

    latents_BCHW: Tensor
    noise_BCHW: Tensor
    sigma: Tensor
    text: Conditioning
    controls: Sequence[Tensor]
    name: str
    weights: Tensor | None
    example_weight: float


def timed(items: Iterable[T], waited: Callable[[float], None]) -> Iterator[T]:
    """Yields the items, and calls `waited` with the seconds that each of them took to come."""
    began = time.perf_counter()
    for item in items:
        waited(time.perf_counter() - began)
        yield item
        began = time.perf_counter()


def observed(micro_batches: Iterable[list[Batch]], see_batch: Callable[[Batch], None]) -> Iterator[list[Batch]]:
    """Yields the micro-batches, and calls `see_batch` with each batch once, when it is taken."""
    for batches in micro_batches:
        for batch in batches:
            see_batch(batch)
        yield batches


def read_ahead(source: BatchSource, start: int, end: int, num_workers: int, pin_memory: bool) -> Iterator[list[Batch]]:
    """Yields micro-batches `start` to `end` - 1 in order, which `num_workers` threads make ahead of the step.

    Threads serve better than processes: the work is file reads and generators, which release the interpreter lock, and
    nothing has to be copied between processes or through /dev/shm. With 0 threads each is made on demand.
    """

    def make(index: int, members: Sequence[Turn]) -> list[Batch]:
        parts = source.parts(index, members)
        return [part.pin_memory() for part in parts] if pin_memory else parts

    if num_workers == 0:
        for index in range(start, end):
            yield make(index, source.order.micro_batch(index))
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="read-ahead")
    try:
        pending: deque[Future[list[Batch]]] = deque()
        for index in range(start, end):
            try:  # the order is read here, in one thread: it keeps state between calls
                members = source.order.micro_batch(index)
            except DataError:
                while pending:  # what could be read before is trained on before
                    yield pending.popleft().result()
                raise
            pending.append(pool.submit(make, index, members))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
