"""Passes pictures through an autoencoder in overlapping tiles, where the whole picture would not fit.

The result differs slightly from that of the whole picture: layers that see all of it (attention, group norms) see a
tile. All tiles have one size, unlike in diffusers' own tiling, whose last row and column are the remainder: down to
strips that are too narrow to show their surroundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pixtune.family import LatentDistribution, ModelFamily
from pixtune.storage.model_folder import ModelFolder

OVERLAP_SHARE = 0.25
"""Share of a tile's side that overlaps its neighbour, at least."""
Span = tuple[int, int]


def encode_images(
    family: ModelFamily, folder: ModelFolder, autoencoder: nn.Module, pixels_B3HW: Tensor, tile_pixels: int | None
) -> LatentDistribution:
    """Encodes pictures by `ModelFamily.encode_images`.

    Args:
        tile_pixels: side of the tiles; None: the picture is encoded whole.
    """
    if tile_pixels is None:
        return family.encode_images(autoencoder, pixels_B3HW)

    def encode(tile_B3HW: Tensor) -> Sequence[Tensor]:
        latents = family.encode_images(autoencoder, tile_B3HW)
        return latents.mean_BCHW, latents.std_BCHW

    return LatentDistribution(*in_tiles(encode, pixels_B3HW, tile_pixels, family.pixel_multiple(folder)))


def decode_latents(
    family: ModelFamily, folder: ModelFolder, autoencoder: nn.Module, latents_BCHW: Tensor, tile_pixels: int | None
) -> Tensor:
    """Decodes latents by `ModelFamily.decode_latents`.

    Args:
        tile_pixels: side of the tiles; None: the picture is decoded whole.
    """
    if tile_pixels is None:
        return family.decode_latents(autoencoder, latents_BCHW)
    _, tile_latents, _ = family.latent_shape(folder, tile_pixels, tile_pixels)
    (pixels_B3HW,) = in_tiles(lambda tile: (family.decode_latents(autoencoder, tile),), latents_BCHW, tile_latents, 1)
    return pixels_B3HW


def in_tiles(work: Callable[[Tensor], Sequence[Tensor]], source_BCHW: Tensor, tile: int, multiple: int) -> list[Tensor]:
    """Runs `work` on a picture tile by tile, and blends the results where tiles overlap.

    Args:
        work: returns tensors whose height and width are those of its argument times one factor.
        tile: side of a tile, in the source's units; tiles begin at multiples of `multiple`.
    """
    sums: list[Tensor] = []
    weight_sum_HW = source_BCHW.new_empty(0)
    height, width = source_BCHW.shape[-2:]
    for top, bottom, left, right in tiles(height, width, tile, multiple):
        parts = work(source_BCHW[..., top:bottom, left:right])
        part_height, part_width = parts[0].shape[-2:]
        if not sums:
            size = height * part_height // (bottom - top), width * part_width // (right - left)
            sums = [part.new_zeros(*part.shape[:-2], *size) for part in parts]
            weight_sum_HW = parts[0].new_zeros(size)
        y, x = top * part_height // (bottom - top), left * part_width // (right - left)
        weight_HW = torch.outer(ramp(part_height), ramp(part_width)).to(parts[0])
        weight_sum_HW[y : y + part_height, x : x + part_width] += weight_HW
        for total, part in zip(sums, parts, strict=True):
            total[..., y : y + part_height, x : x + part_width] += part * weight_HW
    return [total / weight_sum_HW for total in sums]


def tiles(height: int, width: int, tile: int, multiple: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields top, bottom, left and right of each tile."""
    for top, bottom in spans(height, tile, multiple):
        for left, right in spans(width, tile, multiple):
            yield top, bottom, left, right


def spans(length: int, tile: int, multiple: int) -> list[Span]:
    """Cuts a side into evenly overlapping pieces of one size; into one piece if it is no longer than a tile."""
    if length <= tile:
        return [(0, length)]
    overlap = round(tile * OVERLAP_SHARE)
    count = math.ceil((length - overlap) / (tile - overlap))
    starts = [number * (length - tile) // (count - 1) // multiple * multiple for number in range(count)]
    return [(start, start + tile) for start in starts]


def ramp(length: int) -> Tensor:
    """Returns the weight of each place of a tile, highest in its middle; fp32 of shape (length,)."""
    place = torch.arange(length) + 0.5
    return torch.minimum(place, length - place)
