"""Small random models of every pipeline, and what the stock pipelines compute inside themselves."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLProcessor

from pixtune.engine.load import load_transformer
from pixtune.families.qwen_image_edit import VisionTokenizer
from pixtune.family import ModelFamily, Placement
from pixtune.storage.model_folder import ModelFolder
from tests.runs import ROOT

CAPTIONS = [
    "a red fox", "a small blue house with a green door", "make it night", "redraw in noto style", "two, three, four",
]  # fmt: skip


def build_folder(kind: str, folder: Path) -> Path:
    """A random model in diffusers' layout, by the scripts that make the shipped ones; `kind` names the script."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        module, shared = __import__(kind), __import__("tiny_qwen_image")
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    pipeline = module.build_pipeline(CAPTIONS * 20)
    give_values(pipeline.transformer)
    save = getattr(module, "save_edit_pipeline", shared.save_pipeline)
    save(pipeline, folder)
    return folder


def give_values(transformer: nn.Module) -> None:
    """Blocks start as the identity: with zeros nothing that goes through them could be wrong."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@contextmanager
def recorded_calls(transformer: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of every forward call, and its first output under "output"."""
    calls: list[dict[str, Any]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert not args
        calls.append({**kwargs, "output": output[0]})

    hook = transformer.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def assert_same(ours: Any, stock: Any, name: str) -> None:
    """Equal inputs of a transformer: exact where nothing was computed, tight where it was."""
    if stock is None:
        assert ours is None, name
    elif isinstance(stock, Tensor):
        assert ours.shape == stock.shape, (name, ours.shape, stock.shape)
        ours = ours.to(stock.dtype)
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}")
    else:
        assert ours == stock, (name, ours, stock)


@contextmanager
def remembered_encodings() -> Iterator[None]:
    """Pictures of a megapixel take an autoencoder of this size three seconds: equal ones are encoded once.

    What decides the result is what it is remembered by: the pixels, the weights and how they are run. So ours and the
    stock pipeline share one only where they give the same pixels to the same model, and each gets a copy.
    """
    kind = AutoencoderKLQwenImage
    encode = kind.encode

    def remembered(autoencoder: Any, pixels: Tensor, return_dict: bool = True) -> Any:
        switches = (autoencoder.use_tiling, autoencoder.use_slicing, autoencoder.training, pixels.dtype, pixels.shape)
        config = {name: value for name, value in autoencoder.config.items() if not name.startswith("_")}  # no path
        digest = hashlib.sha256(repr((switches, config)).encode())
        for tensor in (pixels, *autoencoder.state_dict().values()):
            digest.update(tensor.contiguous().numpy().tobytes())
        key = digest.hexdigest()
        if key not in KNOWN_ENCODINGS:
            KNOWN_ENCODINGS[key] = encode(autoencoder, pixels).latent_dist.parameters.detach()
        posterior = DiagonalGaussianDistribution(KNOWN_ENCODINGS[key].clone())
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "encode", remembered)
        yield


KNOWN_ENCODINGS: dict[str, Tensor] = {}
"""Parameters of the distributions of `remembered_encodings`, a few hundred kilobytes each."""


# ---- the stock edit pipelines


class ForwardsTokenTypes(nn.Module):
    """The text encoder as the pull request calls it."""

    def __init__(self, encoder: Any, picture_token: int) -> None:
        super().__init__()
        self.encoder, self.picture_token = encoder, picture_token

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        token_types = (input_ids == self.picture_token).int()
        return self.encoder(input_ids=input_ids, mm_token_type_ids=token_types, **inputs)


def real_processor(tokenizer: VisionTokenizer) -> Qwen2VLProcessor:
    """Made without its constructor, which wants torchvision for films."""
    processor = Qwen2VLProcessor.__new__(Qwen2VLProcessor)
    processor.image_processor, processor.tokenizer = tokenizer.image_processor, tokenizer.tokenizer
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    processor.image_token_id, processor.video_token_id = tokenizer.tokenizer.convert_tokens_to_ids(
        [processor.image_token, processor.video_token]
    )
    processor.chat_template, processor.image_ids, processor.video_ids = None, [], []
    return processor


def edit_pipeline(family: ModelFamily, folder: ModelFolder) -> Any:
    """The stock pipeline over a folder, in fp32."""
    import diffusers

    placement = Placement(torch.device("cpu"), torch.float32)
    (tokenizer,) = family.load_text_encoder(folder, placement).tokenizers
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder.path / "text_encoder", dtype=torch.float32)
    pipeline = getattr(diffusers, folder.pipeline_class)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder.path / "scheduler"),
        vae=family.load_autoencoder(folder, placement),
        text_encoder=ForwardsTokenTypes(model, tokenizer.tokenizer.convert_tokens_to_ids("<|image_pad|>")),
        tokenizer=tokenizer.tokenizer,
        processor=real_processor(tokenizer),
        transformer=load_transformer(family, folder, placement).module,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
