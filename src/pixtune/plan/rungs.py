"""Ways of holding a run in memory, from the fastest to the leanest, and what each needs. Numbers alone, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pixtune.config.schema import TrainConfig
from pixtune.errors import ConfigError
from pixtune.hardware.facts import GIB, HardwareFacts, missing_on_host
from pixtune.plan.footprint import INPUT_UNITS, BlockKind, Footprint, block_weight_bytes, bytes_per_weight

EIGHT_BIT = ("fp8", "int8")
QUANTIZED = (*EIGHT_BIT, "nf4")
"""Formats of weights that are not the ones of activations."""
FIXED_BYTES = round(0.05 * GIB)
"""In the allocator, besides what is counted: workspaces of products, latents, noise, the layers at both ends."""
FULL_UNITS = {"compiled": 6.1, "eager": 13.1}
"""What a block keeps more where all its weights are trained, in units; counted on a CPU from the tensors that autograd
keeps, for each kind of block (tests/unit/plan/test_all_weights.py). Compiled: the inputs of the MLP's two linear
layers, 1 + 4, and what the gates multiply, 2, of which one is kept anyhow. Eager also what norms made."""
AHEAD_BYTES = GIB
"""On the device, of optimizer states that are on their way from and to host memory."""
LEAST_HOST_TENSOR_BYTES = 2**16
"""Smaller optimizer states stay on the device: those of norms and biases are a few megabytes together."""
FRAGMENTED, FRAGMENTED_BY_RECOMPUTING = 0.017, 0.06
"""Of a step's activations. Measured on an H100, between allocated and reserved: 0.57 GiB at 19.6 GiB of activations
that are all kept, 0.98 at 12.4 of lean blocks, 0.74 at 8.7 where 21 of 60 blocks are recomputed; `plan.RESERVE_BYTES`
is part of each."""
CAPTURE_BYTES = 24 * 2**20
"""Of one shape's captured steps, outside the allocator: processes that captured one held 0.02 to 0.03 GiB more than
those that captured none (H100). The first is part of `plan.CONTEXT_BYTES`."""
LEAST_CAPTURES, MOST_CAPTURES = 4, 64
"""Room is left for so many where blocks are lean or recomputed, which costs less than a block more of them."""
TABLE_ROWS = (128, 32)
"""Draws whose modulation is computed in one pass over its weights. Qwen-Image has 120 such layers and FLUX.1-dev 76, so
that with 128 rows one is read and multiplied at each step of batch 1. The second where host memory is scarce."""
TABLES = 2
"""One is filled while the other one is in use."""
STREAM_SLOTS = 3


@dataclass(frozen=True)
class Rung:
    """One way of holding a run in memory."""

    weights_format: str
    modulation_rows: int = 0
    """Of the table in host memory that stands in for modulation layers; 0: they are loaded."""
    selective: bool = False
    recomputed_blocks: int = 0
    offload_inputs: bool = False
    streamed_blocks: int = 0
    reprojected_blocks: int = 0
    """After the recomputed ones: they compute queries, keys and values again."""
    kept_transposes: bool = False
    """8-bit weights are kept a second time, transposed: 0.17 ms a block of Qwen-Image on an H100."""


def is_unified(facts: HardwareFacts, config: TrainConfig) -> bool:
    """Whether CPU and GPU are treated as one pool of memory."""
    return facts.integrated if config.unified_memory is None else config.unified_memory


# ---- the ladder


def ladder(facts: HardwareFacts, footprint: Footprint, config: TrainConfig) -> Iterator[Rung]:
    """A LoRA's rungs, fastest first."""
    blocks, no_recompute = footprint.num_blocks, config.disable_gradient_checkpointing
    plain, rows = compute_format_of(config), table_rows(footprint)
    for number, weights_format in enumerate(allowed_formats(facts, config)):
        quantized = weights_format != plain
        if no_recompute is not False:
            if not quantized:
                yield Rung(weights_format)
            for transposes in (True, False) if weights_format in EIGHT_BIT else (False,):
                for selective in (False, True) if no_recompute is None else (False,):
                    yield Rung(weights_format, rows, selective, kept_transposes=transposes)
        is_last = number == len(allowed_formats(facts, config)) - 1
        if no_recompute is True or not (quantized or is_last):
            continue  # products in 8 bits are faster than computing blocks twice in 16
        selective, counts = no_recompute is None, range(1, blocks + 1) if no_recompute is None else (blocks,)
        reprojects = selective and all(kind.units.projections for kind in footprint.kinds)
        if reprojects:  # a third of what a lean block keeps, for a sixth of its products
            yield from (Rung(weights_format, rows, selective, reprojected_blocks=count) for count in counts)
        for offload in (False, True) if not is_unified(facts, config) else (False,):
            for count in counts:
                others = blocks - count if reprojects else 0
                yield Rung(weights_format, rows, selective, count, offload, reprojected_blocks=others)
        if is_last and not is_unified(facts, config):
            for count in range(STREAM_SLOTS + 1, blocks + 1):
                yield Rung(weights_format, rows, selective, blocks, True, count)


