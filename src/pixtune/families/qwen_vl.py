"""Captions by Qwen2.5-VL and Qwen3-VL: a model's own text encoder, whole, or any folder of these two.

Conventions follow transformers' processors and chat templates of these models, which the tests compare with; neither
torchvision nor a `processor` folder is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixtune.errors import WeightsError
from pixtune.families.qwen_image import OUTPUT_LAYER, VISION_TOWER
from pixtune.families.qwen_image_edit import PICTURE, PICTURE_TOKEN, VisionTokenizer
from pixtune.family import Answer, CaptionerWeights, Choose, Placement, Question, TextEncoder
from pixtune.late import LateModule
from pixtune.sizes import Size
from pixtune.storage.model_folder import ModelFolder, read_header, weight_files

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor
else:
    torch = LateModule("torch")

LEAST_PICTURE_TOKENS = 4
"""Number of tokens that a picture becomes at least; likewise."""
LONGEST_SHAPE = 200
"""Longer side over the shorter one up to which the image processor takes pictures."""
EMBEDDING = "embed_tokens."
END = "<|im_end|>"
ENDS = (END, "<|endoftext|>")
"""Tokens that end an answer."""


@dataclass(frozen=True)
class Kind:
    """A generation of the model."""

    model_class: str
    """Name of its class in transformers."""
    system_part: str
    """Text that its chat template puts before a conversation without a system message."""
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    """Statistics of colours, where no image processor's config states them."""


