"""Builds the parts of `assets/tiny-flux/`: exactly FLUX.1-dev's classes at toy size.

    python scripts/tiny_flux.py --out /tmp/tiny-flux-random     # random weights, a valid pipeline folder

Sizes are set here and nowhere else; `train_tiny_models.py` gives the weights their values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from tiny_qwen_image import build_scheduler, randomized, write_untrained, zero_parameters
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

TEXT_FEATURES = 128
POOLED_FEATURES = 128
VOCABULARY_SIZE = 3072
CLIP_TOKENS = 77
TRANSFORMER_SIZES = {
    "num_layers": 2,
    "num_single_layers": 5,
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "axes_dims_rope": (16, 24, 24),
    "joint_attention_dim": TEXT_FEATURES,
    "pooled_projection_dim": POOLED_FEATURES,
}


def build_clip_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """Builds CLIP's byte-level tokenizer with a vocabulary learnt from the captions."""
    alphabet = sorted(ByteLevel.alphabet())
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator([caption.lower() for caption in captions], trainer)
    model = json.loads(learner.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for token in [*(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]:
        vocabulary.setdefault(token, len(vocabulary))
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=[tuple(merge) for merge in model["merges"]],
        model_max_length=CLIP_TOKENS,
    )


def build_t5_tokenizer(captions: Iterable[str]) -> T5TokenizerFast:
    """Builds T5's unigram tokenizer with a vocabulary learnt from the captions."""
    learner = Tokenizer(Unigram())
    learner.pre_tokenizer = Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = UnigramTrainer(vocab_size=VOCABULARY_SIZE, special_tokens=special, unk_token="<unk>", show_progress=False)
    learner.train_from_iterator(captions, trainer)
    vocabulary = [tuple(entry) for entry in json.loads(learner.to_str())["model"]["vocab"]]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Builds a random CLIP that is not trained; its pooled feature is the last word's, which attends to all others."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=POOLED_FEATURES,
        intermediate_size=2 * POOLED_FEATURES,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return randomized(CLIPTextModel(config), "token_embedding", ("position",))


def build_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """Builds a random T5 that is not trained; its token vectors are large beside what its layers add."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_FEATURES,
        d_kv=32,
        d_ff=2 * TEXT_FEATURES,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return randomized(T5EncoderModel(config), "shared", ("relative",))


def build_autoencoder() -> AutoencoderKL:
    """Builds FLUX's autoencoder, narrow: 8x smaller, 16 channels. Its latent statistics are set after training."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 48, 48),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
    )
    with torch.no_grad():
        model.encoder.conv_out.bias[16:] = -6  # a narrow posterior: the decoder has a signal from the first step
    return model


def build_transformer() -> FluxTransformer2DModel:
    """Builds FLUX.1-dev's transformer, narrow and shallow.

    Blocks start as the identity (Peebles & Xie 2023, adaLN-Zero).
    """
    model = FluxTransformer2DModel(in_channels=64, guidance_embeds=True, **TRANSFORMER_SIZES)
    zero_parameters([model.proj_out, model.norm_out.linear])
    zero_parameters(norm.linear for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context))
    zero_parameters(block.norm.linear for block in model.single_transformer_blocks)
    return model


def build_pipeline(captions: Iterable[str], seed: int = 0) -> FluxPipeline:
    """Builds all parts, untrained."""
    torch.manual_seed(seed)
    captions = list(captions)
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(captions), build_t5_tokenizer(captions)
    return FluxPipeline(
        scheduler=build_scheduler(),
        vae=build_autoencoder(),
        text_encoder=build_clip(clip_tokenizer),
        tokenizer=clip_tokenizer,
        text_encoder_2=build_t5(t5_tokenizer),
        tokenizer_2=t5_tokenizer,
        transformer=build_transformer(),
    )


if __name__ == "__main__":
    write_untrained(__doc__, build_pipeline)
