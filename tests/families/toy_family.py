"""A family as docs/add_a_family.md describes it, in one file: SD3's transformer conditioned on a caption's bytes.

`python tests/families/toy_family.py train ...` is `pixtune train ...` with this family registered, so that the trainer,
the sampler and the export are shown to need nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pixtune import randomness
from pixtune.families import FAMILIES
from pixtune.families.flow_schedule import model_sigmas, model_time_shift
from pixtune.families.packing import PATCH, num_tokens
from pixtune.family import (
    ActivationUnits,
    Conditioning,
    LatentDistribution,
    Placement,
    Prompt,
    PromptOutline,
    Shapes,
    TextEncoder,
    TextLength,
)
from pixtune.sizes import Size
from pixtune.storage.model_folder import ModelFolder
from pixtune.storage.model_names import ModelSpec, OriginalLayer

TEXT_WIDTH = 16
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class ToyFamily:
    """A toy family; `family.ModelFamily` describes its members."""

    name = "toy"
    pipeline_classes: tuple[str, ...] = ("ToyPipeline",)
    script = "tests/families/toy_family.py"
    lora_targets: tuple[str, ...] = LORA_TARGETS
    lora_presets: Mapping[str, tuple[str, ...]] = {"attention": LORA_TARGETS}
    block_paths: tuple[str, ...] = ("transformer_blocks",)
    modulation_layers: tuple[str, ...] = ("norm1.linear", "norm1_context.linear")
    text_layers: tuple[str, ...] = (
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    activation_units: Mapping[str, ActivationUnits] = {
        "transformer_blocks": ActivationUnits(
            eager=17,
            kept=13,
            selective=8,
            projections=0,
            working=25,
            forward=13,
            forward_quantized=18,
            forward_fused=18,
            passing=18,
            passing_quantized=39,
        )
    }
    time_embedder = "time_text_embed"
    time_features: tuple[str, ...] = ("pooled",)
    text_components: tuple[str, ...] = ("text_encoder",)
    unread_text_weights: tuple[str, ...] = ()
    captioner_parts: tuple[str, str, str] | None = None
    prompt_template = "<{}>"
    dropped_caption = ""
    max_controls = 0
    controls_in_text = False
    embedded_guidance = False
    comfyui_prefix = "diffusion_model."
    modelspec = ModelSpec("toy", "https://example.org", "toy", "networks.lora_toy", {})
    original_layers: tuple[OriginalLayer, ...] = tuple(
        OriginalLayer(path, (path,)) for path in (f"transformer_blocks.{{}}.attn.{name}" for name in LORA_TARGETS)
    )
    encoding_bytes_per_pixel = 3150
    pads_text = False

    def pixel_multiple(self, folder: ModelFolder) -> int:
        return PATCH * self._compression(folder)

    def latent_shape(self, folder: ModelFolder, width: int, height: int) -> tuple[int, int, int]:
        factor = self._compression(folder)
        return folder.component_config("vae")["latent_channels"], height // factor, width // factor

    @staticmethod
    def _compression(folder: ModelFolder) -> int:
        return 2 ** (len(folder.component_config("vae")["block_out_channels"]) - 1)

    def num_image_tokens(self, latent_height: int, latent_width: int) -> int:
        return num_tokens(latent_height, latent_width)

    def control_size(self, folder: ModelFolder, picture: Size, side: int) -> Size:
        raise NotImplementedError("takes no control pictures")

    def vision_size(self, picture: Size, side: int) -> Size:
        raise NotImplementedError("takes no control pictures")

    def block_shape(self, folder: ModelFolder) -> tuple[int, int]:
        config = folder.component_config("transformer")
        return config["num_layers"], config["num_attention_heads"] * config["attention_head_dim"]

    def random_text(self, folder: ModelFolder, num_tokens: int, seed: int) -> Conditioning:
        features_TD = randomness.normal((num_tokens, TEXT_WIDTH), seed, "random weights", "text")
        return {"features": features_TD, "pooled": features_TD.mean(0)}

    def load_text_encoder(self, folder: ModelFolder, placement: Placement) -> TextEncoder:
        weight = load_file(folder.path / "text_encoder" / "model.safetensors")["weight"]
        model = nn.Embedding.from_pretrained(weight.to(placement.device, placement.dtype))
        return TextEncoder((model,), ())

    def load_autoencoder(self, folder: ModelFolder, placement: Placement) -> nn.Module:
        from diffusers import AutoencoderKL

        return self._placed(AutoencoderKL.from_pretrained(folder.path / "vae"), placement)

    def encoding_form(self, device: torch.device) -> str | None:
        return None

    def build_transformer(self, config: Mapping[str, Any]) -> nn.Module:
        from diffusers import SD3Transformer2DModel

        with torch.device("meta"):
            return SD3Transformer2DModel.from_config(config)

    def kept_beside(self, config: Mapping[str, Any]) -> float:
        return 0.0

    def transformer_shapes(self, config: Mapping[str, Any]) -> Shapes:
        return {name: tuple(tensor.shape) for name, tensor in self.build_transformer(config).state_dict().items()}

    @staticmethod
    def _placed(model: Any, placement: Placement) -> nn.Module:
        return model.to(placement.device, placement.dtype).eval().requires_grad_(False)

    def encode_text(
        self, encoder: TextEncoder, prompts: Sequence[Prompt], max_tokens: int | None = None
    ) -> list[Conditioning]:
        (model,) = encoder.models
        codes = [list(self.prompt_template.format(prompt.text).encode())[:max_tokens] for prompt in prompts]
        rows = [model(torch.tensor(code, device=next(model.parameters()).device)).detach() for code in codes]
        return [{"features": features_TD, "pooled": features_TD.mean(0)} for features_TD in rows]

    def text_lengths(
        self, folder: ModelFolder, prompts: Sequence[PromptOutline], max_tokens: int | None = None
    ) -> list[tuple[TextLength, ...]]:
        if max_tokens is None:
            return [()] * len(prompts)
        counts = [len(self.prompt_template.format(prompt.text).encode()) for prompt in prompts]
        return [(TextLength("the toy reads", count, max_tokens),) for count in counts]

    def stack_conditioning(self, rows: Sequence[Conditioning], multiple: int = 1) -> Conditioning:
        features_BTD = nn.utils.rnn.pad_sequence([row["features"] for row in rows], batch_first=True)
        return {"features": features_BTD, "pooled": torch.stack([row["pooled"] for row in rows])}

    @torch.no_grad()
    def encode_images(self, autoencoder: Any, pixels_B3HW: Tensor) -> LatentDistribution:
        posterior = autoencoder.encode(pixels_B3HW.to(autoencoder.dtype)).latent_dist
        return LatentDistribution(posterior.mean.float(), posterior.std.float())

    @torch.no_grad()
    def decode_latents(self, autoencoder: Any, latents_BCHW: Tensor) -> Tensor:
        return autoencoder.decode(latents_BCHW.to(autoencoder.dtype)).sample.float()

    def predict_velocity(
        self,
        transformer: Any,
        noisy_BCHW: Tensor,
        sigma_B: Tensor,
        conditioning: Conditioning,
        controls: Sequence[Tensor] = (),
        guidance: float = 1.0,
    ) -> Tensor:
        return transformer(
            hidden_states=noisy_BCHW.to(transformer.dtype),
            encoder_hidden_states=conditioning["features"].to(transformer.dtype),
            pooled_projections=conditioning["pooled"].to(transformer.dtype),
            timestep=sigma_B * 1000,
            return_dict=False,
        )[0]

    def embed_time(
        self, transformer: Any, sigma_B: Tensor, conditioning: Conditioning, guidance: float = 1.0
    ) -> Tensor:
        return transformer.time_text_embed(sigma_B * 1000, conditioning["pooled"].to(transformer.dtype))

    def time_shift(self, folder: ModelFolder, num_image_tokens: int) -> float:
        return model_time_shift(folder, num_image_tokens)

    def sigma_schedule(self, folder: ModelFolder, num_steps: int, num_image_tokens: int) -> list[float]:
        return model_sigmas(folder, num_steps, num_image_tokens)

    def guide(self, conditional_BCHW: Tensor, unconditional_BCHW: Tensor, scale: float) -> Tensor:
        return unconditional_BCHW + scale * (conditional_BCHW - unconditional_BCHW)


def build_toy_folder(path: Path) -> Path:
    """A random model in diffusers' layout."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    torch.manual_seed(0)
    SD3Transformer2DModel(
        sample_size=32, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH, caption_projection_dim=16, pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=64,
    ).save_pretrained(path / "transformer")  # fmt: skip
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    AutoencoderKL(latent_channels=4, block_out_channels=[8, 8], norm_num_groups=4, **blocks).save_pretrained(
        path / "vae"
    )
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(path / "scheduler")
    (path / "text_encoder").mkdir()
    save_file({"weight": torch.randn(256, TEXT_WIDTH)}, path / "text_encoder" / "model.safetensors")
    parts = {
        "transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL", "text_encoder": "Embedding",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }  # fmt: skip
    index = {"_class_name": "ToyPipeline", **{part: ["diffusers", kind] for part, kind in parts.items()}}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


if __name__ == "__main__":
    from pixtune.cli import main

    FAMILIES["toy"] = ToyFamily()  # the registry line
    main()
