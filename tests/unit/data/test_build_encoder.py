"""Which encoder a run gets on which machine, and which encodings of another one it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pixtune.config import load_config
from pixtune.config.schema import TrainConfig
from pixtune.data import build_encoder as module
from pixtune.data.buckets import Framing
from pixtune.data.build_encoder import build_encoder, prefer_more_exact
from pixtune.data.cache import CacheKey, Entry
from pixtune.data.encode import Encoder, FramedPicture, TextItem
from pixtune.data.encodings import Encodings
from pixtune.engine.tiling import encode_images
from pixtune.families import family_of
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import GIB
from pixtune.plan.encoders import ON_CPU, PLAINLY, EncoderPlan
from pixtune.storage.files import file_digest
from pixtune.storage.model_folder import open_model_folder
from tests.runs import DEMO_TRAIN, ROOT, TINY_MODEL, overrides

TEXTS = [TextItem("a fox"), TextItem("an owl")]
CPU: Any = SimpleNamespace(is_main_process=True, device=torch.device("cpu"))
GPU: Any = SimpleNamespace(is_main_process=True, device=torch.device("cuda"))
PICTURE = FramedPicture("a.png", Path("a.png"), "0" * 64, Framing(64, 64, 1.0, (0.0, 0.0, 64.0, 64.0), 0.0))
FOUR_BITS = EncoderPlan("nf4", 256)


def config_of(tmp_path: Path, **changes: object) -> TrainConfig:
    return load_config(None, overrides(tmp_path / "out", tmp_path / "cache", **changes))


def encoder_of(config: TrainConfig, accelerator: Any = CPU, plan: EncoderPlan | None = None) -> Encoder:
    folder = open_model_folder(str(TINY_MODEL))
    return build_encoder(config, family_of(folder), folder, accelerator, TEXTS, [], plan)


def features(encoder: Encoder) -> list[Entry]:
    keys = encoder.text_keys(TEXTS)
    encoder.fill_texts(TEXTS, keys)
    return [encoder.store.read(key.digest) for key in keys]


def digests(keys: Sequence[CacheKey]) -> list[str]:
    return [key.digest for key in keys]


def test_on_a_cpu_everything_is_as_it_is_loaded(tmp_path: Path) -> None:
    assert encoder_of(config_of(tmp_path)).plan == PLAINLY


def test_a_gpus_memory_decides_and_the_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_facts", lambda device, fraction: facts_as("RTX 4090"))
    assert encoder_of(config_of(tmp_path), GPU).plan.text_format is None
    assert encoder_of(config_of(tmp_path, gpu_memory_limit_gib=1.7), GPU).plan.text_format is None
    least = encoder_of(config_of(tmp_path, gpu_memory_limit_gib=1.5), GPU).plan
    assert least.text_format == ON_CPU and "slow" in least.reasons[0]


def test_a_run_that_goes_on_encodes_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_facts", lambda device, fraction: replace(facts_as("4090"), free_bytes=80 * GIB))
    assert encoder_of(config_of(tmp_path), GPU, FOUR_BITS).plan == FOUR_BITS


def test_formats_and_tiles_have_keys_of_their_own_and_places_have_not(tmp_path: Path) -> None:
    plain = encoder_of(config_of(tmp_path))

    def texts(text_format: str | None) -> tuple[str, ...]:
        return tuple(digests(replace(plain, plan=replace(FOUR_BITS, text_format=text_format)).text_keys(TEXTS)))

    assert texts(None) == texts(ON_CPU) == tuple(digests(plain.text_keys(TEXTS)))
    assert len({texts(None), texts("int8"), texts("nf4")}) == 3


@pytest.mark.parametrize("text_format", ["int8", "nf4", ON_CPU])
def test_each_format_is_encoded_and_read_again(tmp_path: Path, text_format: str) -> None:
    config = config_of(tmp_path)
    exact = features(encoder_of(config))
    ours = features(encoder_of(config, plan=replace(FOUR_BITS, text_format=text_format)))
    for mine, theirs in zip(ours, exact, strict=True):
        a, b = mine["prompt_embeds"], theirs["prompt_embeds"]
        assert torch.nn.functional.cosine_similarity(a, b, dim=-1).min() > 0.99
        assert torch.equal(a, b) == (text_format == ON_CPU)


def entries_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("model", ["tiny-qwen-image", "tiny-flux"])
def test_in_bf16_an_entry_depends_on_nothing_that_is_encoded_beside_it(tmp_path: Path, model: str) -> None:
    """A cache that a killed run left unfinished is finished to the bytes of one that was filled at once."""
    captions = ["a fox", "an owl at night, with a caption of more words than the other ones have", "a bear in the snow"]
    texts = [TextItem(caption) for caption in captions]
    sources = sorted(DEMO_TRAIN.glob("*.png"))[:3]
    pictures = [replace(PICTURE, name=path.name, path=path, digest=file_digest(path)) for path in sources]

    def filled(name: str, *parts: slice) -> Encodings:
        config = config_of(
            tmp_path, pretrained_model_name_or_path=ROOT / "assets" / model, mixed_precision="bf16",
            data_config__cache_dir=tmp_path / name,
        )  # fmt: skip
        folder = open_model_folder(config.pretrained_model_name_or_path)
        for part in parts:
            encodings = Encodings(build_encoder(config, family_of(folder), folder, CPU, texts, pictures))
            encodings.fill_texts(texts[part])
            encodings.fill_pictures(pictures[part])
        return encodings

    filled("at once", slice(None))
    finished = filled("finished later", slice(1, 2), slice(0, 2), slice(None))
    at_once = entries_of(tmp_path / "at once")
    assert len(at_once) == 6 and entries_of(tmp_path / "finished later") == at_once
    in_loop = Encodings(finished.encoder)
    in_loop.keep_text_encoder()
    in_loop.keep_autoencoder()
    for item, framed in zip(texts, pictures, strict=True):
        stored, made = finished.text(item), in_loop.text(item)
        assert stored.keys() == made.keys() and all(torch.equal(stored[name], made[name]) for name in made)
        assert torch.equal(finished.latents(framed).mean_BCHW, in_loop.latents(framed).mean_BCHW)
        assert torch.equal(finished.latents(framed).std_BCHW, in_loop.latents(framed).std_BCHW)


@pytest.mark.parametrize("tile_pixels", [None, 32])
def test_pictures_are_encoded_in_the_planned_tiles(tmp_path: Path, tile_pixels: int | None) -> None:
    encoder = encoder_of(config_of(tmp_path), plan=replace(FOUR_BITS, tile_pixels=tile_pixels))
    family, folder, placement = encoder.family, encoder.folder, encoder.placement
    autoencoder = family.load_autoencoder(folder, placement)
    pixels_13HW = torch.linspace(-1, 1, 3 * 64 * 96).view(1, 3, 64, 96)
    expected = encode_images(family, folder, autoencoder, pixels_13HW, tile_pixels).mean_BCHW
    latents = encoder.open_autoencoder()(pixels_13HW).mean_BCHW
    assert torch.equal(latents, expected)
    whole = family.encode_images(autoencoder, pixels_13HW).mean_BCHW
    assert torch.equal(latents, whole) == (tile_pixels is None)
    keys = [replace(encoder, plan=PLAINLY).latent_keys([PICTURE]), encoder.latent_keys([PICTURE])]
    assert (digests(keys[0]) == digests(keys[1])) == (tile_pixels is None)


def test_what_a_larger_gpu_encoded_is_used(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    small = encoder_of(config, plan=FOUR_BITS)
    assert prefer_more_exact(small, TEXTS, [], config).plan.text_format == "nf4", "nothing is there yet"
    features(encoder_of(config))
    better = prefer_more_exact(small, TEXTS, [], config)
    assert better.plan.text_format == ON_CPU and digests(better.text_keys(TEXTS)) != digests(small.text_keys(TEXTS))
    in_loop = config.model_copy(update={"precompute_text_embeddings": False})
    assert prefer_more_exact(small, TEXTS, [], in_loop).plan.text_format == "nf4", "training captions are not there"
    more = [*TEXTS, TextItem("a bear")]
    assert prefer_more_exact(small, more, [], config).plan.text_format == "nf4", "not all are there"