def table_rows(footprint: Footprint, wanted: int = TABLE_ROWS[0]) -> int:
    """Of the modulation table; one more than a step's examples at the least. 0: its layers must be in place."""
    return 0 if footprint.trains_modulation else max(wanted, footprint.examples_per_step + 1)


def fit_host(
    rung: Rung, footprint: Footprint, facts: HardwareFacts, num_tables: int = TABLES, num_processes: int = 1
) -> Rung | None:
    """The rung with as many rows of the modulation table as host memory allows; None where it lacks for the fewest.

    Args:
        num_processes: on one host, each with all of it.
    """
    for wanted in TABLE_ROWS:
        smaller = with_rows(rung, footprint, wanted)
        if not missing_on_host(facts, num_processes * host_bytes(smaller, footprint, num_tables)):
            return smaller
    return None


def with_rows(rung: Rung, footprint: Footprint, wanted: int = TABLE_ROWS[-1]) -> Rung:
    """The rung with no more rows of the modulation table than that; the fewest by default."""
    return replace(rung, modulation_rows=min(rung.modulation_rows, table_rows(footprint, wanted)))


def allowed_formats(facts: HardwareFacts, config: TrainConfig) -> tuple[str, ...]:
    """Formats of the blocks' linear layers that the GPU has and the config leaves, plain first.

    Raises:
        ConfigError: the config demands a format that this GPU does not compute in.
    """
    plain = compute_format_of(config)
    fp8 = config.cuda_features.enable_fp8_training
    if fp8 and facts.capability < (8, 9):
        raise ConfigError(
            "cuda_features.enable_fp8_training is true",
            [
                f"{facts.name} has compute capability {facts.capability[0]}.{facts.capability[1]} and no FP8 tensor "
                "cores (8.9 and newer have them). Leave the key out; quantize: true computes in int8 there."
            ],
        )
    if config.disable_quantization or config.quantize is False:
        return (plain,)
    if facts.capability < (8, 0):
        return (plain,)
    eight = "int8" if facts.capability < (8, 9) or fp8 is False else "fp8"
    if config.quantize or fp8:
        return (eight,)
    return (plain, eight, "nf4")


def compute_format_of(config: TrainConfig) -> str:
    return "bf16" if config.mixed_precision == "bf16" else "fp32"


# ---- bytes


def room_for_captures(rung: Rung, config: TrainConfig) -> int:
    """Bytes that are left for captured steps."""
    wanted = config.cuda_graphs and (rung.selective or rung.recomputed_blocks > 0)
    return (LEAST_CAPTURES - 1) * CAPTURE_BYTES if wanted else 0


