"""A transformer whose blocks have weights only while they run: read from their files each time, freed afterwards.

So a model of any size runs on a machine that can hold one of its blocks and the layers outside them, in the same format
in which it would train. That costs reading all files once per pass: it is for examining a model, not for training it.
With `activations.recompute_blocks` the backward pass works too, and reads the files once more.

While a block's weights are away its tensors hold NaN, in a single number on the device, as in `streaming`: code that
reads them by mistake computes nothing that looks right, and a LoRA attached meanwhile finds the right device and shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.forwards import Forward, wrap_forward
from pixtune.engine.load import PLAIN, Layout, fill, lay_out, parent, put_into
from pixtune.engine.quantize import QuantizedLinear
from pixtune.errors import WeightsError
from pixtune.family import ModelFamily, Placement
from pixtune.storage.loading import TransformerTensors, open_transformer
from pixtune.storage.model_folder import ModelFolder

Visit = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None]
"""Function that gets a block's path, the block with its weights in place, and the arguments that it will run with."""


@dataclass(frozen=True)
class BlockWeights:
    """The tensors of one block, and the modules that they belong to."""

    path: str
    modules: dict[str, nn.Module]
    """Each tensor's module, by the tensor's name; collected before a LoRA changes the paths."""
    stored: TransformerTensors
    placement: Placement

    def arrive(self) -> None:
        """Reads the block's tensors.

        Raises:
            WeightsError: a tensor is missing or has another shape.
        """
        missing = set(self.modules)
        # fastsafetensors would read whole files for each block.
        read = self.stored.iterate(self.placement.device, use_fast=False, wanted=self.modules.__contains__)
        for name, tensor in read:
            put_into(self.modules[name], name, tensor, self.placement)
            missing.discard(name)
        if missing:
            raise WeightsError(
                f"{self.stored.source} lacks {len(missing)} tensors of {self.path}, {min(missing)} among them. Was "
                "the download interrupted? Fetch it again."
            )

    def leave(self) -> None:
        """Replaces the block's tensors by placeholders."""
        for module in self.modules.values():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(self._placeholder(parameter), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = self._placeholder(buffer)

    def prepare(self) -> None:
        """Puts placeholders in place before the first run."""
        for module in set(self.modules.values()):
            if isinstance(module, QuantizedLinear):
                module.weight = torch.empty(module.out_features, module.in_features, dtype=torch.uint8, device="meta")
        self.leave()

    def _placeholder(self, tensor: Tensor) -> Tensor:
        is_number = tensor.is_floating_point()
        dtype = self.placement.dtype if tensor.is_meta and is_number else tensor.dtype
        one = torch.full((), float("nan") if is_number else 0, dtype=dtype, device=self.placement.device)
        return one.expand(tensor.shape)


def load_on_demand(
    family: ModelFamily,
    folder: ModelFolder,
    placement: Placement,
    layout: Layout = PLAIN,
    visit: Visit | None = None,
) -> nn.Module:
    """Loads a frozen transformer, of which only the layers outside its blocks hold their weights.

    Args:
        layout: a layout without `modulation_rows` and `streamed`, which have no meaning here.
        visit: called before each block runs.

    Raises:
        WeightsError: the files' tensors are not those of the architecture that the config describes; names some.
    """
    model = family.build_transformer(folder.component_config("transformer"))
    names = set(model.state_dict())
    lay_out(model, family, placement, layout)
    stored = open_transformer(folder)
    blocks = {f"{path}.{n}": b for path in family.block_paths for n, b in model.get_submodule(path).named_children()}
    in_blocks = tuple(f"{path}." for path in blocks)
    outside = {name for name in names if not name.startswith(in_blocks)}
    tensors = stored.iterate(placement.device, use_fast=False, wanted=lambda name: not name.startswith(in_blocks))
    fill(model, tensors, outside, placement, str(stored.source))
    for path, block in blocks.items():
        modules = {name: model.get_submodule(parent(name)) for name in names if name.startswith(f"{path}.")}
        weights = BlockWeights(path, modules, stored, placement)
        weights.prepare()
        wrap_forward(block, partial(run_with_weights, weights, block, visit))
    return model.requires_grad_(False).eval()


def run_with_weights(
    weights: BlockWeights,
    block: nn.Module,
    visit: Visit | None,
    inner: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Runs a block once, with its weights in place for that time."""
    weights.arrive()
    try:
        if visit is not None:
            visit(weights.path, block, args, kwargs)
        return inner(*args, **kwargs)
    finally:
        weights.leave()
