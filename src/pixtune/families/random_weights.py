"""A model of a given architecture with random weights, for speed and memory where the real ones are absent."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from pixtune.families.base import Placement


def build_random(build: Callable[[], nn.Module], placement: Placement) -> nn.Module:
    """Built without memory, then given memory and values in place: never a second copy.

    What a model holds besides parameters and buffers is without values afterwards: the caller rebuilds it.
    """
    with torch.device("meta"):
        model = build().to(placement.dtype)
    model.to_empty(device=placement.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.5 / math.sqrt(parameter.shape[-1]))
            elif name.endswith("weight"):
                parameter.fill_(1)
            else:
                parameter.zero_()
    return model.requires_grad_(False)
