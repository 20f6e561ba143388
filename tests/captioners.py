"""Small vision-language models with random weights, whose greedy answers are strings of different words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests.runs import ROOT

TINY = ROOT / "assets" / "tiny-qwen-image"
KINDS = ("qwen2_5_vl", "qwen3_vl")


def write_captioner(folder: Path, kind: str, tied: bool = False, like: Path = TINY) -> Path:
    """Writes a folder as the model's makers publish it, without a picture processor.

    Args:
        like: small model with the tokenizer that serves.
    """
    tokenizer = AutoTokenizer.from_pretrained(like / "tokenizer")
    tokenizer.save_pretrained(folder)
    base = AutoConfig.from_pretrained(like / "text_encoder")
    torch.manual_seed(0)
    model: Any
    if kind == "qwen2_5_vl":
        base.tie_word_embeddings = base.text_config.tie_word_embeddings = tied
        model = Qwen2_5_VLForConditionalGeneration(base)
    else:
        text = {
            "vocab_size": base.text_config.vocab_size, "hidden_size": 128, "intermediate_size": 256, "head_dim": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        }  # fmt: skip
        vision = {
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        }  # fmt: skip
        numbers = {name: getattr(base, name) for name in ("image_token_id", "video_token_id")}
        ends = {name: getattr(base, name) for name in ("vision_start_token_id", "vision_end_token_id")}
        model = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **numbers, **ends)
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # larger than usual, so that a picture changes the words
                parameter.normal_(0, 0.6 if "embed_tokens" in name else 0.12)
    model.save_pretrained(folder)
    # Settings that must not matter: the makers' own draw and punish words of the question.
    settings = {"do_sample": True, "temperature": 1.7, "top_k": 3, "repetition_penalty": 1.9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder
