"""Ladder of a run that trains all weights: ways of holding it in memory, fastest first, and what each needs. No torch.

What is saved, in this order: activations (recomputed blocks), 32-bit optimizer states, gradients (each weight is
stepped within the backward pass), states on the device (they wait in host memory), and last weights of blocks, which
come from host memory in each pass and go back once they were stepped. Clipping by the global norm has to know all
gradients before the first weight moves, so stepping within the backward pass then runs it twice.

Several processes each hold all weights where that fits; otherwise they hold them together (`engine/sharding.py`), with
their gradients and states, and gather each block before it runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pixtune.hardware.facts import GIB
from pixtune.plan.footprint import ELEMENT_BYTES, Footprint, block_weight_bytes
from pixtune.plan.optimizers import EXACT, KERNEL, OPTIMIZERS, SMALL
from pixtune.plan.rungs import FIXED_BYTES, STREAM_SLOTS, Rung, activation_units, kept_units, weight_bytes
from pixtune.plan.situation import Situation

AHEAD_BYTES = GIB
"""Device memory of optimizer states that are on their way from and to host memory."""
LEAST_HOST_TENSOR_BYTES = 2**16
"""Size below which an optimizer state stays on the device: those of norms and biases are a few megabytes together."""
MARGIN_BYTES = GIB // 2
"""Margin of the estimate: one run of full size has been measured (docs/experiments.md), and a plan that is a little too
bold ends the run."""

SCATTERED_BLOCKS = 17
"""Gradients of a block in fp32 whose memory torch's allocator holds and cannot use where weights lie in parts, since
what was freed on one stream serves no other: 22 GiB of a model with blocks of 0.34 billion weights, whether 71 or 107
GiB were allocated (benchmarks/results/two_gpus_h200). Where that does not fit, memory is freed and taken again in each
step, which then takes twice as long."""


@dataclass(frozen=True)
class AllWeightsRung:
    """One way of holding a run in memory that trains all weights."""

    optimizer: str
    recomputed_blocks: int = 0
    """Number of leading blocks that are recomputed from their inputs."""
    fused_step: bool = False
    """Each weight is stepped within the backward pass, and its gradient freed."""
    states_on_host: bool = False
    """Optimizer states, and fp32 copies, wait in host memory."""
    shards: int = 1
    """Number of processes that hold one copy of weights, gradients and states together."""
    keeps_gathered: bool = False
    """Blocks stay whole from their forward to their backward pass, which then gathers nothing."""
    streamed_blocks: int = 0
    """Number of blocks whose weights wait in host memory."""

    def blocks(self, compute_format: str) -> Rung:
        """Returns the rung of a LoRA run that holds the blocks in the same way."""
        return Rung(
            compute_format,
            recomputed_blocks=self.recomputed_blocks,
            streamed_blocks=self.streamed_blocks,
            shards=self.shards,
            keeps_gathered=self.keeps_gathered,
        )

    def peak_bytes(self, situation: Situation) -> int:
        """Returns the peak of a step, with a margin."""
        footprint, demands = situation.footprint, situation.demands
        held = weight_bytes(self.blocks(demands.compute_format), footprint, demands.compute_format) / self.shards
        states = states_on_device(self.optimizer, self.states_on_host, demands.fp32_copies, footprint, self.shards)
        gathered = gathered_bytes(footprint, demands.compute_format, self.keeps_gathered) if self.shards > 1 else 0
        return round(held + gathered + states + _moment_bytes(self, situation) + FIXED_BYTES + MARGIN_BYTES)

    def beside_bytes(self, situation: Situation) -> int:
        """Returns 0: the margin is part of the peak, and no step is captured."""
        return 0

    def host_bytes(self, situation: Situation) -> int:
        """Returns the bytes of optimizer states, fp32 copies and streamed weights.

        The memory of states is taken in pieces of a GiB.
        """
        if not self.states_on_host:
            return 0
        every = resting_bytes(self.optimizer, situation.demands.fp32_copies, situation.footprint)
        weights = self.blocks(situation.demands.compute_format).host_bytes(situation)
        return every // self.shards + GIB + weights


# ---- the ladder


def ladder_of_all_weights(situation: Situation) -> list[AllWeightsRung]:
    """Returns the rungs, fastest first."""
    blocks, demands = situation.footprint.num_blocks, situation.demands
    counts = {None: range(blocks + 1), False: (0,), True: (blocks,)}[demands.recompute]
    # Gradients have to be whole after one backward pass of one process.
    can_fuse = not demands.accumulates and situation.all_processes == 1
    rungs = [
        AllWeightsRung(optimizer, count, fused, on_host, shards, keeps)
        for shards in _shards(situation)
        for on_host in ((False,) if situation.unified else (False, True))
        for fused in ((False, True) if can_fuse else (False,))
        for optimizer in _optimizers(demands.optimizer, on_host)
        if shards == 1 or OPTIMIZERS[optimizer].by_number
        for count in counts
        for keeps in ((True, False) if shards > 1 else (False,))
    ]
    if can_fuse and not situation.unified and blocks in counts and 1 in _shards(situation):
        rungs += [
            AllWeightsRung(optimizer, blocks, fused_step=True, states_on_host=True, streamed_blocks=count)
            for optimizer in _optimizers(demands.optimizer, on_host=True)
            for count in range(STREAM_SLOTS + 1, blocks + 1)
        ]
    return sorted(
        rungs,
        key=lambda rung: (
            rung.streamed_blocks,
            rung.states_on_host,
            rung.shards,  # gathering costs more than recomputing
            runs_backward_twice(rung, situation),
            rung.recomputed_blocks,
            rung.optimizer == SMALL,  # the more exact one first
            rung.fused_step,
            not rung.keeps_gathered,
        ),
    )


def runs_backward_twice(rung: AllWeightsRung, situation: Situation) -> bool:
    """Returns whether a step needs the norm of all gradients before it has them."""
    return rung.fused_step and situation.demands.clips


def _shards(situation: Situation) -> tuple[int, ...]:
    if situation.demands.shards is not None:
        return (situation.demands.shards,)
    return (1, situation.all_processes) if situation.all_processes > 1 else (1,)


def _optimizers(demanded: str | None, on_host: bool) -> tuple[str, ...]:
    if demanded is not None:
        return (demanded,)
    # Four times as much through the link would cost more than anything else.
    return (SMALL,) if on_host else (EXACT, SMALL)


def first_that_fits(situation: Situation) -> AllWeightsRung | None:
    """Returns the fastest rung that GPU and host hold; None: there is none.

    One that leaves no room for what is scattered gives way to a slower one that does, if its states stay on the GPU.
    """
    fitting = (rung for rung in ladder_of_all_weights(situation) if situation.fits(rung))
    if (first := next(fitting, None)) is None or has_room(first, situation):
        return first
    alike = (rung for rung in fitting if (rung.shards, rung.states_on_host) == (first.shards, first.states_on_host))
    return next((rung for rung in alike if has_room(rung, situation)), first)


def has_room(rung: AllWeightsRung, situation: Situation) -> bool:
    """Returns whether a GPU that holds a part of the weights also has memory left for what its streams keep apart."""
    if rung.shards == 1:
        return True
    block = max(block_weight_bytes(kind, "fp32", "fp32", True) for kind in situation.footprint.kinds)
    return situation.needed(rung) + SCATTERED_BLOCKS * block <= situation.usable_bytes


# ---- bytes


def resting_bytes(optimizer: str, fp32_copies: bool, footprint: Footprint) -> int:
    """Returns the bytes of all weights between steps, besides themselves: optimizer states and fp32 copies."""
    return footprint.state_bytes(optimizer) + 4 * fp32_copies * footprint.trained_weights


def states_on_device(optimizer: str, on_host: bool, fp32_copies: bool, footprint: Footprint, shards: int = 1) -> int:
    """Returns the bytes of all states; of those in host memory, of what is on its way (`host_states.HostStates`).

    Args:
        shards: number of processes that hold them together.
    """
    every = resting_bytes(optimizer, fp32_copies, footprint) // shards
    largest = (footprint.largest_state_bytes(optimizer) + 4 * fp32_copies * footprint.largest_weight) // shards
    return min(every, max(AHEAD_BYTES, 2 * largest)) if on_host else every


def gathered_bytes(footprint: Footprint, compute_format: str, keeps_gathered: bool = False) -> int:
    """Returns the bytes of weights and gradients on their way between processes that hold the weights together.

    Of weights, a block that runs, the next one, and the piece in which this one travels; of gradients, those of a block
    in fp32 as they are sent, and those of the one before. What is outside of blocks stays gathered.

    Args:
        keeps_gathered: all blocks are whole where the backward pass begins.
    """
    element = ELEMENT_BYTES[compute_format]
    sizes = [block_weight_bytes(kind, compute_format, compute_format, True) for kind in footprint.kinds]
    block = max(sizes)
    weights = 3 * block
    if keeps_gathered:
        weights = block + sum(kind.count * size for kind, size in zip(footprint.kinds, sizes, strict=True))
    return weights + 2 * 4 * block // element + (element + 4) * footprint.outside_weights


def _moment_bytes(rung: AllWeightsRung, situation: Situation) -> float:
    """Returns the bytes of activations, gradients and the step itself at the worst moment."""
    footprint, demands, compiled = situation.footprint, situation.demands, situation.compiled
    blocks, element = rung.blocks(demands.compute_format), ELEMENT_BYTES[demands.compute_format]
    unit = footprint.unit_bytes * element / 2
    twice = runs_backward_twice(rung, situation)
    activations = unit * activation_units(blocks, footprint, compiled, retained=twice)
    if twice and compiled:  # a compiled backward pass may use what it was given up as working memory only once
        activations += unit * max(kept_units(kind, blocks, footprint, compiled) for kind in footprint.kinds)
    needs = OPTIMIZERS[rung.optimizer]
    in_place = situation.step_form == KERNEL and needs.has_kernel
    step = 0 if in_place else needs.step_bytes * footprint.largest_weight / rung.shards
    if rung.shards > 1 and situation.step_form is None:
        step += 4 * footprint.largest_weight  # what rounding drew for all rows
    # A compiled block's gradients come all at once.
    one_block = max(
        block_weight_bytes(kind, demands.compute_format, demands.compute_format, True) for kind in footprint.kinds
    )
    if rung.fused_step:
        return activations + step + one_block
    gradients = footprint.trained_weights * (4 if demands.fp32_copies else element) / rung.shards
    copies_average = situation.all_processes > rung.shards  # all gradients wait for that
    if demands.fp32_copies or demands.accumulates or copies_average:  # summed, so always there
        return max(activations, step) + one_block + gradients
    # Gradients come as activations go: the peak is at the beginning or at the end of the backward pass.
    first_block = replace(footprint, kinds=(replace(footprint.kinds[0], count=1),))
    at_end = gradients + max(step, unit * activation_units(blocks, first_block, compiled))
    return max(activations + one_block, at_end)
