"""Floating-point operations of a training step, from shapes alone: those the model needs, and those the plan computes.

A product of M rows with N x K weights is 2 M N K operations. A step of a LoRA passes every frozen linear layer twice:
forward, and backward for the gradient of its input; a frozen weight has no gradient. The LoRA's own matrices, and all
weights where all are trained, pass a third time for theirs. Attention's two products become four in the backward pass;
a fused backward pass computes the scores again, a fifth (FlashAttention-2, Dao 2023, arXiv 2307.08691, sections 3.1
and 4.1: 2.5 times the forward pass). "Model" operations leave out whatever is recomputed, so that a plan gains nothing
by recomputing; "hardware" operations count it.

At the two ends less is needed, and not counted: what the first block's attention reads depends on nothing that is
trained (unless all weights are), and nothing reads the text tokens that leave the last block.

Left out are the layers outside the blocks (less than 0.02% of a full-size step at 1024x1024 pixels) and everything that
is not a product. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pixtune.family import Shapes
from pixtune.plan.adapter import Adapter

if TYPE_CHECKING:
    from pixtune.family import ModelFamily

ATTENTION_FORWARD = 4
"""Operations for each pair of tokens and feature: scores, and their sum of values."""
ATTENTION_BACKWARD, ATTENTION_BACKWARD_AGAIN = 8, 2
"""Operations of the gradients' four products, and of the recomputed scores."""

ATTENTION_INPUTS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
"""Names in diffusers of the linear layers that an attention begins with."""


@dataclass(frozen=True)
class BlockLinear:
    """A linear layer of a block."""

    block: int
    """Number of its block in the order in which they run."""
    num_weights: int
    num_lora_weights: int
    image_tokens_pass: bool
    text_tokens_pass: bool
    """Whether text tokens pass; where neither kind does, it is one row an example, as in modulation layers."""
    quantized: bool
    begins_attention: bool
    """Whether it makes queries, keys or values."""
    reads_untrained: bool
    """Whether its input has no gradient unless all weights are trained."""
    leads_nowhere: bool
    """Whether nothing reads its output, so that it has no backward pass."""


