"""Samples by captured, compiled passes are those of plain ones on a GPU, and leave no memory behind."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pixtune.engine.apply import blocks_of, load_planned, placement_of
from pixtune.engine.capture import Capture, GraphCapturer, Replay, ReplayedPass
from pixtune.engine.compile import compile_blocks
from pixtune.engine.load import LoadedTransformer
from pixtune.engine.padded_attention import padding_obstacle
from pixtune.families import family_of
from pixtune.plan.passes import PLAIN_PASSES, PassPlan
from pixtune.plan.sampling import SamplingPlan
from pixtune.sampler import EncodedPrompt, PassInputs, PromptSampler, SamplerSettings
from pixtune.storage.model_folder import ModelFolder
from tests.unit.engine.tiny import ASSETS

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
NUM_STEPS = 10
USABLE = torch.iinfo(torch.int64).max
CAPTURED = PassPlan(captures=4, captures_stay=True, usable_bytes=USABLE)
PLANS = {
    "bf16": SamplingPlan("bf16", "bf16", 0, 0, False, None, 0, 0),
    "fp8, modulation ahead": SamplingPlan("bf16", "fp8", NUM_STEPS + 1, 0, False, None, 0, 0),
    "modulation in stretches": SamplingPlan("bf16", "bf16", 5, 0, False, None, 0, 0),
    "nf4, streamed": SamplingPlan("bf16", "nf4", NUM_STEPS + 1, 4, False, None, 0, 0),
}
MODELS = ("tiny-qwen-image", "tiny-qwen-image-edit", "tiny-flux")


class Drawing:
    """A small model and a prompt."""

    def __init__(self, name: str, plan: SamplingPlan) -> None:
        self.folder = ModelFolder(ASSETS / name)
        self.family, self.plan = family_of(self.folder), plan
        self.transformer = load_planned(self.family, self.folder, plan, DEVICE)
        draw = torch.Generator().manual_seed(0)
        controls = tuple(
            torch.randn(1, *self.family.latent_shape(self.folder, 128, 64), generator=draw)
            for _ in range(min(self.family.max_controls, 1))
        )
        negative = None if self.family.embedded_guidance else self.family.random_text(self.folder, 3, 9)
        self.prompt = EncodedPrompt("", self.family.random_text(self.folder, 40, 1), negative, controls, (128, 128))
        self.capturers: list[Watched] = []

    def compile(self) -> None:
        compile_blocks(blocks_of(self.transformer.module, self.family), selective=False)

    def latents(self, passes: PassPlan) -> Tensor:
        sampler = PromptSampler(
            self.family, self.folder, [self.prompt], SamplerSettings((1, 2), NUM_STEPS, 3.0),
            placement_of(self.plan, DEVICE), False, None, passes, self.build_capture,
        )  # fmt: skip
        return torch.cat([latents.clone() for _, _, latents in sampler.latents(self.transformer)])

    def build_capture(self, loaded: LoadedTransformer) -> Capture:
        self.capturers.append(Watched(GraphCapturer(self.transformer.stream)))
        return self.capturers[-1]


class Watched:
    """Counts what a capturer captures."""

    def __init__(self, capturer: GraphCapturer) -> None:
        self.capturer, self.captured = capturer, 0

    def __call__(self, work: Callable[[], Tensor]) -> Replay:
        replay = self.capturer(work)
        self.captured += 1
        return replay


def psnr(found: Tensor, expected: Tensor) -> float:
    error = (found - expected).square().mean().clamp_min(1e-20)
    return float(20 * (expected.max() - expected.min()).log10() - 10 * error.log10())


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_captured_passes_give_the_plain_latents(name: str, plan: SamplingPlan) -> None:
    drawing = Drawing(name, plan)
    expected = drawing.latents(PLAIN_PASSES)
    captured = drawing.latents(CAPTURED)
    assert captured.equal(expected) and sum(each.captured for each in drawing.capturers) > 0


@pytest.mark.parametrize("plan", [PLANS["bf16"], PLANS["fp8, modulation ahead"]], ids=["bf16", "fp8"])
@pytest.mark.parametrize("name", MODELS[:2])
@pytest.mark.parametrize("compiled", [False, True])
def test_guidance_as_one_batch_gives_the_same_picture(name: str, plan: SamplingPlan, compiled: bool) -> None:
    drawing = Drawing(name, plan)
    if padding_obstacle(DEVICE, drawing.folder.component_config("transformer")["attention_head_dim"]) is not None:
        pytest.skip("no kernel for padded prompts of this head size")
    expected = drawing.latents(PLAIN_PASSES)
    if compiled:
        drawing.compile()
    together = drawing.latents(replace(CAPTURED, together=True))
    assert [each.captured for each in drawing.capturers] == [1]
    # 8-bit codes of values that differ by rounding differ by one, here and there.
    assert psnr(together, expected) > (40 if plan.weights_format == "bf16" else 30)


def test_compiled_passes_are_captured_too() -> None:
    drawing = Drawing("tiny-flux", PLANS["bf16"])
    expected = drawing.latents(PLAIN_PASSES)
    drawing.compile()
    assert psnr(drawing.latents(CAPTURED), expected) > 40
    assert [each.captured for each in drawing.capturers] == [1]


def test_no_memory_stays_and_pictures_can_be_sampled_again(caplog: pytest.LogCaptureFixture) -> None:
    """As between the steps of a run: the next time, passes are captured in a pool of their own."""
    drawing = Drawing("tiny-qwen-image", PLANS["fp8, modulation ahead"])
    first = drawing.latents(CAPTURED)
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    with caplog.at_level(logging.WARNING):
        assert drawing.latents(CAPTURED).equal(first)
        assert drawing.latents(replace(CAPTURED, captures_stay=False)).equal(first)
    assert not caplog.text
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= held + 4 * 2**20
    assert [each.captured for each in drawing.capturers] == [2, 2, 2]


def test_captures_of_samples_leave_those_of_others_alone() -> None:
    """A captured pass with a modulation table, samples, and the pass again: its rows are where they were."""
    drawing = Drawing("tiny-qwen-image", PLANS["fp8, modulation ahead"])
    family, loaded = drawing.family, drawing.transformer
    assert loaded.table is not None
    text = {key: tensor.to(DEVICE) for key, tensor in family.stack_conditioning([drawing.prompt.positive]).items()}
    noisy = torch.randn(1, *family.latent_shape(drawing.folder, 128, 128), device=DEVICE)

    @torch.no_grad()
    def compute(inputs: PassInputs) -> Tensor:
        return family.predict_velocity(loaded.module, inputs.latents_BCHW, inputs.sigma_B, inputs.conditioning)

    replayed: ReplayedPass[PassInputs] = ReplayedPass(compute, (), GraphCapturer(), 1, lambda: USABLE)

    def step(sigma: float) -> Tensor:
        sigma_B = torch.tensor([sigma], device=DEVICE)
        assert loaded.table is not None
        loaded.table.use(sigma, lambda: family.embed_time(loaded.module, sigma_B, {}))
        loaded.table.show([0, -1])
        return replayed(PassInputs(noisy, sigma_B, text, ())).clone()

    before = [step(sigma) for sigma in (0.8, 0.8, 0.8, 0.3)]
    assert replayed._captures
    drawing.latents(CAPTURED)
    after = [step(sigma) for sigma in (0.8, 0.3)]
    assert after[0].equal(before[2]) and after[1].equal(before[3])
    assert not after[0].equal(after[1])


def test_captured_passes_survive_the_samples_that_were_captured_before_them() -> None:
    """Samples come before the first step: nothing that steps capture may lie in the memory of their captures."""
    weight = torch.randn(2048, 2048, device=DEVICE).bfloat16()
    drawing = Drawing("tiny-qwen-image", PLANS["bf16"])
    drawing.latents(CAPTURED)
    values = torch.randn(512, 2048, device=DEVICE).bfloat16()
    expected = values @ weight @ weight
    replay = GraphCapturer()(lambda: values @ weight @ weight)
    drawing.latents(CAPTURED)
    gc.collect()
    torch.cuda.empty_cache()
    filling = [torch.full((1 << 22,), float("nan"), device=DEVICE) for _ in range(64)]
    replay()
    assert replay().equal(expected) and all(bool(each.isnan().all()) for each in filling)
