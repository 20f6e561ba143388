"""Where an example's encodings come from: the cache, or encoders that stay loaded and encode at each turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from pixtune.data.cache import CacheKey, FillReport
from pixtune.data.controls import ControlFraming
from pixtune.data.encode import Encoder, FramedPicture, TextItem
from pixtune.data.examples import Example
from pixtune.data.images import to_pixels
from pixtune.family import Conditioning, LatentDistribution


def target_picture(example: Example, variant: int) -> FramedPicture:
    """What the autoencoder gets of an example's target."""
    return FramedPicture(example.name, example.image_path, example.image_digest, example.framings[variant])


def control_pictures(example: Example, variant: int) -> tuple[FramedPicture, ...]:
    """What the autoencoder gets of an example's control pictures."""
    return tuple(
        FramedPicture(_control_name(path), path, digest, framing.latents)
        for path, digest, framing in _controls(example, variant)
    )


def text_item(text: str, example: Example, variant: int) -> TextItem:
    """A caption as the text encoder gets it for this example: beside the control pictures, if it sees them."""
    pictures = [
        FramedPicture(_control_name(path), path, digest, framing.vision)
        for path, digest, framing in _controls(example, variant)
        if framing.vision is not None
    ]
    return TextItem(text, tuple(pictures))


def _controls(example: Example, variant: int) -> Iterable[tuple[Path, str, ControlFraming]]:
    if not example.control_paths:
        return ()
    return zip(example.control_paths, example.control_digests, example.control_framings[variant], strict=True)


def _control_name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@dataclass
class Encodings:
    """Reads encodings by what they are of. Safe to use from several threads.

    What `fill` was told to leave out is encoded at each read: slower, and the same result within rounding.
    """

    encoder: Encoder
    _text_keys: dict[TextItem, CacheKey] = field(default_factory=dict)
    _latent_keys: dict[FramedPicture, CacheKey] = field(default_factory=dict)
    _encode_texts: Callable[[Sequence[TextItem]], list[Conditioning]] | None = None
    _encode_pictures: Callable[[Tensor], LatentDistribution] | None = None
    _turn: Lock = field(default_factory=Lock)

    def fill_texts(self, items: Sequence[TextItem]) -> FillReport:
        """Makes what the cache lacks of these."""
        keys = self.encoder.text_keys(items)
        self._text_keys |= zip(items, keys, strict=True)
        return self.encoder.fill_texts(items, keys)

    def fill_pictures(self, pictures: Sequence[FramedPicture]) -> FillReport:
        """Makes what the cache lacks of these."""
        keys = self.encoder.latent_keys(pictures)
        self._latent_keys |= zip(pictures, keys, strict=True)
        return self.encoder.fill_pictures(pictures, keys)

    def know(self, items: Sequence[TextItem], pictures: Sequence[FramedPicture]) -> None:
        """The same names without filling: for processes whose first one fills."""
        self._text_keys |= zip(items, self.encoder.text_keys(items), strict=True)
        self._latent_keys |= zip(pictures, self.encoder.latent_keys(pictures), strict=True)

    def keep_text_encoder(self) -> None:
        """Loads the text encoder for captions that are not in the cache."""
        self._encode_texts = self.encoder.open_text_encoder()

    def keep_autoencoder(self) -> None:
        """Loads the autoencoder for pictures that are not in the cache."""
        self._encode_pictures = self.encoder.open_autoencoder()

    def text(self, item: TextItem) -> Conditioning:
        """Features of a caption, on the CPU.

        Raises:
            DataError: it is encoded now, and a control picture beside it has changed or is gone.
        """
        if item in self._text_keys:
            return self.encoder.store.read(self._text_keys[item].digest)
        assert self._encode_texts is not None, f"{item.text!r} was neither filled nor is it to be encoded live"
        with self._turn:
            (row,) = self._encode_texts([item])
        return {name: tensor.cpu() for name, tensor in row.items()}

    def latents(self, picture: FramedPicture) -> LatentDistribution:
        """The latents' distribution with batch size 1, on the CPU.

        Raises:
            DataError: the picture is encoded now, and has changed or is gone.
        """
        if picture in self._latent_keys:
            entry = self.encoder.store.read(self._latent_keys[picture].digest)
            return LatentDistribution(entry["mean"], entry["std"])
        assert self._encode_pictures is not None, f"{picture.name} was neither filled nor is it to be encoded live"
        pixels_13HW = to_pixels(picture.read()).unsqueeze(0)
        with self._turn, torch.no_grad():
            latents = self._encode_pictures(pixels_13HW)
        return LatentDistribution(latents.mean_BCHW.cpu(), latents.std_BCHW.cpu())
