"""FLUX.1-dev and FLUX.1-Kontext-dev: 19 double-stream and 38 single-stream blocks, told by T5 and CLIP.

Conventions follow diffusers' `FluxPipeline` and `FluxKontextPipeline`. Both are guidance-distilled: the guidance scale
is an input of the transformer, beside sigma and CLIP's pooled feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pixtune import draws
from pixtune.data.buckets import Size
from pixtune.families.base import CONTROL_SIDE, Conditioning, LatentDistribution, Placement, Prompt, TextEncoder
from pixtune.families.flow_schedule import model_sigmas, model_time_shift, rounded_timestep
from pixtune.families.packing import PATCH, grid, num_tokens, pack_latents, unpack_latents
from pixtune.families.transformer_shapes import flux_shapes
from pixtune.fit.activations import recompute
from pixtune.fit.attention import with_dense_gradient
from pixtune.fit.footprint import ActivationUnits, Shapes
from pixtune.fit.heads import Stream, join_heads
from pixtune.fit.lora import project
from pixtune.fit.mlp import mlp
from pixtune.weights import ModelFolder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxTransformer2DModel

NUM_TEXT_TOKENS = 512
"""`max_sequence_length` of the pipelines' call: T5's features are padded to it, and the padding is attended to."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TEXT_MLP = ("ff_context.net.0.proj", "ff_context.net.2")
MLP = ("ff.net.0.proj", "ff.net.2", *TEXT_MLP, "proj_mlp")