KINDS = {
    "qwen2_5_vl": Kind(
        "Qwen2_5_VLForConditionalGeneration",
        f"<|im_start|>system\nYou are a helpful assistant.{END}\n",
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
    "qwen3_vl": Kind("Qwen3VLForConditionalGeneration", "", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Generations that can write captions, by the `model_type` of their configs."""


class QwenCaptioner:
    """A folder of Qwen2.5-VL or Qwen3-VL; `family.Captioner` describes it.

    Args:
        weights, tokenizer: folders of the two.
        processor: folder with `preprocessor_config.json`; where there is none, the defaults of the model serve.
        picture_tokens: tokens that a picture becomes at most.

    Raises:
        WeightsError: it is another model, or one that cannot write captions; says what it lacks.
    """

    formats: Mapping[str, str | None] = {"model.visual": None, "lm_head": "int8"}
    # In 4 bits a vision tower takes one thing for another, and rare words suffer first in an output layer.

    def __init__(self, weights: Path, tokenizer: Path, processor: Path, picture_tokens: int) -> None:
        self.path, self._tokenizer_path, self._processor_path = weights, tokenizer, processor
        self._picture_tokens = picture_tokens
        config = ModelFolder(weights.parent).component_config(weights.name)
        name = config.get("model_type")
        if name not in KINDS:
            raise WeightsError(f"{weights} holds a {name or 'model'}, which cannot write captions. {WHAT_CAN}")
        if config.get("quantization_config"):
            raise WeightsError(
                f"{weights} is stored in a quantized form that is not read (quantization_config in its config.json). "
                "Take the unquantized model: pixtune quantizes it where memory is short."
            )
        self._kind = KINDS[name]
        self.weights = _count_weights(weights, _ties(config))
        self._tokens_of: dict[tuple[str, int], int] = {}

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        from pixtune.storage.loading.parts import naming_part

        with naming_part(self.path):
            config = AutoConfig.from_pretrained(self.path, trust_remote_code=False, local_files_only=True)
            if not all(type(value) is int and value > 0 for value in _patches(config.vision_config)):
                raise ValueError(f"patches of {_patches(config.vision_config)} pixels")
        return config

    @property
    def cached_numbers_per_token(self) -> int:
        text = self._config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return int(2 * text.num_hidden_layers * text.num_key_value_heads * width)

    @cached_property
    def _tokenizer(self) -> VisionTokenizer:
        from transformers import AutoTokenizer

        from pixtune.storage.loading.parts import load_tokenizer

        tokenizer = load_tokenizer(AutoTokenizer, self._tokenizer_path)
        numbers = [tokenizer.convert_tokens_to_ids(token) for token in (PICTURE_TOKEN, END)]
        if numbers[0] != self._config.image_token_id or numbers[1] in (None, tokenizer.unk_token_id):
            raise WeightsError(
                f"{self._tokenizer_path} is no tokenizer of the model in {self.path}: it lacks {PICTURE_TOKEN} or "
                f"{END}, or numbers them otherwise. Fetch the model again."
            )
        # Answers grow at the right, so shorter questions of a batch are padded at the left.
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = ENDS[-1]
        return VisionTokenizer(tokenizer, self._image_processor())

    def _image_processor(self) -> Any:
        from transformers import Qwen2VLImageProcessorPil

        from pixtune.storage.loading.parts import naming_part

        vision, size = self._config.vision_config, self._pixels_of_a_picture
        if not (self._processor_path / "preprocessor_config.json").is_file():
            return Qwen2VLImageProcessorPil(
                size=size, patch_size=vision.patch_size, temporal_patch_size=vision.temporal_patch_size,
                merge_size=vision.spatial_merge_size, image_mean=list(self._kind.image_mean),
                image_std=list(self._kind.image_std),
            )  # fmt: skip
        with naming_part(self._processor_path):
            processor = Qwen2VLImageProcessorPil.from_pretrained(self._processor_path)
            if (processor.patch_size, processor.merge_size, processor.temporal_patch_size) != _patches(vision):
                raise WeightsError(
                    f"{self._processor_path} cuts pictures into patches of {processor.patch_size} pixels, and the "
                    f"model in {self.path} sees {vision.patch_size}. Are they of different models?"
                )
            processor.size = size
        return processor

    @property
    def _pixels_of_a_picture(self) -> dict[str, int]:
        """Bounds of a picture's pixels, under the names that the image processor has for them."""
        vision = self._config.vision_config
        pixels_per_token = (vision.patch_size * vision.spatial_merge_size) ** 2
        return {
            "shortest_edge": LEAST_PICTURE_TOKENS * pixels_per_token,
            "longest_edge": self._picture_tokens * pixels_per_token,
        }

    def question(self, text: str, num_pictures: int) -> str:
        """Writes a conversation of one question, as the model's chat template does with a generation prompt.

        Of several pictures each has its number before it, as with `add_vision_id`, so that the question can name them.
        """
        numbers = [f"Picture {number + 1}: " if num_pictures > 1 else "" for number in range(num_pictures)]
        pictures = "".join(f"{number}{PICTURE}" for number in numbers)
        return f"{self._kind.system_part}<|im_start|>user\n{pictures}{text}{END}\n<|im_start|>assistant\n"

    def count_tokens(self, text: str, sizes: Sequence[Size]) -> int:
        for width, height in sizes:
            if max(width, height) > LONGEST_SHAPE * min(width, height):
                raise ValueError(f"is longer than {LONGEST_SHAPE} times its width ({width}x{height})")
        key = text, len(sizes)
        if key not in self._tokens_of:
            (tokens,) = self._tokenizer.tokenizer([self.question(text, len(sizes))], verbose=False).input_ids
            self._tokens_of[key] = len(tokens) - len(sizes)  # without the placeholders
        return self._tokens_of[key] + sum(self._tokenizer.num_features(size) for size in sizes)

    def fit(self, picture: Image) -> Image:
        import numpy as np
        from PIL import Image as images
        from transformers.image_utils import SizeDict

        processor = self._tokenizer.image_processor
        pixels_3HW = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
        factor = processor.patch_size * processor.merge_size
        fitting = processor.resize(pixels_3HW, SizeDict(**self._pixels_of_a_picture), processor.resample, factor)
        return images.fromarray(np.ascontiguousarray(fitting.transpose(1, 2, 0)))

    def load(self, placement: Placement) -> TextEncoder:
        import transformers

        from pixtune.storage.loading.parts import check_words, load_part

        tokenizer = self._tokenizer
        model = load_part(getattr(transformers, self._kind.model_class), self.path, dtype=placement.dtype)
        check_words(tokenizer.tokenizer, model, self._tokenizer_path)
        model.to(placement.device).eval().requires_grad_(False)
        return TextEncoder((model,), (tokenizer,))

    def answer(
        self, encoder: TextEncoder, questions: Sequence[Question], max_tokens: int, choose: Choose | None = None
    ) -> list[Answer]:
        from transformers import GenerationConfig, LogitsProcessorList

        model: Any = encoder.models[0]
        (vision,) = encoder.tokenizers
        texts = [self.question(question.text, len(question.pictures)) for question in questions]
        inputs = vision(texts, [question.pictures for question in questions])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        length = inputs["input_ids"].shape[1]
        ends = [number for number in map(vision.tokenizer.convert_tokens_to_ids, ENDS) if number is not None]
        settings = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=ends,
            pad_token_id=vision.tokenizer.pad_token_id,
            disable_compile=True,
        )

        def process(input_ids_BT: Tensor, logits_BV: Tensor) -> Tensor:
            return logits_BV if choose is None else choose(logits_BV, input_ids_BT.shape[1] - length)

        # The folder's own settings would draw, and punish words for standing in the question.
        model.generation_config = settings
        with torch.no_grad():
            whole_BT = model.generate(**inputs, logits_processor=LogitsProcessorList([process]))
        answers = []
        for tokens in whole_BT[:, length:].tolist():
            text = vision.tokenizer.decode(tokens, skip_special_tokens=True)
            answers.append(Answer(text, any(token in ends for token in tokens)))
        return answers


WHAT_CAN = (
    "The text encoders of Qwen-Image and Qwen-Image-Edit can, and any local folder of Qwen2.5-VL or Qwen3-VL: "
    "--captioner FOLDER."
)


def _patches(vision: Any) -> tuple[int, int, int]:
    """Returns the side of a patch in pixels, how many along a side become a token, and the frames of a patch."""
    return vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size


def _ties(config: Mapping[str, Any]) -> bool:
    """Returns whether the output layer has the embedding's weights, by a config of transformers 4 or 5."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings", False) if isinstance(text, dict) else False
    return bool(config.get("tie_word_embeddings", inner))


def _count_weights(folder: Path, ties: bool) -> CaptionerWeights:
    """Counts weights by headers alone.

    Raises:
        WeightsError: the files lack what writing captions takes; says what.
    """
    linear, output, plain, tower = 0, 0, 0, 0
    for file in weight_files(folder):
        for name, tensor in read_header(file).items():
            if name == "__metadata__":
                continue
            count, is_matrix = math.prod(tensor["shape"]), len(tensor["shape"]) == 2
            if name.startswith(OUTPUT_LAYER):
                output += 0 if ties else count
            elif name.startswith(VISION_TOWER):
                tower += count
            elif is_matrix and EMBEDDING not in name:
                linear += count
            else:
                plain += count
    lacks = [
        *(["the vision tower, by which it sees pictures"] if not tower else []),
        *(["the output layer, by which it writes"] if not output and not ties else []),
    ]
    if lacks:
        raise WeightsError(
            f"{folder} lacks {' and '.join(lacks)}: the folder was saved for encoding text alone, and cannot write "
            f"captions. Fetch the whole model again, or give another one. {WHAT_CAN}"
        )
    return CaptionerWeights(linear, output, plain + tower)
