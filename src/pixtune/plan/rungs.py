"""Ladder of a LoRA run: ways of holding it in memory, about the fastest first, and what each needs. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter

from pixtune.errors import ConfigError
from pixtune.hardware.facts import GIB
from pixtune.plan.footprint import (
    BYTES_PER_WEIGHT,
    ELEMENT_BYTES,
    INPUT_UNITS,
    MEASURED_RANKS,
    BlockKind,
    Footprint,
    block_weight_bytes,
)
from pixtune.plan.seconds import step_seconds
from pixtune.plan.shards import possible_shards
from pixtune.plan.situation import NCCL_BYTES, TABLES, Situation

EIGHT_BIT = ("fp8", "int8")
QUANTIZED = (*EIGHT_BIT, "nf4")
"""Formats of weights that are not the ones of activations."""
FIXED_BYTES = round(0.05 * GIB)
"""Memory in the allocator that is not counted one by one: workspaces of products, latents, noise, the layers at both
ends."""
AT_WORK_BYTES, FUSED_AT_WORK_BYTES, AT_WORK_UNITS = 52 * 2**20, 104 * 2**20, 2.0
"""Memory of 8-bit codes made for products, whatever the number of tokens: of one weight; where an MLP is one function,
of its two weights of 36 MiB, with a workspace of 32. Units were measured with 4400 tokens, of which the first was 2. By
81 cells drawn by lot, of 1774 to 48000 tokens (benchmarks/results/random_cells_h200), 61 of which it meets within 70
MiB."""
MLP_WORK_UNITS = 12.5
"""Units that a block at work holds in addition where a LoRA is on an MLP, by the same cells: 10.7 to 13.6."""
FULL_UNITS = {"compiled": 6.1, "eager": 13.1}
"""Units that a block keeps in addition where all its weights are trained; counted on a CPU from the tensors that
autograd keeps, for each kind of block (tests/unit/plan/test_all_weights.py). Compiled: the inputs of the MLP's two
linear layers, 1 + 4, and what the gates multiply, 2, of which one is kept anyhow. Eager also what norms made."""
FRAGMENTED = {"nothing": 0.017, "selective": 0.06, "blocks": 0.12}
"""Share of a step's activations that fragments between them take, by what is recomputed. `situation.RESERVE_BYTES`
comes in addition. The most that was measured on H100 and H200 between allocated and reserved: 0.55 GiB at 19.6 GiB of
activations that are all kept, 1.06 at 14.5 of selective recomputation, 1.41 at 8.0 and 0.58 at 5.3 where blocks are
recomputed; most runs have half of that or less (benchmarks/results)."""
BESIDE_CAPTURES_BYTES = round(0.15 * GIB)
"""Memory that captured steps cannot use although nothing else does, where blocks are recomputed: a capture gets pages
of its own, and lasting tensors hold pages of 20 MiB that are hardly used. 0.24 to 0.30 GiB in four runs that could not
be captured for lack of 0.1 (H200)."""
SCRATCH_BYTES = 64 * 2**20
"""Memory that the compiler's trials of kernels take within a compiled step that runs for the first time, where the
GPU's own figure is not known: as much as its cache holds (H200: 60 MiB)."""
CAPTURE_BYTES = 24 * 2**20
"""Memory of one shape's captured steps, outside the allocator: processes that captured one held 0.02 to 0.03 GiB more
than those that captured none (H100). The first is part of `situation.CONTEXT_BYTES`."""
LEAST_CAPTURES, MOST_CAPTURES = 4, 64
"""Number of shapes for which room is left where anything is recomputed, which costs less than recomputing one more
block; and the largest number that is captured."""
TABLE_ROWS = (128, 32)
"""Draws whose modulations are computed in one pass over the layers. Qwen-Image has 120 of them and FLUX.1-dev 76, so
that with 128 rows one is read and multiplied at each step of batch 1. The second number is for scarce host memory."""
STREAM_SLOTS = 3
"""Blocks on the device at once where their weights are streamed."""


