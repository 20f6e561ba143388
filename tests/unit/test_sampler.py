"""Samples of captured passes, and of guidance as one batch, are those of plain passes, by a capturer without a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pixtune import sampler as sampler_module
from pixtune.engine import padded_attention
from pixtune.engine.apply import load_planned, placement_of
from pixtune.engine.capture import PLAIN_CALLS, Capture, Replay
from pixtune.engine.load import LoadedTransformer
from pixtune.engine.modulation import ModulationTable
from pixtune.engine.modulation_filling import Filling
from pixtune.families import family_of
from pixtune.plan.passes import PLAIN_PASSES, PassPlan
from pixtune.plan.sampling import SamplingPlan
from pixtune.sampler import EncodedPrompt, PromptSampler, SamplerSettings
from pixtune.storage.model_folder import ModelFolder
from tests.shallow import shallow_model

CPU = torch.device("cpu")
PLAIN = SamplingPlan("fp32", "fp32", 0, 0, False, None, 0, 0)
NUM_STEPS = 7
CAPTURED = PassPlan(captures=2, captures_stay=True)


@pytest.fixture(autouse=True)
def _free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is there to be asked."""
    monkeypatch.setattr(sampler_module, "free_bytes", lambda usable_bytes: 1)


class FakeCapturer:
    """Does what CUDA graphs do: the work runs again on the inputs' memory, and all results share one memory."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0
        self.pool = torch.empty(1 << 16)

    def __call__(self, work: Callable[[], Tensor]) -> Replay:
        self.captured += 1
        work()

        def replay() -> Tensor:
            self.replayed += 1
            computed = work()
            return self.pool[: computed.numel()].view(computed.shape).copy_(computed)

        return replay


class Sampling:
    """A small model with prompts of different lengths."""

    def __init__(self, name: str, plan: SamplingPlan = PLAIN, lengths: Sequence[int] = (9,)) -> None:
        self.folder = ModelFolder(shallow_model(name))
        self.family, self.plan = family_of(self.folder), plan
        self.transformer = load_planned(self.family, self.folder, plan, CPU)
        draw = torch.Generator().manual_seed(0)
        controls = tuple(
            torch.randn(1, *self.family.latent_shape(self.folder, 128, 64), generator=draw)
            for _ in range(min(self.family.max_controls, 1))
        )
        negative = None if self.family.embedded_guidance else self.family.random_text(self.folder, 3, 9)
        positives = [self.family.random_text(self.folder, length, length) for length in lengths]
        self.prompts = [EncodedPrompt("a fox", positive, negative, controls, (64, 128)) for positive in positives]
        self.fake = FakeCapturer()

    def sampler(self, passes: PassPlan, seeds: tuple[int, ...] = (4,), capture: Capture | None = None) -> PromptSampler:
        return PromptSampler(
            self.family, self.folder, self.prompts, SamplerSettings(seeds, NUM_STEPS, 3.0),
            placement_of(self.plan, CPU), False, None, passes, lambda transformer: capture or self.fake,
        )  # fmt: skip

    def latents(self, passes: PassPlan, *options: Any) -> list[Tensor]:
        return [latents for _, _, latents in self.sampler(passes, *options).latents(self.transformer)]


@pytest.mark.parametrize(("name", "passes_per_step"), [("tiny-qwen-image", 2), ("tiny-flux", 1)])
def test_captured_passes_give_the_plain_latents_bit_for_bit(name: str, passes_per_step: int) -> None:
    sampling = Sampling(name)
    plain = sampling.latents(PLAIN_PASSES, (4, 5))
    assert sampling.fake.captured == 0
    captured = sampling.latents(CAPTURED, (4, 5))
    assert all(ours.equal(theirs) for ours, theirs in zip(captured, plain, strict=True))
    assert sampling.fake.captured == passes_per_step
    # Passes of two shapes alternate, so that one more of each is plain.
    plain_passes = PLAIN_CALLS if passes_per_step == 1 else 2 * PLAIN_CALLS + 1
    assert sampling.fake.replayed == passes_per_step * 2 * NUM_STEPS - plain_passes


@pytest.mark.parametrize("name", ["tiny-qwen-image", "tiny-qwen-image-edit"])
@pytest.mark.parametrize("rows", [0, NUM_STEPS + 1, 4])
def test_guidance_as_one_batch_gives_the_same_latents(name: str, rows: int) -> None:
    """With and without a modulation table, of which one is too small for all steps; padded to 64 tokens, captured."""
    (expected,) = Sampling(name).latents(PLAIN_PASSES)
    sampling = Sampling(name, replace(PLAIN, modulation_rows=rows))
    (found,) = sampling.latents(replace(CAPTURED, together=True))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (sampling.fake.captured, sampling.fake.replayed) == (1, NUM_STEPS - PLAIN_CALLS)


def test_prompts_of_similar_lengths_share_a_capture_where_guidance_is_one_batch() -> None:
    sampling = Sampling("tiny-qwen-image", lengths=(9, 12, 30))
    together, apart = (sampling.sampler(replace(CAPTURED, together=both)) for both in (True, False))
    assert apart.sizes_vary and not together.sizes_vary
    assert len(list(together.latents(sampling.transformer))) == 3 and sampling.fake.captured == 1


@pytest.mark.parametrize("passes", [CAPTURED, replace(CAPTURED, together=True)])
def test_rows_of_all_steps_are_made_once_for_all_pictures(passes: PassPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the time embedding depends on sigma alone."""
    begun: list[object] = []
    begin = ModulationTable._begin

    def noting(table: ModulationTable, place: int, purpose: object, embed: Callable[[], Tensor]) -> Filling:
        begun.append(purpose)
        return begin(table, place, purpose, embed)

    monkeypatch.setattr(ModulationTable, "_begin", noting)
    sampling = Sampling("tiny-qwen-image", replace(PLAIN, modulation_rows=NUM_STEPS + 1), (9, 70))
    assert len(sampling.latents(passes, (4, 5))) == 4 and len(begun) == 1


