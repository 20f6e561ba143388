"""The report's page, in the order of a user's questions. Every text from outside goes through `escape`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from pixtune.hardware.facts import GIB
from pixtune.plan.adapter import KINDS, USUAL_FACTOR
from pixtune.progress import in_words
from pixtune.report.charts import Chart, Series, render_chart
from pixtune.report.judging import build_best, build_suspects
from pixtune.report.pictures import data_uri, edge_for, open_picture, spread
from pixtune.report.record import (
    MemoryRecord,
    RunRecord,
    Sample,
    StageRow,
    Validation,
    smooth,
    smoothing_window,
)
from pixtune.report.style import CSS
from pixtune.report.values import format_decision, format_percent, format_plain, format_seconds, format_setting
from pixtune.storage.resume import flatten

# A JPEG pixel takes about 0.3 bytes here, base64 adds a third: together some 7 MB at most.
MOST_PAIR_PIXELS, PAIR_EDGES = 6_000_000, (512, 384, 256)
MOST_STRIP_PIXELS, STRIP_EDGES = 10_000_000, (256, 192)
MOST_PAIRS = 60
MOST_WARNINGS = 60

QUARTERS = ("nearly clean [0, 1/4)", "[1/4, 1/2)", "[1/2, 3/4)", "nearly noise [3/4, 1]")
"""Names of sigma's quarters, in the order of `ValidationLoss.quarters`."""

WATCH_HELD_OUT = (
    "The held-out loss is the one to watch: it falls while the model learns what carries over to other pictures, "
    "and rises once it learns yours by heart. "
)
HOW_TO_READ = (
    "The loss of a training step depends on its noise level more than on the weights; only the mean of many steps says "
    "something."
)

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy by which the browser itself keeps the page from loading anything."""


def build_page(
    output_dir: Path,
    record: RunRecord,
    *,
    config: Mapping[str, Any],
    plan: Mapping[str, Any],
    versions: Mapping[str, str],
    facts: Mapping[str, str | int | float],
    num_steps: int | None = None,
) -> str:
    """Builds the whole HTML document. The arguments are those of `write_report`."""
    name, best_is_kept = escape(output_dir.resolve().name), (output_dir / "best").is_dir()
    decisions = [format_decision(key, value) for key, value in plan.items() if key != "reasons"]
    body = [
        f'<header><h1>{name}</h1><p class="quiet">{escape(describe_run(output_dir, config))}</p>'
        f"{build_outcome(record, best_is_kept)}</header>",
        build_tiles(record, plan, num_steps),
        build_suspects(output_dir, record),
        build_pairs(output_dir, record),
        build_strips(output_dir, record),
        build_charts(record),
        build_warnings("Losses that went wrong", record.losses),
        build_warnings("Slower steps", record.drifts),
        build_warnings("What failed", record.problems),
        build_memory(record.memory) if record.memory else "",
        '<div class="columns">',
        build_table("LoRA and data", {key: format_plain(value) for key, value in facts.items()}),
        "</div>",
        build_details("Plan", dict(decisions), plan.get("reasons", ())),
        build_details("Config", {key: format_setting(value) for key, value in flatten(config).items()}),
        build_details("Versions", dict(versions)),
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{name}: pixtune report</title>\n<style>{CSS}</style>\n</head>\n<body>",
            *filter(None, body),
            "</body>\n</html>\n",
        ]
    )


# ---- the head


def describe_adapter(config: Mapping[str, Any]) -> str:
    """Describes the adapter that was trained. Configs of version 0.1.0 have no section of it."""
    own = config.get("adapter", {})
    kind = own.get("kind", "lora")
    if kind == "lokr" and own.get("lokr_low_rank", "none") == "none":
        return f"LoKr of factor {own.get('lokr_factor') or USUAL_FACTOR}"
    others = " and others" if own.get("rank_pattern") else ""
    return f"{KINDS.get(kind, kind)} of rank {config['rank']}{others}"


def describe_run(output_dir: Path, config: Mapping[str, Any]) -> str:
    """Describes what was trained, how and when, in a line."""
    is_lora = config.get("method", "lora") == "lora" and "rank" in config
    parts = [
        str(config["pretrained_model_name_or_path"]) if "pretrained_model_name_or_path" in config else "",
        describe_adapter(config) if is_lora else "",
        f"learning rate {config['learning_rate']:g}" if "learning_rate" in config else "",
        str(output_dir),
        f"written {datetime.now():%d %b %Y, %H:%M}",
    ]
    return ", ".join(filter(None, parts))


def build_outcome(record: RunRecord, best_is_kept: bool) -> str:
    """Builds the sentence with the run's outcome."""
    outcome = record.outcome
    if outcome is None:
        only = "".join(f"Held-out loss at step {v.step:,}: {v.loss:.4f}. " for v in record.validations)
        missing = only or "No held-out pictures were measured. "
        return f'<p class="outcome">{missing}</p>'
    first, last = outcome.first, outcome.last
    change = ""
    if outcome.change is not None:
        kind = "good" if outcome.change < 0 else "bad"
        change = f' <span class="{kind}">({format_percent(outcome.change)})</span>'
    sentence = f'<p class="outcome">Held-out loss {first.loss:.4f} → {last.loss:.4f}{change}</p>'
    return sentence + build_best(outcome, record.training_pictures, best_is_kept)


