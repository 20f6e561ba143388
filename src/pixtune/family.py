"""Model families: the one seam between the trainer and a model's own conventions.

Nothing outside `families/` knows a model's name, its packing of latents, its prompt template or its timestep scale.
A family is stateless: weights and tensors go in, tensors come out. Shapes in names: B batch, C latent channels, H and W
latent height and width, T text tokens, D text feature size, L image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from pixtune.sizes import LatentShape, Size
from pixtune.storage.model_folder import ModelFolder
from pixtune.storage.model_names import ModelSpec, OriginalLayer

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

Conditioning: TypeAlias = "dict[str, Tensor]"
"""Text features of one example by names that the family chooses, without padding, as the cache stores them; or of a
batch, stacked."""


@dataclass(frozen=True)
class Prompt:
    """Input of the text encoder for one example."""

    text: str
    pictures: tuple[Image, ...] = ()
    """Control pictures at `ModelFamily.vision_size`; none where the family's encoder sees no pictures."""


@dataclass(frozen=True)
class PromptOutline:
    """A prompt whose control pictures are not read: their sizes alone decide how many tokens they take."""

    text: str
    picture_sizes: tuple[Size, ...] = ()
    """Sizes of control pictures by `ModelFamily.vision_size`; none where the family's encoder sees no pictures."""


@dataclass(frozen=True)
class TextLength:
    """Number of a prompt's tokens in one text encoder, and how many of them that encoder reads."""

    reader: str
    """Name of the encoder for messages, with its verb: "T5 reads"."""
    num_tokens: int
    limit: int

    @property
    def is_cut(self) -> bool:
        """Whether the encoder does not read the prompt to its end."""
        return self.num_tokens > self.limit


Shapes = Mapping[str, Sequence[int]]
"""Shapes of tensors by name."""


CONTROL_SIDE = 1024
"""Side in pixels of the square whose area the stock pipelines give a control picture, whatever the target's size."""


@dataclass(frozen=True)
class ActivationUnits:
    """Memory of a block's activations, in units of a bf16 tensor of all tokens' features: tokens x width x 2 bytes."""

    eager: float
    """Units kept for the backward pass where nothing is compiled."""
    kept: float
    """Units kept by a compiled block that computes no product and no attention twice."""
    selective: float
    """Units kept by a compiled block that recomputes norms, rotary embedding and gates, and keeps its MLP's activation
    in 8 bits."""
    projections: float
    """Units of `selective` that are queries, keys and values; 0 where the attention cannot recompute them
    (`recomputes_projections`)."""
    working: float
    """Peak units beyond those kept while the backward pass of a recomputed block runs, unless its MLP is one function:
    then what the block keeps when it runs again comes beside `forward_fused`."""
    forward: float
    """Peak units beyond those kept while the block runs forward, or backward from what it kept."""
    forward_quantized: float
    """Value of `forward` where weights are quantized, which adds codes, scales and transposed weights."""
    forward_fused: float
    """Value of `forward_quantized` where each MLP is one function (`engine.mlp`)."""
    passing: float
    """Peak units while the block runs without gradients, not compiled."""
    passing_quantized: float
    """Value of `passing` where weights are quantized: an MLP's input passes through fp32 on its way to codes."""
    cut: float = 0.0
    """Units beyond `kept` with several examples at once, for the image tokens cut out of the attended ones. A single
    example's tokens lie together; those of several are copied."""


@dataclass(frozen=True)
class Placement:
    """The place of a loaded part, and its number format."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class TextEncoder:
    """Frozen text encoders, each with the tokenizer that turns words (and pictures) into its input."""

    models: tuple[nn.Module, ...]
    tokenizers: tuple[Any, ...]


@dataclass(frozen=True)
class LatentDistribution:
    """The autoencoder's output for pictures: a diagonal Gaussian over *normalized* latents."""

    mean_BCHW: Tensor
    std_BCHW: Tensor

    def latents(self, noise_BCHW: Tensor) -> Tensor:
        """Draws latents with the given standard normal noise; shape BCHW."""
        return self.mean_BCHW + self.std_BCHW * noise_BCHW


@dataclass(frozen=True)
class Question:
    """A question about pictures, as a captioner gets it."""

    text: str
    pictures: tuple[Image, ...]
    """Pictures of any size, or as `Captioner.fit` returns them."""


@dataclass(frozen=True)
class Answer:
    """A captioner's answer to a question."""

    text: str
    ended: bool
    """Whether the captioner came to an end; otherwise the answer is cut at the most tokens."""


@dataclass(frozen=True)
class CaptionerWeights:
    """Numbers of a captioner's weights, by the formats that they may have."""

    linear: int
    """Weights of the language model's linear layers, in 16, 8 or 4 bits."""
    output: int
    """Weights of the output layer, in 16 or 8 bits; 0 where it shares those of the embedding."""
    plain: int
    """Weights of embedding, norms and vision tower, which are never quantized."""


