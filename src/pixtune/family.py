"""What a model family is: the one seam between the trainer and a model's own conventions.

Nothing outside `families/` knows a model's name, its packing of latents, its prompt template or its timestep scale.
A family is stateless: weights and tensors go in, tensors come out. Shapes in names:
B batch, C latent channels, H W latent height and width, T text tokens, D text feature size, L image tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from pixtune.sizes import LatentShape, Size
from pixtune.storage.model_folder import ModelFolder

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

# One example's text features by name, without padding: what the cache stores. A family chooses the names.
Conditioning: TypeAlias = "dict[str, Tensor]"


@dataclass(frozen=True)
class Prompt:
    """What the text encoder is told of one example."""

    text: str
    pictures: tuple[Image, ...] = ()
    """Control pictures at `ModelFamily.vision_size`; none where the family's encoder sees no pictures."""


@dataclass(frozen=True)
class PromptOutline:
    """A prompt whose control pictures are not read: their sizes alone decide how many tokens they take."""

    text: str
    picture_sizes: tuple[Size, ...] = ()
    """Sizes that `ModelFamily.vision_size` gives; none where the family's encoder sees no pictures."""


@dataclass(frozen=True)
class TextLength:
    """Number of a prompt's tokens in one text encoder, and how many of them that encoder reads."""

    reader: str
    """The encoder for messages, with its verb: "T5 reads"."""
    num_tokens: int
    limit: int

    @property
    def is_cut(self) -> bool:
        return self.num_tokens > self.limit


Shapes = Mapping[str, Sequence[int]]
"""Tensor name -> shape."""


CONTROL_SIDE = 1024
"""Side in pixels of the square whose area the stock pipelines give a control picture, whatever the target's size."""


@dataclass(frozen=True)
class ActivationUnits:
    """What one block keeps for the backward pass, in units; see the module."""

    eager: float
    """Nothing compiled."""
    kept: float
    """Compiled; no product and no attention is computed twice."""
    selective: float
    """The same, norms, rotary embedding and gates computed again, the MLP's activation kept in 8 bits."""
    projections: float
    """Of these, queries, keys and values; 0: its attention cannot compute them again (`recomputes_projections`)."""
    working: float
    """On top of what it keeps, at most, while the backward pass of a recomputed block runs."""
    forward: float
    """On top of what it keeps, at most, while it runs forward or backward from what was kept."""
    forward_quantized: float
    """The same where weights are quantized: codes, scales, and transposed weights."""
    forward_fused: float
    """The same where, besides, each MLP is one function (`engine.mlp`)."""
    passing: float
    """Most that is alive while it runs without gradients, not compiled."""
    passing_quantized: float
    """The same where weights are quantized: an MLP's input passes through fp32 on its way to codes."""
    cut: float = 0.0
    """On top of `kept` with several examples at once: image tokens cut out of what was attended. One
    example's tokens lie together already; those of several are copied."""


