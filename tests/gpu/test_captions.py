"""A captioner on a GPU says what it says on a CPU, in each format, within the memory of its plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixtune.captioning.describe import load_captioner
from pixtune.families.captioners import open_captioner
from pixtune.family import Captioner, Placement, Question
from pixtune.plan.captioning import CaptionPlan, CaptionSizes, caption_bytes
from tests.captioners import KINDS, write_captioner
from tests.pictures import noise

pytestmark = pytest.mark.gpu

NUM_TOKENS = 24
QUESTIONS = [Question("What is this?", (noise(200 + 90 * number, 160, number),)) for number in range(3)]


def first_logits(captioner: Captioner, text_format: str | None, device: str) -> Tensor:
    """Logits of the first word of each answer."""
    encoder = load_captioner(captioner, CaptionPlan(text_format, 1, 0), Placement(torch.device(device), torch.float32))
    seen: list[Tensor] = []

    def keep(logits_BV: Tensor, position: int) -> Tensor:
        seen.append(logits_BV.cpu())
        return logits_BV

    captioner.answer(encoder, QUESTIONS, 1, keep)
    return seen[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text_format", [None, "int8", "nf4"])
def test_first_words_are_those_of_the_cpu(tmp_path: Path, kind: str, text_format: str | None) -> None:
    captioner = open_captioner(write_captioner(tmp_path, kind))
    expected, found = (first_logits(captioner, text_format, device) for device in ("cpu", "cuda"))
    # Products in TF32, where they are allowed, have an error of 1e-3 of their own.
    assert (found - expected).norm() < 5e-3 * expected.norm()


def test_memory_stays_below_the_plan(tmp_path: Path) -> None:
    captioner = open_captioner(write_captioner(tmp_path, KINDS[0]))
    length = max(captioner.count_tokens(each.text, [each.pictures[0].size]) for each in QUESTIONS)
    sizes = CaptionSizes(captioner.weights, captioner.cached_numbers_per_token, length, NUM_TOKENS)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    encoder = load_captioner(captioner, CaptionPlan(None, 3, 0), Placement(torch.device("cuda"), torch.bfloat16))
    captioner.answer(encoder, QUESTIONS, NUM_TOKENS)
    assert torch.cuda.max_memory_allocated() - before < caption_bytes(sizes, None, len(QUESTIONS))