PICTURE_TOKENS = 1280
"""Number of tokens that a picture becomes at most for a captioner: larger pictures are scaled down, to about a
megapixel. It is the default of the image processor of Qwen2.5-VL, and bounds time and memory."""

Choose: TypeAlias = "Callable[[Tensor, int], Tensor]"
"""Function from the logits of the next tokens, shape BV, and the number of tokens before them in the answers, to logits
of which the largest decide."""


class Captioner(Protocol):
    """A vision-language model that answers questions about pictures. Made from configs and headers alone."""

    path: Path
    """Folder of its weights."""
    weights: CaptionerWeights
    formats: Mapping[str, str | None]
    """Number formats of modules that differ from the chosen one, by the beginnings of their paths; see
    `engine.weight_only.quantize_encoder`."""

    @property
    def cached_numbers_per_token(self) -> int:
        """Keys and values that are kept of each token while an answer grows."""

    def count_tokens(self, text: str, sizes: Sequence[Size]) -> int:
        """Counts the tokens of a question about pictures of these sizes.

        Raises:
            ValueError: a picture has a shape that the model cannot see; says which shapes it sees.
        """

    def fit(self, picture: Image) -> Image:
        """Scales a picture to the size at which the model sees it. Threads may call it."""

    def load(self, placement: Placement) -> TextEncoder:
        """Loads the model with its tokenizer.

        Raises:
            WeightsError: files are damaged, or do not belong together.
        """

    def answer(
        self, encoder: TextEncoder, questions: Sequence[Question], max_tokens: int, choose: Choose | None = None
    ) -> list[Answer]:
        """Answers questions as one batch, token by token, each time with the likeliest one.

        Args:
            max_tokens: length at which answers are cut.
            choose: changes the logits before the largest is taken; None: they stay as they are.
        """


