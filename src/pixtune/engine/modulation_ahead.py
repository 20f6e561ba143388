"""Announces coming passes to a transformer's modulation table, so that it holds their rows when they run.

Held-out losses are announced picture by picture. All sigmas of a sample are announced at once, and each sampler step is
shown its own row, so that no pass waits for the device. The steps of a training run are known from the first to the
last, and the table of the next stretch is filled while those of this one run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixtune.engine.load import LoadedTransformer
from pixtune.engine.modulation import ModulationTable
from pixtune.family import Conditioning, ModelFamily


def announce(
    transformer: LoadedTransformer,
    family: ModelFamily,
    sigma_N: Tensor,
    conditioning: Conditioning,
    guidance: float = 1.0,
) -> None:
    """Prepares the forward passes to come. Does nothing where the modulation layers are in place, or nothing changes.

    Args:
        sigma_N: sigmas of all examples of those passes, on the model's device; N below the table's number of rows.
        conditioning: stacked, of the same examples; only what `family.time_features` names is read.
    """
    if transformer.table is None:
        return
    features = {name: conditioning[name] for name in family.time_features}
    purpose = (sigma_N.tolist(), guidance, {name: tensor.tolist() for name, tensor in features.items()})
    transformer.table.answer(purpose, lambda: family.embed_time(transformer.module, sigma_N, features, guidance))


@dataclass(frozen=True)
class SigmasAhead:
    """Rows of all sampler steps of a batch of samples, made before the first of these, as far as the table has room.

    Where the time embedding depends on sigma alone, all examples of a step and all samples with its sigmas share a row.

    Args:
        sigmas: sigma of each sampler step.
        conditioning: stacked, of a step's examples; only what `family.time_features` names is read.
        device: the transformer's.
    """

    transformer: LoadedTransformer
    family: ModelFamily
    sigmas: Sequence[float]
    conditioning: Conditioning
    guidance: float
    device: torch.device

    def reach(self, number: int) -> None:
        """Makes sure that the rows of a sampler step are there, counted from 0."""
        table = self.transformer.table
        if table is None:
            return
        features = {name: self.conditioning[name] for name in self.family.time_features}
        per_step = len(next(iter(features.values()))) if features else 1
        stretch = (table.num_rows - 1) // per_step  # one row is for pictures that are seen as clean
        place = number % stretch
        if place == 0:
            self._fill(table, self.sigmas[number : number + stretch], features, per_step)
        table.show([*range(place * per_step, (place + 1) * per_step), -1])  # the clean one comes last

    def _fill(self, table: ModulationTable, sigmas: Sequence[float], features: Conditioning, per_step: int) -> None:
        purpose = (tuple(sigmas), self.guidance, {name: tensor.tolist() for name, tensor in features.items()})
        sigma_N = torch.tensor(sigmas, device=self.device).repeat_interleave(per_step)
        repeated = {name: tensor.repeat(len(sigmas), *[1] * (tensor.ndim - 1)) for name, tensor in features.items()}
        table.use_for_samples(
            purpose, lambda: self.family.embed_time(self.transformer.module, sigma_N, repeated, self.guidance)
        )


@dataclass
class StepsAhead:
    """Keeps the table of a training run ahead of its steps, in stretches cut at fixed step numbers.

    Args:
        times_of: step -> sigmas of all this process's examples in it and their `time_features`, stacked; on the CPU.
        examples_per_step: number of this process's examples in a step.
    """

    transformer: LoadedTransformer
    family: ModelFamily
    times_of: Callable[[int], tuple[Tensor, Conditioning]]
    examples_per_step: int
    num_steps: int
    guidance: float
    device: torch.device

    def reach(self, step: int) -> None:
        """Makes sure that the rows of a step are there."""
        table = self.transformer.table
        if table is None:
            return
        first, stretch = self._stretch_of(step, table)
        table.use(("steps from", first), lambda: self._embed(first, stretch))
        place = (step - first) * self.examples_per_step
        table.show([*range(place, place + self.examples_per_step), -1])  # the clean one comes last

    def look_ahead(self, step: int) -> None:
        """Fills a step's share of the next stretch's rows, ideally while the device is busy with the step."""
        table = self.transformer.table
        if table is None:
            return
        first, stretch = self._stretch_of(step, table)
        coming = first + stretch
        if coming < self.num_steps:
            share = (step - first + 1) / stretch
            table.prepare(("steps from", coming), lambda: self._embed(coming, stretch), share)

    def _stretch_of(self, step: int, table: ModulationTable) -> tuple[int, int]:
        """Returns the first step of the stretch that a step is in, and the stretch's length."""
        length = (table.num_rows - 1) // self.examples_per_step  # one row is for pictures that are seen as clean
        return step - step % length, length

    def _embed(self, first: int, stretch: int) -> Tensor:
        steps = range(first, min(first + stretch, self.num_steps))
        sigmas, features = zip(*(self.times_of(number) for number in steps), strict=True)
        sigma_N = torch.cat(sigmas).to(self.device)
        stacked = {name: torch.cat([row[name] for row in features]).to(self.device) for name in features[0]}
        return self.family.embed_time(self.transformer.module, sigma_N, stacked, self.guidance)
