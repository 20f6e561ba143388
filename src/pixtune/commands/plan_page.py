"""Prints what `pixtune plan` has found, the answer to a user's question first."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from pixtune.commands.plan import PlanReport
from pixtune.data.shares import times_used
from pixtune.hardware.facts import GIB
from pixtune.plan.kernel_choice import NAMES
from pixtune.plan.optimizers import OPTIMIZERS
from pixtune.plan.seconds import basis
from pixtune.plan.training import TrainingPlan


def render(report: PlanReport, console: Console, verbose: bool = False) -> None:
    """Prints a plan for people: verdict, time and memory first; what decides it behind `verbose`."""
    title = "Estimate for" if report.is_estimate else "Plan for"
    console.print(f"[bold]{verdict(report)}[/]", highlight=False, soft_wrap=True)
    for line in (*time_lines(report), f"{title} {escape(report.facts.name)}: {escape(report.model)}."):
        console.print(line, highlight=False, soft_wrap=True)
    if report.is_estimate:
        host = "" if report.facts.integrated else f", in a machine with {report.facts.host_total_bytes / GIB:.0f} GiB"
        console.print(f"From the table of cards{host}; nothing was measured.", style="dim", highlight=False)
    for phase in report.too_large:
        missing = (phase.device_bytes - report.usable_bytes) / GIB
        console.print(
            f"[bold yellow]{phase.name}[/] would need {missing:.1f} GiB more than there is. {ADVICE[phase.name]}",
            highlight=False,
        )
    console.print()
    console.print(Padding(decision_table(decisions(report.plan) if verbose else in_short(report.plan)), (0, 0, 0, 2)))
    if report.phases:
        console.print(Padding(phase_table(report), (0, 0, 0, 2)))
    if report.together is not None:
        console.print("[bold]Together[/]")
        console.print(Padding(bullets(together_lines(report)), (0, 0, 0, 2)), highlight=False)
    reasons = [reason for reason in report.plan.reasons if reason not in report.why_together]
    why = [("Why", (*reasons, *report.encoders.reasons))] if verbose else []
    for heading, lines in (*why, ("Assumed", report.assumptions)):
        console.print(f"[bold]{heading}[/]")
        console.print(Padding(bullets(lines), (0, 0, 0, 2)), highlight=False)
    if not verbose:
        console.print("Every decision with its reason: --verbose.", style="dim", highlight=False)


def verdict(report: PlanReport) -> str:
    """Returns whether the run fits, in a sentence."""
    if not report.usable_bytes:
        return "There is no GPU here: a run would use the CPU. --as NAME plans for a card, for example --as 4090."
    usable = f"{report.usable_bytes / GIB:.1f} GiB"
    if report.too_large:
        return f"Does not fit as it is: {', '.join(phase.name for phase in report.too_large)}, within {usable}."
    largest = max(report.phases, key=lambda phase: phase.device_bytes)
    return (
        f"Fits {escape(report.facts.name)}: {largest.device_bytes / GIB:.1f} of {usable} at the peak ({largest.name})."
    )


def time_lines(report: PlanReport) -> list[str]:
    """Returns how long the steps take, with what that rests on; and how often each picture is used."""
    length, plan = report.length, report.plan
    lines = []
    if plan.micro_batch_seconds:
        step_seconds = length.micro_batches_per_step * plan.micro_batch_seconds
        if report.together is not None and report.together.step is not None:
            step_seconds = report.together.step.seconds
        steps = "" if length.num_steps is None else f"{about(length.num_steps * step_seconds)}: "
        num = "" if length.num_steps is None else f"{length.num_steps:,} steps, "
        lines.append(
            f"Takes about {steps}{num}{step_seconds:.2g} s each, beside loading, encoding, held-out loss and samples "
            f"({basis(report.facts)})."
        )
    elif report.usable_bytes:
        lines.append("How long a step takes is not estimated where all weights are trained: pixtune bench measures it.")
    else:
        lines.append("How long a step takes is not estimated on a CPU: pixtune bench measures it.")
    if length.num_pictures is not None:
        used = ""
        if length.num_steps is not None and length.turns_per_epoch:
            mean = length.num_steps * length.pictures_per_step / length.turns_per_epoch
            others = "of the others " * (length.num_held_out > 0)
            used = f": each {others}is used {times_used(mean, length.is_once)}"
        held_out = f", {length.num_held_out:,} of them held out" if length.num_held_out else ""
        lines.append(f"{length.num_pictures:,} pictures with captions{held_out}{used}.")
    return lines


def together_lines(report: PlanReport) -> list[str]:
    """Returns what several GPUs do in a step, with what the plan's reasons say of it."""
    found = report.together
    assert found is not None
    hosts = f" on {found.num_hosts} hosts" if found.num_hosts > 1 else ""
    lines = [f"{found.num_processes} GPUs{hosts} take {report.length.pictures_per_step} pictures a step"]
    if found.step is not None:
        lines[0] += f": {report.length.pictures_per_step / found.step.seconds:.3g} pictures a second, "
        alone = report.seconds_alone
        times = None if alone is None else found.num_processes * alone / found.step.seconds
        lines[0] += "and one alone does not hold the run" if times is None else f"{times:.3g} times those of one alone"
    return [*lines, *report.why_together]