@dataclass(frozen=True)
class Rung:
    """One way of holding a LoRA run in memory."""

    weights_format: str
    modulation_rows: int = 0
    """Rows of the table in host memory that stands in for modulation layers; 0: they are loaded."""
    selective: bool = False
    """Norms, rotary embedding and gates are recomputed in each block."""
    recomputed_blocks: int = 0
    """Number of leading blocks that are recomputed from their inputs."""
    offload_inputs: bool = False
    """Inputs of recomputed blocks wait in host memory."""
    streamed_blocks: int = 0
    """Number of blocks whose weights come from elsewhere each time: from host memory, or from `shards` processes."""
    reprojected_blocks: int = 0
    """Number of blocks, following the recomputed ones, that recompute queries, keys and values."""
    kept_transposes: bool = False
    """8-bit weights are kept a second time, transposed: 0.17 ms a block of Qwen-Image on an H100."""
    shards: int = 1
    """Number of processes that hold the streamed blocks together, each a part of every one; 1: host memory does."""
    keeps_gathered: bool = False
    """Trained blocks that several processes hold together stay whole from their forward to their backward pass."""

    @property
    def recomputes(self) -> bool:
        """Whether blocks are recomputed, or their cheap parts."""
        return self.selective or self.recomputed_blocks > 0

    def peak_bytes(self, situation: Situation) -> int:
        """Returns the peak of a step. A LoRA's weights, their gradients and optimizer states are fp32."""
        footprint, compute_format = situation.footprint, situation.demands.compute_format
        trained = footprint.trained_weights * (4 + 4) + situation.state_bytes
        codes = FUSED_AT_WORK_BYTES if self.weights_format in footprint.fused_formats else AT_WORK_BYTES
        fixed = FIXED_BYTES + (codes if holds_codes_at_work(self) else 0)
        trained += (
            footprint.average_bytes + footprint.adapter_bytes + footprint.frozen_weights * ELEMENT_BYTES[compute_format]
        )
        held = transformer_bytes(self, footprint, compute_format) + trained + fixed
        return round(held + rounded_bytes(self, situation) + activation_bytes(self, situation))

    def beside_bytes(self, situation: Situation) -> int:
        """Returns the bytes of fragments, and of captured steps where something is recomputed.

        The first step is not captured yet: it has hardly any fragments, and kernels are tried in it.
        """
        captures = LEAST_CAPTURES - 1 if situation.demands.captures and self.recomputes else 0
        scratch = (situation.facts.l2_cache_bytes or SCRATCH_BYTES) if situation.compiled else 0
        gathering = NCCL_BYTES if self.shards > 1 else 0
        return gathering + max(fragmented_bytes(self, situation) + captures * CAPTURE_BYTES, scratch)

    def host_bytes(self, situation: Situation) -> int:
        """Returns the bytes of streamed weights, inputs of recomputed blocks, modulation tables and an average."""
        footprint, compute_format = situation.footprint, situation.demands.compute_format
        element, loaded = ELEMENT_BYTES[compute_format], self.modulation_rows == 0
        blocks = sum(
            kind.count * block_weight_bytes(kind, self.weights_format, compute_format, loaded)
            for kind in footprint.kinds
        )
        streamed = self.streamed_blocks * blocks / footprint.num_blocks if self.shards == 1 else 0
        inputs = self.recomputed_blocks * footprint.unit_bytes * element // 2 if self.offload_inputs else 0
        tables = 0 if footprint.one_pool else element * table_host_numbers(self, footprint, situation.num_tables)
        return round(streamed + inputs + tables) + footprint.average_host_bytes


# ---- the ladder


def ladder(situation: Situation) -> Iterator[Rung]:
    """Yields the rungs of a LoRA run, those with most bits first and about the fastest first among them.

    Raises:
        ConfigError: a format is demanded that this GPU does not compute in.
    """
    footprint, recompute, unified = situation.footprint, situation.demands.recompute, situation.unified
    blocks, rows, formats = footprint.num_blocks, table_rows(footprint), allowed_formats(situation)
    must_share = (situation.demands.shards or 1) > 1
    for weights_format in formats:
        quantized, is_last = weights_format in QUANTIZED, weights_format == formats[-1]
        if must_share:
            yield from _shared(situation, weights_format, is_last)
            continue
        if recompute is not True:
            if not quantized:
                yield Rung(weights_format)
            for transposes in (True, False) if weights_format in EIGHT_BIT else (False,):
                for selective in (False, True) if recompute is None else (False,):
                    yield Rung(weights_format, rows, selective, kept_transposes=transposes)
        if recompute is False or not (quantized or is_last):
            continue  # products in 8 bits are faster than recomputing blocks in 16
        selective, counts = recompute is None, range(1, blocks + 1) if recompute is None else (blocks,)
        reprojects = selective and all(kind.units.projections for kind in footprint.kinds)
        if reprojects:  # frees a third of what selective recomputation keeps, for a quarter of the forward products
            yield from (Rung(weights_format, rows, selective, reprojected_blocks=count) for count in counts)
        for offload in (False,) if unified else (False, True):
            for count in counts:
                others = blocks - count if reprojects else 0
                yield Rung(weights_format, rows, selective, count, offload, reprojected_blocks=others)
        yield from _shared(situation, weights_format, is_last)
        if is_last and not unified:
            for count in range(STREAM_SLOTS + 1, blocks + 1):
                yield Rung(weights_format, rows, selective, blocks, True, count)