class Flux:
    """See `families.base.ModelFamily`."""

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
    # As for Qwen-Image, 4096 image and 512 text tokens. Eager: of Qwen-Image's blocks, not measured.
    activation_units: Mapping[str, ActivationUnits] = {
        "transformer_blocks": ActivationUnits(
            eager=17.0,
            kept=13.1,
            lean=8.2,
            projections=2.9,
            working=25.0,
            forward=9.1,
            forward_quantised=12.5,
            forward_fused=9.9,
            passing=15.0,
            passing_quantised=28.0,
        ),
        "single_transformer_blocks": ActivationUnits(
            eager=16.0,
            kept=12.35,
            lean=6.95,
            projections=2.9,
            working=25.0,
            forward=13.2,
            forward_quantised=18.3,
            forward_fused=10.3,
            passing=18.0,
            passing_quantised=39.0,
        ),
    }
    time_embedder = "time_text_embed"
    time_features: tuple[str, ...] = ("pooled_embeds",)
    text_components: tuple[str, ...] = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    unread_text_weights: tuple[str, ...] = ()
    prompt_template = "{}"
    dropped_caption = ""
    controls_in_text = False
    embedded_guidance = True
    encoding_bytes_per_pixel = 1850  # 1600 reserved on an H200, one to four pictures of 1024 pixels a side
    pads_text = False

    def __init__(self, name: str, pipeline_classes: tuple[str, ...], max_controls: int = 0) -> None:
        self.name, self.pipeline_classes, self.max_controls = name, pipeline_classes, max_controls

    def pixel_multiple(self, folder: ModelFolder) -> int:
        return PATCH * self._compression(folder)

    def latent_shape(self, folder: ModelFolder, width: int, height: int) -> tuple[int, int, int]:
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
            "prompt_embeds": draws.normal((num_tokens, config["joint_attention_dim"]), seed, "random weights", "text"),
            "pooled_embeds": draws.normal((config["pooled_projection_dim"],), seed, "random weights", "pooled"),
        }

    # ---- loading

    def load_text_encoder(self, folder: ModelFolder, placement: Placement) -> TextEncoder:
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        models = tuple(
            kind.from_pretrained(folder.path / part, dtype=placement.dtype, use_safetensors=True)
            .to(placement.device)
            .eval()
            .requires_grad_(False)
            for kind, part in ((CLIPTextModel, "text_encoder"), (T5EncoderModel, "text_encoder_2"))
        )
        tokenizers = (
            CLIPTokenizer.from_pretrained(folder.path / "tokenizer"),
            T5TokenizerFast.from_pretrained(folder.path / "tokenizer_2"),
        )
        return TextEncoder(models, tokenizers)

    def load_autoencoder(self, folder: ModelFolder, placement: Placement) -> nn.Module:
        from diffusers import AutoencoderKL

        model = AutoencoderKL.from_pretrained(folder.path / "vae", torch_dtype=placement.dtype, use_safetensors=True)
        return model.to(placement.device).eval().requires_grad_(False)

    def build_transformer(self, config: Mapping[str, Any]) -> nn.Module:
        from diffusers import FluxTransformer2DModel

        with torch.device("meta"):
            model: Any = FluxTransformer2DModel.from_config(config)
        model.pos_embed = PairedRotaryEmbedding(model.pos_embed)
        for block in model.transformer_blocks:
            block.attn.set_processor(JointAttention())
        for block in model.single_transformer_blocks:
            block.attn.set_processor(AttentionBesideMlp())
            block.forward = MethodType(single_block, block)
        return model

    def transformer_shapes(self, config: Mapping[str, Any]) -> Shapes:
        return flux_shapes(config)

    # ---- encoding

    @torch.no_grad()
    def encode_text(
        self, encoder: TextEncoder, prompts: Sequence[Prompt], max_tokens: int | None = None
    ) -> list[Conditioning]:
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

    def stack_conditioning(self, rows: Sequence[Conditioning], multiple: int = 1) -> Conditioning:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    @torch.no_grad()
    def encode_images(self, autoencoder: AutoencoderKL, pixels_B3HW: Tensor) -> LatentDistribution:
        posterior = autoencoder.encode(pixels_B3HW.to(autoencoder.dtype)).latent_dist
        shift, scale = autoencoder.config["shift_factor"], autoencoder.config["scaling_factor"]
        return LatentDistribution((posterior.mean.float() - shift) * scale, posterior.std.float() * scale)

    @torch.no_grad()
    def decode_latents(self, autoencoder: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
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

    def comfyui_tensors(self, weights: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
        """ComfyUI knows diffusers' names of this model; its own names would need q, k and v melted into one layer.

        The scale alpha / rank is multiplied into the up-projection, since diffusers refuses `.alpha` beside such names.
        """
        tensors = {}
        for name, tensor in weights.items():
            module, matrix, _ = name.rsplit(".", 2)
            scale = alpha / len(weights[f"{module}.lora_A.weight"])
            tensors[f"transformer.{name}"] = tensor * scale if matrix == "lora_B" else tensor
        return tensors


class PairedRotaryEmbedding(nn.Module):
    """The stock embedding, which has each cosine and sine twice, as pairs; fp32, (tokens, head size / 2, 2)."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, ids: Tensor) -> Tensor:
        cosine, sine = self.stock(ids)
        return torch.stack([cosine[:, ::2], sine[:, ::2]], dim=-1)


class JointAttention:
    """The stock attention of image and text tokens, the projections of each by `fit.lora.project`."""

    recomputes_projections = False
    """Queries, keys and values are computed again in the backward pass; `fit.activations` switches it on."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert image_rotary_emb is not None
        inputs = (attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        query, key, value = recompute(joint_heads, inputs, {}) if self.recomputes_projections else joint_heads(*inputs)
        attended = attend(query, key, value, attention_mask)
        num_text_tokens = encoder_hidden_states.shape[1]
        (image_output,) = project(attended[:, num_text_tokens:].contiguous(), (attn.to_out[0],))
        (text_output,) = project(attended[:, :num_text_tokens].contiguous(), (attn.to_add_out,))
        return attn.to_out[1](image_output), text_output


class AttentionBesideMlp:
    """The stock attention of blocks that put the MLP's features beside what was attended, with `fit.lora.project`.

    Its gradient is then a slice of a wider tensor; see `fit.attention` for what that does.
    """

    recomputes_projections = False
    """As in `JointAttention`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Tensor:
        assert image_rotary_emb is not None
        inputs = (attn, hidden_states, image_rotary_emb)
        again = self.recomputes_projections
        query, key, value = recompute(single_heads, inputs, {}) if again else single_heads(*inputs)
        return with_dense_gradient(attend(query, key, value, attention_mask))


def single_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Tensor,
    joint_attention_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The stock `FluxSingleTransformerBlock.forward`, its MLP by `fit.mlp`. Its names are those that it is called by.

    It returns copies, not slices of one tensor: slices leave a compiled block as views, whose gradients are then put
    together outside of it, in four more passes over them.
    """
    states_BLC = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    normed_BLC, gate_BC = block.norm(states_BLC, emb=temb)
    attended_BLC = block.attn(hidden_states=normed_BLC, image_rotary_emb=image_rotary_emb)
    update_BLC = mlp(normed_BLC, block.proj_mlp, block.act_mlp, block.proj_out, attended_BLC)
    text_BTC, image_BLC = (states_BLC + gate_BC.unsqueeze(1) * update_BLC).split(
        [encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1
    )
    return text_BTC.clone(), image_BLC.clone()


def joint_heads(attn: Any, image_BLC: Tensor, text_BTC: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, turned, and values of text and image tokens; shape (B, T + L, H, D) each.

    Args:
        turns: cosine and sine of each token's angles, shape (T + L, D / 2, 2).
    """
    image = project(image_BLC, (attn.to_q, attn.to_k, attn.to_v))
    text = project(text_BTC, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    text_turns, image_turns = turns.split([text_BTC.shape[1], image_BLC.shape[1]])
    streams = (
        Stream(text, attn.norm_added_q, attn.norm_added_k, text_turns),
        Stream(image, attn.norm_q, attn.norm_k, image_turns),
    )
    return join_heads(streams, attn.head_dim)


def single_heads(attn: Any, states_BLC: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of one stream."""
    projected = project(states_BLC, (attn.to_q, attn.to_k, attn.to_v))
    return join_heads((Stream(projected, attn.norm_q, attn.norm_k, turns),), attn.head_dim)


def attend(query_BLHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor, mask: Tensor | None) -> Tensor:
    """Heads side by side in the result, (B, L, H * D)."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    attended_BLHD = dispatch_attention_fn(query_BLHD, key_BLHD, value_BLHD, attn_mask=mask)
    return attended_BLHD.flatten(2, 3).to(query_BLHD.dtype)


def image_positions(rows: int, columns: int, number: int, device: torch.device) -> Tensor:
    """(image, row, column) of each token: image 0 is the target, 1 its control picture; shape (rows * columns, 3)."""
    axes = [torch.arange(length, device=device, dtype=torch.float32) for length in (rows, columns)]
    row, column = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([torch.full_like(row, number), row, column], dim=-1).reshape(-1, 3)


FLUX = Flux("flux", ("FluxPipeline",))
FLUX_KONTEXT = Flux("flux_kontext", ("FluxKontextPipeline",), max_controls=1)