def about(seconds: float) -> str:
    """Formats an estimate of a time, which is good for two digits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


ADVICE = {
    "captions encoded": "Encode on a larger GPU once: the cache (data_config.cache_dir) can be copied.",
    "pictures encoded": "Encode on a larger GPU once: the cache (data_config.cache_dir) can be copied.",
    "training step": "Leave out disable_cpu_offload, and leave precompute_text_embeddings at true.",
    "sampling": "Ask for smaller samples (samples.width, samples.height), or for none.",
}
"""Advice on each phase that is too large."""


def bullets(lines: Sequence[str]) -> Table:
    """Returns a list with a bullet for each line; what is wrapped is indented."""
    table = Table.grid(padding=(0, 1))
    for line in lines:
        table.add_row("-", escape(line))
    return table


def in_short(plan: TrainingPlan) -> list[tuple[str, str]]:
    """Returns what the plan does to the model and how it saves memory, in words that need no knowledge of it."""
    bits = {"fp8": "8 bits (fp8)", "int8": "8 bits (int8)", "nf4": "4 bits (nf4)"}
    rows = [("model's weights", bits.get(plan.weights_format, f"whole ({plan.weights_format})"))]
    if plan.shards > 1:
        rows.append(("in parts on GPUs", f"{plan.streamed_blocks or 'all'} blocks, each on {plan.shards} of them"))
    elif plan.streamed_blocks:
        rows.append(("wait in host memory", f"the weights of {plan.streamed_blocks} blocks"))
    again = "nothing"
    if plan.recomputed_blocks:
        again = f"{plan.recomputed_blocks} blocks, to save memory: slower"
    elif plan.selective or plan.reprojected_blocks:
        again = "small parts, to save memory: a little slower"
    rows.append(("computed twice", again))
    rows.append(("optimizer", OPTIMIZERS[plan.optimizer].title))
    if plan.expected_host_bytes:
        rows.append(("host memory", f"{plan.expected_host_bytes / GIB:.1f} GiB"))
    return rows


def decision_table(rows: Sequence[tuple[str, str]]) -> Table:
    """Returns names and values as a table."""
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def decisions(plan: TrainingPlan) -> list[tuple[str, str]]:
    """Returns name and value of each decision, in words."""
    recomputed = f"{plan.recomputed_blocks} blocks" if plan.recomputed_blocks else "no block"
    again = f"; queries, keys and values of {plan.reprojected_blocks}" if plan.reprojected_blocks else ""
    cheap = f"{again}; norms, gates and rotary embedding in every block" if plan.selective else again
    rows = [
        ("base weights", plan.weights_format + (", also kept transposed" if plan.kept_transposes else "")),
        ("computed in", plan.compute_format),
        ("modulation", f"{plan.modulation_rows} draws ahead" if plan.modulation_rows else "on the device"),
        ("recomputed", recomputed + cheap),
        ("inputs of blocks", "in host memory" if plan.offload_inputs else "on the device"),
        ("streamed blocks", str(plan.streamed_blocks) if plan.streamed_blocks and plan.shards == 1 else "none"),
        *([("in parts", f"{plan.streamed_blocks or 'all'} blocks, each on {plan.shards} GPUs")] * (plan.shards > 1)),
        ("compiled", _yes(plan.compile)),
        ("captured", f"steps of up to {plan.captures} shapes (CUDA graphs)" if plan.captures else "no"),
        ("attention", f"{NAMES[plan.attention]} where possible" if plan.attention else "PyTorch's own choice"),
        ("optimizer", plan.optimizer + ", its states in host memory" * plan.states_on_host),
        ("weights stepped", "within the backward pass" if plan.fused_step else "after the backward pass"),
        ("encoders", "stay on the device" if plan.encoders_stay else "leave the device after encoding"),
        ("pinned batches", _yes(plan.pin_memory)),
    ]
    if plan.expected_host_bytes:
        rows.append(("host memory", f"{plan.expected_host_bytes / GIB:.1f} GiB page-locked"))
    return rows


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def phase_table(report: PlanReport) -> Table:
    """Returns the memory of each phase beside what is usable, as a table."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("phase", no_wrap=True)
    table.add_column("on the device", overflow="fold")
    table.add_column("GiB", justify="right")
    table.add_column(f"of {report.usable_bytes / GIB:.1f} usable", justify="right")
    for phase in report.phases:
        share = phase.device_bytes / report.usable_bytes
        style = "yellow" if phase in report.too_large else None
        table.add_row(phase.name, phase.holds, f"{phase.device_bytes / GIB:.1f}", f"{share:.0%}", style=style)
    return table