def captures_steps(config: TrainConfig) -> bool:
    """Whether a GPU does. Training all weights may step each in its backward pass, so none is captured."""
    return config.cuda_graphs and config.method != "full"


def count_captures(
    rung: Rung, footprint: Footprint, config: TrainConfig, compiled: bool, beside_peak_bytes: int
) -> int:
    """Of how many shapes steps are captured.

    Args:
        beside_peak_bytes: what a step leaves of the memory there is.
    """
    if not captures_steps(config):
        return 0
    left = beside_peak_bytes - fragmented_bytes(rung, footprint, config, compiled)
    return min(1 + max(left, 0) // CAPTURE_BYTES, MOST_CAPTURES)


def weight_bytes(rung: Rung, footprint: Footprint, compute_format: str) -> int:
    """Of the transformer on the device: resident blocks, the ring of streamed ones, and what is outside of blocks."""
    per_block = [
        block_weight_bytes(kind, rung.weights_format, rung.modulation_rows == 0)
        for kind in footprint.kinds
        for _ in range(kind.count)
    ]
    plain = 4 if compute_format == "fp32" else 2
    total = sum(per_block) + footprint.outside_weights * plain
    # Counted as resident in a streamed block, too: they are few. Their scales, which there are none of, stay counted.
    total += round(footprint.plain_layer_weights * max(plain - bytes_per_weight(rung.weights_format), 0))
    if rung.kept_transposes:
        total += sum(kind.count * kind.linear_weights for kind in footprint.kinds) - footprint.plain_layer_weights
    if not rung.streamed_blocks:
        return total
    mean = sum(per_block) / len(per_block)
    return round(total - rung.streamed_blocks * mean + STREAM_SLOTS * max(per_block))


def peak_bytes(rung: Rung, footprint: Footprint, config: TrainConfig, optimizer: str, compiled: bool) -> int:
    """Most that a training step of a LoRA allocates: its weights, their gradients and optimizer states are fp32."""
    compute_format = compute_format_of(config)
    table = table_bytes(rung, footprint, compute_format)
    trained = footprint.trained_weights * (4 + 4 + (2 if optimizer == "adamw_8bit" else 8))
    activations = activation_bytes(rung, footprint, config, compiled)
    return round(weight_bytes(rung, footprint, compute_format) + table + trained + FIXED_BYTES + activations)


def table_bytes(rung: Rung, footprint: Footprint, compute_format: str) -> int:
    """On the device, of the modulation table: a step's rows, a layer's weights on their way, and what they make."""
    if not rung.modulation_rows:
        return 0
    row = modulation_row(footprint) * (footprint.examples_per_step + 1)
    made = rung.modulation_rows * max(kind.modulation_outputs for kind in footprint.kinds)
    on_host = table_host_numbers(rung, footprint, TABLES) if footprint.one_pool else 0
    return (4 if compute_format == "fp32" else 2) * (row + made + largest_modulation(footprint) + on_host)


def table_host_numbers(rung: Rung, footprint: Footprint, num_tables: int) -> int:
    """In host memory: the tables, and two layers' weights on their way."""
    if not rung.modulation_rows:
        return 0
    return num_tables * rung.modulation_rows * modulation_row(footprint) + 2 * largest_modulation(footprint)


def modulation_row(footprint: Footprint) -> int:
    """Numbers in a row of the modulation table."""
    return sum(kind.count * kind.modulation_outputs for kind in footprint.kinds)


def largest_modulation(footprint: Footprint) -> int:
    """Numbers in the largest modulation layer."""
    return max(kind.largest_modulation for kind in footprint.kinds)


def activation_bytes(rung: Rung, footprint: Footprint, config: TrainConfig, compiled: bool) -> float:
    unit = footprint.unit_bytes * (2 if compute_format_of(config) == "fp32" else 1)
    return unit * activation_units(rung, footprint, compiled)


def fragmented_bytes(rung: Rung, footprint: Footprint, config: TrainConfig, compiled: bool) -> int:
    """What the allocator cannot use between a step's activations. A step that is captured cannot move them together."""
    share = FRAGMENTED_BY_RECOMPUTING if rung.selective or rung.recomputed_blocks else FRAGMENTED
    return round(share * activation_bytes(rung, footprint, config, compiled))


def activation_units(rung: Rung, footprint: Footprint, compiled: bool, retained: bool = False) -> float:
    """Most that a step's activations take, in units.

    Args:
        retained: all that is kept stays until the end of the backward pass, for a second one.

    The first blocks are the recomputed ones, so that what later blocks kept is free when one of them runs again.
    """
    extra = extra_units(footprint, compiled)
    inputs = INPUT_UNITS * (min(3, rung.recomputed_blocks) if rung.offload_inputs else rung.recomputed_blocks)
    kept, forward, working, number = 0.0, 0.0, 0.0, 0
    for kind in footprint.kinds:
        recomputed = min(max(rung.recomputed_blocks - number, 0), kind.count)
        again = min(max(rung.recomputed_blocks + rung.reprojected_blocks - number, 0), kind.count) - recomputed
        number += kind.count
        if recomputed < kind.count:
            kept += (kind.count - recomputed) * kept_units(kind, rung, footprint, compiled)
            kept -= again * kind.units.projections
            forward = max(forward, beside_units(kind, rung, footprint) + (kind.units.projections if again else 0))
        if recomputed:
            # What a fused MLP saves, it saves in a block's second forward pass, too.
            saved = kind.units.forward_quantized - kind.units.forward_fused if fuses_mlps(rung, footprint) else 0
            working = max(working, kind.units.working - saved + extra)
    return inputs + (kept + max(forward, working) if retained else max(kept + forward, working))


def beside_units(kind: BlockKind, rung: Rung, footprint: Footprint) -> float:
    """On top of what one block keeps, while it runs."""
    if fuses_mlps(rung, footprint):
        return kind.units.forward_fused
    return kind.units.forward_quantized if rung.weights_format in QUANTIZED else kind.units.forward


def fuses_mlps(rung: Rung, footprint: Footprint) -> bool:
    """Whether MLPs are one function each: frozen, in float8 codes."""
    return rung.weights_format in footprint.fused_formats


def with_fused_mlps(footprint: Footprint, facts: HardwareFacts) -> Footprint:
    """The same on a GPU: with what it has kernels for."""
    if not footprint.mlps_are_frozen or footprint.trains_all or facts.capability < (8, 9):
        return footprint
    return replace(footprint, fused_formats=("fp8", "nf4"))


def kept_units(kind: BlockKind, rung: Rung, footprint: Footprint, compiled: bool) -> float:
    """Of one block that is not recomputed."""
    each = kind.units.eager if not compiled else kind.units.selective if rung.selective else kind.units.kept
    if compiled and not rung.selective and footprint.examples_at_once > 1:
        each += kind.units.cut
    return each + extra_units(footprint, compiled)


def extra_units(footprint: Footprint, compiled: bool) -> float:
    """What is trained lets each block keep so much more."""
    return footprint.extra_units + (FULL_UNITS["compiled" if compiled else "eager"] if footprint.trains_all else 0)


def host_bytes(rung: Rung, footprint: Footprint, num_tables: int = TABLES) -> int:
    """Page-locked host memory: streamed weights, the inputs of recomputed blocks, modulation tables."""
    kinds = footprint.kinds
    mean = sum(k.count * block_weight_bytes(k, rung.weights_format, rung.modulation_rows == 0) for k in kinds)
    streamed = rung.streamed_blocks * mean / footprint.num_blocks
    inputs = rung.recomputed_blocks * footprint.unit_bytes if rung.offload_inputs else 0
    tables = 0 if footprint.one_pool else 2 * table_host_numbers(rung, footprint, num_tables)
    return round(streamed + inputs + tables)
