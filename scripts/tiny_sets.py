"""Builds what the small models that draw learn from: drawings, variations of them and captions, all encoded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from zlib import crc32

import torch
import torch.nn.functional as F
from emoji_pictures import Icon, render_all
from tiny_training import TrainingSet, weights_by_group
from torch import Tensor, nn
from vary_pictures import made_up_words, vary

from pixtune.families import family_of
from pixtune.family import LatentDistribution, ModelFamily, Placement, Prompt
from pixtune.storage.model_folder import ModelFolder

NUM_VARIATIONS = 18
"""Times that each drawing is redrawn: a third in its own style, bent alone; two thirds in made-up styles."""
NUM_UNKNOWN_STYLES = 1000
UNKNOWN_STYLES_A_NAME = 12
MAX_CAPTION_TOKENS = 24
"""Longest caption that Qwen's small model is trained on; few are longer."""
FLUX_TEXT_TOKENS = 24
"""Tokens of a caption in most steps; hardly a caption here is longer. The pipelines' 512, of which most are padding
that FLUX attends to, get every sixth step, a smaller one."""


def load_pixels(icons: Sequence[Icon], size: int, device: torch.device) -> Tensor:
    """Renders all pictures as uint8, shape (N, 3, H, W), on the device."""
    return torch.from_numpy(render_all(icons, size)).permute(0, 3, 1, 2).contiguous().to(device)


def encode_pictures(family: ModelFamily, autoencoder: nn.Module, pixels: Tensor) -> LatentDistribution:
    """Encodes pictures given as uint8, shape (N, 3, H, W); on a GPU in bf16."""
    with torch.autocast("cuda", torch.bfloat16, enabled=pixels.is_cuda):
        parts = [family.encode_images(autoencoder, chunk.float() / 127.5 - 1) for chunk in pixels.split(64)]
    return joined(parts)


def joined(parts: Sequence[LatentDistribution]) -> LatentDistribution:
    """Joins the latents of several pictures, or lots of them, in their order."""
    return LatentDistribution(torch.cat([p.mean_BCHW for p in parts]), torch.cat([p.std_BCHW for p in parts]))


def caption_features(
    family: ModelFamily, folder: ModelFolder, captions: Sequence[str], device: torch.device, cut: int | None = None
) -> dict[str, Tensor]:
    """Encodes all captions, padded to one length; with a mask where a family pads with nothing.

    Args:
        cut: tokens of FLUX's captions; None: as many as the stock pipeline's.
    """
    encoder = family.load_text_encoder(folder, Placement(device, torch.float32))
    rows = []
    for start in range(0, len(captions), 512):
        rows += family.encode_text(encoder, [Prompt(text) for text in captions[start : start + 512]], cut)
    return pad_to_eight(family.stack_conditioning(rows))


def pad_to_eight(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pads features to a multiple of eight tokens, at which attention with a mask is fastest."""
    if "prompt_embeds_mask" not in features:
        return features
    spare = -features["prompt_embeds"].shape[1] % 8
    return {
        "prompt_embeds": F.pad(features["prompt_embeds"], (0, 0, 0, spare)),
        "prompt_embeds_mask": F.pad(features["prompt_embeds_mask"], (0, spare)),
    }


class Captions:
    """Collects (picture, caption) rows in parts, each with its share of the draws."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str]] = []
        self.parts: list[tuple[float, Tensor]] = []

    def add(self, share: float, first_picture: int, captions: Sequence[str], weights: Tensor) -> None:
        """Adds a caption for each picture from the given one on."""
        self.rows += [(first_picture + place, caption) for place, caption in enumerate(captions)]
        self.parts.append((share, weights))


def text_to_image_sets(
    folder: ModelFolder, icons: list[Icon], pixels: Tensor, batch_size: int
) -> list[tuple[TrainingSet, int]]:
    """Builds the set of drawings and variations of them by `vary_pictures`, with their captions.

    Captions name the real or made-up style, or, so that a style which the model does not know is no style in
    particular to it, a word that says nothing, or none. FLUX, which attends to padding, gets them at two lengths.
    """
    family, real, count = family_of(folder), weights_by_group(icons, pixels.device), len(icons)
    words, chosen = made_up_words(NUM_UNKNOWN_STYLES, seed=1), random.Random(0)

    def unknown() -> list[str]:
        """Ends each name with one of a few words that say nothing."""
        first = [crc32(icon.name.encode()) for icon in icons]
        places = [(place + chosen.randrange(UNKNOWN_STYLES_A_NAME)) % len(words) for place in first]
        return [f"{icon.name}, {words[place]} style" for icon, place in zip(icons, places, strict=True)]

    autoencoder = family.load_autoencoder(folder, Placement(pixels.device, torch.float32))
    captions, encoded = [icon.caption for icon in icons], [encode_pictures(family, autoencoder, pixels)]
    table = Captions()
    table.add(0.22, 0, captions, real)
    table.add(0.04, 0, unknown(), real)
    table.add(0.04, 0, [icon.name for icon in icons], real)
    kinds = NUM_VARIATIONS // 3
    for seed in range(NUM_VARIATIONS):
        place = (1 + seed) * count
        kind = seed % 3
        named, varied = vary(icons, pixels, seed, freedom=(0.5, 0.4, 1.0)[kind], made_up=kind > 0)
        table.add((0.25, 0.22, 0.04)[kind] / kinds, place, [icon.caption for icon in named], real)
        if kind != 1:
            table.add((0.07, 0.0, 0.12)[kind] / kinds, place, unknown(), real)
        encoded.append(encode_pictures(family, autoencoder, varied))
    latents = joined(encoded)
    if not family.embedded_guidance:
        return [(with_captions(family, folder, table, latents, batch_size), 1)]
    short = with_captions(family, folder, table, latents, batch_size, FLUX_TEXT_TOKENS)
    return [(short, 5), (with_captions(family, folder, table, latents, batch_size // 4, every=16), 1)]


def with_captions(
    family: ModelFamily,
    folder: ModelFolder,
    table: Captions,
    latents: LatentDistribution,
    batch_size: int,
    cut: int | None = None,
    every: int = 1,
) -> TrainingSet:
    """Builds a training set of each nth row of a table; `cut` as in `caption_features`."""
    device = latents.mean_BCHW.device
    rows = table.rows[::every]
    captions = list(dict.fromkeys(caption for _, caption in rows))
    places = {caption: place for place, caption in enumerate(captions)}
    texts_N = torch.tensor([places[caption] for _, caption in rows], device=device)
    features = caption_features(family, folder, [*captions, family.dropped_caption], device, cut)
    weights = torch.cat([share * weights / weights.sum() for share, weights in table.parts])[::every]
    if "prompt_embeds_mask" in features:
        fits = features["prompt_embeds_mask"].sum(1)[: len(captions)] <= MAX_CAPTION_TOKENS
        weights = weights * fits[texts_N]
        features = {name: tensor[:, :MAX_CAPTION_TOKENS].contiguous() for name, tensor in features.items()}
        print(f"{float(fits.float().mean()):.1%} of the captions are short enough", flush=True)
    return TrainingSet(
        latents=latents,
        features=features,
        targets_N=torch.tensor([picture for picture, _ in rows], device=device),
        texts_N=texts_N,
        dropped_N=torch.full_like(texts_N, len(captions)),
        controls_N=None,
        cumulative_shares_N=torch.cumsum(weights.double() / weights.double().sum(), 0).float(),
        batch_size=batch_size,
    )
