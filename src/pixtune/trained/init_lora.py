"""Starts the LoRA of a new run from a LoRA file, at the run's own layers, ranks and scales.

Where rank and scale are the file's, every bit is. A larger rank keeps the file's numbers: the further rows of the down
stay as they were drawn, and the further columns of the up are zero, so nothing is added yet. A smaller rank takes the
largest singular values of what the file adds to a layer's weight, the best approximation there is (Eckart and Young
1936). Another scale is divided out of the up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pixtune.config.schema import TrainConfig
from pixtune.errors import ConfigError
from pixtune.family import ModelFamily, Shapes
from pixtune.trained.adapters import ADAPTER_NAME
from pixtune.trained.fused_layers import LowRank
from pixtune.trained.low_rank import norm_of, svd_of_sum
from pixtune.trained.saved_lora import SavedLora, read_lora_of_key
from pixtune.trained.targets import resolve_targets

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

KEY = "init_lora"


@dataclass(frozen=True)
class Fitted:
    """A LoRA of one layer at a wanted rank and scale."""

    lora: LowRank
    size: float
    """Frobenius norm of what the layer's weight got by the file."""
    lost: float
    """Norm of what the wanted rank has no room for."""


def fitting_init_lora(config: TrainConfig, family: ModelFamily, shapes: Shapes) -> SavedLora | None:
    """Reads the LoRA that a new run starts from, and checks by headers alone that it can; None where there is none.

    Args:
        shapes: shapes of the transformer's tensors.

    Raises:
        WeightsError: it cannot be read as a LoRA of the family, or is for another model; names the key.
        ConfigError: it has layers that are not trained; names some, and targets that have them.
    """
    lora = init_lora_of(config, family)
    if lora is None:
        return None
    lora.refuse_other_model(shapes)
    linears = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    trained = _matched(linears, config.lora_targets or family.lora_targets, family)
    if beyond := sorted(set(lora.modules) - trained):
        wide = [name for name in family.lora_presets if set(lora.modules) <= _matched(linears, [name], family)]
        targets = wide[0] if wide else ", ".join(_endings(lora.modules))
        raise ConfigError(
            f"{KEY}: {lora.path} has {len(beyond)} layers that this run does not train, such as {beyond[0]}; what they "
            "do would be lost",
            [f"Train them too: lora_targets='[{targets}]'. Layers that the file has not start from zero."],
        )
    return lora


def init_lora_of(config: TrainConfig, family: ModelFamily) -> SavedLora | None:
    """Returns the LoRA that a new run starts from; None where the config names none. No number of it is read yet.

    Raises:
        WeightsError: it cannot be read as a LoRA of the family; names the key.
    """
    return None if config.init_lora is None else read_lora_of_key(KEY, config.init_lora, family)


def _matched(linears: Sequence[str], targets: Sequence[str], family: ModelFamily) -> set[str]:
    endings = resolve_targets(linears, targets, family.lora_presets)
    return {name for name in linears if any(name == ending or name.endswith(f".{ending}") for ending in endings)}


def _endings(layers: Iterable[str]) -> list[str]:
    """Returns the layers' paths within their blocks, each once; whole paths of layers outside of blocks."""
    return list(dict.fromkeys(re.sub(r"^\w+\.\d+\.", "", layer) for layer in layers))


def start_from(layers: Mapping[str, LoraLayer], lora: SavedLora) -> str:
    """Puts a LoRA's weights into a freshly attached one, and says in a line what became of them.

    Args:
        layers: the attached LoRA's layers by their paths, with fresh weights.
    """
    size = lost = 0.0
    ranks: dict[tuple[int, int], int] = {}
    for path, saved in lora.low_ranks().items():
        layer = layers[path]
        down, up = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        fitted = fit(saved, down.detach().cpu(), float(layer.scaling[ADAPTER_NAME]))
        with torch.no_grad():
            down.copy_(fitted.lora.down)
            up.copy_(fitted.lora.up)
        size, lost = size + fitted.size**2, lost + fitted.lost**2
        ranks[saved.rank, len(down)] = ranks.get((saved.rank, len(down)), 0) + 1
    return _sentence(
        lora, ranks, math.sqrt(lost / size) if size else 0.0, [path for path in layers if path not in lora.ranks]
    )


def fit(saved: LowRank, fresh_down: Tensor, scale: float) -> Fitted:
    """Brings a layer's LoRA to the rank of a fresh one and to its scale.

    Args:
        fresh_down: shape (wanted rank, inputs); its rows go on where the saved LoRA has fewer.
        scale: that of the fresh one.
    """
    rank = len(fresh_down)
    if saved.rank <= rank:
        down, up = fresh_down.clone(), torch.zeros(len(saved.up), rank)
        down[: saved.rank] = saved.down
        up[:, : saved.rank] = saved.up if saved.scale == scale else saved.up.double() * (saved.scale / scale)
        return Fitted(LowRank(down, up, scale), norm_of(saved), 0.0)
    left, values, right = svd_of_sum([saved])
    roots = (values[:rank] / scale).sqrt()
    found = len(roots)  # a layer narrower than the rank has no more of them
    up, down = left[:, :found] * roots, roots[:, None] * right[:found]
    up, down = torch.nn.functional.pad(up, (0, rank - found)), torch.cat([down, fresh_down[found:].double()])
    return Fitted(LowRank(down.float(), up.float(), scale), float(values.norm()), float(values[rank:].norm()))


def _sentence(lora: SavedLora, ranks: Mapping[tuple[int, int], int], lost: float, fresh: Sequence[str]) -> str:
    words = [f"starts from {lora.path.name} ({lora.format} names) on {len(lora.ranks)} layers"]
    changed = {pair: count for pair, count in ranks.items() if pair[0] != pair[1]}
    for (was, wanted), count in sorted(changed.items()):
        where = "" if len(ranks) == 1 else f" on {count}"
        words.append(f"rank {was} made {wanted}{where}" + (" by SVD" if was > wanted else " with zeros"))
    if any(was > wanted for was, wanted in changed):
        words[-1] += f", which loses {lost:.2%} of what it adds to weights"
    if fresh:
        words.append(f"{len(fresh)} layers that it has not start from zero, such as {fresh[0]}")
    return "; ".join(words)
