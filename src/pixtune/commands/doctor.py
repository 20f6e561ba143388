"""`pixtune doctor`: reports this machine's hardware, what keeps it from training or slows it, and what to fix."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from pixtune.config.model_parts import NO_PARTS, ModelParts
from pixtune.hardware.advice import Advice, advise
from pixtune.hardware.facts import GIB, HardwareFacts
from pixtune.hardware.machine import Machine, read_machine

if TYPE_CHECKING:
    from pixtune.commands.model_check import ModelCheck

WORST_LAYERS = 5

LINKS = {
    "pcie": "PCIe",
    "c2c": "NVLink-C2C; two pools, each readable from the other side",
    "integrated": "none: CPU and GPU share one pool",
    "none": "none",
}


@dataclass(frozen=True)
class Examination:
    """A machine with the advice for it."""

    machine: Machine
    advice: tuple[Advice, ...]

    @property
    def can_train(self) -> bool:
        return all(advice.severity != "fault" for advice in self.advice)

    def to_json(self) -> str:
        """Returns plain values, bytes as bytes, for programs and for bug reports."""
        values = {
            "can_train": self.can_train,
            "advice": [asdict(advice) for advice in self.advice],
            "machine": asdict(self.machine),
        }
        return json.dumps(values, indent=2)


def examine() -> Examination:
    """Examines this machine, with the working folder as the place of runs. Starts CUDA, loads and trains nothing."""
    machine = read_machine(dict(os.environ), Path.cwd())
    return Examination(machine, tuple(advise(machine)))


def render(examination: Examination, console: Console) -> None:
    """Prints facts and advice as tables."""
    facts = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in rows_of(examination.machine):
        facts.add_row(name, escape(value))
    console.print(facts)
    if not examination.advice:
        console.print("No problem was found.", style="green")
        return
    for advice in examination.advice:
        style = "bold red" if advice.severity == "fault" else "bold yellow"
        console.print(
            f"[{style}]{advice.severity}[/]  [bold]{escape(advice.topic)}[/]  {escape(advice.found)}", highlight=False
        )
        console.print(Padding(escape(advice.remedy), (0, 0, 1, 4)), highlight=False)


def examine_model(name_or_path: str, parts: ModelParts = NO_PARTS) -> ModelCheck:
    """Checks a model on this machine's first GPU, or its CPU. Reads all of its transformer several times.

    Raises:
        WeightsError: there is no model, or none that can be trained here.
    """
    import torch

    from pixtune.commands.model_check import check_model
    from pixtune.families import family_of
    from pixtune.families.opening import open_model

    folder = open_model(name_or_path, parts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return check_model(folder, family_of(folder), device)


def render_model(check: ModelCheck, console: Console) -> None:
    """Prints the worst layers, the comparisons, and the verdict in a sentence."""
    table = Table(box=box.SIMPLE, pad_edge=False, title=f"{check.folder_name}: errors of the worst layers")
    table.add_column("layer", overflow="fold", min_width=24)
    for heading in ("format", "product", "gradient", "weights*", "inputs*"):
        table.add_column(heading, no_wrap=True)
    for layer in sorted(check.layers, key=lambda layer: layer.worst, reverse=True)[:WORST_LAYERS]:
        errors = (layer.product, layer.gradient, layer.weight_channel, layer.input_channel)
        table.add_row(escape(layer.path), layer.linear_format, *(f"{error:.1%}" for error in errors))
    console.print(table)
    console.print("* of the median input channel", style="dim", highlight=False)
    stock = check.stock
    compared = f"not compared: {stock.note}" if stock.error is None else f"{stock.error:.2%} apart {stock.note}"
    console.print(escape(f"velocity, pixtune's and {check.pipeline_class}'s: {compared.strip()}"), highlight=False)
    for quantized in check.formats:
        kept = quantized.cosine_kept
        then = "" if kept is None else f", {kept:.4f} with keep_plain"
        console.print(
            f"LoRA gradients in {quantized.linear_format}: cosine {quantized.cosine:.4f}{then}",
            highlight=False,
        )
    console.print(escape(check.verdict), style="bold red" if check.faults else "bold green", highlight=False)


def rows_of(machine: Machine) -> list[tuple[str, str]]:
    """Returns names and values for people."""
    facts = machine.facts
    system = f"{machine.system}{' (WSL)' if machine.is_wsl else ''}, {machine.machine}, Python {machine.python}"
    rows = [("system", system), ("torch", _torch(machine))]
    if facts is not None and facts.device == "cuda":
        rows += _gpu_rows(facts, machine)
    elif facts is not None:
        rows.append(("device", f"CPU ({facts.name})"))
    rows += [
        ("host memory", _host(machine)),
        ("free disk", _gib(machine.disk_free_bytes)),
        ("packages", ", ".join(f"{name} {version}" for name, version in machine.packages.items() if version)),
    ]
    return rows


def _torch(machine: Machine) -> str:
    torch = machine.torch
    if torch.version is None:
        return "not installed"
    if torch.import_error is not None:
        return f"{torch.version}, cannot be imported"
    build = f"CUDA {torch.cuda_version}" if torch.cuda_version else "no CUDA"
    return f"{torch.version}, {build}{f', cuDNN {torch.cudnn_version}' if torch.cudnn_version else ''}"


def _gpu_rows(facts: HardwareFacts, machine: Machine) -> list[tuple[str, str]]:
    capability = f"compute capability {facts.capability[0]}.{facts.capability[1]}"
    others = f", and {machine.torch.num_gpus - 1} more" if machine.torch.num_gpus > 1 else ""
    memory = f"{_gib(facts.total_bytes)}, of which a run may take {_gib(facts.free_bytes)}"
    if facts.integrated:
        memory += f"; one pool with the CPU, {_gib(machine.memory.page_cache_bytes)} of it cached files"
    bandwidth = facts.memory_bandwidth_bytes_per_second
    speed = facts.link_bandwidth_bytes_per_second
    return [
        ("GPU", f"{facts.name}, {capability}, {facts.num_sms} SMs{others}"),
        ("driver", machine.driver_version or "unknown"),
        ("GPU memory", memory),
        ("bandwidth", f"{bandwidth / 1e9:.0f} GB/s (nominal)" if bandwidth else "unknown: not in the table of cards"),
        ("link to host", LINKS[facts.coherent_link] + (f", about {speed / 1e9:.0f} GB/s" if speed else "")),
        ("tensor cores", ", ".join(facts.tensor_core_formats) or "none of bf16, int8, fp8"),
    ]


def _host(machine: Machine) -> str:
    if machine.facts is None:
        return f"{_gib(machine.memory.total_bytes)}, {_gib(machine.memory.available_bytes)} available"
    facts = machine.facts
    return f"{_gib(facts.host_total_bytes)}, {_gib(facts.host_available_bytes)} available"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
