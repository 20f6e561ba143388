"""FLUX.1-dev and FLUX.1-Kontext-dev: 19 double-stream and 38 single-stream blocks, conditioned on T5 and CLIP.

Conventions follow diffusers' `FluxPipeline` and `FluxKontextPipeline`. Both are guidance-distilled: the guidance scale
is an input of the transformer, beside sigma and CLIP's pooled feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pixtune import randomness
from pixtune.errors import WeightsError
from pixtune.families.flow_schedule import model_sigmas, model_time_shift, rounded_timestep
from pixtune.families.model_spec import SPECS
from pixtune.families.original_layers import FLUX_LAYERS
from pixtune.families.packing import PATCH, grid, num_tokens, pack_latents, unpack_latents
from pixtune.families.transformer_shapes import flux_shapes
from pixtune.family import (
    CONTROL_SIDE,
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
from pixtune.late import LateModule
from pixtune.sizes import LatentShape, Size
from pixtune.storage.model_folder import ModelFolder
from pixtune.storage.model_names import OriginalLayer

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from torch import Tensor, nn
else:
    torch = LateModule("torch")

NUM_TEXT_TOKENS = 512
"""Number of tokens that T5's features are padded to (`max_sequence_length` of the pipelines' call). The padding is
attended to."""

MOST_CLIP_TOKENS = 1024
"""Number of tokens beyond what any CLIP reads; FLUX's reads 77."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TEXT_MLP = ("ff_context.net.0.proj", "ff_context.net.2")
MLP = ("ff.net.0.proj", "ff.net.2", *TEXT_MLP, "proj_mlp")


