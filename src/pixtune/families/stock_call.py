"""One step of a family's stock pipeline from given inputs, to compare the family's velocity with.

The pipeline itself is called, so packing, position ids, timestep scale and guidance are its own. It encodes no text and
no pictures: features and control latents are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from pixtune import randomness
from pixtune.family import CONTROL_SIDE, Conditioning, ModelFamily, Placement
from pixtune.storage.loading import open_transformer
from pixtune.storage.model_folder import ModelFolder

SIGMAS = [0.7, 0.3]
"""Sigmas before the sampler's shift: two, since the last one of a schedule may be stretched to its end."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of a transformer's call, on the device."""

    noisy_BCHW: Tensor
    conditioning: Conditioning
    """Text features of one example, stacked to a batch."""
    controls: tuple[Tensor, ...]
    """Latents BCHW at the size that the pipeline gives a square control picture."""
    guidance: float


def random_inputs(family: ModelFamily, folder: ModelFolder, side: int, num_text_tokens: int, device: Any) -> Inputs:
    """Draws fixed latents, text features and, for a model that edits, one control.

    Args:
        side: side of the picture in pixels.
    """

    def latents(width: int, height: int, what: str) -> Tensor:
        shape_CHW = family.latent_shape(folder, width, height)
        return randomness.normal((1, *shape_CHW), 0, "random weights", what).to(device)

    text = family.stack_conditioning([family.random_text(folder, num_text_tokens, 0)])
    side -= side % family.pixel_multiple(folder)
    controls = []
    if family.max_controls and family.embedded_guidance:
        controls.append(latents(side, side, "control"))  # this pipeline has a switch to leave a control's size alone
    elif family.max_controls:
        controls.append(latents(*family.control_size(folder, (CONTROL_SIDE, CONTROL_SIDE), CONTROL_SIDE), "control"))
    return Inputs(
        latents(side, side, "noisy"), {name: tensor.to(device) for name, tensor in text.items()}, tuple(controls), 3.5
    )


def load_stock_transformer(folder: ModelFolder, placement: Placement) -> nn.Module:
    """Loads the transformer by the class that its config names, in that class's own way where it lies in a folder."""
    import diffusers

    config = folder.component_config("transformer")
    kind = getattr(diffusers, config["_class_name"])
    if folder.file is not None:
        model = kind.from_config(config).to(placement.dtype)
        stored = open_transformer(folder)
        model.load_state_dict({entry.name: stored.read(entry.name) for entry in stored.entries})
        return model.to(placement.device).eval().requires_grad_(False)
    model = kind.from_pretrained(folder.part("transformer"), torch_dtype=placement.dtype, use_safetensors=True)
    return model.to(placement.device).eval().requires_grad_(False)


@torch.no_grad()
def stock_velocity(
    family: ModelFamily, folder: ModelFolder, transformer: nn.Module, inputs: Inputs, placement: Placement
) -> tuple[Tensor, Tensor]:
    """Computes the first step's velocity by the stock pipeline, BCHW, and the sigma that its sampler chose."""
    import diffusers

    kind: Any = getattr(diffusers, folder.pipeline_class)
    parts: dict[str, Any] = dict.fromkeys(folder.components)
    autoencoder = family.load_autoencoder(folder, placement)  # for its config alone: nothing is encoded
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder.part("scheduler"))
    pipeline = kind(**{**parts, "vae": autoencoder, "scheduler": scheduler, "transformer": transformer})
    pipeline.set_progress_bar_config(disable=True)
    batch, channels, height, width = inputs.noisy_BCHW.shape
    outputs: list[Tensor] = []
    hook = transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    try:
        pipeline(
            latents=pipeline._pack_latents(inputs.noisy_BCHW.to(placement.dtype), batch, channels, height, width),
            width=width * pipeline.vae_scale_factor, height=height * pipeline.vae_scale_factor,
            num_inference_steps=len(SIGMAS), sigmas=SIGMAS, output_type="latent",
            callback_on_step_end=stop_after_a_step, **_arguments(family, pipeline, inputs, placement.dtype),
        )  # fmt: skip
    finally:
        hook.remove()
    tokens_BLC = outputs[0][:, : height * width // 4]
    sides = (height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor, pipeline.vae_scale_factor)
    velocity = pipeline._unpack_latents(tokens_BLC, *sides)
    sigma_B = scheduler.sigmas[:1].float().to(inputs.noisy_BCHW.device)
    return (velocity[:, :, 0] if velocity.ndim == 5 else velocity), sigma_B


def stop_after_a_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Makes the pipeline, as its callback, skip the steps to come."""
    pipeline._interrupt = True
    return {}


def _arguments(family: ModelFamily, pipeline: Any, inputs: Inputs, dtype: torch.dtype) -> dict[str, Any]:
    """Builds the arguments that differ between the pipelines' calls."""
    text = {name: tensor.to(dtype) for name, tensor in inputs.conditioning.items()}
    arguments: dict[str, Any] = {"prompt_embeds": text["prompt_embeds"]}
    if family.embedded_guidance:
        arguments |= {"pooled_prompt_embeds": text["pooled_embeds"], "guidance_scale": inputs.guidance}
    else:
        mask_BT = torch.ones(text["prompt_embeds"].shape[:2], dtype=torch.bool, device=inputs.noisy_BCHW.device)
        arguments |= {"true_cfg_scale": 1.0, "prompt_embeds_mask": mask_BT}
    if inputs.controls:
        control = inputs.controls[0].to(dtype)
        # The pipelines know a control by its picture's size; the latents that its autoencoder would make are given.
        pipeline._encode_vae_image = lambda image, generator: control.unsqueeze(2) if image.ndim == 5 else control
        arguments["image"] = Image.new("RGB", (CONTROL_SIDE, CONTROL_SIDE))
        if family.embedded_guidance:
            height, width = (side * pipeline.vae_scale_factor for side in inputs.noisy_BCHW.shape[-2:])
            arguments["image"] = Image.new("RGB", (width, height))
            arguments |= {"_auto_resize": False, "max_area": height * width}
    return arguments
