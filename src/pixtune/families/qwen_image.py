"""Qwen-Image: a 60-block dual-stream transformer over 2x2 packed latents, told by a Qwen2.5-VL text encoder.

Conventions follow diffusers' `QwenImagePipeline`, which is the reference that the tests compare with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pixtune import draws
from pixtune.families.base import Conditioning, LatentDistribution, Placement, TextEncoder
from pixtune.weights import ModelFolder

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

NUM_TEMPLATE_TOKENS = 34
"""Tokens before the caption, which the pipeline cuts from the features."""
MAX_CAPTION_TOKENS = 1024
MAX_FEATURE_TOKENS = 512
"""`max_sequence_length` of the pipeline's call."""
PATCH = 2


class QwenImage:
    """See `families.base.ModelFamily`."""

    name = "qwen_image"
    pipeline_classes: tuple[str, ...] = ("QwenImagePipeline",)
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    block_paths: tuple[str, ...] = ("transformer_blocks",)
    prompt_template = (
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
        "spatial relationships of the objects and background:<|im_end|>\n"
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    )
    dropped_caption = " "

    def pixel_multiple(self, folder: ModelFolder) -> int:
        return PATCH * self._compression(folder)

    def latent_shape(self, folder: ModelFolder, width: int, height: int) -> tuple[int, int, int]:
        factor = self._compression(folder)
        return folder.component_config("vae")["z_dim"], height // factor, width // factor

    @staticmethod
    def _compression(folder: ModelFolder) -> int:
        """Pixels per latent along a side."""
        return 2 ** len(folder.component_config("vae")["temperal_downsample"])

    def num_image_tokens(self, latent_height: int, latent_width: int) -> int:
        return (latent_height // PATCH) * (latent_width // PATCH)

    def block_shape(self, folder: ModelFolder) -> tuple[int, int]:
        config = folder.component_config("transformer")
        return config["num_layers"], config["num_attention_heads"] * config["attention_head_dim"]

    def random_text(self, folder: ModelFolder, num_tokens: int, seed: int) -> Conditioning:
        width = folder.component_config("transformer")["joint_attention_dim"]
        return {"prompt_embeds": draws.normal((num_tokens, width), seed, "random weights", "text")}

    # ---- loading

    def load_text_encoder(self, folder: ModelFolder, placement: Placement) -> TextEncoder:
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder.path / "text_encoder", dtype=placement.dtype, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder.path / "tokenizer")
        return TextEncoder(model.to(placement.device).eval().requires_grad_(False), tokenizer)

    def load_autoencoder(self, folder: ModelFolder, placement: Placement) -> nn.Module:
        from diffusers import AutoencoderKLQwenImage

        model = AutoencoderKLQwenImage.from_pretrained(
            folder.path / "vae", torch_dtype=placement.dtype, use_safetensors=True
        )
        return model.to(placement.device).eval().requires_grad_(False)

    def load_transformer(self, folder: ModelFolder, placement: Placement) -> nn.Module:
        from diffusers import QwenImageTransformer2DModel

        model = QwenImageTransformer2DModel.from_pretrained(
            folder.path / "transformer", torch_dtype=placement.dtype, use_safetensors=True
        )
        return model.to(placement.device).requires_grad_(False)

    def random_transformer(self, placement: Placement, config: Mapping[str, Any]) -> nn.Module:
        from diffusers import QwenImageTransformer2DModel
        from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

        with torch.device("meta"):
            model = QwenImageTransformer2DModel(**config).to(placement.dtype)
        model.to_empty(device=placement.device)
        # Not a parameter: `to_empty` left the rotary table without values.
        axes = list(model.config["axes_dims_rope"])
        model.pos_embed = QwenEmbedRope(theta=10000, axes_dim=axes, scale_rope=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0, 0.5 / math.sqrt(parameter.shape[-1]))
                elif name.endswith("weight"):
                    parameter.fill_(1)
                else:
                    parameter.zero_()
        return model.requires_grad_(False)

    # ---- encoding

    @torch.no_grad()
    def encode_text(self, encoder: TextEncoder, prompts: Sequence[str]) -> list[Conditioning]:
        device = next(encoder.model.parameters()).device
        tokens = encoder.tokenizer(
            [self.prompt_template.format(prompt) for prompt in prompts],
            max_length=MAX_CAPTION_TOKENS + NUM_TEMPLATE_TOKENS,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        output = encoder.model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
        )
        features_BTD = output.hidden_states[-1]
        rows = []
        for features_TD, keep_T in zip(features_BTD, tokens.attention_mask.bool(), strict=True):
            features_TD = features_TD[keep_T][NUM_TEMPLATE_TOKENS:][:MAX_FEATURE_TOKENS]
            rows.append({"prompt_embeds": features_TD.contiguous()})
        return rows

    def stack_conditioning(self, rows: Sequence[Conditioning]) -> Conditioning:
        features = [row["prompt_embeds"] for row in rows]
        lengths = [len(f) for f in features]
        embeds_BTD = nn.utils.rnn.pad_sequence(features, batch_first=True)
        if min(lengths) == max(lengths):
            return {"prompt_embeds": embeds_BTD}
        positions_T = torch.arange(max(lengths), device=embeds_BTD.device)
        mask_BT = positions_T < torch.tensor(lengths, device=embeds_BTD.device)[:, None]
        return {"prompt_embeds": embeds_BTD, "prompt_embeds_mask": mask_BT}

    @torch.no_grad()
    def encode_images(self, autoencoder: AutoencoderKLQwenImage, pixels_B3HW: Tensor) -> LatentDistribution:
        frames_B3FHW = pixels_B3HW.to(autoencoder.dtype).unsqueeze(2)  # the video autoencoder's frame axis, one frame
        posterior = autoencoder.encode(frames_B3FHW).latent_dist
        shift, scale = self._latent_statistics(autoencoder)
        mean_BCHW = (posterior.mean[:, :, 0].float() - shift) / scale
        return LatentDistribution(mean_BCHW, posterior.std[:, :, 0].float() / scale)

    @torch.no_grad()
    def decode_latents(self, autoencoder: AutoencoderKLQwenImage, latents_BCHW: Tensor) -> Tensor:
        shift, scale = self._latent_statistics(autoencoder)
        latents_BCFHW = (latents_BCHW.float() * scale + shift).to(autoencoder.dtype).unsqueeze(2)
        return autoencoder.decode(latents_BCFHW).sample[:, :, 0].float()

    @staticmethod
    def _latent_statistics(autoencoder: AutoencoderKLQwenImage) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel, shape (1, C, 1, 1)."""
        device = next(autoencoder.parameters()).device
        shift = torch.tensor(autoencoder.config["latents_mean"], device=device).view(1, -1, 1, 1)
        scale = torch.tensor(autoencoder.config["latents_std"], device=device).view(1, -1, 1, 1)
        return shift, scale

    # ---- velocity

    def predict_velocity(
        self, transformer: QwenImageTransformer2DModel, noisy_BCHW: Tensor, sigma_B: Tensor, conditioning: Conditioning
    ) -> Tensor:
        batch_size, _, height, width = noisy_BCHW.shape
        dtype = transformer.dtype
        # The stock pipeline rounds the 0-1000 timestep to the model's format before it divides.
        timestep_B = (sigma_B * 1000).to(dtype) / 1000
        velocity_BLC = transformer(
            hidden_states=pack_latents(noisy_BCHW).to(dtype),
            timestep=timestep_B,
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            encoder_hidden_states_mask=conditioning.get("prompt_embeds_mask"),
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * batch_size,
            return_dict=False,
        )[0]
        return unpack_latents(velocity_BLC, height, width)

    def time_shift(self, folder: ModelFolder, num_image_tokens: int) -> float:
        from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

        config = folder.component_config("scheduler")
        if not config.get("use_dynamic_shifting", False):
            return math.log(config.get("shift", 1.0))  # shift * s / (1 + (shift - 1) s) is the same curve
        return calculate_shift(
            num_image_tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )

    def sigma_schedule(self, folder: ModelFolder, num_steps: int, num_image_tokens: int) -> list[float]:
        import numpy
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler.from_config(folder.component_config("scheduler"))
        sigmas = numpy.linspace(1.0, 1 / num_steps, num_steps)
        scheduler.set_timesteps(sigmas=sigmas, mu=self.time_shift(folder, num_image_tokens))
        return scheduler.sigmas.tolist()

    def guide(self, conditional_BCHW: Tensor, unconditional_BCHW: Tensor, scale: float) -> Tensor:
        conditional, unconditional = pack_latents(conditional_BCHW), pack_latents(unconditional_BCHW)
        guided = unconditional + scale * (conditional - unconditional)
        # The pipeline keeps each token's length, so that a high scale does not burn the picture.
        guided = guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return unpack_latents(guided, *conditional_BCHW.shape[-2:])

    def comfyui_key(self, module_path: str) -> str:
        return module_path


def pack_latents(latents_BCHW: Tensor) -> Tensor:
    """2x2 neighbours become one token: (B, C, H, W) -> (B, H/2 * W/2, 4C), channel-major within a token."""
    batch_size, channels, height, width = latents_BCHW.shape
    tiles = latents_BCHW.reshape(batch_size, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch_size, -1, channels * PATCH * PATCH)


def unpack_latents(tokens_BLC: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack_latents` for latents of the given height and width."""
    batch_size, _, packed = tokens_BLC.shape
    channels = packed // (PATCH * PATCH)
    tiles = tokens_BLC.reshape(batch_size, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(batch_size, channels, height, width)
