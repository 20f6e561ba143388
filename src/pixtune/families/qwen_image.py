"""Qwen-Image: a 60-block dual-stream transformer over 2x2 packed latents, conditioned on Qwen2.5-VL's text features.

Conventions follow diffusers' `QwenImagePipeline`, which is the reference that the tests compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pixtune import randomness
from pixtune.families.flow_schedule import model_sigmas, model_time_shift, rounded_timestep
from pixtune.families.model_spec import SPECS
from pixtune.families.original_layers import QWEN_IMAGE_LAYERS
from pixtune.families.packing import PATCH, grid, num_tokens, pack_latents, unpack_latents
from pixtune.families.transformer_shapes import qwen_image_shapes, refuse_guidance
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
from pixtune.late import LateModule
from pixtune.plan.text_padding import padded_length
from pixtune.sizes import LatentShape, Size
from pixtune.storage.model_folder import ModelFolder
from pixtune.storage.model_names import OriginalLayer

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from torch import Tensor, nn
else:
    torch = LateModule("torch")

NUM_TEMPLATE_TOKENS = 34
"""Number of tokens before the caption, which the pipeline cuts from the features."""
MAX_CAPTION_TOKENS = 1024
"""Number of a caption's tokens that the pipeline's tokenizer lets through."""
MAX_FEATURE_TOKENS = 512
"""Number of tokens whose features are kept (`max_sequence_length` of the pipeline's call)."""

MASK, REAL = "prompt_embeds_mask", "prompt_embeds_real"
"""Names in the conditioning of the marks of text tokens that are no padding: for the stock model, and for attention
without a mask."""

FRAMES_ALONE = "frames alone"
"""Name in cache keys of latents whose autoencoder `qwen_frames.skip_empty_frames` has changed."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TEXT_MLP = ("txt_mlp.net.0.proj", "txt_mlp.net.2")
MLP = ("img_mlp.net.0.proj", "img_mlp.net.2", *TEXT_MLP)
OUTPUT_LAYER = ("lm_head.",)
VISION_TOWER = ("visual.", "model.visual.")
"""Beginnings of the names of the text encoder's tensors, in files of transformers 4 and 5."""


class PromptReader(Protocol):
    """A variant's way from prompts to text features."""

    @property
    def template(self) -> str: ...

    @property
    def components(self) -> tuple[str, ...]:
        """Folders of the model that decide the features."""

    def load_tokenizer(self, folder: ModelFolder) -> Any: ...

    def encode(self, encoder: TextEncoder, prompts: Sequence[Prompt], max_tokens: int | None) -> list[Conditioning]: ...

    def text_lengths(
        self, folder: ModelFolder, prompts: Sequence[PromptOutline], max_tokens: int | None
    ) -> list[tuple[TextLength, ...]]: ...

    def control_size(self, folder: ModelFolder, picture: Size, side: int, multiple: int) -> Size: ...

    def vision_size(self, picture: Size, side: int) -> Size: ...


class QwenImage:
    """A family of Qwen-Image; `family.ModelFamily` describes its members. Edit models have another `PromptReader`."""

    lora_targets: tuple[str, ...] = ATTENTION
    lora_presets: Mapping[str, tuple[str, ...]] = {
        "attention": ATTENTION,
        "attention_mlp": (*ATTENTION, *TEXT_ATTENTION, *MLP),
        "all_linear": ("transformer_blocks.*",),
    }
    block_paths: tuple[str, ...] = ("transformer_blocks",)
    modulation_layers: tuple[str, ...] = ("img_mod.1", "txt_mod.1")
    text_layers: tuple[str, ...] = (*TEXT_ATTENTION, *TEXT_MLP)
    # Measured on one H100 with torch 2.11: 4096 image and 256 text tokens, eight blocks of full size
    # (benchmarks/RESULTS.md).
    activation_units: Mapping[str, ActivationUnits] = {
        "transformer_blocks": ActivationUnits(
            eager=17.0,
            kept=13.05,
            selective=8.09,
            projections=3.05,
            working=23.5,
            forward=5.0,
            forward_quantized=14.5,
            forward_fused=9.9,
            passing=15.0,
            passing_quantized=28.0,
            cut=0.94,
        )
    }
    time_embedder = "time_text_embed"
    time_features: tuple[str, ...] = ()
    captioner_parts: tuple[str, str, str] | None = ("text_encoder", "tokenizer", "processor")
    dropped_caption = " "
    embedded_guidance = False
    encoding_bytes_per_pixel = 3150  # measured: so much reserved, 2700 allocated (H100, 512 to 1328 pixels a side)
    comfyui_prefix = "diffusion_model."
    original_layers: tuple[OriginalLayer, ...] = QWEN_IMAGE_LAYERS
    pads_text = True

    def __init__(
        self, name: str, pipeline_classes: tuple[str, ...], reader: PromptReader, max_controls: int = 0
    ) -> None:
        self.name, self.pipeline_classes, self.max_controls = name, pipeline_classes, max_controls
        self._reader = reader
        self.prompt_template, self.text_components = reader.template, reader.components
        self.controls_in_text = max_controls > 0
        self.unread_text_weights: tuple[str, ...] = OUTPUT_LAYER if max_controls else (*OUTPUT_LAYER, *VISION_TOWER)
        self.modelspec = SPECS[name]
        self.script = "train_qwen_edit_lora.py" if max_controls else "train.py"

    def pixel_multiple(self, folder: ModelFolder) -> int:
        return PATCH * self._compression(folder)

    def latent_shape(self, folder: ModelFolder, width: int, height: int) -> LatentShape:
        factor = self._compression(folder)
        return folder.component_config("vae")["z_dim"], height // factor, width // factor

    @staticmethod
    def _compression(folder: ModelFolder) -> int:
        """Pixels per latent along a side."""
        return 2 ** len(folder.component_config("vae")["temperal_downsample"])

    def num_image_tokens(self, latent_height: int, latent_width: int) -> int:
        return num_tokens(latent_height, latent_width)

    def control_size(self, folder: ModelFolder, picture: Size, side: int) -> Size:
        return self._reader.control_size(folder, picture, side, self.pixel_multiple(folder))

    def vision_size(self, picture: Size, side: int) -> Size:
        return self._reader.vision_size(picture, side)

    def block_shape(self, folder: ModelFolder) -> tuple[int, int]:
        config = folder.component_config("transformer")
        return config["num_layers"], config["num_attention_heads"] * config["attention_head_dim"]

    def random_text(self, folder: ModelFolder, num_tokens: int, seed: int) -> Conditioning:
        width = folder.component_config("transformer")["joint_attention_dim"]
        return {"prompt_embeds": randomness.normal((num_tokens, width), seed, "random weights", "text")}

    # ---- loading

    def load_text_encoder(self, folder: ModelFolder, placement: Placement) -> TextEncoder:
        from transformers import Qwen2_5_VLForConditionalGeneration

        from pixtune.storage.loading.parts import check_words, load_part

        tokenizer = self._reader.load_tokenizer(folder)
        whole = load_part(
            Qwen2_5_VLForConditionalGeneration,
            folder.part("text_encoder"),
            unread=self.unread_text_weights,
            dtype=placement.dtype,
        )
        check_words(getattr(tokenizer, "tokenizer", tokenizer), whole, folder.part("tokenizer"))
        model = whole.model  # without the output layer: nothing reads logits
        if not self.controls_in_text:
            model.visual = None
        model.to(placement.device).eval().requires_grad_(False)
        return TextEncoder((model,), (tokenizer,))

    def load_autoencoder(self, folder: ModelFolder, placement: Placement) -> nn.Module:
        from diffusers import AutoencoderKLQwenImage

        from pixtune.storage.loading.parts import load_part

        model = load_part(AutoencoderKLQwenImage, folder.part("vae"), torch_dtype=placement.dtype)
        if self.encoding_form(placement.device):
            from pixtune.families.qwen_frames import skip_empty_frames

            skip_empty_frames(model)
        return model.to(placement.device).eval().requires_grad_(False)

    def encoding_form(self, device: torch.device) -> str | None:
        # On a GPU as diffusers does it, which filled the caches of thousands of pictures that are in use.
        return FRAMES_ALONE if device.type == "cpu" else None

    def build_transformer(self, config: Mapping[str, Any]) -> nn.Module:
        from diffusers import QwenImageTransformer2DModel

        from pixtune.families.qwen_attention import JointAttention, RealRotaryEmbedding
        from pixtune.families.qwen_clean_controls import count_on_device

        refuse_guidance(config)
        with torch.device("meta"):
            model: Any = QwenImageTransformer2DModel.from_config(config)
        # The embedding is no parameter and in no file, so it is made again, with values.
        stock = type(model.pos_embed)(
            theta=model.pos_embed.theta, axes_dim=model.pos_embed.axes_dim, scale_rope=model.pos_embed.scale_rope
        )
        model.pos_embed = RealRotaryEmbedding(stock)
        for block in model.transformer_blocks:
            block.attn.set_processor(JointAttention())
        if model.zero_cond_t:
            count_on_device(model)
        return model

    def kept_beside(self, config: Mapping[str, Any]) -> float:
        # Where each token has one of two modulations, both norms of a block keep their outputs. Counted on a CPU; the
        # share of text, for which that does not hold, is small where there are controls.
        return 2.0 if config.get("zero_cond_t") else 0.0

    def transformer_shapes(self, config: Mapping[str, Any]) -> Shapes:
        refuse_guidance(config)
        return qwen_image_shapes(config)

    # ---- encoding

    def encode_text(
        self, encoder: TextEncoder, prompts: Sequence[Prompt], max_tokens: int | None = None
    ) -> list[Conditioning]:
        with torch.no_grad():
            return self._reader.encode(encoder, prompts, max_tokens)

    def text_lengths(
        self, folder: ModelFolder, prompts: Sequence[PromptOutline], max_tokens: int | None = None
    ) -> list[tuple[TextLength, ...]]:
        return self._reader.text_lengths(folder, prompts, max_tokens)

    def stack_conditioning(self, rows: Sequence[Conditioning], multiple: int = 1) -> Conditioning:
        features = [row["prompt_embeds"] for row in rows]
        lengths = [len(f) for f in features]
        embeds_BTD = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
        if multiple == 1 and min(lengths) == max(lengths):
            return {"prompt_embeds": embeds_BTD}
        length = padded_length(max(lengths), multiple)
        embeds_BTD = torch.nn.functional.pad(embeds_BTD, (0, 0, 0, length - max(lengths)))
        positions_T = torch.arange(length, device=embeds_BTD.device)
        mask_BT = positions_T < torch.tensor(lengths, device=embeds_BTD.device)[:, None]
        return {"prompt_embeds": embeds_BTD, (MASK if multiple == 1 else REAL): mask_BT}

    def encode_images(self, autoencoder: AutoencoderKLQwenImage, pixels_B3HW: Tensor) -> LatentDistribution:
        with torch.no_grad():
            frames_B3FHW = pixels_B3HW.to(autoencoder.dtype).unsqueeze(2)  # a video's frame axis, one frame
            posterior = autoencoder.encode(frames_B3FHW).latent_dist
            shift, scale = self._latent_statistics(autoencoder)
            mean_BCHW = (posterior.mean[:, :, 0].float() - shift) / scale
            return LatentDistribution(mean_BCHW, posterior.std[:, :, 0].float() / scale)

    def decode_latents(self, autoencoder: AutoencoderKLQwenImage, latents_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
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
        self,
        transformer: QwenImageTransformer2DModel,
        noisy_BCHW: Tensor,
        sigma_B: Tensor,
        conditioning: Conditioning,
        controls: Sequence[Tensor] = (),
        guidance: float = 1.0,
    ) -> Tensor:
        batch_size, _, height, width = noisy_BCHW.shape
        dtype = transformer.dtype
        images = [noisy_BCHW, *controls]
        image_BLC = torch.cat([pack_latents(image) for image in images], dim=1).to(dtype)
        velocity_BLC = transformer(
            hidden_states=image_BLC,
            timestep=rounded_timestep(sigma_B, dtype),
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            attention_kwargs=real_tokens(conditioning, image_BLC.shape[1]),
            img_shapes=[[(1, *grid(image)) for image in images]] * batch_size,
            return_dict=False,
        )[0]
        return unpack_latents(velocity_BLC[:, : num_tokens(height, width)], height, width)

    def embed_time(
        self,
        transformer: QwenImageTransformer2DModel,
        sigma_B: Tensor,
        conditioning: Conditioning,
        guidance: float = 1.0,
    ) -> Tensor:
        timestep_B = rounded_timestep(sigma_B, transformer.dtype)
        if transformer.config["zero_cond_t"]:  # tokens of control pictures are modulated as if clean
            timestep_B = torch.cat([timestep_B, timestep_B[:1] * 0])
        return transformer.time_text_embed(timestep_B, timestep_B)  # only the format of the second is read

    def time_shift(self, folder: ModelFolder, num_image_tokens: int) -> float:
        return model_time_shift(folder, num_image_tokens)

    def sigma_schedule(self, folder: ModelFolder, num_steps: int, num_image_tokens: int) -> list[float]:
        return model_sigmas(folder, num_steps, num_image_tokens)

    def guide(self, conditional_BCHW: Tensor, unconditional_BCHW: Tensor, scale: float) -> Tensor:
        conditional, unconditional = pack_latents(conditional_BCHW), pack_latents(unconditional_BCHW)
        guided = unconditional + scale * (conditional - unconditional)
        # The pipeline keeps each token's length, so that a high scale does not burn the picture.
        guided = guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return unpack_latents(guided, *conditional_BCHW.shape[-2:])


def real_tokens(conditioning: Conditioning, num_image_tokens: int) -> dict[str, Tensor] | None:
    """Marks text and image tokens that are no padding, for `JointAttention`; None where no token can be padding.

    The marks go past the model, which would copy a number to the device for a mask, and that cannot be captured.
    """
    for name, argument in ((REAL, "real_BL"), (MASK, "mask_BL")):
        if (real_BT := conditioning.get(name)) is not None:
            return {argument: torch.nn.functional.pad(real_BT.bool(), (0, num_image_tokens), value=True)}
    return None


def count_inside(template: str, tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Counts the tokens of each text where it stands in the template, without the template's own."""
    whole = tokenizer([template.format(text) for text in ("", *texts)], verbose=False).input_ids
    return [len(token_ids) - len(whole[0]) for token_ids in whole[1:]]


class CaptionReader:
    """The text-to-image pipeline's prompt: the caption inside a fixed template, whose features are cut off."""

    components: tuple[str, ...] = ("text_encoder", "tokenizer")
    template = (
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
        "spatial relationships of the objects and background:<|im_end|>\n"
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    )

    def load_tokenizer(self, folder: ModelFolder) -> Any:
        from transformers import AutoTokenizer

        from pixtune.storage.loading.parts import load_tokenizer

        return load_tokenizer(AutoTokenizer, folder.part("tokenizer"))

    def encode(self, encoder: TextEncoder, prompts: Sequence[Prompt], max_tokens: int | None) -> list[Conditioning]:
        (model,), (tokenizer,) = encoder.models, encoder.tokenizers
        tokens = tokenizer(
            [self.template.format(prompt.text) for prompt in prompts],
            max_length=MAX_CAPTION_TOKENS + NUM_TEMPLATE_TOKENS,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(model.device)
        output = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        rows = []
        for features_TD, keep_T in zip(output.last_hidden_state, tokens.attention_mask.bool(), strict=True):
            features_TD = features_TD[keep_T][NUM_TEMPLATE_TOKENS:][: max_tokens or MAX_FEATURE_TOKENS]
            rows.append({"prompt_embeds": features_TD.contiguous()})
        return rows

    def text_lengths(
        self, folder: ModelFolder, prompts: Sequence[PromptOutline], max_tokens: int | None
    ) -> list[tuple[TextLength, ...]]:
        limit = min(max_tokens or MAX_FEATURE_TOKENS, MAX_CAPTION_TOKENS)
        counts = count_inside(self.template, self.load_tokenizer(folder), [prompt.text for prompt in prompts])
        return [(TextLength("the text encoder reads", count, limit),) for count in counts]

    def control_size(self, folder: ModelFolder, picture: Size, side: int, multiple: int) -> Size:
        raise NotImplementedError("a text-to-image model has no control pictures")

    def vision_size(self, picture: Size, side: int) -> Size:
        raise NotImplementedError("a text-to-image model has no control pictures")


QWEN_IMAGE = QwenImage("qwen_image", ("QwenImagePipeline",), CaptionReader())