class Flux:
    """A family of FLUX.1; `family.ModelFamily` describes its members."""

    script = "train_flux_lora.py"
    lora_targets: tuple[str, ...] = ATTENTION
    lora_presets: Mapping[str, tuple[str, ...]] = {
        "attention": ATTENTION,
        # A single-stream block's output projection carries attention and MLP together.
        "attention_mlp": (*ATTENTION, *TEXT_ATTENTION, *MLP, "single_transformer_blocks.*.proj_out"),
        "all_linear": ("transformer_blocks.*", "single_transformer_blocks.*"),
    }
    block_paths: tuple[str, ...] = ("transformer_blocks", "single_transformer_blocks")
    modulation_layers: tuple[str, ...] = ("norm1.linear", "norm1_context.linear", "norm.linear")
    text_layers: tuple[str, ...] = (*TEXT_ATTENTION, *TEXT_MLP)
    # Measured as Qwen-Image's, with 4096 image and 512 text tokens; `eager` alone is taken from Qwen-Image's blocks.
    activation_units: Mapping[str, ActivationUnits] = {
        "transformer_blocks": ActivationUnits(
            eager=17.0,
            kept=12.85,
            selective=8.2,
            projections=2.9,
            working=23.5,
            forward=9.1,
            forward_quantized=12.5,
            forward_fused=9.9,
            passing=15.0,
            passing_quantized=28.0,
            cut=0.89,
        ),
        "single_transformer_blocks": ActivationUnits(
            eager=16.0,
            kept=12.1,
            selective=6.95,
            projections=2.9,
            working=23.5,
            forward=13.2,
            forward_quantized=18.3,
            forward_fused=10.3,
            passing=18.0,
            passing_quantized=39.0,
        ),
    }
    time_embedder = "time_text_embed"
    time_features: tuple[str, ...] = ("pooled_embeds",)
    text_components: tuple[str, ...] = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    unread_text_weights: tuple[str, ...] = ()
    captioner_parts: tuple[str, str, str] | None = None
    prompt_template = "{}"
    dropped_caption = ""
    controls_in_text = False
    embedded_guidance = True
    encoding_bytes_per_pixel = 1850  # measured: 1600 reserved (H200, one to four pictures of 1024 pixels a side)
    comfyui_prefix = "transformer."
    original_layers: tuple[OriginalLayer, ...] = FLUX_LAYERS
    pads_text = False

    def __init__(self, name: str, pipeline_classes: tuple[str, ...], max_controls: int = 0) -> None:
        self.name, self.pipeline_classes, self.max_controls = name, pipeline_classes, max_controls
        self.modelspec = SPECS[name]

    def pixel_multiple(self, folder: ModelFolder) -> int:
        return PATCH * self._compression(folder)

    def latent_shape(self, folder: ModelFolder, width: int, height: int) -> LatentShape:
        factor = self._compression(folder)
        return folder.component_config("vae")["latent_channels"], height // factor, width // factor

    @staticmethod
    def _compression(folder: ModelFolder) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(folder.component_config("vae")["block_out_channels"]) - 1)

    def num_image_tokens(self, latent_height: int, latent_width: int) -> int:
        return num_tokens(latent_height, latent_width)

    def control_size(self, folder: ModelFolder, picture: Size, side: int) -> Size:
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        multiple, scale = self.pixel_multiple(folder), side / CONTROL_SIDE

        def rounded(length: float) -> int:
            return max(int(length) // multiple, 1) * multiple

        ratio = rounded(picture[0]) / rounded(picture[1])
        _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        return rounded(width * scale), rounded(height * scale)

    def vision_size(self, picture: Size, side: int) -> Size:
        raise NotImplementedError("this family's text encoders see no pictures")

    def block_shape(self, folder: ModelFolder) -> tuple[int, int]:
        config = folder.component_config("transformer")
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return config["num_layers"] + config["num_single_layers"], width

    def random_text(self, folder: ModelFolder, num_tokens: int, seed: int) -> Conditioning:
        config = folder.component_config("transformer")
        return {
            "prompt_embeds": randomness.normal(
                (num_tokens, config["joint_attention_dim"]), seed, "random weights", "text"
            ),
            "pooled_embeds": randomness.normal((config["pooled_projection_dim"],), seed, "random weights", "pooled"),
        }

    # ---- loading

    def load_text_encoder(self, folder: ModelFolder, placement: Placement) -> TextEncoder:
        from transformers import CLIPTextModel, T5EncoderModel

        from pixtune.storage.loading.parts import check_words, load_part

        tokenizers = self._load_tokenizers(folder)
        models = tuple(
            load_part(kind, folder.part(part), dtype=placement.dtype).to(placement.device).eval().requires_grad_(False)
            for kind, part in ((CLIPTextModel, "text_encoder"), (T5EncoderModel, "text_encoder_2"))
        )
        for tokenizer, model, part in zip(tokenizers, models, ("tokenizer", "tokenizer_2"), strict=True):
            check_words(tokenizer, model, folder.part(part))
        return TextEncoder(models, tokenizers)

    @staticmethod
    def _load_tokenizers(folder: ModelFolder) -> tuple[Any, Any]:
        """Loads CLIP's and T5's tokenizer."""
        from transformers import CLIPTokenizer, T5TokenizerFast

        from pixtune.storage.loading.parts import load_tokenizer

        clip_tokenizer = load_tokenizer(CLIPTokenizer, folder.part("tokenizer"))
        if not 0 < clip_tokenizer.model_max_length <= MOST_CLIP_TOKENS:  # prompts are padded to it
            raise WeightsError(
                f"{folder.part('tokenizer')} reads {clip_tokenizer.model_max_length} tokens (model_max_length), and "
                f"CLIP at most {MOST_CLIP_TOKENS}. Fetch the model again."
            )
        return clip_tokenizer, load_tokenizer(T5TokenizerFast, folder.part("tokenizer_2"))

    def load_autoencoder(self, folder: ModelFolder, placement: Placement) -> nn.Module:
        from diffusers import AutoencoderKL

        from pixtune.storage.loading.parts import load_part

        config = folder.component_config("vae")
        if missing := [key for key in ("scaling_factor", "shift_factor") if config.get(key) is None]:
            file = folder.part("vae") / "config.json"
            raise WeightsError(f"{file} has no {missing[0]}, which latents are scaled by. Fetch the model again.")
        model = load_part(AutoencoderKL, folder.part("vae"), torch_dtype=placement.dtype)
        return model.to(placement.device).eval().requires_grad_(False)

    def encoding_form(self, device: torch.device) -> str | None:
        return None

    def build_transformer(self, config: Mapping[str, Any]) -> nn.Module:
        from diffusers import FluxTransformer2DModel

        from pixtune.families.flux_blocks import compute_by_ours

        with torch.device("meta"):
            model: Any = FluxTransformer2DModel.from_config(config)
        compute_by_ours(model)
        return model

    def kept_beside(self, config: Mapping[str, Any]) -> float:
        return 0.0

    def transformer_shapes(self, config: Mapping[str, Any]) -> Shapes:
        return flux_shapes(config)

    # ---- encoding

    def encode_text(
        self, encoder: TextEncoder, prompts: Sequence[Prompt], max_tokens: int | None = None
    ) -> list[Conditioning]:
        with torch.no_grad():
            clip: Any
            t5: Any
            (clip, t5), (clip_tokenizer, t5_tokenizer) = encoder.models, encoder.tokenizers
            texts = [prompt.text for prompt in prompts]

            def token_ids(tokenizer: Any, length: int) -> Tensor:
                tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
                return tokens.input_ids

            pooled_BD = clip(token_ids(clip_tokenizer, clip_tokenizer.model_max_length).to(clip.device)).pooler_output
            features_BTD = t5(token_ids(t5_tokenizer, max_tokens or NUM_TEXT_TOKENS).to(t5.device))[0]
            return [
                {"prompt_embeds": features_TD.contiguous(), "pooled_embeds": pooled_D.contiguous()}
                for features_TD, pooled_D in zip(features_BTD, pooled_BD, strict=True)
            ]

    def text_lengths(
        self, folder: ModelFolder, prompts: Sequence[PromptOutline], max_tokens: int | None = None
    ) -> list[tuple[TextLength, ...]]:
        clip_tokenizer, t5_tokenizer = self._load_tokenizers(folder)
        t5_limit = max_tokens or NUM_TEXT_TOKENS
        encoders = (
            (clip_tokenizer, f"CLIP reads (T5 reads {t5_limit})", clip_tokenizer.model_max_length),
            (t5_tokenizer, "T5 reads", t5_limit),
        )
        texts = [prompt.text for prompt in prompts]
        columns = [
            [TextLength(reader, len(token_ids), limit) for token_ids in tokenizer(texts, verbose=False).input_ids]
            for tokenizer, reader, limit in encoders
        ]
        return list(zip(*columns, strict=True))

    def stack_conditioning(self, rows: Sequence[Conditioning], multiple: int = 1) -> Conditioning:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def encode_images(self, autoencoder: AutoencoderKL, pixels_B3HW: Tensor) -> LatentDistribution:
        with torch.no_grad():
            posterior = autoencoder.encode(pixels_B3HW.to(autoencoder.dtype)).latent_dist
            shift, scale = autoencoder.config["shift_factor"], autoencoder.config["scaling_factor"]
            return LatentDistribution((posterior.mean.float() - shift) * scale, posterior.std.float() * scale)

    def decode_latents(self, autoencoder: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            shift, scale = autoencoder.config["shift_factor"], autoencoder.config["scaling_factor"]
            return autoencoder.decode((latents_BCHW.float() / scale + shift).to(autoencoder.dtype)).sample.float()

    # ---- velocity

    def predict_velocity(
        self,
        transformer: FluxTransformer2DModel,
        noisy_BCHW: Tensor,
        sigma_B: Tensor,
        conditioning: Conditioning,
        controls: Sequence[Tensor] = (),
        guidance: float = 1.0,
    ) -> Tensor:
        height, width = noisy_BCHW.shape[-2:]
        dtype, device = transformer.dtype, noisy_BCHW.device
        images = [noisy_BCHW, *controls]
        text_BTD = conditioning["prompt_embeds"].to(dtype)
        position_ids = [image_positions(*grid(image), number, device) for number, image in enumerate(images)]
        velocity_BLC = transformer(
            hidden_states=torch.cat([pack_latents(image) for image in images], dim=1).to(dtype),
            timestep=rounded_timestep(sigma_B, dtype),
            guidance=torch.full_like(sigma_B, guidance) if transformer.config["guidance_embeds"] else None,
            pooled_projections=conditioning["pooled_embeds"].to(dtype),
            encoder_hidden_states=text_BTD,
            txt_ids=torch.zeros(text_BTD.shape[1], 3, device=device),
            img_ids=torch.cat(position_ids),
            return_dict=False,
        )[0]
        return unpack_latents(velocity_BLC[:, : num_tokens(height, width)], height, width)

    def embed_time(
        self, transformer: FluxTransformer2DModel, sigma_B: Tensor, conditioning: Conditioning, guidance: float = 1.0
    ) -> Tensor:
        dtype = transformer.dtype
        scales_B = [rounded_timestep(sigma_B, dtype) * 1000]
        if transformer.config["guidance_embeds"]:
            scales_B.append(torch.full_like(sigma_B, guidance).to(dtype) * 1000)
        return transformer.time_text_embed(*scales_B, conditioning["pooled_embeds"].to(dtype))

    def time_shift(self, folder: ModelFolder, num_image_tokens: int) -> float:
        return model_time_shift(folder, num_image_tokens)

    def sigma_schedule(self, folder: ModelFolder, num_steps: int, num_image_tokens: int) -> list[float]:
        return model_sigmas(folder, num_steps, num_image_tokens)

    def guide(self, conditional_BCHW: Tensor, unconditional_BCHW: Tensor, scale: float) -> Tensor:
        return unconditional_BCHW + scale * (conditional_BCHW - unconditional_BCHW)


def image_positions(rows: int, columns: int, number: int, device: torch.device) -> Tensor:
    """Makes (image, row, column) of each token, shape (rows * columns, 3); image 0 is the target, 1 its control."""
    axes = [torch.arange(length, device=device, dtype=torch.float32) for length in (rows, columns)]
    row, column = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([torch.full_like(row, number), row, column], dim=-1).reshape(-1, 3)


FLUX = Flux("flux", ("FluxPipeline",))
FLUX_KONTEXT = Flux("flux_kontext", ("FluxKontextPipeline",), max_controls=1)
