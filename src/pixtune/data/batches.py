"""Which samples meet in which batch, and what is drawn for them: a pure function of the seed, so it can be resumed.

The unit is the *global micro-batch*: `batch_size * num_processes` draws of one bucket, of which process r takes its
contiguous share. Two processes therefore see exactly what one process with twice the batch size sees.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pixtune import draws
from pixtune.config.schema import ObjectiveConfig
from pixtune.families.base import Conditioning, LatentDistribution
from pixtune.objective import draw_sigmas, shift_sigmas


@dataclass(frozen=True)
class Draw:
    """One sample's turn: which sample, and which of its framings (see `random_ratio`)."""

    sample: int
    variant: int


class BatchPlan:
    """The order of draws of a whole run.

    Args:
        buckets: the bucket of each sample and variant: `buckets[sample][variant]`. Draws meet only within a bucket.
        global_batch_size: draws in one global micro-batch.
        seed: the run's seed.
    """

    def __init__(self, buckets: Sequence[Sequence[tuple[int, int]]], global_batch_size: int, seed: int) -> None:
        self.buckets = buckets
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._epoch_ends: list[int] = []
        self.epoch = lru_cache(maxsize=4)(self._epoch)

    def _epoch(self, epoch: int) -> list[list[Draw]]:
        """The micro-batches of one epoch: every sample once, then as many again as fill each bucket's last batch."""
        by_bucket: dict[tuple[int, int], list[Draw]] = {}
        for sample in draws.shuffled(len(self.buckets), self.seed, "order", epoch):
            variants = self.buckets[sample]
            variant = int(draws.uniform(self.seed, "ratio", epoch, sample) * len(variants))
            by_bucket.setdefault(variants[variant], []).append(Draw(sample, variant))
        size = self.global_batch_size
        micro_batches = []
        for members in by_bucket.values():
            # A short batch would weigh its samples more; wrapping round keeps every step's size and every rank's work.
            padded = [members[i % len(members)] for i in range(-(-len(members) // size) * size)]
            micro_batches += [padded[i : i + size] for i in range(0, len(padded), size)]
        return [micro_batches[i] for i in draws.shuffled(len(micro_batches), self.seed, "order", epoch, "batches")]

    def epoch_end(self, epoch: int) -> int:
        """Number of micro-batches up to and with this epoch."""
        while len(self._epoch_ends) <= epoch:
            before = self._epoch_ends[-1] if self._epoch_ends else 0
            self._epoch_ends.append(before + len(self.epoch(len(self._epoch_ends))))
        return self._epoch_ends[epoch]

    def epoch_of(self, index: int) -> int:
        """The epoch in which micro-batch `index` falls."""
        epoch = max(0, len(self._epoch_ends) - 1)
        while epoch > 0 and self.epoch_end(epoch - 1) > index:
            epoch -= 1
        while self.epoch_end(epoch) <= index:
            epoch += 1
        return epoch

    def micro_batch(self, index: int) -> list[Draw]:
        """The draws of global micro-batch `index` of the run."""
        epoch = self.epoch_of(index)
        start = self.epoch_end(epoch - 1) if epoch else 0
        return self.epoch(epoch)[index - start]


@dataclass(frozen=True)
class Batch:
    """One process's share of a micro-batch: everything a step needs, already drawn."""

    latents_BCHW: Tensor
    noise_BCHW: Tensor
    sigma_B: Tensor
    conditioning: Conditioning
    names: list[str]

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            change(self.latents_BCHW),
            change(self.noise_BCHW),
            change(self.sigma_B),
            {name: change(tensor) for name, tensor in self.conditioning.items()},
            self.names,
        )

    def to(self, device: torch.device) -> Batch:
        """On the device; does not wait for the copy where memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which copies to the device run in the background."""
        return self._map(Tensor.pin_memory)


@dataclass(frozen=True)
class SampleReader:
    """How a batch gets at a sample's encodings, wherever they live."""

    read_latents: Callable[[int, int], LatentDistribution]
    """Sample, variant -> distribution with batch size 1."""
    read_text: Callable[[int | None], Conditioning]
    """Sample -> its caption's features; None -> the dropped caption's."""
    stack: Callable[[Sequence[Conditioning]], Conditioning]
    time_shift: Callable[[int, int], float]
    """Latent height, width -> mu of the model's own shift."""
    names: Sequence[str]


@dataclass(frozen=True)
class BatchSource:
    """Micro-batch number -> this process's batch. Position alone decides everything."""

    plan: BatchPlan
    reader: SampleReader
    objective: ObjectiveConfig
    caption_dropout_rate: float
    rank: int = 0
    world_size: int = 1

    def batch(self, index: int, members: Sequence[Draw]) -> Batch:
        """Reads and draws this process's share of global micro-batch `index`, whose draws are `members`."""
        share = self.plan.global_batch_size // self.world_size
        slots = range(self.rank * share, (self.rank + 1) * share)
        seed, reader = self.plan.seed, self.reader
        latents, noise, rows, names = [], [], [], []
        for slot in slots:
            draw = members[slot]
            distribution = reader.read_latents(draw.sample, draw.variant)
            shape = distribution.mean_BCHW.shape
            latents.append(distribution.sample(draws.normal(shape, seed, "latents", index, slot)))
            noise.append(draws.normal(shape, seed, "noise", index, slot))
            dropped = draws.uniform(seed, "caption dropout", index, slot) < self.caption_dropout_rate
            rows.append(reader.read_text(None if dropped else draw.sample))
            names.append(reader.names[draw.sample])
        latents_BCHW = torch.cat(latents)
        return Batch(
            latents_BCHW, torch.cat(noise), self._sigmas(index, slots, latents_BCHW), reader.stack(rows), names
        )

    def _sigmas(self, index: int, slots: range, latents_BCHW: Tensor) -> Tensor:
        objective = self.objective
        uniform_B = torch.tensor([draws.uniform(self.plan.seed, "sigma", index, slot) for slot in slots])
        sigma_B = draw_sigmas(
            objective.sigma_distribution,
            uniform_B,
            logit_mean=objective.logit_mean,
            logit_std=objective.logit_std,
            mode_scale=objective.mode_scale,
        )
        if objective.shift == "none":
            return sigma_B
        if objective.shift == "model":
            return shift_sigmas(sigma_B, self.reader.time_shift(*latents_BCHW.shape[-2:]))
        return shift_sigmas(sigma_B, objective.shift)


def read_ahead(source: BatchSource, start: int, end: int, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Batches `start` to `end` - 1 in order, made ahead of the step by `num_workers` threads (0: on demand).

    Threads rather than processes: the work is file reads and generators, which release the interpreter lock, and
    nothing has to be copied between processes or through /dev/shm.
    """

    def make(index: int, members: Sequence[Draw]) -> Batch:
        batch = source.batch(index, members)
        return batch.pin_memory() if pin_memory else batch

    if num_workers == 0:
        for index in range(start, end):
            yield make(index, source.plan.micro_batch(index))
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="read-ahead")
    try:
        pending: deque[Future[Batch]] = deque()
        for index in range(start, end):
            # The plan is consulted here, in one thread: it keeps state between calls.
            pending.append(pool.submit(make, index, source.plan.micro_batch(index)))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
