"""Sizes of a run's parts, in numbers alone: read from the headers of weight files, no weight loaded.

Imports no torch, so that `pixtune plan` answers at once. Activations are counted in units of a bf16 tensor of all
tokens' features: tokens x width x 2 bytes. How many units a kind of block keeps is measured and stated by its family.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from pixtune.hardware.facts import HardwareFacts
from pixtune.plan.adapter import Adapter
from pixtune.plan.optimizers import USUAL_STATES, StateOptions, TrainedTensors, state_bytes

if TYPE_CHECKING:
    from pixtune.config.schema import TrainConfig
    from pixtune.family import ActivationUnits, ModelFamily, Shapes

NF4_BLOCK = 16
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
"""Bytes of a number in each format of a run's activations."""
BYTES_PER_WEIGHT: dict[str, float] = {**ELEMENT_BYTES, "fp8": 1, "int8": 1, "nf4": 0.5 + 1 / NF4_BLOCK}
"""Bytes of a linear layer's weight, without the scales of its rows."""
MEASURED_RANKS = 4 * 16
"""Sum of the ranks of a block's LoRA in the measurements of activations' units, which hold what it keeps."""
AVERAGE_PIECE_BYTES = 1 << 25
"""Size of the pieces in which the average of a LoRA's weights is updated, unless one weight is larger."""
INPUT_UNITS = 1.0
"""Units that a recomputed block keeps: its input, both streams."""
MLP_INPUT_UNITS, GATED_UNITS = 2.0, 1.0
"""Units that a block keeps in addition under selective recomputation where a LoRA is on an MLP's second layer, whose
input is then kept in 16 bits instead of 8, and where one is on modulation layers: what a gate multiplies. The inputs of
other layers are recomputed. Counted on a CPU from what compiled blocks of both families keep: 7.1, 9.1 and 10.1 units
of double blocks, 6.1, 8.1 and 9.1 of single ones, for attention, `attention_mlp` and `all_linear`."""
KEPT_GATED_UNITS = 1.5
"""Units that a block keeps in addition where a LoRA is on modulation layers and nothing is recomputed; counted so."""


@dataclass(frozen=True)
class BlockKind:
    """Repeated blocks of one list."""

    path: str
    count: int
    linear_weights: int
    """Weights of one block's linear layers, without those that make modulations."""
    modulation_weights: int
    """Weights of the layers that make one block's modulations."""
    modulation_outputs: int
    """Features of one block in a row of the modulation table."""
    largest_modulation: int
    """Numbers in the largest of one block's modulation layers."""
    other_weights: int
    """Norms and biases of one block."""
    rows: int
    """Output features of one block's linear layers together: each has a scale."""
    num_linears: int
    """Linear layers of one block, without those that make modulations."""
    units: ActivationUnits


