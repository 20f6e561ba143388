"""Small random models of every pipeline, and what the stock pipelines compute inside themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.runs import ROOT

CAPTIONS = [
    "a red fox", "a small blue house with a green door", "make it night", "redraw in noto style", "two, three, four",
]  # fmt: skip


def build_folder(kind: str, folder: Path) -> Path:
    """A random model in diffusers' layout, by the scripts that make the shipped ones; `kind` names the script."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        module = __import__(kind)
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    pipeline = module.build_pipeline(CAPTIONS * 20)
    give_values(pipeline.transformer)
    save = getattr(module, "save_edit_pipeline", module.save_pipeline)
    save(pipeline, folder)
    return folder


def give_values(transformer: nn.Module) -> None:
    """Blocks start as the identity: with zeros nothing that goes through them could be wrong."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@contextmanager
def recorded_calls(transformer: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of every forward call, and its first output under "output"."""
    calls: list[dict[str, Any]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert not args
        calls.append({**kwargs, "output": output[0]})

    hook = transformer.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def assert_same(ours: Any, stock: Any, name: str) -> None:
    """Equal inputs of a transformer: exact where nothing was computed, tight where it was."""
    if stock is None:
        assert ours is None, name
    elif isinstance(stock, Tensor):
        assert ours.shape == stock.shape, (name, ours.shape, stock.shape)
        ours = ours.to(stock.dtype)
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}")
    else:
        assert ours == stock, (name, ours, stock)