def _shared(situation: Situation, weights_format: str, is_last: bool) -> Iterator[Rung]:
    """Yields the rungs whose blocks lie in parts on several GPUs, those of fewest GPUs first.

    More bits come first here, too: 8-bit weights that are gathered come before 4-bit ones that are there. Parts on
    other hosts are for where nothing else is left, as a network is slower than any link within a host.
    """
    demanded, blocks = situation.demands.shards, situation.footprint.num_blocks
    numbers = possible_shards(situation.num_processes, situation.num_hosts if is_last else 1)
    if demanded is not None:
        numbers = (demanded,) if demanded > 1 else ()
    rows, selective = table_rows(situation.footprint), situation.demands.recompute is None
    for shards in numbers:
        for offload in (False,) if situation.unified else (False, True):
            for count in range(min(STREAM_SLOTS + 1, blocks), blocks + 1):
                yield Rung(weights_format, rows, selective, blocks, offload, count, shards=shards)


def allowed_formats(situation: Situation) -> tuple[str, ...]:
    """Returns formats of the blocks' linear layers that the GPU has and the demands leave, plain first.

    Raises:
        ConfigError: a format is demanded that this GPU does not compute in.
    """
    facts, demands = situation.facts, situation.demands
    if demands.fp8 and facts.capability < (8, 9):
        raise ConfigError(
            "cuda_features.enable_fp8_training is true",
            [
                f"{facts.name} has compute capability {facts.capability[0]}.{facts.capability[1]} and no FP8 tensor "
                "cores (8.9 and newer have them). Leave the key out; quantize: true computes in int8 there."
            ],
        )
    if demands.quantize and facts.capability < (8, 0):
        raise ConfigError(
            "quantize is true",
            [
                f"{facts.name} has compute capability {facts.capability[0]}.{facts.capability[1]}, and pixtune "
                "multiplies in 8 bits on 8.0 and newer alone. Leave the key out."
            ],
        )
    if demands.quantize is False or facts.capability < (8, 0):
        return (demands.compute_format,)
    eight = "int8" if facts.capability < (8, 9) or demands.fp8 is False else "fp8"
    return (eight,) if demands.quantize or demands.fp8 else (demands.compute_format, eight, "nf4")


def table_rows(footprint: Footprint, wanted: int = TABLE_ROWS[0]) -> int:
    """Returns the rows of the modulation table, at least one more than a step's examples; 0: its layers are needed."""
    return 0 if footprint.trains_modulation else max(wanted, footprint.examples_per_step + 1)


def with_rows(rung: Rung, footprint: Footprint, wanted: int = TABLE_ROWS[-1]) -> Rung:
    """Returns the rung with at most `wanted` rows of the modulation table; the fewest by default."""
    return replace(rung, modulation_rows=min(rung.modulation_rows, table_rows(footprint, wanted)))


def fit_host(rung: Rung, situation: Situation) -> Rung | None:
    """Returns the rung with as many rows of the modulation table as host memory allows; None: it lacks for any."""
    smaller = (with_rows(rung, situation.footprint, wanted) for wanted in TABLE_ROWS)
    return next((each for each in smaller if situation.fits_host(each)), None)


def fitting_by_speed(situation: Situation) -> Iterator[Rung]:
    """Yields the rungs that the GPU holds: formats in the ladder's order, those of one format by a step's time.

    More bits come first although a step with fewer may be faster: they decide how exact gradients are, and all else
    that a rung decides does not.
    """
    for _, of_format in groupby(ladder(situation), key=attrgetter("weights_format")):
        fitting = filter(situation.fits_device, of_format)
        yield from sorted(fitting, key=lambda rung: step_seconds(rung, situation))