def build_tiles(record: RunRecord, plan: Mapping[str, Any], num_steps: int | None = None) -> str:
    """Builds the tiles with the run's figures."""
    is_on_its_way = num_steps is not None and record.last_step < num_steps
    tiles = [("Steps so far" if is_on_its_way else "Steps", f"{record.last_step:,}", "")]
    if is_on_its_way:
        tiles = [("Steps so far", f"{record.last_step:,}", f"of {num_steps:,}")]
    if record.median_seconds is not None:
        tiles.append(("Time in steps", in_words(record.total_seconds), "without validation and samples"))
        tiles.append(("Time of a step", format_seconds(record.median_seconds), "median"))
    if record.memory is not None:
        whole = sum(stage.seconds for stage in record.memory.stages)
        tiles.append(("Whole time", in_words(whole), "of the last session, loading and samples included"))
    if record.first_steps:
        first = record.first_steps[0]
        graphs = f"with {first.compiled_graphs:,} graphs compiled" if first.compiled_graphs else "nothing compiled"
        tiles.append(("First step", format_seconds(first.seconds), graphs))
    if record.peak_memory_gib:
        expected = plan.get("expected_peak_bytes")
        note = f"the plan expected {expected / GIB:.1f} GiB" if expected else ""
        tiles.append(("Peak GPU memory", f"{record.peak_memory_gib:.1f} GiB", note))
    entries = [
        f"<div><dt>{title}</dt><dd>{value}</dd>{f'<dd class=quiet>{note}</dd>' if note else ''}</div>"
        for title, value, note in tiles
    ]
    return f'<dl class="tiles">{"".join(entries)}</dl>'


# ---- pictures


def build_pairs(output_dir: Path, record: RunRecord) -> str:
    """Builds the pairs of samples before and after training."""
    pairs = spread(record.pairs, MOST_PAIRS)
    if not pairs:
        return ""
    edge = edge_for(2 * len(pairs), MOST_PAIR_PIXELS, PAIR_EDGES)
    figures = []
    for before, after in pairs:
        pictures = "".join(
            build_picture(output_dir, sample, edge, f"{when} (step {sample.step:,})")
            for sample, when in ((before, "before"), (after, "after"))
        )
        figures.append(
            f'<figure><div class="pair">{pictures}</div>'
            f'<figcaption dir="auto">{escape(before.prompt)} <span>{escape(before.detail)}</span></figcaption></figure>'
        )
    left_out = f" ({len(pairs)} of {len(record.pairs)} pairs)" if len(pairs) < len(record.pairs) else ""
    return f'<section><h2>Before and after{left_out}</h2><div class="pairs">{"".join(figures)}</div></section>'