@dataclass(frozen=True)
class StepSize:
    """Examples of one process's optimizer step, and their tokens."""

    num_examples: int
    """Examples of an optimizer step, all micro-batches together."""
    num_image_tokens: int
    """Image tokens of one example: its picture and its controls."""
    num_text_tokens: int
    """Text tokens of one example."""

    def rows(self, linear: BlockLinear) -> int:
        """Counts the rows that a layer is given in a step."""
        tokens = self.num_image_tokens * linear.image_tokens_pass + self.num_text_tokens * linear.text_tokens_pass
        return self.num_examples * (tokens or 1)


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of one optimizer step of one process."""

    plain: int = 0
    """Operations of linear layers in the format of activations."""
    quantized: int = 0
    """Operations of linear layers in 8 bits."""
    lora: int = 0
    attention: int = 0
    plain_again: int = 0
    quantized_again: int = 0
    lora_again: int = 0
    attention_again: int = 0
    """Recomputed operations of attentions: in recomputed blocks, and of all attentions the scores in the backward
    pass."""

    @property
    def model(self) -> int:
        """Operations that a step needs however it is computed."""
        return self.plain + self.quantized + self.lora + self.attention

    @property
    def hardware(self) -> int:
        """Operations that are computed."""
        again = self.plain_again + self.quantized_again + self.lora_again + self.attention_again
        return self.model + again

    @property
    def quantized_share(self) -> tuple[float, float]:
        """Shares of the model's and of the hardware's operations that are in 8 bits."""
        return self.quantized / self.model, (self.quantized + self.quantized_again) / self.hardware


def read_linears(
    family: ModelFamily,
    shapes: Shapes,
    lora_targets: Sequence[str] = (),
    rank: int | Adapter = 0,
    quantized: bool = False,
    plain_layers: Sequence[str] = (),
) -> list[BlockLinear]:
    """Lists the blocks' linear layers.

    Args:
        shapes: shapes of the transformer's tensors by name.
        lora_targets: paths of the layers that get a LoRA.
        rank: its rank, or the adapter that they get in its place.
        quantized: whether the layers are in 8 bits, except for `plain_layers` and those that make modulations.
    """
    adapter = rank if isinstance(rank, Adapter) else Adapter(rank=rank)
    places = _number_blocks(family, shapes)
    with_text = {
        place for name in shapes if (place := _place(family, name)) and _path(name).endswith(family.text_layers)
    }
    targets, plain, last = set(lora_targets), set(plain_layers), len(places) - 1
    linears = []
    for name, shape in shapes.items():
        place, path = _place(family, name), _path(name)
        if place is None or not name.endswith(".weight") or len(shape) != 2:
            continue
        block, modulates = places[place], path.endswith(family.modulation_layers)
        for_text, begins = path.endswith(family.text_layers), path.endswith(ATTENTION_INPUTS)
        linears.append(
            BlockLinear(
                block=block,
                num_weights=math.prod(shape),
                num_lora_weights=adapter.count_products(path, shape) if path in targets else 0,
                image_tokens_pass=not modulates and not for_text,
                text_tokens_pass=not modulates and (for_text or place not in with_text),
                quantized=quantized and not modulates and path not in plain,
                begins_attention=begins,
                reads_untrained=modulates or (block == 0 and begins),
                leads_nowhere=block == last and for_text and not begins,
            )
        )
    return linears


def step_flops(
    linears: Sequence[BlockLinear],
    size: StepSize,
    width: int,
    recomputed_blocks: int,
    trains_all: bool,
    reprojected_blocks: int = 0,
) -> StepFlops:
    """Counts the operations of a step.

    Args:
        width: features of a token inside the blocks, all attention heads together.
        recomputed_blocks: number of leading blocks that run forward twice.
        trains_all: whether every weight has a gradient.
        reprojected_blocks: number of blocks after them that make queries, keys and values twice.
    """
    passes = [_passes(linear, trains_all) for linear in linears]
    forward = [2 * size.rows(linear) * linear.num_weights for linear in linears]
    lora = [2 * size.rows(linear) * linear.num_lora_weights for linear in linears]
    reprojected = recomputed_blocks + reprojected_blocks
    again = [linear.block < (reprojected if linear.begins_attention else recomputed_blocks) for linear in linears]
    eight = [linear.quantized for linear in linears]

    num_blocks = 1 + max(linear.block for linear in linears)
    num_tokens = size.num_image_tokens + size.num_text_tokens
    attention = num_blocks * size.num_examples * num_tokens**2 * width
    attention_again = ATTENTION_BACKWARD_AGAIN + ATTENTION_FORWARD * min(recomputed_blocks, num_blocks) / num_blocks
    return StepFlops(
        plain=sum(f * p for f, p, q in zip(forward, passes, eight, strict=True) if not q),
        quantized=sum(f * p for f, p, q in zip(forward, passes, eight, strict=True) if q),
        # Forward, the gradient of their input and their own: half of the first of the two matrices' is its input's.
        lora=sum(round(f * _lora_passes(linear)) for f, linear in zip(lora, linears, strict=True)),
        attention=attention * (ATTENTION_FORWARD + ATTENTION_BACKWARD),
        plain_again=sum(f for f, a, q in zip(forward, again, eight, strict=True) if a and not q),
        quantized_again=sum(f for f, a, q in zip(forward, again, eight, strict=True) if a and q),
        lora_again=sum(f for f, a in zip(lora, again, strict=True) if a),
        attention_again=round(attention * attention_again),
    )


def _passes(linear: BlockLinear, trains_all: bool) -> int:
    """Counts how often a layer's weights are passed: forward, for its input's gradient, and for their own."""
    if linear.leads_nowhere:
        return 1
    return 3 if trains_all else 1 if linear.reads_untrained else 2


def _lora_passes(linear: BlockLinear) -> float:
    """Counts how often the two matrices of a layer's LoRA are passed, on average."""
    return 1 if linear.leads_nowhere else 2.5 if linear.reads_untrained else 3


def _number_blocks(family: ModelFamily, shapes: Shapes) -> dict[tuple[str, int], int]:
    """Maps each block's (list, number in it) to its number in the order in which blocks run."""
    places = {place for name in shapes if (place := _place(family, name))}
    in_order = sorted(places, key=lambda place: (family.block_paths.index(place[0]), place[1]))
    return {place: number for number, place in enumerate(in_order)}


def _place(family: ModelFamily, name: str) -> tuple[str, int] | None:
    """Returns the list and number of the block that a tensor belongs to, if it belongs to one."""
    for path in family.block_paths:
        if name.startswith(f"{path}."):
            return path, int(name.removeprefix(f"{path}.").split(".")[0])
    return None


def _path(name: str) -> str:
    """Returns the path of a tensor's module."""
    return name.rpartition(".")[0]
