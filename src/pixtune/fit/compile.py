"""Compiles the repeated blocks, each kind once, with torch.compile.

Blocks of one kind share their code, so the first of them pays for all. What is outside the blocks stays eager.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch._functorch.config as functorch_config
from torch import nn

from pixtune.fit.forwards import replace_computation

MOST_GRAPHS = 64
"""Graphs of one kind of block: one a shape until sizes are made variable, twice that with and without gradients. The
default of 8 is for functions that are called with one or two."""


def compile_blocks(blocks: Iterable[nn.Module], activation_budget: float) -> None:
    """Replaces each block's computation by a compiled one. Nothing is compiled before the first call.

    Args:
        activation_budget: below 1, the compiler keeps less for the backward pass and computes cheap operations again:
            norms, rotary embeddings, gates; the lower, the more of them. Products and attention are kept.
    """
    functorch_config.activation_memory_budget = activation_budget
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    for block in blocks:
        replace_computation(block, torch.compile)