def first_that_fits(situation: Situation) -> Rung | None:
    """Returns the fastest rung of the most bits that GPU and host hold; None: there is none."""
    return next(filter(None, (fit_host(rung, situation) for rung in fitting_by_speed(situation))), None)


# ---- bytes


def count_captures(rung: Rung, situation: Situation, peak_bytes: int) -> int:
    """Returns the number of shapes whose steps are captured, at most `MOST_CAPTURES`."""
    if not situation.demands.captures:
        return 0
    left = situation.usable_bytes - peak_bytes - fragmented_bytes(rung, situation)
    return min(1 + max(left, 0) // CAPTURE_BYTES, MOST_CAPTURES)


def transformer_bytes(rung: Rung, footprint: Footprint, compute_format: str) -> int:
    """Returns the bytes of the transformer and of the table that stands in for its modulation layers."""
    return weight_bytes(rung, footprint, compute_format) + table_bytes(rung, footprint, compute_format)


def weight_bytes(rung: Rung, footprint: Footprint, compute_format: str) -> int:
    """Returns bytes on the device: of resident blocks, the ring of streamed ones, and what is outside of blocks."""
    loaded = rung.modulation_rows == 0
    sizes = [block_weight_bytes(kind, rung.weights_format, compute_format, loaded) for kind in footprint.kinds]
    blocks = sum(kind.count * size for kind, size in zip(footprint.kinds, sizes, strict=True))
    plain = ELEMENT_BYTES[compute_format]
    total = blocks + footprint.outside_weights * plain
    # Plain layers count as resident in a streamed block, too: they are few. Scales that they lack stay counted.
    total += round(footprint.plain_layer_weights * max(plain - BYTES_PER_WEIGHT[rung.weights_format], 0))
    if rung.kept_transposes:
        total += sum(kind.count * kind.linear_weights for kind in footprint.kinds) - footprint.plain_layer_weights
    if not rung.streamed_blocks:
        return total
    away = rung.streamed_blocks * blocks / footprint.num_blocks
    own_part = away / rung.shards if rung.shards > 1 else 0
    return round(total - away + own_part + STREAM_SLOTS * max(sizes))


def table_bytes(rung: Rung, footprint: Footprint, compute_format: str) -> int:
    """Returns the table's bytes on the device: a step's rows, a layer's weights on their way, and what they make."""
    if not rung.modulation_rows:
        return 0
    row = modulation_row(footprint) * (footprint.examples_per_step + 1)
    made = rung.modulation_rows * max(kind.modulation_outputs for kind in footprint.kinds)
    on_host = table_host_numbers(rung, footprint, TABLES) if footprint.one_pool else 0
    return ELEMENT_BYTES[compute_format] * (row + made + largest_modulation(footprint) + on_host)


def table_host_numbers(rung: Rung, footprint: Footprint, num_tables: int) -> int:
    """Counts numbers in host memory: the tables, and two layers' weights on their way."""
    if not rung.modulation_rows:
        return 0
    return num_tables * rung.modulation_rows * modulation_row(footprint) + 2 * largest_modulation(footprint)


def modulation_row(footprint: Footprint) -> int:
    """Counts the numbers in a row of the modulation table."""
    return sum(kind.count * kind.modulation_outputs for kind in footprint.kinds)


def largest_modulation(footprint: Footprint) -> int:
    """Counts the numbers in the largest modulation layer."""
    return max(kind.largest_modulation for kind in footprint.kinds)


# ---- activations


def activation_bytes(rung: Rung, situation: Situation) -> float:
    """Returns the peak of a step's activations."""
    unit = situation.footprint.unit_bytes * ELEMENT_BYTES[situation.demands.compute_format] // 2
    return unit * activation_units(rung, situation.footprint, situation.compiled)


def rounded_bytes(rung: Rung, situation: Situation) -> float:
    """Returns the bytes of a LoRA's rounded weights, which compiled blocks keep unless they recompute what is cheap.

    Those of `MEASURED_RANKS` are part of the blocks' measured units.
    """
    footprint = situation.footprint
    if not situation.compiled or rung.selective or situation.demands.compute_format != "bf16":
        return 0.0
    kept = 1 - rung.recomputed_blocks / footprint.num_blocks
    beyond = footprint.rank_units * footprint.width
    weights = footprint.trained_weights + footprint.frozen_weights
    return ELEMENT_BYTES["bf16"] * weights * kept * beyond / (beyond + MEASURED_RANKS)


def fragmented_bytes(rung: Rung, situation: Situation) -> int:
    """Returns what the allocator cannot use between activations. A captured step cannot move them together."""
    share = FRAGMENTED["blocks" if rung.recomputed_blocks else "selective" if rung.selective else "nothing"]
    held = BESIDE_CAPTURES_BYTES if rung.recomputed_blocks and situation.demands.captures else 0
    return held + round(share * activation_bytes(rung, situation))


def activation_units(rung: Rung, footprint: Footprint, compiled: bool, retained: bool = False) -> float:
    """Returns the peak of a step's activations, in units.

    The recomputed blocks come first, so that what later blocks kept is free when one of them runs again.

    Args:
        retained: all that is kept stays until the end of the backward pass, for a second one.
    """
    at_work = work_units(footprint, compiled) - (AT_WORK_UNITS if holds_codes_at_work(rung) else 0)
    inputs = INPUT_UNITS * (min(3, rung.recomputed_blocks) if rung.offload_inputs else rung.recomputed_blocks)
    kept, forward, working, number = 0.0, 0.0, 0.0, 0
    for kind in footprint.kinds:
        recomputed = min(max(rung.recomputed_blocks - number, 0), kind.count)
        again = min(max(rung.recomputed_blocks + rung.reprojected_blocks - number, 0), kind.count) - recomputed
        number += kind.count
        fuses = rung.weights_format in footprint.fused_formats
        if recomputed < kind.count:
            kept += (kind.count - recomputed) * kept_units(kind, rung, footprint, compiled)
            kept -= again * (kind.units.projections + footprint.projected_rank_units)
            quantized = kind.units.forward_fused if fuses else kind.units.forward_quantized
            running = quantized if rung.weights_format in QUANTIZED else kind.units.forward
            running += kind.units.projections if again else 0
            forward = max(forward, running + (0 if footprint.trains_all else at_work))
        if recomputed:
            # With a fused MLP what a block keeps when it runs again, beside what its backward pass needs at work.
            again_kept = kept_units(kind, rung, footprint, compiled) + kind.units.forward_fused
            working = max(working, (again_kept if fuses else kind.units.working) + at_work)
    return inputs + (kept + max(forward, working) if retained else max(kept + forward, working))


def kept_units(kind: BlockKind, rung: Rung, footprint: Footprint, compiled: bool) -> float:
    """Returns the units that one block keeps which is not recomputed."""
    each = kind.units.eager if not compiled else kind.units.selective if rung.selective else kind.units.kept
    if compiled and not rung.selective and footprint.examples_at_once > 1:
        each += kind.units.cut
    if compiled and rung.selective and not footprint.trains_all:
        gained = footprint.gained_units + footprint.compiled_adapter_units
        return each + footprint.selective_extra_units + footprint.rank_units + gained
    return each + extra_units(footprint, compiled)


def extra_units(footprint: Footprint, compiled: bool) -> float:
    """Returns the units that each block keeps in addition because of what is trained."""
    if footprint.trains_all:
        return FULL_UNITS["compiled" if compiled else "eager"]
    gained = footprint.gained_units
    gained += footprint.compiled_adapter_units if compiled else footprint.gained_projection_units
    return footprint.extra_units + footprint.rank_units + gained


def work_units(footprint: Footprint, compiled: bool) -> float:
    """Returns the units that a block at work holds in addition because of what is trained."""
    if footprint.trains_all:
        return FULL_UNITS["compiled" if compiled else "eager"]
    low_ranks = 2 * footprint.rank_units  # outputs of down-projections, and their gradients
    return MLP_WORK_UNITS * footprint.trains_mlp + low_ranks + footprint.adapter_work_units


def holds_codes_at_work(rung: Rung) -> bool:
    """Returns whether products read 8-bit codes that are made for them, transposed or out of 4 bits."""
    return rung.weights_format in QUANTIZED and not rung.kept_transposes