class ModelFamily(Protocol):
    """Everything that the trainer needs of a model family."""

    name: str
    pipeline_classes: tuple[str, ...]
    """`_class_name` values of `model_index.json` that belong to this family."""
    script: str
    """Root script that trains a LoRA of it."""
    lora_targets: tuple[str, ...]
    """Endings of the names of modules that get a LoRA by default."""
    lora_presets: Mapping[str, tuple[str, ...]]
    """Sets of targets by name: endings, or patterns with `*` over whole module paths."""
    block_paths: tuple[str, ...]
    """Attribute paths of the lists of repeated blocks."""
    modulation_layers: tuple[str, ...]
    """Endings of the blocks' linear layers that see one row per example, SiLU of the time embedding, not tokens."""
    text_layers: tuple[str, ...]
    """Endings of the blocks' linear layers that text tokens alone pass. Where a block has some, only tokens of pictures
    pass its others."""
    activation_units: Mapping[str, ActivationUnits]
    """Memory of a block's activations, measured, for each of `block_paths`."""
    time_embedder: str
    """Path of the module that makes the time embedding."""
    time_features: tuple[str, ...]
    """Entries of the conditioning that the time embedding depends on, besides sigma and guidance."""
    text_components: tuple[str, ...]
    """Folders that decide the text features: part of the text cache's key."""
    unread_text_weights: tuple[str, ...]
    """Beginnings of the names of text encoders' tensors that never reach a device: nothing reads their results."""
    captioner_parts: tuple[str, str, str] | None
    """Folders of weights, tokenizer and picture processor (which may be missing) of a text encoder that is a whole
    vision-language model, so that it can write captions; None: there is none."""
    prompt_template: str
    """Text around a prompt: part of the text cache's key, since another template gives other features."""
    dropped_caption: str
    """Text that replaces a dropped caption: the one that the stock pipeline gets as an empty negative prompt."""
    max_controls: int
    """Largest number of control pictures of an example; 0 where the model does not edit."""
    controls_in_text: bool
    """Whether the text encoder sees the control pictures, so that text features depend on them."""
    embedded_guidance: bool
    """Whether the guidance scale is an input of the transformer (a distilled model), and not a second pass."""
    encoding_bytes_per_pixel: int
    """Peak device memory of the autoencoder in bf16, besides its weights, for each pixel that it encodes."""
    comfyui_prefix: str
    """Beginning of the names of a LoRA's layers in ComfyUI's file. Where it is diffusers', `transformer.`, the scale is
    multiplied in, since diffusers' loader, which is to read that file as well, refuses `.alpha` there."""
    modelspec: ModelSpec
    original_layers: tuple[OriginalLayer, ...]
    """Linear layers of the transformer as the model's authors name them."""
    pads_text: bool
    """Whether captions have lengths of their own and `stack_conditioning` can pad them to a multiple."""

    def pixel_multiple(self, folder: ModelFolder) -> int:
        """Returns the number of pixels that picture sides must be a multiple of."""

    def latent_shape(self, folder: ModelFolder, width: int, height: int) -> LatentShape:
        """Returns the shape of the latents of a picture of `width` x `height` pixels."""

    def num_image_tokens(self, latent_height: int, latent_width: int) -> int:
        """Counts the tokens that the transformer sees of latents of this height and width."""

    def control_size(self, folder: ModelFolder, picture: Size, side: int) -> Size:
        """Returns the size at which a control picture of this size joins the latents.

        Args:
            side: side in pixels of the square with about the wanted area; `CONTROL_SIDE` in stock pipelines.
        """

    def vision_size(self, picture: Size, side: int) -> Size:
        """Returns the size at which the text encoder sees a control picture; arguments are those of `control_size`."""

    def block_shape(self, folder: ModelFolder) -> tuple[int, int]:
        """Returns the number of repeated blocks and the width of a token inside them, for estimates of memory."""

    def random_text(self, folder: ModelFolder, num_tokens: int, seed: int) -> Conditioning:
        """Draws text features of the model's shape, for measurements without the real weights."""

    def load_text_encoder(self, folder: ModelFolder, placement: Placement) -> TextEncoder: ...

    def load_autoencoder(self, folder: ModelFolder, placement: Placement) -> nn.Module: ...

    def encoding_form(self, device: torch.device) -> str | None:
        """Returns a name for how pictures are encoded on a device, which differs from diffusers' by rounding; None: it
        does not differ. Entries of two forms have two places in the cache.
        """

    def build_transformer(self, config: Mapping[str, Any]) -> nn.Module:
        """Builds the transformer that a config describes (empty: the full-size default), on the meta device.

        Tensors that its files do not hold have values; `engine.load` gives the others theirs.
        """

    def transformer_shapes(self, config: Mapping[str, Any]) -> Shapes:
        """Returns the shapes of all tensors in the state dict of `build_transformer`, in the same order.

        It takes arithmetic alone, where a plan is not to wait for the import of the model's class.
        """

    def kept_beside(self, config: Mapping[str, Any]) -> float:
        """Returns the units that a compiled block keeps beside `ActivationUnits.kept` because of the model's config."""

    def encode_text(
        self, encoder: TextEncoder, prompts: Sequence[Prompt], max_tokens: int | None = None
    ) -> list[Conditioning]:
        """Encodes prompts, each to text features without padding.

        Args:
            max_tokens: number of tokens that longer captions are cut to; None: the stock pipeline's cut (or padding).
        """

    def text_lengths(
        self, folder: ModelFolder, prompts: Sequence[PromptOutline], max_tokens: int | None = None
    ) -> list[tuple[TextLength, ...]]:
        """Counts the tokens of each prompt by the folder's tokenizers, without loading an encoder.

        Args:
            max_tokens: as in `encode_text`.

        Returns:
            For each prompt a length for each encoder that cuts; none where nothing is ever cut.
        """

    def stack_conditioning(self, rows: Sequence[Conditioning], multiple: int = 1) -> Conditioning:
        """Pads and stacks examples to a batch. It never holds a mask of all true, which costs the fast attention path.

        Args:
            multiple: number of tokens that captions are padded to a multiple of, where the family `pads_text`; others
                leave it unread. Above 1, the batch shows which tokens are real, in one form whether or not any is
                padded, and `predict_velocity` attends to those by fast kernels (`engine.padded_attention`).
        """

    def encode_images(self, autoencoder: nn.Module, pixels_B3HW: Tensor) -> LatentDistribution:
        """Encodes pixels in [-1, 1] to the distribution of normalized latents."""

    def decode_latents(self, autoencoder: nn.Module, latents_BCHW: Tensor) -> Tensor:
        """Decodes normalized latents to pixels in [-1, 1], shape B3HW."""

    def predict_velocity(
        self,
        transformer: nn.Module,
        noisy_BCHW: Tensor,
        sigma_B: Tensor,
        conditioning: Conditioning,
        controls: Sequence[Tensor] = (),
        guidance: float = 1.0,
    ) -> Tensor:
        """Computes the model's estimate of `noise - latents`; shape BCHW.

        Args:
            sigma_B: 0 for clean, 1 for pure noise.
            controls: clean latents of the control pictures, each of shape BCHW with a height and width of its own.
            guidance: guidance scale, read by models with `embedded_guidance` only.
        """

    def embed_time(
        self, transformer: nn.Module, sigma_B: Tensor, conditioning: Conditioning, guidance: float = 1.0
    ) -> Tensor:
        """Computes the rows of the time embedding that `predict_velocity` uses, by a call of `time_embedder`.

        Shape (rows, D): a row for each example, and at most one more that all of them share.
        """

    def time_shift(self, folder: ModelFolder, num_image_tokens: int) -> float:
        """Returns `mu` of the resolution-dependent shift in the model's own scheduler config; 0 means unshifted."""

    def sigma_schedule(self, folder: ModelFolder, num_steps: int, num_image_tokens: int) -> list[float]:
        """Returns the sampler's sigmas, `num_steps` + 1 values from about 1 down to 0."""

    def guide(self, conditional_BCHW: Tensor, unconditional_BCHW: Tensor, scale: float) -> Tensor:
        """Combines the two velocities of classifier-free guidance as the stock pipeline does."""
