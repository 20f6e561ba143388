"""Steps are captured, compute the same and are launched at once, which only a GPU can show."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pixtune.data.batches import Batch
from pixtune.engine import activations
from pixtune.engine.activations import recompute_blocks
from pixtune.engine.apply import blocks_of
from pixtune.engine.capture import GraphCapturer, ReplayedPass
from pixtune.engine.load import Layout, load_transformer
from pixtune.engine.streaming import in_backward_pass, stream_blocks
from pixtune.families import family_of
from pixtune.family import Placement
from pixtune.storage.model_folder import ModelFolder
from pixtune.trained import adapters
from tests.unit.engine.tiny import ASSETS, MODELS, Numbers

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
RANK = 4


def losses_and_gradients(
    name: str, layout: Layout, recompute: str | None, capture: bool
) -> list[tuple[Tensor, Tensor]]:
    """Losses and gradients of ten steps, two sizes alternating, with another sigma at each."""
    folder = ModelFolder(ASSETS / name)
    family = family_of(folder)
    loaded = load_transformer(family, folder, Placement(DEVICE, torch.bfloat16), layout)
    transformer, table, stream = loaded.module, loaded.table, None
    if recompute == "and blocks streamed":
        stream = stream_blocks(blocks_of(transformer, family), DEVICE)
    adapters.attach_lora(transformer, family.lora_targets, RANK, RANK, 0, family.lora_presets)
    with torch.no_grad():
        for number, (path, weight) in enumerate(adapters.lora_weights(transformer).items()):
            if "lora_B" in path:
                weight.normal_(0, 0.05, generator=torch.Generator(DEVICE).manual_seed(number))
    if recompute:
        recompute_blocks(blocks_of(transformer, family), offload=recompute != "inputs kept")
    parameters = list(adapters.trainable_parameters(transformer).values())

    def compute(batch: Batch) -> Tensor:
        noisy_BCHW = torch.lerp(batch.latents_BCHW, batch.noise_BCHW, batch.sigma_B.view(-1, 1, 1, 1))
        velocity = family.predict_velocity(transformer, noisy_BCHW, batch.sigma_B, batch.conditioning)
        loss = (velocity - batch.noise_BCHW + batch.latents_BCHW).square().mean()
        loss.backward()
        return loss.detach()

    replayed = ReplayedPass(compute, parameters, GraphCapturer(stream) if capture else None, max_captures=2)
    found = []
    for step in range(10):
        size = (64, 128)[step % 2]
        _, height, width = family.latent_shape(folder, size, 64)
        generator = torch.Generator().manual_seed(step)
        latents, noise = torch.randn(2, 1, folder_channels(folder), height, width, generator=generator).to(DEVICE)
        sigma_B = torch.tensor([0.1 + 0.08 * step], device=DEVICE)
        text = family.stack_conditioning([family.random_text(folder, 7, step)])
        text = {key: tensor.to(DEVICE) for key, tensor in text.items()}
        if table is not None:
            features = {name: text[name] for name in family.time_features}
            table.use(step, partial(family.embed_time, transformer, sigma_B, features))
            table.show([0, -1])
        loss = replayed(Batch(latents, noise, sigma_B, text, (), ["picture"])).clone()
        gradients = [p.grad.flatten().clone() for p in parameters if p.grad is not None]
        found.append((loss, torch.cat(gradients)))
        replayed.zero_gradients()
    if capture:
        assert len(replayed._captures) == 2, "nothing was captured"
    return found


def folder_channels(folder: ModelFolder) -> int:
    return family_of(folder).latent_shape(folder, 64, 64)[0]


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("recompute", [None, "inputs kept", "inputs on the host", "and blocks streamed"])
@pytest.mark.parametrize("layout", [Layout(), Layout("fp8", modulation_rows=8), Layout("nf4", modulation_rows=8)])
@pytest.mark.parametrize("name", MODELS)
def test_a_replay_gives_the_loss_and_gradients_of_the_plain_pass(
    name: str, layout: Layout, recompute: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "MIN_OFFLOADED_BYTES", 0)
    plain = losses_and_gradients(name, layout, recompute, capture=False)
    for (loss, gradients), (again, gradients_again) in zip(
        plain, losses_and_gradients(name, layout, recompute, capture=True), strict=True
    ):
        torch.testing.assert_close(again, loss, rtol=0, atol=0)
        torch.testing.assert_close(gradients_again, gradients, rtol=0, atol=0)


def test_captured_steps_of_many_sizes_share_their_memory() -> None:
    weight = nn.Parameter(torch.randn(1024, 1024, device=DEVICE))

    def compute(values: Tensor) -> Tensor:
        hidden = values
        for _ in range(8):
            hidden = torch.tanh(hidden @ weight)
        loss = hidden.square().mean()
        loss.backward()
        return loss.detach()

    capture = GraphCapturer()
    weight.grad = torch.zeros_like(weight)
    torch.cuda.synchronize()
    reserved, replays, inputs = [], [], []
    for rows in (8192, 4096, 2048):
        inputs.append(torch.randn(rows, 1024, device=DEVICE))  # a capture reads them where they are
        compute(inputs[-1])
        replays.append(capture(partial(compute, inputs[-1])))
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[2] - reserved[0] < 64 * 2**20
    assert all(torch.isfinite(replay()) for replay in replays)


def test_captures_can_be_given_back_while_a_replay_runs() -> None:
    """As where the next micro-batch has another shape, which has no room beside the captures."""
    weight = nn.Parameter(torch.randn(4096, 4096, device=DEVICE) / 64)

    def compute(inputs: Numbers) -> Tensor:
        hidden = inputs.values
        for _ in range(100):
            hidden = torch.tanh(hidden @ weight)
        loss = hidden.square().mean()
        loss.backward()
        return loss.detach()

    replayed = ReplayedPass(compute, [weight], GraphCapturer())
    inputs = Numbers(torch.randn(16384, 4096, device=DEVICE))
    for _ in range(4):
        plain = replayed(inputs).clone()
        replayed.zero_gradients()
    assert replayed.history.made == 1
    torch.cuda.synchronize()
    expected = weight.grad
    for _ in range(3):
        replayed(inputs)  # takes about a second
        replayed.release()
        torch.cuda.synchronize()
        assert expected is not None and expected.isfinite().all()
        replayed.zero_gradients()
        again = replayed(inputs).clone()
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_a_capture_that_breaks_off_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The capture fails in the middle of a backward pass, with copies of weights and of blocks' inputs under way."""
    monkeypatch.setattr(activations, "MIN_OFFLOADED_BYTES", 0)
    torch.manual_seed(0)
    # First in its block: a recomputation ends with the last tensor that it has to save.
    blocks = [nn.Sequential(BreaksOff(), nn.Linear(1024, 1024)).to(DEVICE).requires_grad_(False) for _ in range(8)]
    stream = stream_blocks(blocks, DEVICE)
    recompute_blocks(blocks, offload=True)
    gain = nn.Parameter(torch.ones((), device=DEVICE))

    def compute(values: Tensor) -> Tensor:
        hidden = values * gain
        for block in blocks:
            hidden = block(hidden)
        loss = hidden.square().mean()
        loss.backward()
        return loss.detach()

    values = torch.randn(4096, 1024, device=DEVICE)
    expected = compute(values)
    replayed: ReplayedPass[Numbers] = ReplayedPass(lambda inputs: compute(inputs.values), [gain], GraphCapturer(stream))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    BreaksOff.is_due = True
    losses = [replayed(Numbers(values)) for _ in range(4)]
    BreaksOff.is_due = False
    assert replayed._capture is None, "the capture succeeded"
    assert all(loss.equal(expected) for loss in losses)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2 * 2**20


class BreaksOff(nn.Module):
    """Passes its input on; where a capture is under way, not in a backward pass's fourth block."""

    is_due = False
    calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        if BreaksOff.is_due and in_backward_pass() and torch.cuda.is_current_stream_capturing():
            BreaksOff.calls += 1
            if BreaksOff.calls == 4:
                raise torch.OutOfMemoryError("no room")
        return inputs * 1
