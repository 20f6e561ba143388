"""Fills the cache: loads the text encoder, encodes captions and drops it, then the same with autoencoder and pictures.

An encoder is loaded only if an entry is missing, and content alone decides that: see `cache.py`. Captions and pictures
are encoded one by one. In a batch, rounding depends on its size and padding, so an entry would depend on what else was
missing: a cache filled in one go, or after a kill, or in the loop would differ in the last bits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from pixtune.data.ahead import made_ahead
from pixtune.data.buckets import Framing
from pixtune.data.cache import CacheKey, Entry, Keys, Ledger, Store
from pixtune.data.caption_tokens import Lengths, count_new, cut_captions
from pixtune.data.filling import FillReport, Lacking, Work, fill
from pixtune.data.images import crop_resize, decoded, to_pixels, while_unchanged
from pixtune.engine.tiling import encode_images
from pixtune.engine.weight_only import quantize_encoder
from pixtune.errors import WeightsError
from pixtune.family import Conditioning, LatentDistribution, ModelFamily, Placement, Prompt, PromptOutline, TextEncoder
from pixtune.hardware.meminfo import read_host_memory
from pixtune.launch.crew import ALONE, Crew, Share
from pixtune.plan.encoders import ON_CPU, EncoderPlan
from pixtune.progress import announced, say
from pixtune.storage.files import text_digest
from pixtune.storage.model_folder import ModelFolder

if TYPE_CHECKING:
    from PIL.Image import Image

DECODE_THREADS = 4
"""Number of threads that decode picture files while the autoencoder works."""
Loaded = TypeVar("Loaded")


@dataclass(frozen=True, slots=True)
class FramedPicture:
    """A picture file and the part of it to encode."""

    name: str
    path: Path
    digest: str
    """SHA-256 of the file, as hex."""
    framing: Framing

    @property
    def parts(self) -> dict[str, str]:
        """Parts of a cache key that decide the pixels."""
        size = f"{self.framing.width}x{self.framing.height}"
        flip = {"flip": "left to right"} if self.framing.flipped else {}
        return {"picture": self.digest, "size": size, "crop": repr(self.framing.crop_box), **flip}

    def read(self) -> Image:
        """Reads the framed part as an upright RGB picture at its size.

        Raises:
            DataError: the file cannot be read, or is not the one that `digest` was taken of.
        """
        with while_unchanged(self.path, self.digest), decoded(self.path) as picture:
            return crop_resize(picture.image, self.framing)


@dataclass(frozen=True, slots=True)
class TextItem:
    """A caption with the control pictures that the text encoder sees beside it."""

    text: str
    pictures: tuple[FramedPicture, ...] = ()

    def prompt(self) -> Prompt:
        """Reads the pictures, and returns all that the text encoder gets."""
        return Prompt(self.text, tuple(picture.read() for picture in self.pictures))

    def outline(self) -> PromptOutline:
        """Returns the text with the pictures' sizes, without reading them."""
        return PromptOutline(self.text, tuple(picture.framing.size for picture in self.pictures))


