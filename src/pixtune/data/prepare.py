"""From a folder of pictures to what the loop reads: samples, held-out pictures, encoded prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console

from pixtune import draws
from pixtune.config.schema import TrainConfig
from pixtune.data.batches import SampleReader
from pixtune.data.buckets import Framing
from pixtune.data.cache import CacheKey, DiskStore, Ledger, MemoryStore, Store, file_digest, missing_keys
from pixtune.data.encode import Encoder, FramedPicture, hash_text
from pixtune.data.samples import Sample, check_folder, read_samples, split_held_out
from pixtune.families.base import Conditioning, LatentDistribution, ModelFamily, Placement
from pixtune.sample import EncodedPrompts
from pixtune.validation import HeldOutPicture
from pixtune.weights import ModelFolder

CACHE_FOLDER = ".pixtune_cache"
RANDOM_TEXT_TOKENS = 256
"""Length of the stand-in captions of a run with random weights."""


@dataclass(frozen=True)
class PreparedData:
    """A data set that no longer needs its encoders."""

    reader: SampleReader
    buckets: list[list[tuple[int, int]]]
    """Size in pixels of each training sample's variants."""
    held_out: list[HeldOutPicture]
    prompts: EncodedPrompts
    most_image_tokens: int
    most_text_tokens: int
    fingerprint: str
    """A hash over everything that decides what is trained on."""


def prepare_data(
    config: TrainConfig, family: ModelFamily, folder: ModelFolder, accelerator: Accelerator
) -> PreparedData:
    """Reads the data set, encodes what the cache lacks, and says what it did.

    The first process encodes while others wait; with the cache in memory each process encodes for itself.

    Raises:
        DataError: pictures or captions that cannot be used, all at once.
    """
    multiple, data = family.pixel_multiple(folder), config.data_config
    samples = read_samples(data, data.img_dir, multiple, data.random_ratio)
    training, held_out = split_held_out(samples, config.validation.held_out, config.seed)
    if config.validation.held_out_dir is not None:
        held_out = read_samples(data, config.validation.held_out_dir, multiple, random_ratio=False)
    if config.random_weights:
        return _random_data(config, family, folder, training)

    encoder = _build_encoder(config, family, folder, accelerator)
    texts = _needed_texts(config, family, [*training, *held_out])
    pictures = _needed_pictures(training, held_out)
    text_keys, latent_keys = encoder.text_keys(texts), encoder.latent_keys(pictures)
    if accelerator.is_main_process or not config.save_cache_on_disk:
        if missing_keys(encoder.store, latent_keys):
            for checked in filter(None, (data.img_dir, config.validation.held_out_dir)):
                for warning in check_folder(data, checked, multiple):
                    encoder.console.print(f"note: {warning}", markup=False, highlight=False, soft_wrap=True)
        encoder.console.print(f"captions: {encoder.fill_texts(texts, text_keys)}")
        encoder.console.print(f"pictures: {encoder.fill_pictures(pictures, latent_keys)}")
    accelerator.wait_for_everyone()
    cached = Cached(
        encoder.store,
        dict(zip(texts, text_keys, strict=True)),
        {(p.path, p.framing): key for p, key in zip(pictures, latent_keys, strict=True)},
    )
    return _gather(config, family, folder, cached, training, held_out)


@dataclass(frozen=True)
class Cached:
    """Finds entries by caption, and by picture file and framing."""

    store: Store
    text_keys: dict[str, CacheKey]
    latent_keys: dict[tuple[Path, Framing], CacheKey]

    def text(self, text: str) -> Conditioning:
        return self.store.read(self.text_keys[text].digest)

    def latents(self, sample: Sample, variant: int = 0) -> LatentDistribution:
        entry = self.store.read(self.latent_keys[sample.image_path, sample.framings[variant]].digest)
        return LatentDistribution(entry["mean"], entry["std"])


def _build_encoder(config: TrainConfig, family: ModelFamily, folder: ModelFolder, accelerator: Accelerator) -> Encoder:
    cache_dir = config.data_config.cache_dir or config.data_config.img_dir / CACHE_FOLDER
    on_disk = config.save_cache_on_disk
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    return Encoder(
        family=family,
        folder=folder,
        placement=Placement(accelerator.device, dtype),
        batch_size=config.encode_batch_size,
        store=DiskStore(cache_dir / "entries") if on_disk else MemoryStore(),
        ledger=Ledger(cache_dir / "ledger.json" if on_disk else None),
        console=Console(quiet=not accelerator.is_main_process),
        memo_dir=cache_dir / "weights" if on_disk else None,
    )


