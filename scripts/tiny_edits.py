"""Builds what the small edit model learns from: pairs of drawings with an instruction, all encoded."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from emoji_pictures import Icon
from tiny_qwen_image import TEXT_FEATURES
from tiny_sets import encode_pictures, joined, pad_to_eight
from tiny_training import SILHOUETTES, TrainingSet, cumulative, weights_by_group
from torch import Tensor
from vary_pictures import made_up_words, vary

from pixtune.families import family_of
from pixtune.families.qwen_image_edit import NUM_TEMPLATE_TOKENS, EditReader
from pixtune.family import Placement
from pixtune.storage.model_folder import ModelFolder

NUM_VARIATIONS = 8
"""Times that each drawing is redrawn in made-up styles."""
SWAPS_A_PICTURE = 4
"""Other sets' drawings of the same thing that a drawing is to become, at most."""
EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "mirror it": lambda pixels: pixels.flip(-1),
    "turn it upside down": lambda pixels: pixels.flip(-2),
    "make it black and white": lambda pixels: pixels.float().mean(1, keepdim=True).expand(-1, 3, -1, -1).byte(),
    "make it red": lambda pixels: _tinted(pixels, (0.15, 1.0, 1.0)),
    "make it green": lambda pixels: _tinted(pixels, (1.0, 0.3, 1.0)),
    "make it blue": lambda pixels: _tinted(pixels, (1.0, 0.6, 0.1)),
    "change nothing": lambda pixels: pixels,
}
"""Edits of uint8 pictures by their instruction."""


def _tinted(pixels_B3HW: Tensor, ink: tuple[float, float, float]) -> Tensor:
    """Turns grey levels into ink of one colour, given as how much of red, green and blue it takes from white."""
    darkness = 1 - pixels_B3HW.float().mean(1, keepdim=True) / 255
    taken = torch.tensor(ink, device=pixels_B3HW.device).view(1, 3, 1, 1)
    return ((1 - (0.3 * (darkness > 0.03) + 0.7 * darkness) * taken) * 255).round().byte()


def edit_sets(folder: ModelFolder, icons: list[Icon], pixels: Tensor, batch_size: int) -> list[tuple[TrainingSet, int]]:
    """Builds the set of edits: to other sets' drawings of the same thing, to made-up styles, and simple ones.

    Most keep the lines of the drawing, so that a style which the model does not know is the same thing in other colours
    to it, and not any drawing of the kind.
    """
    family, device, count = family_of(folder), pixels.device, len(icons)
    chosen, words = random.Random(0), made_up_words(300, seed=1)
    by_name: dict[str, list[int]] = {}
    for row, icon in enumerate(icons):
        by_name.setdefault(icon.name, []).append(row)
    swaps, unknown_swaps = [], []
    for row, icon in enumerate(icons):
        others = [other for other in by_name[icon.name] if other != row]
        others = chosen.sample(others, min(SWAPS_A_PICTURE, len(others)))
        swaps += [(row, other, f"redraw in {icons[other].style}") for other in others]
        coloured = [other for other in others if icons[other].style not in SILHOUETTES]
        unknown_swaps += [(row, other, f"redraw in {chosen.choice(words)} style") for other in coloured[:2]]
    autoencoder = family.load_autoencoder(folder, Placement(device, torch.float32))
    encoded, made_up, unknown, edited = [encode_pictures(family, autoencoder, pixels)], [], [], []
    for seed in range(NUM_VARIATIONS):
        named, varied = vary(icons, pixels, seed, freedom=0.25)
        place = len(encoded) * count
        made_up += [(row, place + row, f"redraw in {icon.style}") for row, icon in enumerate(named)]
        unknown += [(row, place + row, f"redraw in {chosen.choice(words)} style") for row in range(count)]
        encoded.append(encode_pictures(family, autoencoder, varied))
    for place, (instruction, change) in enumerate(EDITS.items()):
        rows = torch.arange(place, count, len(EDITS), device=device)
        start = sum(len(part.mean_BCHW) for part in encoded)
        edited += [(row, start + place_in, instruction) for place_in, row in enumerate(rows.tolist())]
        encoded.append(encode_pictures(family, autoencoder, change(pixels[rows])))
    parts = (swaps, unknown_swaps, made_up, unknown, edited)
    table = [row for part in parts for row in part]
    weights = weights_by_group(icons, device)
    weights_of = [weights[[control for control, _, _ in part]] for part in parts]
    prompts = [(control, text) for control, _, text in table] + [(row, family.dropped_caption) for row in range(count)]
    data = TrainingSet(
        latents=joined(encoded),
        features=edit_features(folder, pixels, prompts),
        targets_N=torch.tensor([target for _, target, _ in table], device=device),
        texts_N=torch.arange(len(table), device=device),
        dropped_N=torch.tensor([len(table) + control for control, _, _ in table], device=device),
        controls_N=torch.tensor([control for control, _, _ in table], device=device),
        cumulative_shares_N=cumulative(*zip((0.2, 0.1, 0.2, 0.4, 0.1), weights_of, strict=True)),
        batch_size=batch_size,
    )
    return [(data, 1)]


