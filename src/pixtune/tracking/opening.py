"""Says what is about to run, in a few lines: data, what is trained, how long, on how many processes."""

from __future__ import annotations

from collections.abc import Sequence

from pixtune.config.schema import TrainConfig
from pixtune.data.batches import BatchSource
from pixtune.data.order import BatchOrder
from pixtune.data.prepared import PreparedData
from pixtune.data.shares import times_used, uneven_note
from pixtune.trained import schedule


def opening_lines(
    config: TrainConfig, data: PreparedData, source: BatchSource, num_steps: int, summary: str, reasons: Sequence[str]
) -> list[str]:
    """Returns the lines, with notes and warnings last.

    Args:
        source: source of this process's batches, whose order is that of all processes together.
        num_steps: optimizer steps of the whole run.
        summary: what is trained.
        reasons: those of the plan.
    """
    order = source.order
    num_sizes = len({size for variants in data.buckets for size in variants})
    per_step = order.global_batch_size * config.gradient_accumulation_steps
    num_processes = order.global_batch_size // config.batch_size
    together = f", by {num_processes} processes" if num_processes > 1 else ""
    warning = schedule.check_schedule(config, num_steps)
    if data.stream is not None or not isinstance(order, BatchOrder):
        return [
            f"data: a stream, {len(data.buckets)} pictures in {num_sizes} sizes encoded so far, "
            f"{len(data.held_out)} held out",
            summary,
            f"length: {counted(num_steps, 'step')} of {counted(per_step, 'picture')} each{together}",
            *(f"plan: {reason}" for reason in reasons),
            *([f"warning: {warning}"] if warning else []),
        ]
    # Not epochs: one that fills its batches uses pictures of rare shapes oftener than once.
    mean = num_steps * per_step / sum(use.repeats for use in order.uses)
    note = uneven_note(order, source.reader.names)
    turns = f"every picture {times_used(mean, all(use.repeats == 1 for use in order.uses))}"
    return [
        # Scripts look for this line, so its words stay whatever the numbers are.
        f"data: {len(data.buckets)} pictures in {num_sizes} sizes, {len(data.held_out)} held out",
        summary,
        f"length: {counted(num_steps, 'step')} of {counted(per_step, 'picture')} each{together}; {turns}",
        *(f"plan: {reason}" for reason in reasons),
        *([f"note: {note}"] if note else []),
        *([f"warning: {warning}"] if warning else []),
    ]


def counted(number: int, noun: str) -> str:
    """Returns "1 step" or "1,000 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