def _needed_texts(config: TrainConfig, family: ModelFamily, samples: Sequence[Sample]) -> list[str]:
    texts = [sample.caption for sample in samples] + list(config.samples.prompts)
    if config.data_config.caption_dropout_rate or config.samples.prompts:
        texts.append(family.dropped_caption)
    return list(dict.fromkeys(texts))


def _needed_pictures(training: Sequence[Sample], held_out: Sequence[Sample]) -> list[FramedPicture]:
    wanted = [(s, framing) for s in training for framing in s.framings] + [(s, s.framings[0]) for s in held_out]
    digests = {sample.image_path: file_digest(sample.image_path) for sample, _ in wanted}
    pictures = [FramedPicture(s.name, s.image_path, digests[s.image_path], framing) for s, framing in wanted]
    return list(dict.fromkeys(pictures))


def _gather(
    config: TrainConfig,
    family: ModelFamily,
    folder: ModelFolder,
    cached: Cached,
    training: Sequence[Sample],
    held_out: Sequence[Sample],
) -> PreparedData:
    settings = config.samples
    negative = cached.text(family.dropped_caption) if settings.prompts and settings.guidance_scale > 1 else None
    reader = SampleReader(
        read_latents=lambda sample, variant: cached.latents(training[sample], variant),
        read_text=lambda sample: cached.text(family.dropped_caption if sample is None else training[sample].caption),
        stack=family.stack_conditioning,
        time_shift=lambda height, width: family.time_shift(folder, family.num_image_tokens(height, width)),
        names=[sample.name for sample in training],
    )
    keys = [cached.text_keys[s.caption].digest for s in training]
    keys += [cached.latent_keys[s.image_path, framing].digest for s in training for framing in s.framings]
    return PreparedData(
        reader=reader,
        buckets=[[framing.size for framing in sample.framings] for sample in training],
        held_out=[
            HeldOutPicture(sample.name, cached.latents(sample).mean_BCHW, cached.text(sample.caption))
            for sample in held_out
        ],
        prompts=EncodedPrompts(settings.prompts, tuple(cached.text(prompt) for prompt in settings.prompts), negative),
        most_image_tokens=_most_image_tokens(family, folder, training),
        most_text_tokens=max(_num_tokens(cached.text(sample.caption)) for sample in training),
        fingerprint=hash_text("\n".join(keys)),
    )


def _most_image_tokens(family: ModelFamily, folder: ModelFolder, samples: Sequence[Sample]) -> int:
    sizes = {framing.size for sample in samples for framing in sample.framings}
    return max(family.num_image_tokens(*family.latent_shape(folder, *size)[1:]) for size in sizes)


def _num_tokens(row: Conditioning) -> int:
    """The longest of a row's sequences."""
    return max(len(tensor) for tensor in row.values())


def _random_data(
    config: TrainConfig, family: ModelFamily, folder: ModelFolder, training: Sequence[Sample]
) -> PreparedData:
    """Random latents and text features of the right shapes: speed and memory are real, pictures are not."""

    def read_latents(sample: int, variant: int) -> LatentDistribution:
        shape = (1, *family.latent_shape(folder, *training[sample].framings[variant].size))
        mean_BCHW = draws.normal(shape, config.seed, "random weights", sample)
        return LatentDistribution(mean_BCHW, torch.zeros(shape))

    def read_text(sample: int | None) -> Conditioning:
        return family.random_text(folder, RANDOM_TEXT_TOKENS, -1 if sample is None else sample)

    reader = SampleReader(
        read_latents=read_latents,
        read_text=read_text,
        stack=family.stack_conditioning,
        time_shift=lambda height, width: family.time_shift(folder, family.num_image_tokens(height, width)),
        names=[sample.name for sample in training],
    )
    return PreparedData(
        reader=reader,
        buckets=[[framing.size for framing in sample.framings] for sample in training],
        held_out=[],
        prompts=EncodedPrompts((), (), None),
        most_image_tokens=_most_image_tokens(family, folder, training),
        most_text_tokens=RANDOM_TEXT_TOKENS,
        fingerprint="random",
    )