@torch.no_grad()
def edit_features(folder: ModelFolder, pixels: Tensor, prompts: Sequence[tuple[int, str]]) -> dict[str, Tensor]:
    """Encodes (picture, instruction) pairs as `EditReader.encode` does, but prepares each picture once."""
    family, device = family_of(folder), pixels.device
    encoder = family.load_text_encoder(folder, Placement(device, torch.float32))
    (model,), (tokenizer,) = encoder.models, encoder.tokenizers
    reader = EditReader(numbered=False, vision_side=None)

    seen = torch.cat([patches_seen(tokenizer.image_processor, chunk) for chunk in pixels.split(512)])
    num_patches = seen.shape[1]
    side = round(num_patches**0.5)
    num_features = num_patches // tokenizer.image_processor.merge_size**2
    # Few instructions serve many pictures: each is tokenized once.
    texts = sorted({text for _, text in prompts})
    written = [reader.template.format(reader.user_part(text, num_pictures=1)) for text in texts]
    tokens = {name: t.to(device) for name, t in tokenizer.tokens(written, iter([num_features] * len(texts))).items()}
    place = {text: row for row, text in enumerate(texts)}
    places_N = torch.tensor([place[text] for _, text in prompts], device=device)
    pictures_N = torch.tensor([picture for picture, _ in prompts], device=device)
    num_tokens = tokens["input_ids"].shape[1]
    features = torch.zeros(
        len(prompts), num_tokens - NUM_TEMPLATE_TOKENS, TEXT_FEATURES, dtype=torch.bfloat16, device=device
    )
    grid = torch.tensor([[1, side, side]], device=device)
    get_positions: Any = model.get_rope_index
    positions, _ = get_positions(
        tokens["input_ids"],
        tokens["mm_token_type_ids"],
        image_grid_thw=grid.expand(len(texts), 3),
        attention_mask=tokens["attention_mask"],
    )
    for start in range(0, len(prompts), 512):
        chunk = slice(start, start + 512)
        inputs = {name: tensor[places_N[chunk]] for name, tensor in tokens.items()}
        inputs["pixel_values"] = seen[pictures_N[chunk]].flatten(0, 1)
        inputs["image_grid_thw"] = grid.expand(len(places_N[chunk]), 3)
        inputs["position_ids"] = positions[:, places_N[chunk]]
        features[chunk] = model(**inputs).last_hidden_state[:, NUM_TEMPLATE_TOKENS:].bfloat16()
    mask = tokens["attention_mask"].bool()[places_N, NUM_TEMPLATE_TOKENS:]
    return pad_to_eight({"prompt_embeds": features, "prompt_embeds_mask": mask})


def patches_seen(processor: Any, pixels_B3HW: Tensor) -> Tensor:
    """Makes the patches of square pictures that the text encoder sees, as its processor does, but on any device."""
    size, merge = processor.patch_size, processor.merge_size
    most = int(processor.size["longest_edge"] ** 0.5)  # of a side, in pixels
    cells = min(round(pixels_B3HW.shape[-1] / (size * merge)), most // (size * merge))
    resized = F.interpolate(pixels_B3HW.float(), (cells * size * merge,) * 2, mode="bicubic", antialias=True)
    mean, deviation = (
        torch.tensor(v, device=resized.device).view(3, 1, 1) for v in (processor.image_mean, processor.image_std)
    )
    normal = (resized.round().clamp(0, 255) / 255 - mean) / deviation
    films = normal[:, None].expand(-1, processor.temporal_patch_size, -1, -1, -1)
    parts = films.unflatten(4, (cells, merge, size)).unflatten(3, (cells, merge, size))
    return parts.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(1, 4)
