"""Compiles the repeated blocks, each kind once, with torch.compile.

Blocks of one kind share their code, so the first of them pays for all. What is outside the blocks stays eager.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn

from pixtune.engine.forwards import Forward, replace_computation
from pixtune.storage.files import user_cache_folder

MAX_GRAPHS = 64
"""Limit on the graphs of one kind of block. One or two serve all sizes, depending on whether a block recomputes
projections, plus as many without gradients and as many for batches with masks. The default of 8 could be reached, and
graphs beyond it would run uncompiled."""
STATES = ("hidden_states", "encoder_hidden_states")
"""diffusers' names of the features of image and text tokens that go from block to block."""
TOKEN_AXES = {
    **dict.fromkeys(STATES, 1), "image_rotary_emb": 0, "encoder_hidden_states_mask": 1, "modulate_index": 1,
    "joint_attention_kwargs": 1,
}  # fmt: skip
"""Axis of tokens in each argument that diffusers calls a block with; the last is a family's own masks by name."""

LIMITS_TO_RECOMPUTING = (
    "ban_recompute_used_far_apart", "ban_recompute_long_fusible_chains", "ban_recompute_materialized_backward",
    "ban_recompute_reductions",
)  # fmt: skip
"""Limits of the partitioner (torch._functorch.config, 2.10 to 2.15). `activation_memory_budget` lifts more than these,
and then recomputes products to stay below its budget."""
LIMIT_TO_KNOWN_OPERATORS = "ban_recompute_not_in_allowlist"
"""Limit that is lifted so that only results known to be expensive are kept (`recompute_policy.py` adds to those that
torch knows). Otherwise joined and rotated queries and keys are kept beside the plain ones."""


def keep_compiled_code() -> None:
    """Has torch keep compiled code in a lasting folder, unless the user has set TORCHINDUCTOR_CACHE_DIR.

    torch's own choice is a folder that a reboot empties; a second start of the same run is half a minute faster where
    the code is still there. Each version of this package's operators has a folder of its own, since torch does not ask
    what is inside of an operator.
    """
    folder = user_cache_folder()
    if folder is not None:
        sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
        version = hashlib.sha256(sources).hexdigest()[:12]
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "compiled" / version))


@functools.cache
def compile_obstacle(device: torch.device) -> str | None:
    """Returns why nothing can be compiled for a device (no Triton, no C compiler); None: it works. Takes seconds."""
    keep_compiled_code()
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return None


def compile_blocks(
    blocks: Iterable[nn.Module], selective: bool, backward_twice: bool = False, sizes_vary: bool = False
) -> None:
    """Replaces each block's computation by a compiled one. Nothing is compiled before the first call.

    Args:
        selective: the compiler may recompute anything in the backward pass that is neither a product nor attention:
            norms, rotary embeddings, gates. Otherwise it keeps results that are long to recompute.
        backward_twice: the backward pass may run twice over one graph, so that it must not use what the forward pass
            kept as working memory.
        sizes_vary: pictures or captions come in several sizes. Then the first graph serves them all. Otherwise it is
            made for the first size, a second one would be made for other pictures and a third one for other captions.
    """
    from torch._inductor import config as inductor_config

    from pixtune.engine.recompute_policy import RecomputePolicy

    keep_compiled_code()
    for limit in (*LIMITS_TO_RECOMPUTING, LIMIT_TO_KNOWN_OPERATORS):
        setattr(functorch_config, limit, not selective)
    inductor_config.joint_custom_pre_pass = RecomputePolicy()
    # Where tokens or ranks are no multiple of 8 the compiler may pad a product's inputs, and keeps the padded copies
    # for the backward pass instead of what they are computed from: 4 units a block of FLUX with a LoRA on its MLP.
    inductor_config.shape_padding = False
    functorch_config.donated_buffer = not backward_twice
    # Otherwise torch traces what it has compiled before, since functions with a backward of their own are in it. What
    # they compute is part of the graph by which compiled code is found again.
    functorch_config.autograd_cache_allow_custom_autograd_functions = True
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    for block in blocks:
        trained = any(parameter.requires_grad for parameter in block.parameters())
        replace_computation(block, functools.partial(compile_forward, trained=trained, sizes_vary=sizes_vary))


def compile_forward(forward: Forward, trained: bool, sizes_vary: bool, backend: str = "inductor") -> Forward:
    """Compiles a block's forward such that one graph serves all blocks of its kind, and all sizes if they vary.

    Args:
        trained: something of the block is trained. A block without that, before all others that have it, runs without
            gradients and keeps nothing.
    """

    compiled = torch.compile(forward, backend=backend)

    def call(*args: Any, **kwargs: Any) -> Any:
        if trained:
            states = {name: kwargs[name] for name in STATES if isinstance(kwargs.get(name), Tensor)}
            kwargs |= {name: as_in_later_blocks(states_BLC) for name, states_BLC in states.items()}
        if sizes_vary:
            for name in TOKEN_AXES.keys() & kwargs.keys():
                mark_tokens(kwargs[name], TOKEN_AXES[name])
        return compiled(*args, **kwargs)

    return call


def as_in_later_blocks(states_BLC: Tensor) -> Tensor:
    """Returns the same states, made such that those of the first trained block look to the compiler like later ones.

    The first block's states need no gradient: that would be another graph, which takes some seconds to compile (9 on a
    machine with an H100), while gradients that nobody reads take an estimated thousandth of a step. And the batch
    stride of a single example has no meaning, but differs where a kind of block passes on slices.
    """
    if states_BLC.shape[0] == 1 and states_BLC.stride(0) != states_BLC.numel():
        states_BLC = states_BLC.flatten(0, 1).unsqueeze(0)
    if torch.is_grad_enabled() and not states_BLC.requires_grad:
        states_BLC = states_BLC.detach().requires_grad_()
    return states_BLC


def mark_tokens(value: Any, axis: int) -> None:
    """Marks for the compiler that the size of this axis varies, in a tensor or in each tensor of a collection."""
    if isinstance(value, Tensor):
        torch._dynamo.maybe_mark_dynamic(value, axis)
    elif isinstance(value, tuple | list | dict):
        for tensor in value.values() if isinstance(value, dict) else value:
            mark_tokens(tensor, axis)