@dataclass(frozen=True)
class Placement:
    """Where a loaded part lives and in which number format."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class TextEncoder:
    """Frozen text encoders, each with what turns words (and pictures) into its input."""

    models: tuple[nn.Module, ...]
    tokenizers: tuple[Any, ...]


@dataclass(frozen=True)
class LatentDistribution:
    """What the autoencoder says of pictures: a diagonal Gaussian over *normalized* latents."""

    mean_BCHW: Tensor
    std_BCHW: Tensor

    def latents(self, noise_BCHW: Tensor) -> Tensor:
        """Latents drawn with the given standard normal noise; shape BCHW."""
        return self.mean_BCHW + self.std_BCHW * noise_BCHW


class ModelFamily(Protocol):
    """Everything the trainer asks of a model family."""

    name: str
    pipeline_classes: tuple[str, ...]
    """`_class_name` values of `model_index.json` that belong to this family."""
    script: str
    """The root script that trains a LoRA of it."""
    lora_targets: tuple[str, ...]
    """Default module name endings that get a LoRA."""
    lora_presets: Mapping[str, tuple[str, ...]]
    """Names for sets of targets: endings, or patterns with `*` over whole module paths."""
    block_paths: tuple[str, ...]
    """Attribute paths of the lists of repeated blocks."""
    modulation_layers: tuple[str, ...]
    """Endings of the linear layers in them that see one row per example, SiLU of the time embedding, not tokens."""
    text_layers: tuple[str, ...]
    """Endings of the linear layers in them that text tokens alone pass. Where a block has some, its others see only
    tokens of pictures."""
    activation_units: Mapping[str, ActivationUnits]
    """What a block of each list keeps for the backward pass, measured; by `block_paths`."""
    time_embedder: str
    """Path of the module that makes the time embedding."""
    time_features: tuple[str, ...]
    """Entries of the conditioning that the time embedding depends on, besides sigma and guidance."""
    text_components: tuple[str, ...]
    """Folders that decide the text features: part of the text cache's key."""
    unread_text_weights: tuple[str, ...]
    """Beginnings of the names of text encoders' tensors that never reach a device: what they compute is not read."""
    prompt_template: str
    """Part of the text cache's key: another template, other features."""
    dropped_caption: str
    """What stands for a dropped caption, the same text that the stock pipeline gets as an empty negative prompt."""
    max_controls: int
    """Most control pictures of one example; 0 where the model does not edit."""
    controls_in_text: bool
    """The text encoder sees the control pictures, so text features depend on them."""
    embedded_guidance: bool
    """The guidance scale is an input of the transformer (a distilled model), not a second pass."""
    encoding_bytes_per_pixel: int
    """Most that the autoencoder takes of a device in bf16, besides its weights, for a pixel that it encodes."""
    pads_text: bool
    """Captions have lengths of their own, and `stack_conditioning` can pad them to a multiple."""

    def pixel_multiple(self, folder: ModelFolder) -> int:
        """Picture sides must be a multiple of this many pixels."""

    def latent_shape(self, folder: ModelFolder, width: int, height: int) -> LatentShape:
        """Shape of the latents of a picture of `width` x `height` pixels."""

    def num_image_tokens(self, latent_height: int, latent_width: int) -> int:
        """Tokens the transformer sees for latents of this height and width."""

    def control_size(self, folder: ModelFolder, picture: Size, side: int) -> Size:
        """(width, height) in pixels at which a control picture of this size joins the latents.

        Args:
            side: of the square with about the wanted area; the stock pipeline has its own, `CONTROL_SIDE`.
        """

    def vision_size(self, picture: Size, side: int) -> Size:
        """(width, height) in pixels at which the text encoder sees a control picture of this size."""

    def block_shape(self, folder: ModelFolder) -> tuple[int, int]:
        """(number of repeated blocks, width of a token inside them), for estimates of memory."""

    def random_text(self, folder: ModelFolder, num_tokens: int, seed: int) -> Conditioning:
        """Text features of the model's shape with random values, for measuring without the real weights."""

    def load_text_encoder(self, folder: ModelFolder, placement: Placement) -> TextEncoder: ...

    def load_autoencoder(self, folder: ModelFolder, placement: Placement) -> nn.Module: ...

    def build_transformer(self, config: Mapping[str, Any]) -> nn.Module:
        """The transformer that a config describes (empty: the full-size default), on the meta device.

        Only what its files do not hold has values. `engine.load` gives it the rest.
        """

    def transformer_shapes(self, config: Mapping[str, Any]) -> Shapes:
        """Of all that `build_transformer` gives names in its state dict, in the same order.

        By arithmetic, where a plan shall not wait for the import of the model's class.
        """

    def encode_text(
        self, encoder: TextEncoder, prompts: Sequence[Prompt], max_tokens: int | None = None
    ) -> list[Conditioning]:
        """Text features, one unpadded entry a prompt.

        Args:
            max_tokens: longer captions are cut to this many tokens; absent: as the stock pipeline cuts (or pads) them.
        """

    def text_lengths(
        self, folder: ModelFolder, prompts: Sequence[PromptOutline], max_tokens: int | None = None
    ) -> list[tuple[TextLength, ...]]:
        """Counts the tokens of each prompt by the folder's tokenizers, without loading an encoder.

        Args:
            max_tokens: as in `encode_text`.

        Returns:
            For each prompt one length for each encoder that cuts; none where nothing is ever cut.
        """

    def stack_conditioning(self, rows: Sequence[Conditioning], multiple: int = 1) -> Conditioning:
        """Pads and stacks examples to a batch. Never holds an all-true mask: it costs the fast attention path.

        Args:
            multiple: above 1, captions of `pads_text` get a multiple of so many tokens, and the batch says in one form,
                whether or not anything was padded, which tokens are real: `predict_velocity` attends to those by fast
                kernels (`engine.padded_attention`). Other families leave it unread.
        """

    def encode_images(self, autoencoder: nn.Module, pixels_B3HW: Tensor) -> LatentDistribution:
        """Pixels in [-1, 1] to the distribution of normalized latents."""

    def decode_latents(self, autoencoder: nn.Module, latents_BCHW: Tensor) -> Tensor:
        """Normalized latents to pixels in [-1, 1], shape B3HW."""

    def predict_velocity(
        self,
        transformer: nn.Module,
        noisy_BCHW: Tensor,
        sigma_B: Tensor,
        conditioning: Conditioning,
        controls: Sequence[Tensor] = (),
        guidance: float = 1.0,
    ) -> Tensor:
        """The model's estimate of `noise - latents`; shape BCHW. `sigma` is 0 for clean, 1 for pure noise.

        Args:
            controls: clean latents of the control pictures, each of shape BCHW with a height and width of its own.
            guidance: for models with `embedded_guidance`; others leave it unread.
        """

    def embed_time(
        self, transformer: nn.Module, sigma_B: Tensor, conditioning: Conditioning, guidance: float = 1.0
    ) -> Tensor:
        """Each row of the time embedding that `predict_velocity` makes of these, by a call of `time_embedder`.

        Shape (rows, D): one an example, and at most one more that all of them share.
        """

    def time_shift(self, folder: ModelFolder, num_image_tokens: int) -> float:
        """`mu` of the resolution-dependent shift in the model's own scheduler config; 0 means unshifted."""

    def sigma_schedule(self, folder: ModelFolder, num_steps: int, num_image_tokens: int) -> list[float]:
        """Sigmas of the sampler, `num_steps` + 1 values from about 1 down to 0."""

    def guide(self, conditional_BCHW: Tensor, unconditional_BCHW: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance as the stock pipeline combines the two velocities."""

    def comfyui_tensors(self, weights: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
        """The LoRA in the names of ComfyUI's copy of the model, each layer with its `.alpha`.

        Args:
            weights: `MODULE.lora_A.weight` (rank x in) and `MODULE.lora_B.weight` (out x rank).
        """
