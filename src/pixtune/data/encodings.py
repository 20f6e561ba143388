"""Encodings of examples: from the cache, or from encoders that stay loaded and encode at each turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from pixtune.data.cache import CacheKey, Digests, Keys
from pixtune.data.controls import ControlFraming
from pixtune.data.encode import Encoder, FramedPicture, TextItem
from pixtune.data.example_table import Example
from pixtune.data.filling import FillReport, Lacking, look_for
from pixtune.data.images import to_pixels
from pixtune.errors import DataError
from pixtune.family import Conditioning, LatentDistribution


def target_picture(example: Example, variant: int) -> FramedPicture:
    """Frames an example's target for the autoencoder."""
    return FramedPicture(example.name, example.image_path, example.image_digest, example.framings[variant])


def control_pictures(example: Example, variant: int) -> tuple[FramedPicture, ...]:
    """Frames an example's control pictures for the autoencoder."""
    return tuple(
        FramedPicture(_control_name(path), path, digest, framing.latents)
        for path, digest, framing in _controls(example, variant)
    )


def text_item(text: str, example: Example, variant: int) -> TextItem:
    """Builds the text encoder's input of a caption of this example: with the control pictures, if it sees them."""
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
    """Reader of encodings, by the captions and pictures that they are of. Several threads may use it.

    Those that were not filled beforehand are encoded at each read: slower, with the same result.
    """

    encoder: Encoder
    _texts: Digests = field(default_factory=Digests)
    """Digests of the captions that are in the cache, or are to be filled into it."""
    _pictures: Digests = field(default_factory=Digests)
    _encode_text: Callable[[TextItem], Conditioning] | None = None
    _encode_picture: Callable[[Tensor], LatentDistribution] | None = None
    _lock: Lock = field(default_factory=Lock)

    @cached_property
    def _text_key(self) -> Callable[[TextItem], CacheKey]:
        return self.encoder.text_key_builder()

    @cached_property
    def _latent_key(self) -> Callable[[FramedPicture], CacheKey]:
        return self.encoder.latent_key_builder()

    def know(self, items: Sequence[TextItem], pictures: Sequence[FramedPicture]) -> tuple[Lacking, Lacking]:
        """Takes captions and pictures as those that are to be in the cache, and returns what it lacks of both."""
        return self._know_texts(items), self._know_pictures(pictures)

    def know_only(self, items: Sequence[TextItem], pictures: Sequence[FramedPicture]) -> tuple[Lacking, Lacking]:
        """Forgets what it knew, and takes these as `know` does: those before them are no longer read."""
        texts, latents = Digests(), Digests()
        lacking = (
            look_for(self.encoder.store, Keys(items, self._text_key), self.encoder.crew, texts),
            look_for(self.encoder.store, Keys(pictures, self._latent_key), self.encoder.crew, latents),
        )
        self._texts, self._pictures = texts, latents  # at once: threads may be reading
        return lacking

    def digests(self, items: Sequence[TextItem], pictures: Sequence[FramedPicture]) -> set[str]:
        """Returns the digests of the entries of captions and pictures."""
        keys = (*Keys(items, self._text_key), *Keys(pictures, self._latent_key))
        return {key.digest for key in keys}

    def _know_texts(self, items: Sequence[TextItem]) -> Lacking:
        return look_for(self.encoder.store, Keys(items, self._text_key), self.encoder.crew, self._texts)

    def _know_pictures(self, pictures: Sequence[FramedPicture]) -> Lacking:
        return look_for(self.encoder.store, Keys(pictures, self._latent_key), self.encoder.crew, self._pictures)

    def fill_texts(self, items: Sequence[TextItem], lacking: Lacking | None = None) -> FillReport:
        """Encodes the captions that the cache lacks.

        Args:
            lacking: what `know` returned for them; None: they are looked for.
        """
        lacking = self._know_texts(items) if lacking is None else lacking
        return self.encoder.fill_texts(items, Keys(items, self._text_key), lacking)

    def fill_pictures(self, pictures: Sequence[FramedPicture], lacking: Lacking | None = None) -> FillReport:
        """Encodes the pictures that the cache lacks; `lacking` is as for `fill_texts`."""
        lacking = self._know_pictures(pictures) if lacking is None else lacking
        return self.encoder.fill_pictures(pictures, Keys(pictures, self._latent_key), lacking)

    def keep_text_encoder(self) -> None:
        """Loads the text encoder for captions that are not in the cache."""
        self._encode_text = self.encoder.open_text_encoder()

    def keep_autoencoder(self) -> None:
        """Loads the autoencoder for pictures that are not in the cache."""
        self._encode_picture = self.encoder.open_autoencoder()

    def text(self, item: TextItem) -> Conditioning:
        """Reads or encodes a caption's features, on the CPU.

        Raises:
            DataError: its entry cannot be used any more; or it is encoded now, and a control picture beside it has
                changed or is gone.
        """
        if (key := self._text_key(item)).digest in self._texts:
            entry = self.encoder.store.read(key.digest)
            _check_form(key, {2} <= {tensor.ndim for tensor in entry.values()} <= {1, 2})
            return entry
        assert self._encode_text is not None, f"{item.text!r} is neither in the cache nor to be encoded in the loop"
        with self._lock:
            row = self._encode_text(item)
        return {name: tensor.cpu() for name, tensor in row.items()}

    def count_text_tokens(self, item: TextItem) -> int:
        """Returns the length of a caption's longest sequence of features; a single vector counts as no sequence.

        Raises:
            DataError: as `text`.
        """
        if (key := self._text_key(item)).digest in self._texts:
            shapes = list(self.encoder.store.read_shapes(key.digest).values())
            _check_form(key, any(len(shape) == 2 for shape in shapes))
        else:
            shapes = [tensor.shape for tensor in self.text(item).values()]
        return max(shape[0] for shape in shapes if len(shape) > 1)

    def latents(self, picture: FramedPicture) -> LatentDistribution:
        """Reads or encodes a picture's distribution of latents, with batch size 1, on the CPU.

        Raises:
            DataError: its entry cannot be used any more; or it is encoded now, and has changed or is gone.
        """
        if (key := self._latent_key(picture)).digest in self._pictures:
            entry = self.encoder.store.read(key.digest)
            shapes = {tuple(tensor.shape) for tensor in entry.values()}
            _check_form(key, entry.keys() == {"mean", "std"} and len(shapes) == 1 and len(next(iter(shapes))) == 4)
            return LatentDistribution(entry["mean"], entry["std"])
        assert self._encode_picture is not None, f"{picture.name} is neither in the cache nor to be encoded in the loop"
        pixels_13HW = to_pixels(picture.read()).unsqueeze(0)
        with self._lock, torch.no_grad():
            latents = self._encode_picture(pixels_13HW)
        return LatentDistribution(latents.mean_BCHW.cpu(), latents.std_BCHW.cpu())


def _check_form(key: CacheKey, is_right: bool) -> None:
    """Checks an entry whose checksum is right: whoever writes to a cache can make that so.

    Raises:
        DataError: it is not what encoders make.
    """
    if not is_right:
        raise DataError(
            "an encoding in the cache cannot be used",
            [f"The entry {key.digest} of {key.item} holds other tensors than encoders make. Delete the cache."],
        )
