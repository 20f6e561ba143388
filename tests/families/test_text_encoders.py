"""What of a text encoder runs and is held: features alone, without logits or eyes that see nothing."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForImageTextToText

from pixtune.families import family_of
from pixtune.family import Placement, Prompt, TextEncoder
from pixtune.planning import count_text_weights
from pixtune.storage.model_folder import ModelFolder, open_model_folder
from tests.runs import ROOT, python

CPU = torch.device("cpu")
LANGUAGE_MODELS = ("tiny-qwen-image", "tiny-qwen-image-edit")
"""Those whose text encoder is a causal language model."""
MODELS = (*LANGUAGE_MODELS, "tiny-flux")
TEXTS = ("a red apple on a table", "cat")


def folder_of(name: str) -> ModelFolder:
    return open_model_folder(str(ROOT / "assets" / name))


def prompts_for(folder: ModelFolder) -> list[Prompt]:
    """Of two lengths, so that one is padded."""
    controls = (Image.linear_gradient("L").resize((64, 64)).convert("RGB"),)
    return [Prompt(text, controls if family_of(folder).controls_in_text else ()) for text in TEXTS]


class HiddenStates:
    """The whole language model behind the part of its interface that is used of the inner one."""

    def __init__(self, whole: Any) -> None:
        self.whole, self.device = whole, whole.device

    def __call__(self, **inputs: Any) -> Any:
        states: Tensor = self.whole(**inputs, output_hidden_states=True).hidden_states[-1]
        return type("Output", (), {"last_hidden_state": states})


def whole_encoder(folder: ModelFolder, dtype: torch.dtype, tokenizers: tuple[Any, ...]) -> TextEncoder:
    whole = AutoModelForImageTextToText.from_pretrained(folder.path / "text_encoder", dtype=dtype)
    return TextEncoder((HiddenStates(whole.eval()),), tokenizers)  # type: ignore[arg-type]


class Widths(TorchDispatchMode):
    """The last sizes of all tensors that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        self.seen |= {t.shape[-1] for t in tree_leaves(output) if isinstance(t, Tensor) and t.ndim > 1}
        return output


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_the_last_hidden_states_and_no_logits_are_computed(name: str, dtype: torch.dtype) -> None:
    folder = folder_of(name)
    family, prompts = family_of(folder), prompts_for(folder)
    encoder = family.load_text_encoder(folder, Placement(CPU, dtype))
    whole = whole_encoder(folder, dtype, encoder.tokenizers)
    vocabulary = whole.models[0].whole.config.text_config.vocab_size  # type: ignore[union-attr]
    with Widths() as ours:
        rows = family.encode_text(encoder, prompts)
    with Widths() as theirs:
        expected = family.encode_text(whole, prompts)
    assert vocabulary in theirs.seen and vocabulary not in ours.seen
    for row, exact in zip(rows, expected, strict=True):
        assert torch.equal(row["prompt_embeds"], exact["prompt_embeds"])


@pytest.mark.parametrize("name", MODELS)
def test_what_is_held_is_what_the_plan_counts(name: str) -> None:
    folder = folder_of(name)
    family = family_of(folder)
    encoder = family.load_text_encoder(folder, Placement(CPU, torch.bfloat16))
    held = sum(parameter.numel() for model in encoder.models for parameter in model.parameters())
    in_files = sum(folder.count_parameters(part) or 0 for part in family.text_components)
    assert count_text_weights(family, folder) == held == in_files - unread(folder)


def unread(folder: ModelFolder) -> int:
    """Weights of the vision tower where no pictures are seen; the small models' output layers are their embeddings."""
    family = family_of(folder)
    if family.controls_in_text or not family.unread_text_weights:
        return 0
    whole = AutoModelForImageTextToText.from_pretrained(folder.path / "text_encoder")
    return sum(math.prod(p.shape) for n, p in whole.named_parameters() if ".visual." in n)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says what of a process is mapped files")
def test_weights_of_16_bits_are_views_of_their_files(tmp_path: Path) -> None:
    """Why an encoder passes through host memory without staying there: `plan.encoders.text_host_bytes`."""
    config = AutoConfig.from_pretrained(folder_of(LANGUAGE_MODELS[0]).path / "text_encoder")
    config.text_config.vocab_size = 2**26 // config.text_config.hidden_size
    AutoModelForImageTextToText.from_config(config).bfloat16().save_pretrained(tmp_path / "text_encoder")
    shutil.copytree(folder_of(LANGUAGE_MODELS[0]).path / "tokenizer", tmp_path / "tokenizer")
    code = f"""
import sys, torch, transformers
from pathlib import Path
from pixtune.families import FAMILIES
from pixtune.family import Placement
from pixtune.storage.model_folder import ModelFolder
def anonymous(): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) >> 10
family, folder = FAMILIES["qwen_image"], ModelFolder(Path({str(tmp_path)!r}))
small = ModelFolder(Path({str(folder_of(LANGUAGE_MODELS[0]).path)!r}))
family.load_text_encoder(small, Placement(torch.device("cpu"), torch.bfloat16))  # what loading anything takes
for dtype in sys.argv[1:]:
    before = anonymous()
    encoder = family.load_text_encoder(folder, Placement(torch.device("cpu"), getattr(torch, dtype)))
    weighs = sum(p.nbytes for p in encoder.models[0].parameters()) >> 20
    print("found", weighs, anonymous() - before)
    del encoder
"""
    shares = {"bfloat16": 0, "float32": 1}
    (tmp_path / "measure.py").write_text(code, encoding="utf-8")
    run = python(tmp_path / "measure.py", *shares)
    assert run.returncode == 0, run.stdout
    found = [line.split()[1:] for line in run.stdout.splitlines() if line.startswith("found")]
    for (dtype, share), (weighs, held) in zip(shares.items(), found, strict=True):
        assert int(weighs) >= 128 and abs(int(held) / int(weighs) - share) < 0.25, (dtype, weighs, held)
