"""Tiles cover a picture, are blended without seams, and give nearly what the whole gives."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from pixtune.engine.tiling import OVERLAP_SHARE, decode_latents, encode_images, in_tiles, spans
from pixtune.families import family_of
from pixtune.family import Placement
from pixtune.sampler import PromptSampler, SamplerSettings, to_image
from pixtune.storage.model_folder import open_model_folder
from tests.runs import ROOT

PLACEMENT = Placement(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("length", "tile", "multiple"), [(512, 256, 16), (272, 256, 16), (1920, 768, 16), (100, 7, 1)])
def test_tiles_are_of_one_size_and_share_a_quarter_with_their_neighbours(length: int, tile: int, multiple: int) -> None:
    found = spans(length, tile, multiple)
    assert found[0][0] == 0 and found[-1][1] == length
    assert all(end - start == tile and start % multiple == 0 for start, end in found)
    shared = [end - start for (_, end), (start, _) in pairwise(found)]
    assert min(shared) >= round(tile * OVERLAP_SHARE) - multiple


def test_a_side_no_longer_than_a_tile_is_one_tile() -> None:
    assert spans(256, 256, 16) == [(0, 256)] and spans(64, 256, 16) == [(0, 64)]


@pytest.mark.parametrize(("height", "width"), [(96, 160), (64, 200), (48, 48)])
def test_work_that_sees_no_neighbours_is_done_exactly(height: int, width: int) -> None:
    """Smaller by 8, as encoding is, and larger by 4."""
    torch.manual_seed(0)
    source = torch.randn(2, 3, height, width)

    def work(tile: torch.Tensor) -> list[torch.Tensor]:
        return [nn.functional.avg_pool2d(tile, 8), tile.repeat_interleave(4, -1).repeat_interleave(4, -2)[:, :1]]

    shrink, grow = (lambda tile: work(tile)[:1]), (lambda tile: work(tile)[1:])
    for part, whole in ((shrink, work(source)[0]), (grow, work(source)[1])):
        torch.testing.assert_close(in_tiles(part, source, 64, 8)[0], whole)


@pytest.mark.parametrize(
    ("name", "latent_error", "decoded_db"), [("tiny-qwen-image", 0.01, 50), ("tiny-flux", 0.02, 42)]
)
def test_tiles_of_a_real_autoencoder_are_near_the_whole(name: str, latent_error: float, decoded_db: float) -> None:
    """Errors as measured: 0.5% and 56 dB (norms by pixel), 1.3% and 47 dB (norms by group).

    Three tiles a side give the same: 512 pixels 0.6% and 54 dB, 1.1% and 45 dB.
    """
    folder = open_model_folder(str(ROOT / "assets" / name))
    family = family_of(folder)
    autoencoder = family.load_autoencoder(folder, PLACEMENT)
    torch.manual_seed(0)
    pixels = torch.tanh(nn.functional.interpolate(torch.randn(1, 3, 48, 48), size=(384, 384), mode="bicubic"))
    whole = encode_images(family, folder, autoencoder, pixels, None)
    tiled = encode_images(family, folder, autoencoder, pixels, 256)
    assert 0 < (tiled.mean_BCHW - whole.mean_BCHW).norm() / whole.mean_BCHW.norm() < latent_error
    assert tiled.std_BCHW.shape == whole.std_BCHW.shape and (tiled.std_BCHW > 0).all()
    drawn = decode_latents(family, folder, autoencoder, whole.mean_BCHW, None)
    in_parts = decode_latents(family, folder, autoencoder, whole.mean_BCHW, 256)
    assert 0 < (in_parts - drawn).square().mean() < 4 * 10 ** (-decoded_db / 10)


def test_a_sampler_decodes_in_tiles() -> None:
    folder = open_model_folder(str(ROOT / "assets" / "tiny-flux"))
    family = family_of(folder)
    autoencoder = family.load_autoencoder(folder, PLACEMENT)
    torch.manual_seed(0)
    latents_BCHW = torch.randn(1, *family.latent_shape(folder, 192, 192))
    whole, in_parts = (decode_latents(family, folder, autoencoder, latents_BCHW, tile) for tile in (None, 128))
    sampler = PromptSampler(
        family, folder, [], SamplerSettings((0,), 1, 1.0), PLACEMENT, keep_autoencoder=True, tile_pixels=128
    )
    assert sampler.decode(latents_BCHW).tobytes() == to_image(in_parts[0]).tobytes() != to_image(whole[0]).tobytes()
