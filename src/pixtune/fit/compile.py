"""Compiles the repeated blocks, each kind once, with torch.compile.

Blocks of one kind share their code, so the first of them pays for all. What is outside the blocks stays eager.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable

import torch
import torch._functorch.config as functorch_config
from torch import nn

from pixtune.files import user_cache_folder
from pixtune.fit.forwards import replace_computation

MOST_GRAPHS = 64
"""Graphs of one kind of block. Four serve all sizes, with and without a gradient of the input; as many again without
gradients and for batches with masks. The default of 8 would be reached, and what comes later run uncompiled."""

LIMITS_TO_RECOMPUTING = (
    "ban_recompute_used_far_apart", "ban_recompute_long_fusible_chains", "ban_recompute_materialized_backward",
    "ban_recompute_reductions",
)  # fmt: skip
"""Of the partitioner (torch._functorch.config, 2.10 to 2.15). `activation_memory_budget` lifts more than these, and
then computes products twice to stay below its budget."""
LIMIT_TO_KNOWN_OPERATORS = "ban_recompute_not_in_allowlist"
"""Lifted, only what is known to be dear is kept (`dear_results.py` adds to what torch knows). Else joined and rotated
queries and keys are kept beside the plain ones."""


def keep_compiled_code() -> None:
    """torch keeps what it has compiled in a folder that a reboot empties; a second start of the same run is quicker by
    half a minute where it stays. TORCHINDUCTOR_CACHE_DIR, if the user has set it, stands."""
    folder = user_cache_folder()
    if folder is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "compiled"))


@functools.cache
def compile_obstacle(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device (no Triton, no C compiler); None where it works. Takes seconds."""
    keep_compiled_code()
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return None


def compile_blocks(blocks: Iterable[nn.Module], lean: bool, backward_twice: bool = False) -> None:
    """Replaces each block's computation by a compiled one. Nothing is compiled before the first call.

    Args:
        lean: the compiler may compute anything again in the backward pass that is neither a product nor attention:
            norms, rotary embeddings, gates. Else it keeps what it would have to read far to compute again.
        backward_twice: the backward pass may run twice over one graph, so that it may not use what the forward pass
            kept as working memory.
    """
    from torch._inductor import config as inductor_config

    from pixtune.fit.dear_results import KeepDearResults

    keep_compiled_code()
    for limit in (*LIMITS_TO_RECOMPUTING, LIMIT_TO_KNOWN_OPERATORS):
        setattr(functorch_config, limit, not lean)
    inductor_config.joint_custom_pre_pass = KeepDearResults()
    functorch_config.donated_buffer = not backward_twice
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    for block in blocks:
        replace_computation(block, torch.compile)