def test_no_pass_for_a_sample_asks_the_host_for_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """That would wait for the device."""
    sampling = Sampling("tiny-qwen-image", replace(PLAIN, modulation_rows=NUM_STEPS + 1))
    monkeypatch.setattr(Tensor, "cpu", lambda *_: pytest.fail("a pass waited"))
    assert len(sampling.latents(CAPTURED)) == 1


@pytest.mark.parametrize(("stay", "captured"), [(True, 1), (False, 3)])
def test_captures_make_room_for_decoding_where_they_must(stay: bool, captured: int) -> None:
    sampling = Sampling("tiny-flux")
    sampler = sampling.sampler(replace(CAPTURED, captures_stay=stay), (1, 2, 3))
    assert len(list(sampler.sample(sampling.transformer))) == 3
    assert sampling.fake.captured == captured and sampler._captured is None


def test_nothing_of_captures_stays_when_sampling_ends_early() -> None:
    sampling = Sampling("tiny-flux")
    sampler = sampling.sampler(CAPTURED, (1, 2))
    drawing = sampler.latents(sampling.transformer)
    next(drawing)
    captured = sampler._captured
    assert captured is not None and captured._captures
    drawing.close()  # type: ignore[attr-defined]
    assert sampler._captured is None and not captured._captures


def test_passes_that_cannot_be_captured_run_plainly(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(work: Callable[[], Tensor]) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing")

    sampling = Sampling("tiny-flux")
    with caplog.at_level(logging.WARNING):
        (found,) = sampling.latents(CAPTURED, (4,), refuse)
    (expected,) = sampling.latents(PLAIN_PASSES)
    assert found.equal(expected) and "operation not permitted" in caplog.text


def test_where_memory_is_short_the_picture_is_begun_anew_in_a_leaner_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is lost: noise depends on the seed alone."""
    sampling = Sampling("tiny-qwen-image")
    expected = sampling.latents(PLAIN_PASSES, (4, 5))
    predict, num_examples = sampler_module.predict_velocity, []

    def short(family: Any, transformer: Any, guidance: float, inputs: sampler_module.PassInputs) -> Tensor:
        num_examples.append(len(inputs.latents_BCHW))
        if len(inputs.latents_BCHW) == 2 and len(num_examples) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 54.00 MiB.\nmore")
        return predict(family, transformer, guidance, inputs)

    monkeypatch.setattr(sampler_module, "predict_velocity", short)
    sampler = sampling.sampler(replace(CAPTURED, together=True), (4, 5))
    with caplog.at_level(logging.WARNING):
        found = [latents for _, _, latents in sampler.latents(sampling.transformer)]
    assert all(ours.equal(theirs) for ours, theirs in zip(found, expected, strict=True))
    assert num_examples == [2] * 3 + [1] * 4 * NUM_STEPS
    assert caplog.text.count("samples lack memory (CUDA out of memory. Tried to allocate 54.00 MiB.)") == 2
    monkeypatch.setattr(sampler_module, "predict_velocity", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(torch.OutOfMemoryError):
        next(sampler.latents(sampling.transformer))


def test_samples_leave_the_rows_of_the_steps_where_captured_steps_read_them() -> None:
    """The memory of shown rows is part of a captured step, and so is its content."""
    sampling = Sampling("tiny-qwen-image", replace(PLAIN, modulation_rows=NUM_STEPS + 1))
    loaded: LoadedTransformer = sampling.transformer
    table = loaded.table
    assert table is not None
    sigmas = torch.tensor([0.9, 0.2])

    def of_steps() -> Tensor:
        return sampling.family.embed_time(loaded.module, sigmas, {})

    table.use("steps", of_steps)
    table.show([1, -1])
    shown = table._shown
    assert shown is not None
    before = shown.embeddings_RD.clone()
    sampling.latents(CAPTURED)
    assert table._shown is not shown and shown.embeddings_RD.equal(before)
    table.use("steps", of_steps)
    table.show([0, -1])
    assert table._shown is shown and not shown.embeddings_RD.equal(before)
    table.check()


def test_padding_is_no_obstacle_on_a_cpu_and_the_trial_itself_finds_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert padded_attention.padding_obstacle(CPU, 64) is None
    attempt = padded_attention._try_padding.__wrapped__
    assert attempt(CPU, 64, padded_attention.ON_CPU) is None
    monkeypatch.setattr(padded_attention, "attend_padded", lambda query, key, value, real, kernel: value)
    assert "wrong" in (attempt(CPU, 64, padded_attention.ON_CPU) or "")
