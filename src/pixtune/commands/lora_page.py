"""Prints what `pixtune lora` has found, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixtune.deltas.adapter_file import AdapterFile
from pixtune.deltas.writing import OF_TENSORS
from pixtune.trained.adapter_config import METADATA_KEY
from pixtune.trained.lora_formats import RANKS_KEY

MOST_NAMES = 3
"""Number of names that a line shows of a list."""


def info_lines(found: Mapping[str, Any], every_layer: bool) -> list[str]:
    """Lays out `describe_adapter`."""
    families = found["families"]
    others = f" (its layers are also those of {', '.join(families[1:])})" if families[1:] else ""
    names = {"comfyui": "ComfyUI"}.get(found["format"], found["format"])
    fits = f"the size of {_few(found['models'])}" if found["models"] else "the size of no published model"
    rows = [
        ("for", f"{families[0]}{others}, {fits}"),
        ("base", found["stated_base"] or "not stated"),
        ("layers", f"{found['num_layers']:,}" + (f", {found['num_zero']:,} of them zero" if found["num_zero"] else "")),
        ("rank", _spread(found["ranks"])),
        ("scale", _spread(found["scales"])),
        ("numbers", f"{found['parameters']:,} in {', '.join(found['dtypes'])}, {megabytes(found['bytes'])}"),
        ("trigger", ", ".join(found["trigger_words"]) or "not stated"),
        ("norm", f"{found['norm']:.4g}"),
    ]
    if found["title"]:
        rows.insert(0, ("title", found["title"]))
    lines = [f"{found['file']}: a {' and '.join(found['kinds'])} with the names of {names}"]
    lines += [f"  {name:<8} {value}" for name, value in rows]
    if every_layer:
        shown = [
            (layer, "none" if each["rank"] is None else str(each["rank"]), f"{each['scale']:g}", f"{each['norm']:.4g}")
            for layer, each in found["layers"].items()
        ]
        lines += ["", *table(("layer", "rank", "scale", "norm"), shown)]
    else:
        kinds = [
            (kind, str(each["layers"]), f"{each['mean_norm']:.4g}", f"{each['largest_norm']:.4g}")
            for kind, each in found["kinds_of_layers"].items()
        ]
        lines += ["", *table(("layers", "number", "mean norm", "largest"), kinds)]
    if found["metadata"]:
        lines += ["", f"metadata: {', '.join(found['metadata'])}"]
    return lines


def convert_lines(
    adapter: AdapterFile, to: str, output: Path, rounded: Sequence[str], metadata: Mapping[str, str]
) -> list[str]:
    """Reports a conversion: what was written, and what is not as it was."""
    lines = [f"{output}: {len(adapter.layers):,} layers, from the names of {adapter.format} to those of {to}"]
    if rounded:
        lines.append(f"{len(rounded):,} layers were rounded, {rounded[0]} for one: {to} has no place for their scales.")
    if left := sorted(adapter.metadata.keys() - metadata.keys() - {"format", METADATA_KEY, RANKS_KEY, *OF_TENSORS}):
        lines.append(f"left out of the metadata, as it may be private: {_few(left)}. --keep-metadata carries it over.")
    return lines


def merged_lines(found: Mapping[str, Any], adapters: Sequence[tuple[AdapterFile, float]]) -> list[str]:
    """Reports a merge into a base."""
    names = ", ".join(f"{adapter.path.name} x {weight:g}" for adapter, weight in adapters)
    return [
        f"{found['output']}: {names} merged into {found['layers']:,} layers",
        f"rounding to the base's number format changes {found['lost_share']:.1%} of what was added",
    ]


def cut_lines(found: Mapping[str, Any], every_layer: bool) -> list[str]:
    """Lays out `describe_cuts`."""
    lines = [
        f"{found['output']}: {found['num_layers']:,} layers, rank {found['ranks']}"
        + (f" (before: {found['ranks_before']})" if found["ranks_before"] else "")
        + f", {megabytes(found['bytes'])}",
        f"error {percent(found['error'])} in total; largest {percent(found['largest_error'])}, "
        f"of {found['largest_error_layer']}",
    ]
    if found.get("layers_equal"):
        lines.append(f"{found['layers_equal']:,} layers are equal in both models")
    if found.get("not_held"):
        names = _few(found["not_held"])
        lines.append(f"{len(found['not_held']):,} tensors differ that no LoRA can hold (norms, biases): {names}")
    if every_layer:
        each_layer = [(layer, str(each["rank"]), percent(each["error"])) for layer, each in found["layers"].items()]
        return [*lines, "", *table(("layer", "rank", "error"), each_layer)]
    rows = [
        (kind, str(each["layers"]), f"{each['mean_rank']:.4g}", percent(each["error"]), percent(each["largest_error"]))
        for kind, each in found["kinds_of_layers"].items()
    ]
    return [*lines, "", *table(("layers", "number", "mean rank", "error", "largest"), rows)]


def comparison_lines(found: Mapping[str, Any], every_layer: bool) -> list[str]:
    """Lays out `describe_comparison`."""
    lines = [
        f"{found['first']} and {found['second']}: {found['num_common']:,} layers in common",
        f"cosine {signed(found['cosine'])} in total; the second is {found['ratio']} times as large; their difference "
        f"is {percent(found['difference'])} of the first",
    ]
    for name in ("first", "second"):
        if only := found[f"only_{name}"]:
            lines.append(f"{len(only):,} layers are in the {name} alone: {_few([*only])}")
    source = found["layers"] if every_layer else found["kinds_of_layers"]
    rows = [(name, signed(each["cosine"]), each["ratio"], percent(each["difference"])) for name, each in source.items()]
    return [*lines, "", *table(("layer" if every_layer else "layers", "cosine", "ratio", "difference"), rows)]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lays out rows under heads: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    return [
        "  " + "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (heads, *rows)
    ]  # fmt: skip


def percent(share: float | None) -> str:
    """Formats a share; one that is not zero never looks like zero."""
    if share is None:
        return "none"
    return "0%" if share == 0 else f"{share:.2%}" if share >= 1e-4 else f"{100 * share:.1e}%"


def signed(value: float | None) -> str:
    """Formats a cosine."""
    return "none" if value is None else f"{value:+.4f}"


def megabytes(num_bytes: int) -> str:
    """Formats a file's size."""
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:,.1f} KiB"


def _spread(counts: Mapping[str, int]) -> str:
    """Formats values with how often each occurs; one value stands alone."""
    if len(counts) == 1:
        return next(iter(counts))
    shown = [f"{value} in {count:,}" for value, count in list(counts.items())[:MOST_NAMES]]
    more = len(counts) - len(shown)
    return ", ".join([*shown, *([f"{more} other values"] if more else [])]) + " layers"


def _few(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more:,} more" if more > 0 else "")