def build_strips(output_dir: Path, record: RunRecord) -> str:
    """Builds a row of all samples of each prompt and strength, whose columns are the steps.

    It is left out where the pairs before and after show them all.
    """
    if len(record.pairs) == len(record.strips) and all(len(strip.samples) == 2 for strip in record.strips):
        return ""
    strips = spread(record.strips, MOST_PAIRS)
    edge = edge_for(sum(len(strip.samples) for strip in strips), MOST_STRIP_PIXELS, STRIP_EDGES)
    most = max(MOST_STRIP_PIXELS // (edge * edge * len(strips)), 2)
    rows: list[str] = []
    have_strengths = len({strip.strength for strip in strips}) > 1
    for number, strip in enumerate(strips):
        samples = spread(strip.samples, most)
        pictures = "".join(
            f"<li>{build_picture(output_dir, sample, edge, f'step {sample.step:,}')}</li>" for sample in samples
        )
        left_out = f", {len(samples)} of {len(strip.samples)} pictures" if len(samples) < len(strip.samples) else ""
        detail = escape(strip.samples[0].detail) + left_out
        if not number or strips[number - 1].samples[0].origin != strip.samples[0].origin:
            rows.append(f'<h3 dir="auto">{escape(strip.prompt)} <span class="quiet">{detail}</span></h3>')
        if have_strengths:
            rows.append(f'<p class="quiet strength">strength {strip.strength:g}</p>')
        rows.append(f'<ul class="strip" tabindex="0" aria-label="Samples by step">{pictures}</ul>')
    of_all = f" ({len(strips)} of {len(record.strips)} prompts and seeds)" if len(strips) < len(record.strips) else ""
    return f"<section><h2>Samples by step{of_all}</h2>{''.join(rows)}</section>"


def build_picture(output_dir: Path, sample: Sample, edge: int, caption: str) -> str:
    """Builds an embedded picture, or a remark on why there is none."""
    picture = open_picture(output_dir, sample.path)
    if picture is None:
        shown = f'<span class="missing">missing or damaged: {escape(sample.path)}</span>'
    else:
        alt = escape(f"{caption}: {sample.prompt}, {sample.detail}")
        shown = (
            f'<img src="{data_uri(picture, edge)}" alt="{alt}" width="{picture.width}" height="{picture.height}" '
            'loading="lazy">'
        )
    return f'<span class="picture">{shown}{escape(caption)}</span>'


# ---- charts


def build_charts(record: RunRecord) -> str:
    """Builds the curves over steps, and the held-out figures as a table."""
    charts = [render_chart(chart) for chart in plan_charts(record)]
    if not any(charts):
        return "<section><h2>Curves</h2><p>No step was logged.</p></section>"
    table = build_validations(record.validations) if record.validations else ""
    how = (WATCH_HELD_OUT if record.validations else "") + HOW_TO_READ
    return f'<section><h2>Curves</h2><p>{how}</p><div class="charts">{"".join(charts)}</div>{table}</section>'


def plan_charts(record: RunRecord) -> list[Chart]:
    """Returns the charts in the order shown."""
    end, rates = record.last_step, dict(record.series("learning_rate"))
    off = [(each.step, each.off_pixels) for each in record.edit_drifts if each.off_pixels is not None]
    held_out = [Series("held-out", [(v.step, v.loss) for v in record.validations], 0, "marked")]
    if record.training_pictures:
        held_out.append(Series("trained on", [(v.step, v.loss) for v in record.training_pictures], 1, "marked"))
    step_sizes = Series("d times rate", [(step, d * rates[step]) for step, d in record.series("d") if step in rates], 0)
    drifts = [
        Chart("Drift of edits", "pixels by which samples lie off their controls", [Series("pixels", off, 0, "marked")],
              end, from_zero=True),
        Chart("Colour of edits", "distance of samples' mean colour from their controls', of 255",
              [Series("levels", [(each.step, each.color_levels) for each in record.edit_drifts], 0, "marked")], end,
              from_zero=True),
    ]  # fmt: skip
    return [
        Chart("Training loss", "error of the velocity, weighed as it is trained", smoothed(record, "loss"), end),
        Chart("Held-out loss", "fixed noise and sigmas, so points compare", held_out, end),
        Chart("Held-out loss by sigma", "change since the first point", quarter_changes(record), end, suffix="%"),
        *(drifts if record.edit_drifts else []),
        Chart("Gradient norm", "before clipping", smoothed(record, "grad_norm"), end),
        Chart("Learning rate", "", [Series("learning rate", record.series("learning_rate"), 0)], end, from_zero=True),
        *(
            [Chart("Step size", "d of Prodigy times the learning rate", [step_sizes], end, from_zero=True)]
            if step_sizes.points
            else []
        ),
        Chart("Time of a step", "seconds", [Series("seconds", record.series("seconds"), 0)], end, from_zero=True),
    ]


def smoothed(record: RunRecord, name: str) -> list[Series]:
    """Returns the series of a noisy figure: each step, and the mean around it."""
    points = record.series(name)
    window = smoothing_window(len(points))
    if window == 1:
        return [Series("each step", points, 0)]
    return [Series("each step", points, 4, "raw"), Series(f"mean of {window} steps", smooth(points, window), 0)]


def quarter_changes(record: RunRecord) -> list[Series]:
    """Returns the change of each sigma quarter's loss in percent; the losses differ too much to share an axis."""
    if record.outcome is None:
        return []
    first = record.outcome.first.quarters
    return [
        Series(
            label,
            [(v.step, 100 * (v.quarters[index] / first[index] - 1)) for v in record.validations if first[index]],
            index,
            "marked",
        )
        for index, label in enumerate(QUARTERS)
    ]


def build_validations(validations: Sequence[Validation]) -> str:
    """Builds the table of held-out losses."""
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in ("step", "all", *QUARTERS))
    rows = "".join(
        f'<tr><th scope="row">{v.step:,}</th>{"".join(f"<td>{loss:.4f}</td>" for loss in (v.loss, *v.quarters))}</tr>'
        for v in spread(validations, 100)
    )
    return (
        '<div class="scroll" tabindex="0"><table class="figures"><caption class="quiet">Held-out loss by sigma '
        f"(0 is clean, 1 is noise)</caption><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


# ---- speed and memory


def build_warnings(title: str, warnings: Sequence[str]) -> str:
    """Builds a section of warnings that were printed during the run; empty where there are none."""
    if not warnings:
        return ""
    shown = spread(warnings, MOST_WARNINGS)
    left_out = f" ({len(shown)} of {len(warnings)})" if len(shown) < len(warnings) else ""
    listed = "".join(f"<li>{escape(warning)}</li>" for warning in shown)
    return f'<section><h2>{title}{left_out}</h2><ul class="reasons drifts">{listed}</ul></section>'


def build_memory(memory: MemoryRecord) -> str:
    """Builds the table of memory by stage; GPU memory only where one was used, beside the plan's estimate."""
    columns = GPU_COLUMNS + HOST_COLUMNS if memory.on_gpu else HOST_COLUMNS
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("stage", *(head for head, _ in columns)))
    rows = "".join(
        f'<tr><th scope="row">{escape(stage.stage)}</th>'
        f"{''.join(f'<td>{value(stage)}</td>' for _, value in columns)}</tr>"
        for stage in memory.stages
    )
    return (
        f"<section><h2>Memory</h2>{build_comparison(memory)}"
        f'<div class="scroll" tabindex="0"><table class="figures memory"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def build_comparison(memory: MemoryRecord) -> str:
    """Compares the plan's estimate with the measured memory, in words."""
    expected, measured = memory.expected_peak_gib, memory.measured_peak_gib
    if not expected or not measured:
        return ""
    more = [
        f"{name} {gib:.1f} GiB"
        for name, gib in (
            ("Torch's allocator reserved", memory.reserved_peak_gib),
            ("the whole process, CUDA included, took", memory.process_peak_gib),
        )
        if gib is not None
    ]
    return (
        f"<p>The plan expected {expected:.1f} GiB at the peak of a step; it was {measured:.1f} GiB, so the estimate "
        f"was off by {format_percent(expected / measured - 1)}. {escape('; '.join(more))}{'.' if more else ''}</p>"
    )


GPU_COLUMNS: tuple[tuple[str, Callable[[StageRow], str]], ...] = (
    ("GPU, peak", lambda stage: f"{stage.peak_gib:.2f} GiB"),
    ("reserved, peak", lambda stage: f"{stage.peak_reserved_gib:.2f} GiB"),
    ("GPU, at its end", lambda stage: f"{stage.allocated_gib:.2f} GiB"),
)
HOST_COLUMNS: tuple[tuple[str, Callable[[StageRow], str]], ...] = (
    ("host, at its end", lambda stage: f"{stage.host_rss_gib:.2f} GiB"),
    ("time", lambda stage: in_words(stage.seconds)),
)


# ---- tables


def build_table(title: str, values: Mapping[str, str]) -> str:
    """Builds a section of names and values."""
    return f"<section><h2>{title}</h2>{build_rows(values)}</section>" if values else ""


def build_details(title: str, values: Mapping[str, str], reasons: Sequence[str] = ()) -> str:
    """Builds names and values, and the reasons for them, that are folded away at first."""
    why = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    listed = f'<ul class="reasons">{why}</ul>' if why else ""
    shown = build_rows(values, "code") + listed
    return f"<details><summary>{title}</summary>{shown}</details>" if values or why else ""


def build_rows(values: Mapping[str, str], kind: str = "plain") -> str:
    """Builds a table of two columns."""
    rows = (
        f'<tr><th scope="row">{escape(key)}</th><td dir="auto">{escape(value)}</td></tr>'
        for key, value in values.items()
    )
    return f'<table class="{kind}"><tbody>{"".join(rows)}</tbody></table>'