@dataclass(frozen=True)
class Footprint:
    """Sizes that decide the memory of a training step."""

    kinds: tuple[BlockKind, ...]
    outside_weights: int
    """Weights of the transformer outside its blocks."""
    width: int
    """Features of a token inside the blocks."""
    num_tokens: int
    """Image and text tokens of the largest micro-batch of one process."""
    trained_weights: int = 0
    """Weights of the LoRA, or all."""
    trained: tuple[TrainedTensors, ...] = ()
    """Shapes of the trained tensors, which decide an optimizer's states."""
    state_options: StateOptions = USUAL_STATES
    """Keys of the config that decide them, too."""
    adapter_bytes: int = 0
    """Bytes that an adapter holds beside its weights, their gradients and optimizer states."""
    gained_units: float = 0.0
    """Units per block of a DoRA's sums before their gains, queries, keys and values apart."""
    gained_projection_units: float = 0.0
    """Units per block of those of queries, keys and values: a compiled block keeps them in place of what follows."""
    compiled_adapter_units: float = 0.0
    """Units per block that a compiled block keeps beside `gained_units`; see `plan/adapter.py: COMPILED_KEEP`."""
    adapter_work_units: float = 0.0
    """Units that a block at work holds in addition for an adapter's plain kernels."""
    step_times: float = 1.0
    """Time that a step computes over that of a LoRA's; see `plan/adapter.py: STEP_TIMES`."""
    notes: tuple[str, ...] = ()
    """Sentences on the adapter for the plan."""
    trains_all: bool = False
    trains_modulation: bool = False
    """A LoRA is on modulation layers, so they must be in place."""
    extra_units: float = 0.0
    """Units per block of inputs that a LoRA on other than attention layers keeps."""
    selective_extra_units: float = 0.0
    """Units of them under selective recomputation."""
    trains_mlp: bool = False
    """A LoRA is on layers of an MLP, be it a frozen one."""
    rank_units: float = 0.0
    """Units per block of the outputs of a LoRA's down-projections, beyond `MEASURED_RANKS`."""
    projected_rank_units: float = 0.0
    """The part of them that belongs to queries, keys and values."""
    examples_per_step: int = 1
    """Examples of one process in a step: rows of the modulation table that the step needs."""
    examples_at_once: int = 1
    """Examples of one process in a micro-batch."""
    plain_layers: tuple[str, ...] = ()
    """Paths of the blocks' linear layers that are not quantized where the others are."""
    plain_layer_weights: int = 0
    """Weights of `plain_layers`."""
    largest_weight: int = 0
    """Numbers in the transformer's largest tensor."""
    mlps_are_frozen: bool = False
    """No LoRA is on a layer of an MLP, and all these layers are quantized where others are."""
    fused_formats: tuple[str, ...] = ()
    """Formats of weights in which an MLP is one function on the GPU that is planned for."""
    one_pool: bool = False
    """Host memory is the device's on the machine that is planned for."""
    frozen_weights: int = 0
    """Weights of a frozen LoRA beside the trained one, which has the format of activations."""
    is_averaged: bool = False
    """An average of the LoRA's weights is kept, in fp32."""
    average_on_host: bool = False
    """The average is in host memory, and the device holds a piece of it."""

    @property
    def num_blocks(self) -> int:
        return sum(kind.count for kind in self.kinds)

    @property
    def num_weights(self) -> int:
        """Number of weights of the whole transformer."""
        blocks = sum(
            kind.count * (kind.linear_weights + kind.modulation_weights + kind.other_weights) for kind in self.kinds
        )
        return blocks + self.outside_weights

    def state_bytes(self, optimizer: str) -> int:
        """Counts the bytes of an optimizer's states of all trained tensors."""
        return self._states_of(optimizer)[0]

    def largest_state_bytes(self, optimizer: str) -> int:
        """Counts the bytes of those of the tensor that has most."""
        return self._states_of(optimizer)[1]

    def _states_of(self, optimizer: str) -> tuple[int, int]:
        if optimizer not in self._known_states:
            each = [state_bytes(optimizer, [replace(kind, count=1)], self.state_options) for kind in self.trained]
            every = state_bytes(optimizer, self.trained, self.state_options)
            self._known_states[optimizer] = every, max(each, default=0)
        return self._known_states[optimizer]

    @cached_property
    def _known_states(self) -> dict[str, tuple[int, int]]:
        """Bytes of all states, and of the largest ones, by optimizer: a plan asks for them thousands of times."""
        return {}

    @property
    def average_bytes(self) -> int:
        """Bytes that the average of the trained weights takes on the device: itself, and a piece of them at work."""
        if not self.is_averaged:
            return 0
        piece = min(AVERAGE_PIECE_BYTES, 4 * self.trained_weights)
        on_device = self.one_pool or not self.average_on_host
        return piece * (2 if self.average_on_host else 1) + 4 * self.trained_weights * on_device

    @property
    def average_host_bytes(self) -> int:
        """Bytes of the average in host memory beside the device's."""
        return 4 * self.trained_weights * (self.is_averaged and self.average_on_host and not self.one_pool)

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit of activations in bf16."""
        return self.num_tokens * self.width * 2


def read_footprint(
    family: ModelFamily,
    shapes: Shapes,
    width: int,
    num_tokens: int,
    lora_targets: Sequence[str] = (),
    rank: int | Adapter = 0,
    examples_per_step: int = 1,
    plain_layers: Sequence[str] = (),
    examples_at_once: int = 1,
    kept_beside: float = 0.0,
    frozen_ranks: Mapping[str, int] | None = None,
) -> Footprint:
    """Returns the footprint of a LoRA run; `of_all_weights` makes it one of training all weights.

    Args:
        shapes: shapes of the transformer's tensors, from its files' headers.
        width: features of a token inside the blocks.
        lora_targets: paths of the linear layers that get a LoRA.
        rank: its rank, or the adapter that they get in its place.
        examples_per_step: examples of one process in a step, over all micro-batches.
        plain_layers: paths of the linear layers that are never quantized.
        examples_at_once: examples of one process in a micro-batch.
        kept_beside: units that `ModelFamily.kept_beside` gives.
        frozen_ranks: ranks of a frozen LoRA's layers, by their paths. It is counted from above: as it is trained too,
            apart from gradients, optimizer states and the inputs that these need.
    """
    adapter = rank if isinstance(rank, Adapter) else Adapter(rank=rank)
    frozen = {f"{path}.weight": rank for path, rank in (frozen_ranks or {}).items()}
    kinds = tuple(_read_kind(family, shapes, path) for path in family.block_paths)
    # A layer with another width than a token's features belongs to an MLP, or makes modulations.
    named = (*lora_targets, *plain_layers, *(frozen_ranks or {}))
    apart = {path for path in named if set(shapes[f"{path}.weight"]) != {width}}
    blocks = tuple(f"{path}." for path in family.block_paths)
    num_blocks = max(sum(kind.count for kind in kinds), 1)
    targets = {f"{path}.weight": shapes[f"{path}.weight"] for path in lora_targets}

    def sees_tokens(name: str) -> bool:
        return name.startswith(blocks) and not parent(name).endswith(family.modulation_layers)

    of_tokens = {name: shape for name, shape in targets.items() if sees_tokens(name)}
    # Layers for text see other tokens than those for pictures, so the larger half is what all tokens keep at most.
    halves = [
        {name: shape for name, shape in of_tokens.items() if parent(name).endswith(family.text_layers) is for_text}
        for for_text in (False, True)
    ]
    trains_modulation = any(parent(name).endswith(family.modulation_layers) for name in (*targets, *frozen))
    # What attention layers read is kept anyhow.
    inputs = [sum(shape[1] for shape in half.values() if set(shape) != {width}) for half in halves]
    half = max(halves, key=len)
    low_sum = sum(adapter.low_features(parent(name)) for name in half)
    frozen_sum = sum(each for name, each in frozen.items() if sees_tokens(name))
    rank_units = max((low_sum + frozen_sum) / num_blocks - MEASURED_RANKS, 0) / width
    on_mlp = any(inputs) or any(sees_tokens(name) and set(shapes[name]) != {width} for name in frozen)
    projections = [name for name in half if parent(name).endswith(family.lora_targets[:3])]
    outputs, of_projections = (
        sum(half[name][0] for name in names) / width / num_blocks for names in (half, projections)
    )
    is_dora = adapter.kind == "dora"
    return Footprint(
        kinds=kinds,
        outside_weights=sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith(blocks)),
        width=width,
        num_tokens=num_tokens,
        trained_weights=sum(adapter.count_weights(parent(name), shape) for name, shape in targets.items()),
        trained=tensors_of(
            (name, each) for name, shape in targets.items() for each in adapter.tensor_shapes(parent(name), shape)
        ),
        adapter_bytes=sum(adapter.bytes_beside(parent(name), shape) for name, shape in targets.items()),
        gained_units=is_dora * (outputs - of_projections),
        gained_projection_units=is_dora * of_projections,
        compiled_adapter_units=adapter.compiled_keep * (of_projections if is_dora else outputs),
        adapter_work_units=max(map(adapter.features_at_work, of_tokens.values()), default=0) / width,
        step_times=adapter.step_times,
        notes=(adapter.note,) if adapter.note else (),
        trains_modulation=trains_modulation,
        extra_units=max(inputs) / width / num_blocks + KEPT_GATED_UNITS * trains_modulation + kept_beside,
        selective_extra_units=MLP_INPUT_UNITS * any(inputs) + GATED_UNITS * trains_modulation,
        trains_mlp=on_mlp,
        rank_units=rank_units,
        projected_rank_units=rank_units * len(projections) / max(len(half), 1),
        examples_per_step=examples_per_step,
        examples_at_once=examples_at_once,
        plain_layers=tuple(plain_layers),
        plain_layer_weights=sum(math.prod(shapes[f"{path}.weight"]) for path in plain_layers),
        largest_weight=max(map(math.prod, shapes.values())),
        mlps_are_frozen=not apart,
        frozen_weights=sum(each * sum(shapes[name]) for name, each in frozen.items()),
    )


def of_all_weights(footprint: Footprint, shapes: Shapes) -> Footprint:
    """Returns the footprint with every weight of the transformer trained.

    Args:
        shapes: shapes of its tensors.
    """
    blocks = tuple(f"{kind.path}." for kind in footprint.kinds)
    return replace(
        footprint,
        trained_weights=footprint.num_weights,
        trained=tensors_of(shapes.items(), blocks),
        trains_all=True,
        trains_modulation=True,
    )


def with_average(footprint: Footprint, config: TrainConfig) -> Footprint:
    """Returns the footprint of a LoRA run with the average that the config asks for."""
    return replace(footprint, is_averaged=config.ema.decay is not None, average_on_host=config.ema.on_host)


def tensors_of(
    named: Iterable[tuple[str, Sequence[int]]], blocks: tuple[str, ...] | None = None
) -> tuple[TrainedTensors, ...]:
    """Counts trained tensors by their shapes.

    Args:
        named: name and shape of each.
        blocks: beginnings of the names of those that belong to blocks; None: all do.
    """
    kinds = Counter((tuple(shape), blocks is None or name.startswith(blocks)) for name, shape in named)
    return tuple(TrainedTensors(shape, count, in_block) for (shape, in_block), count in kinds.items())


def parent(name: str) -> str:
    """Returns the module path of a tensor's name."""
    return name.rpartition(".")[0]


