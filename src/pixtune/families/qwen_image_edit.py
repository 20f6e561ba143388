"""Qwen-Image-Edit, -2509 and -2511: Qwen-Image whose text encoder and latent sequence also get control pictures.

Conventions follow diffusers' `QwenImageEditPipeline` and `QwenImageEditPlusPipeline`. The transformer's own config
decides `zero_cond_t` (2511: control tokens are modulated as if clean).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pixtune.families.qwen_image import QwenImage, count_inside
from pixtune.family import Conditioning, Prompt, PromptOutline, TextEncoder, TextLength
from pixtune.sizes import Size
from pixtune.storage.model_folder import ModelFolder

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

NUM_TEMPLATE_TOKENS = 64
"""Number of tokens before the user's part, which the pipelines cut from the features."""
SIDE_STEP = 32
"""Number of pixels that the pipelines round sides of control pictures to, whatever the autoencoder needs."""
PICTURE_TOKEN = "<|image_pad|>"
"""Token that stands for a feature of a picture, as often as the picture has features."""
PICTURE = f"<|vision_start|>{PICTURE_TOKEN}<|vision_end|>"


@dataclass(frozen=True)
class VisionTokenizer:
    """Tokenizer of words and pictures for Qwen2.5-VL, equal to `Qwen2VLProcessor` without its need for torchvision."""

    tokenizer: Any
    image_processor: Any

    def __call__(self, texts: Sequence[str], pictures: Sequence[Sequence[Image]]) -> dict[str, Tensor]:
        """Makes the model's inputs of a padded batch; each text has one `PICTURE` for each of its pictures."""
        seen: dict[str, Tensor] = {}
        counts: list[int] = []
        if flat := [picture for row in pictures for picture in row]:
            seen = dict(self.image_processor(images=flat, return_tensors="pt"))
            counts = (seen["image_grid_thw"].prod(dim=1) // self.image_processor.merge_size**2).tolist()
        return {**self.tokens(texts, iter(counts)), **seen}

    def num_features(self, size: Size) -> int:
        """Counts the tokens that a picture of this size becomes."""
        width, height = size
        return self.image_processor.get_number_of_image_patches(height, width) // self.image_processor.merge_size**2

    def tokens(self, texts: Sequence[str], counts: Iterator[int]) -> dict[str, Tensor]:
        """Makes the model's inputs without the pixels.

        Args:
            counts: number of features of each picture, in the order of the texts.
        """
        whole = [re.sub(re.escape(PICTURE_TOKEN), lambda _: PICTURE_TOKEN * next(counts), text) for text in texts]
        tokens = dict(self.tokenizer(whole, padding=True, return_tensors="pt"))
        # Without these types transformers 5 numbers a picture's patches like words. The model was trained with their
        # rows and columns; diffusers 0.42 forgets to pass the types on (huggingface/diffusers issue 14194).
        is_picture = tokens["input_ids"] == self.tokenizer.convert_tokens_to_ids(PICTURE_TOKEN)
        return {**tokens, "mm_token_type_ids": is_picture.int()}


@dataclass(frozen=True)
class EditReader:
    """The edit pipelines' prompt: control pictures stand in the user's part, before the instruction."""

    numbered: bool
    """Whether "Picture 1: " and so on stand before pictures, of which there may be several (Plus)."""
    vision_side: int | None
    """Side in pixels of the square whose area the text encoder sees; None: the side that the latents get."""

    components: tuple[str, ...] = ("text_encoder", "tokenizer", "processor")
    template: str = (
        "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
        "background), then explain how the user's text instruction should alter or modify the image. Generate a new "
        "image that meets the user's requirements while maintaining consistency with the original input where "
        "appropriate.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    )

    def load_tokenizer(self, folder: ModelFolder) -> VisionTokenizer:
        from transformers import AutoImageProcessor, AutoTokenizer

        from pixtune.storage.loading.parts import load_tokenizer, naming_part

        tokenizer = load_tokenizer(AutoTokenizer, folder.part("tokenizer"))
        with naming_part(folder.part("processor")):
            return VisionTokenizer(
                tokenizer, AutoImageProcessor.from_pretrained(folder.part("processor"), trust_remote_code=False)
            )

    def user_part(self, text: str, num_pictures: int) -> str:
        """Puts a placeholder for each control picture before the instruction."""
        names = [f"Picture {number + 1}: " if self.numbered else "" for number in range(num_pictures)]
        return "".join(f"{name}{PICTURE}" for name in names) + text

    def encode(self, encoder: TextEncoder, prompts: Sequence[Prompt], max_tokens: int | None) -> list[Conditioning]:
        (model,), (tokenizer,) = encoder.models, encoder.tokenizers
        texts = [self.template.format(self.user_part(prompt.text, len(prompt.pictures))) for prompt in prompts]
        inputs = tokenizer(texts, [prompt.pictures for prompt in prompts])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        features_BTD = model(**inputs).last_hidden_state
        return [
            {"prompt_embeds": features_TD[keep_T][NUM_TEMPLATE_TOKENS:][:max_tokens].contiguous()}
            for features_TD, keep_T in zip(features_BTD, inputs["attention_mask"].bool(), strict=True)
        ]

    def text_lengths(
        self, folder: ModelFolder, prompts: Sequence[PromptOutline], max_tokens: int | None
    ) -> list[tuple[TextLength, ...]]:
        if max_tokens is None:
            return [()] * len(prompts)
        vision = self.load_tokenizer(folder)
        user_parts = [self.user_part(prompt.text, len(prompt.picture_sizes)) for prompt in prompts]
        counts = count_inside(self.template, vision.tokenizer, user_parts)
        # A picture counts as one token above, its placeholder.
        extra = [sum(vision.num_features(size) - 1 for size in prompt.picture_sizes) for prompt in prompts]
        reader = "the text encoder reads (control pictures included)"
        return [(TextLength(reader, count + more, max_tokens),) for count, more in zip(counts, extra, strict=True)]

    def control_size(self, folder: ModelFolder, picture: Size, side: int, multiple: int) -> Size:
        width, height = size_of_area(picture, side)
        return max(width // multiple, 1) * multiple, max(height // multiple, 1) * multiple

    def vision_size(self, picture: Size, side: int) -> Size:
        return size_of_area(picture, self.vision_side or side)


def size_of_area(picture: Size, side: int) -> Size:
    """Returns a size of about `side` squared pixels in the picture's shape, each side rounded to `SIDE_STEP`."""
    ratio = picture[0] / picture[1]
    width = math.sqrt(side * side * ratio)
    return _round(width), _round(width / ratio)


def _round(length: float) -> int:
    return max(round(length / SIDE_STEP), 1) * SIDE_STEP


QWEN_IMAGE_EDIT = QwenImage(
    "qwen_image_edit", ("QwenImageEditPipeline",), EditReader(numbered=False, vision_side=None), max_controls=1
)
QWEN_IMAGE_EDIT_PLUS = QwenImage(
    "qwen_image_edit_plus", ("QwenImageEditPlusPipeline",), EditReader(numbered=True, vision_side=384), max_controls=3
)