@dataclass(frozen=True)
class Encoder:
    """A family's encoders as a run uses them, with the places that their results go to."""

    family: ModelFamily
    folder: ModelFolder
    placement: Placement
    plan: EncoderPlan
    max_text_tokens: int | None
    store: Store
    ledger: Ledger
    console: Console
    memo_dir: Path | None
    """Folder for the digests of large weight files; None: they are not remembered."""
    counts_file: Path | None = None
    """File for captions' numbers of tokens; None: they are not remembered. See `caption_tokens`."""
    stays: bool = False
    """Whether a loaded encoder stays on the device until the run ends, instead of making room."""
    crew: Crew = ALONE
    """Processes that share the places, and divide the encoding."""
    names_weights: bool = True
    """Whether keys name the weights by their content. Entries that do not outlive the process are spared the hashing of
    gigabytes."""
    _loaded: dict[str, Any] = field(default_factory=dict, compare=False)

    def text_keys(self, items: Sequence[TextItem]) -> Keys:
        """Returns the keys of captions: everything that decides their features."""
        return Keys(items, self.text_key_builder())

    def text_key_builder(self) -> Callable[[TextItem], CacheKey]:
        """Returns the function from a caption to its key. The encoders' files are recognized once, here."""
        shared = {
            "kind": "text",
            **{part: self._fingerprint(part) for part in self.family.text_components},
            "prompt template": text_digest(self.family.prompt_template),
            "most tokens": str(self.max_text_tokens),
            "format": self._format("weights", self.plan.weights_format),
        }
        return lambda item: CacheKey(
            " beside ".join([f"caption {shorten(item.text)}", *(picture.name for picture in item.pictures)]),
            {
                **shared,
                "caption": text_digest(item.text),
                **{f"control {n + 1}": repr(picture.parts) for n, picture in enumerate(item.pictures)},
            },
        )

    def cut_captions(self, named: Sequence[tuple[str, TextItem]]) -> list[str]:
        """Names the captions that the text encoders cut, in sentences. Loads tokenizers at most."""
        items = list(dict.fromkeys(item for _, item in named))
        digest_of = {item: key.digest for item, key in zip(items, self.text_keys(items), strict=True)}

        def count(prompts: Sequence[PromptOutline]) -> list[Lengths]:
            return self.family.text_lengths(self.folder, prompts, self.max_text_tokens)

        lengths_of = count_new({digest_of[item]: item.outline() for item in items}, count, self.counts_file)
        return cut_captions([(name, lengths_of[digest_of[item]]) for name, item in named])

    def latent_keys(self, pictures: Sequence[FramedPicture]) -> Keys:
        """Returns the keys of pictures: everything that decides their latents."""
        return Keys(pictures, self.latent_key_builder())

    def latent_key_builder(self) -> Callable[[FramedPicture], CacheKey]:
        """Returns the function from a picture to its key, as `text_key_builder`."""
        shared = {
            "kind": "latents",
            "autoencoder": self._fingerprint("vae"),
            "format": self._format("tiles", self.plan.tile_pixels),
        }
        form = self.family.encoding_form(self.placement.device)
        return lambda picture: CacheKey(
            f"{picture.name} at {picture.framing.width}x{picture.framing.height}", {**shared, **picture.parts}, form
        )

    def _format(self, what: str, value: object) -> str:
        """Returns the number format, with the part of the plan that changes results."""
        return str(self.placement.dtype) if value is None else f"{self.placement.dtype}, {what} {value}"

    def _fingerprint(self, component: str) -> str:
        return self.folder.fingerprint(component, self.memo_dir) if self.names_weights else component

    def fill_texts(
        self, items: Sequence[TextItem], keys: Sequence[CacheKey], lacking: Lacking | None = None
    ) -> FillReport:
        """Encodes the captions that the cache lacks, each in one process of the crew.

        Args:
            lacking: keys without an entry, where they are known; None: they are looked for.
        """

        def encode(missing: Sequence[CacheKey], share: Share) -> Iterator[tuple[CacheKey, Entry]]:
            item_of = _of_missing(missing, keys, items)
            # The longest first: what comes last decides how long the others wait.
            ordered = sorted(missing, key=lambda key: -len(item_of[key.digest].text))
            taken = share.take(ordered) if self._may_encode_texts() else iter(())
            for first in islice(taken, 1):  # nothing is loaded where others have taken all
                encode_one = self.open_text_encoder()
                for key in chain([first], taken):
                    yield key, self._numbers(key, encode_one(item_of[key.digest]), self.family.text_components[0])
                del encode_one
                self._make_room()

        return fill(self.store, self.ledger, keys, encode, self._work("encoding captions"), lacking)

    def _may_encode_texts(self) -> bool:
        """Returns whether this process may hold a text encoder beside those of other processes on its machine.

        One that computes on the CPU has all its cores. One that is quantized is in host memory first, unquantized.
        """
        if self.crew.local_rank == 0 or self.plan.text_format is None:
            return True
        if self.plan.text_format == ON_CPU:
            return False
        num_weights = sum(self.folder.count_parameters(part) or 0 for part in self.family.text_components)
        num_bytes = num_weights * self.placement.dtype.itemsize
        return (self.crew.local_rank + 1) * num_bytes <= read_host_memory().available_bytes

    def _work(self, what: str) -> Work:
        return Work(what, self.crew, self.console)

    def _numbers(self, key: CacheKey, entry: Mapping[str, Tensor], part: str) -> Entry:
        """Returns an entry whose values are numbers.

        Raises:
            WeightsError: some are none; names the part of the model that made it.
        """
        if not all(bool(tensor.isfinite().all()) for tensor in entry.values()):
            raise WeightsError(
                f"{self.folder.part(part)} makes values that are no numbers (NaN or infinity) of {key.item}. Its "
                "weights are damaged, or overflow in this number format: fetch the model again, or set "
                "mixed_precision: 'no'."
            )
        return dict(entry)

    def open_text_encoder(self) -> Callable[[TextItem], Conditioning]:
        """Loads the text encoder. Unless it `stays`, it leaves the device when the returned function is dropped."""
        encoder = self._load("text encoder", self._load_text_encoder)

        def encode(item: TextItem) -> Conditioning:
            (features,) = self.family.encode_text(encoder, [item.prompt()], self.max_text_tokens)
            return features

        return encode

    def fill_pictures(
        self, pictures: Sequence[FramedPicture], keys: Sequence[CacheKey], lacking: Lacking | None = None
    ) -> FillReport:
        """Encodes the pictures that the cache lacks, each in one process of the crew.

        `examples.check_folder` has checked them before.

        Args:
            lacking: as for `fill_texts`.
        """

        def encode(missing: Sequence[CacheKey], share: Share) -> Iterator[tuple[CacheKey, Entry]]:
            picture_of = _of_missing(missing, keys, pictures)

            def load(key: CacheKey) -> Tensor:
                return to_pixels(picture_of[key.digest].read()).unsqueeze(0)

            # Pictures of one size come together: a GPU's kernels and memory are chosen by size. Large ones come first:
            # what comes last decides how long other processes wait.
            ordered = sorted(missing, key=lambda key: picture_of[key.digest].framing.size, reverse=True)
            taken = share.take(ordered)
            for first in islice(taken, 1):  # nothing is loaded where others have taken all
                encode_one = self.open_autoencoder()
                ahead = share.ahead(2 * DECODE_THREADS)
                for key, pixels_13HW in made_ahead(load, chain([first], taken), ahead, DECODE_THREADS):
                    latents = encode_one(pixels_13HW)
                    yield key, self._numbers(key, {"mean": latents.mean_BCHW, "std": latents.std_BCHW}, "vae")
                del encode_one
                self._make_room()

        return fill(self.store, self.ledger, keys, encode, self._work("encoding pictures"), lacking)

    def open_autoencoder(self) -> Callable[[Tensor], LatentDistribution]:
        """Loads the autoencoder. Unless it `stays`, it leaves the device when the returned function is dropped."""
        autoencoder = self._load("autoencoder", lambda: self.family.load_autoencoder(self.folder, self.placement))
        return lambda pixels_13HW: encode_images(
            self.family, self.folder, autoencoder, pixels_13HW.to(self.placement.device), self.plan.tile_pixels
        )

    def _load_text_encoder(self) -> TextEncoder:
        text_format, device = self.plan.text_format, self.placement.device
        if text_format is None:
            return self.family.load_text_encoder(self.folder, self.placement)
        encoder = self.family.load_text_encoder(self.folder, Placement(torch.device("cpu"), self.placement.dtype))
        if text_format != ON_CPU:
            for model in encoder.models:
                quantize_encoder(model, text_format, device)
        return encoder

    def _load(self, part: str, load: Callable[[], Loaded]) -> Loaded:
        if part in self._loaded:
            return self._loaded[part]
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # what is loaded is announced here
        with announced(f"loading the {part}", partial(say, self.console)):
            loaded = load()
        if self.stays:
            self._loaded[part] = loaded
        return loaded

    def _make_room(self) -> None:
        gc.collect()
        if self.placement.device.type == "cuda":
            torch.cuda.empty_cache()


def _of_missing(missing: Iterable[CacheKey], keys: Iterable[CacheKey], items: Iterable[Loaded]) -> dict[str, Loaded]:
    """Returns the items whose entries are missing, by their digests."""
    digests = {key.digest for key in missing}
    return {key.digest: item for key, item in zip(keys, items, strict=True) if key.digest in digests}


def shorten(text: str) -> str:
    """Shortens a caption for a message; long ones stay distinct."""
    return repr(text) if len(text) < 80 else f"{text[:60]!r}... ({text_digest(text)[:8]})"
