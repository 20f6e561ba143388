"""Qwen-Image's autoencoder without the empty frames before a picture, beside diffusers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from pixtune.data.buckets import Framing
from pixtune.data.cache import Ledger, MemoryStore
from pixtune.data.encode import Encoder, FramedPicture
from pixtune.families import family_of
from pixtune.families.qwen_frames import skip_empty_frames
from pixtune.family import Placement
from pixtune.plan.encoders import PLAINLY
from pixtune.storage.model_folder import open_model_folder
from tests.runs import ROOT, TINY_MODEL

CPU = Placement(torch.device("cpu"), torch.float32)


def autoencoder(**changes: Any) -> Any:
    """One of diffusers, with random weights and all kinds of layers that the real one has."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    small = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
    model: Any = AutoencoderKLQwenImage(**{**small, **changes})
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    stock, ours = autoencoder(), autoencoder()
    skip_empty_frames(ours)
    return stock, ours


@pytest.mark.parametrize("shape", [(1, 3, 1, 64, 64), (2, 3, 1, 40, 88)])
def test_pictures_are_encoded_and_decoded_as_by_diffusers(pair: tuple[Any, Any], shape: tuple[int, ...]) -> None:
    stock, ours = pair
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    before, after = (model.encode(pixels).latent_dist.parameters for model in (stock, ours))
    assert before.std() > 0.01
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    before, after = (model.decode(before[:, :4]).sample for model in (stock, ours))
    assert before.std() > 0.01
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_it_takes_less_than_half_the_work(pair: tuple[Any, Any]) -> None:
    work = []
    for model in pair:
        with FlopCounterMode(display=False) as counter:
            model.decode(model.encode(torch.zeros(1, 3, 1, 64, 64)).latent_dist.mean)
        work.append(counter.get_total_flops())
    assert work[1] < 0.5 * work[0]


def test_videos_are_what_they_were(pair: tuple[Any, Any]) -> None:
    """Their later frames see those before them: frames alone would be others."""
    stock, ours = pair
    video = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(2))
    before, after = (model.encode(video).latent_dist.mean for model in (stock, ours))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    before, after = (model.decode(before).sample for model in (stock, ours))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "form"), [("tiny-qwen-image", "frames alone"), ("tiny-flux", None)])
def test_what_a_cpu_encodes_has_keys_of_its_own(model: str, form: str | None) -> None:
    """And a GPU, where the autoencoder computes as diffusers' does, those that it had."""
    folder = open_model_folder(str(ROOT / "assets" / model))
    picture = FramedPicture("a", Path("a.png"), "0" * 64, Framing(64, 64, 1.0, (0, 0, 64, 64), 0.0))
    keys = []
    for device in ("cpu", "cuda"):
        placement = Placement(torch.device(device), torch.float32)
        encoder = Encoder(
            family_of(folder), folder, placement, PLAINLY, None, MemoryStore(), Ledger(None), Console(), memo_dir=None
        )
        (key,) = encoder.latent_keys([picture])
        keys.append(key)
    on_cpu, on_gpu = keys
    assert on_cpu.all_parts == {**on_gpu.all_parts, **({"form": form} if form else {})}
    assert set(on_gpu.all_parts) == {"kind", "autoencoder", "format", "picture", "size", "crop", "code"}
    assert (on_cpu.digest == on_gpu.digest) == (form is None), "entries are not mixed"
    assert on_cpu.content == on_gpu.content == on_gpu.digest, "a run has the same data on both"


def test_a_run_on_a_cpu_uses_it_and_one_on_a_gpu_does_not() -> None:
    folder = open_model_folder(str(TINY_MODEL))
    family = family_of(folder)
    model: Any = family.load_autoencoder(folder, CPU)
    wrapped = "forward" in vars(model.encoder.conv_in)
    assert wrapped and family.encoding_form(torch.device("cpu")) and not family.encoding_form(torch.device("cuda"))
    elsewhere: Any = family.load_autoencoder(folder, Placement(torch.device("meta"), torch.float32))
    assert "forward" not in vars(elsewhere.encoder.conv_in)
