"""Describes what an adapter's file is: for which base and layers, its ranks, scales, number formats and norms."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixtune.deltas.adapter_file import AdapterFile, rank_of
from pixtune.deltas.comparing import Comparison, sum_of
from pixtune.deltas.delta import Angle, Dora, norm, shape_of
from pixtune.deltas.recognizing import BASES
from pixtune.deltas.svd import Cut
from pixtune.deltas.writing import trigger_words
from pixtune.storage.architecture import find_shipped
from pixtune.storage.shipped import shipped_names

LONGEST_VALUE = 200
"""Number of letters that are kept of a value of the metadata: a thumbnail or a table of captions has thousands."""
TITLES = ("modelspec.title", "ss_output_name")


def describe_adapter(adapter: AdapterFile) -> dict[str, Any]:
    """Describes an adapter's file, as values for JSON."""
    metadata = adapter.metadata
    layers = {layer: describe_layer(adapter, layer) for layer in adapter.changes}
    shapes = adapter.family.transformer_shapes({})
    fits = all(
        tuple(shapes.get(f"{layer}.weight", ())) == shape_of(change) for layer, change in adapter.changes.items()
    )
    return {
        "file": str(adapter.path),
        "bytes": adapter.path.stat().st_size,
        "kinds": list(adapter.kinds),
        "format": adapter.format,
        "families": [family.name for family in adapter.families],
        "full_size": fits,
        "models": models_of([family.pipeline_classes for family in adapter.families]) if fits else [],
        "stated_base": next((metadata[key] for key in BASES if metadata.get(key)), None),
        "title": next((metadata[key] for key in TITLES if metadata.get(key)), None),
        "trigger_words": trigger_words(metadata),
        "ranks": _counted(each["rank"] for each in layers.values()),
        "scales": _counted(each["scale"] for each in layers.values()),
        "dtypes": _counted(dtype for each in layers.values() for dtype in each["dtypes"]),
        "parameters": sum(t.numel() for layer in adapter.layers.values() for t in layer.tensors.values()),
        "num_layers": len(layers),
        "num_zero": sum(each["norm"] == 0 for each in layers.values()),
        "norm": math.hypot(*(each["norm"] for each in layers.values())),
        "kinds_of_layers": by_kind(layers),
        "layers": layers,
        "metadata": {key: value[:LONGEST_VALUE] for key, value in sorted(metadata.items())},
    }


def describe_layer(adapter: AdapterFile, layer: str) -> dict[str, Any]:
    """Describes one layer of an adapter, as values for JSON."""
    change, stored = adapter.changes[layer], adapter.layers[layer]
    delta = change.direction if isinstance(change, Dora) else change
    outputs, inputs = shape_of(change)
    return {
        "inputs": inputs,
        "outputs": outputs,
        "rank": rank_of(stored),
        "alpha": stored.alpha,
        "scale": delta.scale,
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored.tensors.values()}),
        "norm": norm(delta),
    }


def by_kind(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Groups layers by what they are in their blocks: how many, and the mean and largest norm."""
    groups: dict[str, list[float]] = {}
    for layer, of_layer in layers.items():
        groups.setdefault(kind_of(layer), []).append(of_layer["norm"])
    return {
        kind: {"layers": len(norms), "mean_norm": sum(norms) / len(norms), "largest_norm": max(norms)}
        for kind, norms in groups.items()
    }


def kind_of(layer: str) -> str:
    """Returns a layer's path with N in place of its block's number."""
    return re.sub(r"\.\d+\.", ".N.", layer, count=1)


def models_of(pipelines: Sequence[Sequence[str]]) -> list[str]:
    """Returns the hub names of the published models that these pipeline classes load."""
    classes = {name for names in pipelines for name in names}
    found = [(name, find_shipped(name)) for name in shipped_names()]
    return [name for name, model in found if model is not None and model.pipeline_class in classes]


def _counted(values: Any) -> dict[str, int]:
    """Counts values, the most frequent first, under texts."""
    counts = Counter(
        "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value) for value in values
    )
    return dict(counts.most_common())


def describe_cuts(output: Path, cuts: Mapping[str, Cut], ranks_before: Mapping[str, int | None]) -> dict[str, Any]:
    """Describes LoRAs that stand for something else: their ranks, and the error by layer, by kind and in total.

    Errors are lengths, in parts of what the LoRA stands for.
    """
    layers = {
        layer: {"rank": cut.delta.rank, "rank_before": ranks_before.get(layer), "norm": cut.norm, "error": _share(cut)}
        for layer, cut in cuts.items()
    }
    groups: dict[str, list[Cut]] = {}
    for layer, cut in cuts.items():
        groups.setdefault(kind_of(layer), []).append(cut)
    worst = max(layers, key=lambda layer: layers[layer]["error"] or 0.0)
    return {
        "output": str(output),
        "bytes": output.stat().st_size,
        "num_layers": len(cuts),
        "ranks": _range([cut.delta.rank for cut in cuts.values()]),
        "ranks_before": _range([rank for rank in ranks_before.values() if rank is not None]),
        "error": _whole_share([*cuts.values()]),
        "largest_error": layers[worst]["error"],
        "largest_error_layer": worst,
        "kinds_of_layers": {
            kind: {
                "layers": len(of_kind),
                "mean_rank": sum(cut.delta.rank for cut in of_kind) / len(of_kind),
                "error": _whole_share(of_kind),
                "largest_error": max((_share(cut) or 0.0) for cut in of_kind),
            }
            for kind, of_kind in groups.items()
        },
        "layers": layers,
    }


def describe_comparison(first: AdapterFile, second: AdapterFile, found: Comparison) -> dict[str, Any]:
    """Describes how two adapters lie to each other, by layer, by kind and in total."""
    groups: dict[str, list[Angle]] = {}
    for layer, angle in found.layers.items():
        groups.setdefault(kind_of(layer), []).append(angle)
    return {
        "first": str(first.path),
        "second": str(second.path),
        "num_common": len(found.layers),
        **_angle(found.whole),
        "only_first": found.only_first,
        "only_second": found.only_second,
        "kinds_of_layers": {kind: _angle(sum_of(angles)) for kind, angles in groups.items()},
        "layers": {layer: _angle(angle) for layer, angle in found.layers.items()},
    }


def _angle(angle: Angle) -> dict[str, Any]:
    first, second = angle.first_norm, angle.second_norm
    return {
        "cosine": angle.cosine,
        "ratio": f"{second / first:.4g}" if first else "none",
        "difference": angle.distance / first if first else None,
        "first_norm": first,
        "second_norm": second,
    }


def _share(cut: Cut) -> float | None:
    """Returns a cut's error in parts of the original; None of an original that is zero, where there is no such part."""
    return cut.error / cut.norm if cut.norm else None if cut.error else 0.0


def _whole_share(cuts: Sequence[Cut]) -> float | None:
    return _share(
        cuts[0]._replace(norm=math.hypot(*(c.norm for c in cuts)), error=math.hypot(*(c.error for c in cuts)))
    )


def _range(ranks: Sequence[int]) -> str:
    """Returns the least and the largest of some ranks, as one where they are the same; empty where there is none."""
    if not ranks:
        return ""
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