def _read_kind(family: ModelFamily, shapes: Shapes, path: str) -> BlockKind:
    numbers = {name.removeprefix(f"{path}.").split(".")[0] for name in shapes if name.startswith(f"{path}.")}
    block = {name: shape for name, shape in shapes.items() if name.startswith(f"{path}.0.")}
    modulation = {n: s for n, s in block.items() if parent(n).endswith(family.modulation_layers)}
    linears = {n: s for n, s in block.items() if n not in modulation and n.endswith(".weight") and len(s) == 2}
    others = {n: s for n, s in block.items() if n not in modulation and n not in linears}
    return BlockKind(
        path=path,
        count=len(numbers),
        linear_weights=sum(map(math.prod, linears.values())),
        modulation_weights=sum(map(math.prod, modulation.values())),
        modulation_outputs=sum(shape[0] for shape in modulation.values() if len(shape) == 2),
        largest_modulation=max(map(math.prod, modulation.values()), default=0),
        other_weights=sum(map(math.prod, others.values())),
        rows=sum(shape[0] for shape in linears.values()),
        num_linears=len(linears),
        units=family.activation_units[path],
    )


def with_fused_mlps(footprint: Footprint, facts: HardwareFacts) -> Footprint:
    """Returns the footprint on a GPU, where kernels may compute each MLP as one function."""
    if not footprint.mlps_are_frozen or footprint.trains_all or facts.capability < (8, 9):
        return footprint
    return replace(footprint, fused_formats=("fp8", "nf4"))


def block_weight_bytes(kind: BlockKind, weights_format: str, compute_format: str, modulation_resident: bool) -> int:
    """Returns the device memory of one block's weights.

    Args:
        weights_format: of its linear layers: "fp32", "bf16", "fp8", "int8" or "nf4".
        compute_format: of everything else: "fp32" or "bf16".
    """
    small = kind.other_weights + (kind.modulation_weights if modulation_resident else 0)
    scale_bytes = 0 if weights_format in ELEMENT_BYTES else 4 * kind.rows  # fp32, one a row of a quantized weight
    linear_bytes = round(kind.linear_weights * BYTES_PER_WEIGHT[weights_format] + scale_bytes)
    return linear_bytes + ELEMENT_BYTES[compute_format] * small
