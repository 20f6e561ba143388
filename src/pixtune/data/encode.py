"""Fills the cache: text encoder in, captions encoded, out; autoencoder in, pictures encoded, out.

An encoder is loaded only if something is missing. What is missing is decided by content alone: see `cache.py`.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console

from pixtune.data.buckets import Framing
from pixtune.data.cache import CacheKey, Entry, FillReport, Ledger, Store, fill
from pixtune.data.images import crop_resize, open_rgb, to_pixels
from pixtune.families.base import ModelFamily, Placement
from pixtune.progress import track
from pixtune.weights import ModelFolder

DECODE_THREADS = 4


@dataclass(frozen=True)
class FramedPicture:
    """A picture file and the part of it to encode."""

    name: str
    path: Path
    digest: str
    """SHA-256 of the file."""
    framing: Framing


@dataclass(frozen=True)
class Encoder:
    """What encodes, and where its results go."""

    family: ModelFamily
    folder: ModelFolder
    placement: Placement
    batch_size: int
    store: Store
    ledger: Ledger
    console: Console
    memo_dir: Path | None
    """Where digests of large weight files are remembered."""

    def text_keys(self, texts: Sequence[str]) -> list[CacheKey]:
        """Everything that decides a caption's features."""
        shared = {
            "kind": "text",
            "text encoder": self.folder.fingerprint("text_encoder", self.memo_dir),
            "tokenizer": self.folder.fingerprint("tokenizer", self.memo_dir),
            "prompt template": hash_text(self.family.prompt_template),
            "format": str(self.placement.dtype),
        }
        return [CacheKey(f"caption {shorten(text)}", {**shared, "caption": hash_text(text)}) for text in texts]

    def latent_keys(self, pictures: Sequence[FramedPicture]) -> list[CacheKey]:
        """Everything that decides a picture's latents."""
        shared = {
            "kind": "latents",
            "autoencoder": self.folder.fingerprint("vae", self.memo_dir),
            "format": str(self.placement.dtype),
        }
        return [
            CacheKey(
                f"{picture.name} at {picture.framing.width}x{picture.framing.height}",
                {
                    **shared,
                    "picture": picture.digest,
                    "size": f"{picture.framing.width}x{picture.framing.height}",
                    "crop": repr(picture.framing.crop_box),
                },
            )
            for picture in pictures
        ]

    def fill_texts(self, texts: Sequence[str], keys: Sequence[CacheKey]) -> FillReport:
        """Encodes the captions that the cache lacks."""
        text_of = {key.digest: text for key, text in zip(keys, texts, strict=True)}

        def encode(missing: Sequence[CacheKey]) -> Iterator[tuple[CacheKey, Entry]]:
            encoder = self.family.load_text_encoder(self.folder, self.placement)
            ordered = sorted(missing, key=lambda key: len(text_of[key.digest]))  # like lengths together: less padding
            chunks = _chunks(ordered, self.batch_size)
            for chunk in track(chunks, "captions", len(chunks), self.console):
                rows = self.family.encode_text(encoder, [text_of[key.digest] for key in chunk])
                yield from zip(chunk, rows, strict=True)
            del encoder
            _free_device(self.placement.device)

        return fill(self.store, self.ledger, keys, encode)

    def fill_pictures(self, pictures: Sequence[FramedPicture], keys: Sequence[CacheKey]) -> FillReport:
        """Encodes the pictures that the cache lacks; they were checked before (`samples.check_folder`)."""
        picture_of = {key.digest: picture for key, picture in zip(keys, pictures, strict=True)}

        def encode(missing: Sequence[CacheKey]) -> Iterator[tuple[CacheKey, Entry]]:
            autoencoder = self.family.load_autoencoder(self.folder, self.placement)

            def size(key: CacheKey) -> tuple[int, int]:
                return picture_of[key.digest].framing.size

            def load(chunk: Sequence[CacheKey]) -> torch.Tensor:
                wanted = [picture_of[key.digest] for key in chunk]
                return torch.stack([to_pixels(crop_resize(open_rgb(p.path), p.framing)) for p in wanted])

            chunks = [
                chunk
                for _, same_size in groupby(sorted(missing, key=size), key=size)
                for chunk in _chunks(list(same_size), self.batch_size)
            ]
            with ThreadPoolExecutor(DECODE_THREADS) as pool:
                decoded = track(pool.map(load, chunks), "pictures", len(chunks), self.console)
                for chunk, pixels_B3HW in zip(chunks, decoded, strict=True):
                    latents = self.family.encode_images(autoencoder, pixels_B3HW.to(self.placement.device))
                    for row, key in enumerate(chunk):
                        yield key, {"mean": latents.mean_BCHW[row : row + 1], "std": latents.std_BCHW[row : row + 1]}
            del autoencoder
            _free_device(self.placement.device)

        return fill(self.store, self.ledger, keys, encode)


def hash_text(text: str) -> str:
    """SHA-256 of a text, as hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def shorten(text: str) -> str:
    """A caption as a message shows it; long ones stay distinct."""
    return repr(text) if len(text) < 80 else f"{text[:60]!r}... ({hash_text(text)[:8]})"


def _chunks(items: Sequence[CacheKey], size: int) -> list[Sequence[CacheKey]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _free_device(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
