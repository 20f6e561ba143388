"""Wraps a block's forward without moving the block, so that its path, and with it a LoRA's names, stay.

The order is: recomputation outermost, streaming inside it (a recomputed block needs its weights again), and innermost
the computation itself, which alone is compiled. The module's own `compile()` compiles the wrappers too: torch 2.13
traces the copies of an offload into the graph and cannot trace streaming at all. So it is refused in favour of
`replace_computation(block, torch.compile)`, which may be called before or after the wrapping.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Forward = Callable[..., Any]
Around = Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]
"""Wrapper that gets the inner forward, its positional and its named arguments, and returns what the forward returns."""


@dataclass
class WrappedForward:
    """A forward with a wrapper around it."""

    block: nn.Module
    inner: Forward
    around: Around
    recomputes: bool
    """Whether `around` keeps only the inputs and runs `inner` again in the backward pass."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        refuse_whole_compilation(self.block)
        return self.around(self.inner, args, kwargs)


def wrap_forward(block: nn.Module, around: Around, recomputes: bool = False) -> None:
    """Wraps `around` around the block's forward and all wrappers that it has so far.

    Raises:
        RuntimeError: `block.compile()` was called.
    """
    refuse_whole_compilation(block)
    block.forward = WrappedForward(block, block.forward, around, recomputes)


def refuse_whole_compilation(block: nn.Module) -> None:
    """Raises RuntimeError if the module's own `compile()` was called."""
    if block._compiled_call_impl is not None:
        raise RuntimeError(
            "Module.compile() would compile the wrappers of a block's forward too; call replace_computation(block, "
            "torch.compile) instead"
        )


def replace_computation(block: nn.Module, change: Callable[[Forward], Forward]) -> None:
    """Replaces the block's own forward, inside all wrappers: `change` is `torch.compile`, for example."""
    holder = block.forward
    if not isinstance(holder, WrappedForward):
        block.forward = change(holder)
        return
    while isinstance(holder.inner, WrappedForward):
        holder = holder.inner
    holder.inner = change(holder.inner)


def is_recomputed(block: nn.Module) -> bool:
    """Returns whether the backward pass runs the block's forward again instead of keeping what it computed."""
    holder = block.forward
    while isinstance(holder, WrappedForward):
        if holder.recomputes:
            return True
        holder = holder.inner
    return False
