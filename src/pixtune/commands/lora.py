"""`pixtune lora info | convert | merge | resize | extract | compare`: looks at LoRA files, and makes new ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

if TYPE_CHECKING:
    import torch

    from pixtune.deltas.adapter_file import AdapterFile
    from pixtune.deltas.svd import Cut, Wanted

app = typer.Typer(
    help="Look at LoRA files, convert, merge, resize, extract and compare them.\n\n"
    "Example: pixtune lora info my.safetensors",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

File = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", help="LoRA, LoKr or DoRA of any trainer; or a run's output folder, or a checkpoint."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
EveryLayer = Annotated[bool, typer.Option("--layers", help="Show every layer, not the kinds of layers.")]
Output = Annotated[Path, typer.Option(help="File for the result, which must not exist.")]
Names = Literal["diffusers", "comfyui", "kohya"]
Dtype = Literal["fp32", "bf16", "fp16"]
Rank = Annotated[int | None, typer.Option(min=1, help="Rank of the result; with --energy, the largest one.")]
Energy = Annotated[
    float | None,
    typer.Option(help="Share of each layer's squared singular values that is kept, in (0, 1], as 0.95."),
]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Number format of the result; default: the files' own.")]
FormatOption = Annotated[
    Names | None, typer.Option("--format", help="Whose names the result has; default: the file's.")
]


@app.command()
def info(file: File, layers: EveryLayer = False, json_output: Json = False) -> None:
    """Show what a LoRA file is.

    For which base and layers, its ranks, scales, number formats, trigger words and norms.

    Example: pixtune lora info my.safetensors
    """
    from pixtune.commands.lora_page import info_lines
    from pixtune.deltas.adapter_file import find_adapter, read_adapter
    from pixtune.deltas.describing import describe_adapter

    _show(describe_adapter(read_adapter(find_adapter(file))), json_output, lambda found: info_lines(found, layers))


@app.command()
def convert(
    file: File,
    to: Annotated[Names, typer.Option("--to", help="Whose names the result has.")],
    output: Output,
    keep_metadata: Annotated[
        bool, typer.Option(help="Carry all metadata over, with the paths and captions that some hold.")
    ] = False,
) -> None:
    """Write a LoRA with the names of diffusers, ComfyUI or kohya.

    No number changes: converted back, the weights are the same to the bit.

    Example: pixtune lora convert my.safetensors --to kohya --output k.safetensors
    """
    from pixtune.commands.lora_page import convert_lines
    from pixtune.deltas.adapter_file import find_adapter, read_adapter
    from pixtune.deltas.writing import carried_metadata, check_file_target, settled, write_adapter

    file = find_adapter(file)
    check_file_target(output, [file])
    adapter = read_adapter(file)
    metadata = carried_metadata(adapter.metadata, keep_all=keep_metadata)
    rounded = write_adapter(output, settled(adapter), to, adapter.family, metadata)
    _print(convert_lines(adapter, to, output, rounded, metadata))


@app.command()
def merge(
    loras: Annotated[list[Path], typer.Argument(metavar="FILE...", help="LoRAs to merge, or folders of runs.")],
    output: Annotated[Path, typer.Option(help="File, or with --base a folder, for the result; must not exist.")],
    weight: Annotated[
        list[float] | None, typer.Option(help="Weight of each LoRA, in their order; default: 1 for each.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Merge into this model: its folder, a transformer's folder, or a .safetensors file."),
    ] = None,
    rank: Rank = None,
    energy: Energy = None,
    dtype: DtypeOption = None,
    file_format: FormatOption = None,
    layers: EveryLayer = False,
    json_output: Json = False,
) -> None:
    """Merge LoRAs into a base model, or with each other.

    With --base, a model is written in its own number format, one tensor at a time. Without, the result is one LoRA that
    adds what all of them add: exactly, of the sum of their ranks, or cut to --rank.

    Example: pixtune lora merge my.safetensors --base Qwen-Image --output merged
    """
    from pixtune.commands.lora_page import merged_lines
    from pixtune.deltas.adapter_file import find_adapter, read_adapter
    from pixtune.deltas.base_files import open_base
    from pixtune.deltas.merging import merge_into_base
    from pixtune.deltas.writing import check_file_target, check_target
    from pixtune.progress import counted

    weights = weight or [1.0] * len(loras)
    if len(weights) != len(loras):
        raise typer.BadParameter(f"{len(weights)} weights for {len(loras)} LoRAs: give --weight once for each")
    if wrong := [each for each in weights if not math.isfinite(each) or each == 0]:
        raise typer.BadParameter(f"--weight {wrong[0]:g}: a weight is a finite number other than 0")
    files = [find_adapter(path) for path in loras]
    if base is None:
        wanted = _wanted(rank, energy)
        if len(loras) == 1 and rank is None and energy is None and weights == [1.0]:
            raise typer.BadParameter("one LoRA alone leaves nothing to merge: name --base, or more LoRAs")
        check_file_target(output, files)
        _join([*zip([read_adapter(path) for path in files], weights, strict=True)], wanted, output, dtype,
              file_format, layers, json_output)  # fmt: skip
        return
    if unused := [name for name, given in (("--rank", rank), ("--energy", energy), ("--dtype", dtype),
                                           ("--format", file_format)) if given]:  # fmt: skip
        raise typer.BadParameter(f"{unused[0]} is for merging LoRAs with each other; a base keeps its own format")
    opened = open_base(base)
    (check_file_target if opened.is_file else check_target)(output, [*files, opened.path])
    adapters = [*zip([read_adapter(path) for path in files], weights, strict=True)]
    with counted("merging", len(opened.entries), Console(stderr=True)) as count:
        merged = merge_into_base(opened, adapters, output, count)
    _show(merged.as_json(), json_output, lambda found: merged_lines(found, adapters))


@app.command()
def resize(
    file: File,
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    dtype: DtypeOption = None,
    file_format: FormatOption = None,
    layers: EveryLayer = False,
    json_output: Json = False,
) -> None:
    """Cut a LoRA or LoKr to a rank, or to the least ranks that hold a share of its energy.

    The result is the closest LoRA there is (by SVD). The error is that of the written file, number format included.

    Example: pixtune lora resize my.safetensors --rank 16 --output r16.safetensors
    """
    from pixtune.deltas.adapter_file import find_adapter, read_adapter
    from pixtune.deltas.writing import check_file_target

    wanted = _wanted(rank, energy)
    if rank is None and energy is None:
        raise typer.BadParameter("give --rank, as 16, or --energy, as 0.95")
    file = find_adapter(file)
    check_file_target(output, [file])
    _join([(read_adapter(file), 1.0)], wanted, output, dtype, file_format, layers, json_output)


@app.command()
def extract(
    original: Annotated[str, typer.Argument(metavar="ORIGINAL", help="Model before: a folder or a .safetensors file.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Model after, likewise.")],
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format of the result.")] = "bf16",
    file_format: Annotated[Names, typer.Option("--format", help="Whose names the result has.")] = "diffusers",
    device: Annotated[str, typer.Option(help="Device that computes: cpu, cuda, cuda:1.")] = "cpu",
    layers: EveryLayer = False,
    json_output: Json = False,
) -> None:
    """Extract the LoRA that comes closest to what a model has become.

    One layer at a time is in memory.

    Example: pixtune lora extract base tuned --rank 64 --output x.safetensors
    """
    from pixtune.commands.lora_page import cut_lines
    from pixtune.deltas.base_files import open_base
    from pixtune.deltas.describing import describe_cuts
    from pixtune.deltas.extracting import extract_lora
    from pixtune.deltas.writing import as_layers, check_file_target, with_model, write_adapter
    from pixtune.progress import counted

    wanted = _wanted(rank, energy)
    if rank is None and energy is None:
        raise typer.BadParameter("give --rank, as 64, or --energy, as 0.95")
    bases = open_base(original), open_base(tuned)
    check_file_target(output, [base.path for base in bases])
    with counted("extracting", len(bases[0].places), Console(stderr=True)) as count:
        found = extract_lora(*bases, wanted, _dtype(dtype), _device(device), count)
    family = bases[0].families[0]
    loras = {layer: cut.delta for layer, cut in found.cuts.items()}
    write_adapter(output, as_layers(loras), file_format, family, with_model({}, family, output.stem))
    described = describe_cuts(output, found.cuts, {}) | {
        "layers_equal": found.num_equal,
        "not_held": list(found.not_held),
    }
    _show(described, json_output, lambda each: cut_lines(each, layers))


@app.command()
def compare(
    first: File,
    second: Annotated[Path, typer.Argument(metavar="OTHER", help="LoRA to compare it with.")],
    layers: EveryLayer = False,
    json_output: Json = False,
) -> None:
    """Compare two LoRAs: per layer the cosine of what they add, and the ratio of its sizes.

    A cosine of 1 is the same direction, 0 is nothing in common.

    Example: pixtune lora compare early.safetensors late.safetensors
    """
    from pixtune.commands.lora_page import comparison_lines
    from pixtune.deltas.adapter_file import find_adapter, read_adapter
    from pixtune.deltas.comparing import compare_adapters
    from pixtune.deltas.describing import describe_comparison

    adapters = read_adapter(find_adapter(first)), read_adapter(find_adapter(second))
    described = describe_comparison(*adapters, compare_adapters(*adapters))
    _show(described, json_output, lambda each: comparison_lines(each, layers))


def _join(
    adapters: list[tuple[AdapterFile, float]],
    wanted: Wanted,
    output: Path,
    dtype: Dtype | None,
    file_format: Names | None,
    layers: bool,
    json_output: bool,
) -> None:
    """Writes one LoRA that stands for some, and shows what that loses."""
    from pixtune.commands.lora_page import cut_lines
    from pixtune.deltas.describing import describe_cuts
    from pixtune.deltas.joining import common_dtype, join_adapters
    from pixtune.deltas.writing import as_layers, joined_metadata, with_model, write_adapter
    from pixtune.progress import counted

    first = adapters[0][0]
    files = [adapter for adapter, _ in adapters]
    num_layers = len({layer for adapter in files for layer in adapter.changes})
    with counted("resizing" if len(files) == 1 else "merging", num_layers, Console(stderr=True)) as count:
        joined = join_adapters(adapters, wanted, _dtype(dtype) if dtype else common_dtype(files), count)
    cuts: dict[str, Cut] = {layer: each.cut for layer, each in joined.items()}
    written = as_layers({layer: cut.delta for layer, cut in cuts.items()})
    metadata = joined_metadata(files)
    metadata = with_model(metadata, first.family, output.stem) if len(files) > 1 else metadata
    write_adapter(output, written, file_format or first.format, first.family, metadata)
    described = describe_cuts(output, cuts, {layer: each.rank_before for layer, each in joined.items()})
    _show(described, json_output, lambda each: cut_lines(each, layers))


def _wanted(rank: int | None, energy: float | None) -> Wanted:
    from pixtune.deltas.svd import Wanted

    if energy is not None and not 0 < energy <= 1:
        raise typer.BadParameter(f"--energy {energy:g}: it is a share, above 0 and at most 1, as 0.95")
    return Wanted(rank, energy)


def _dtype(name: Dtype) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"--device {name}: PyTorch cannot use it here ({reason:.200})") from error
    return device


def _show(found: dict[str, object], json_output: bool, lines_of: object) -> None:
    """Prints values as JSON, or as lines for people."""
    _print([json.dumps(found, indent=1)] if json_output else lines_of(found))  # type: ignore[operator]


def _print(printed: list[str]) -> None:
    from pixtune.inputs.printing import lines

    for line in printed:
        typer.echo(lines(line))
