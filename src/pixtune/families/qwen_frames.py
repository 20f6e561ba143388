"""Qwen-Image's autoencoder on pictures, without the empty frames before them.

It is a video's autoencoder: its convolutions see a frame and the two before it, and before the first frame there are
zeros. A picture is a first frame. So two of a kernel's three slices meet zeros only, and what the last one makes of the
frame, a convolution of a picture, is the whole result. diffusers multiplies the zeros too: two thirds of the work.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pixtune.engine.forwards import Forward, wrap_forward


def skip_empty_frames(autoencoder: nn.Module) -> None:
    """Has an `AutoencoderKLQwenImage` compute single frames alone; its weights stay, and videos are as they were."""
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

    for module in autoencoder.modules():
        if isinstance(module, QwenImageCausalConv3d):
            wrap_forward(module, partial(_of_a_frame, module))


def _of_a_frame(layer: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    frames_BCFHW: Tensor
    frames_BCFHW, *before = (*args, *kwargs.values())
    if frames_BCFHW.shape[2] > 1 or any(frames is not None for frames in before):
        return forward(*args, **kwargs)
    width, _, height, *_ = layer._padding  # of both sides; the layer's own `padding` is 0
    frame_BCHW = torch.nn.functional.conv2d(
        frames_BCFHW[:, :, 0], layer.weight[:, :, -1], layer.bias, layer.stride[1:], (height, width)
    )
    return frame_BCHW.unsqueeze(2)
