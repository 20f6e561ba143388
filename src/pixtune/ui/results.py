"""Shows what a run leaves: files to download, and runs compared side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response

from pixtune.errors import PixtuneError
from pixtune.runs.read import find_runs
from pixtune.runs.state import RunState
from pixtune.ui import runs, turns
from pixtune.ui.answers import BadRequestError, answer, as_url, plain_values
from pixtune.ui.run_page import run_folder, strips_of, watch_of
from pixtune.ui.workplace import Workplace, workplace_of

FILES = {
    "pytorch_lora_weights.safetensors": "the LoRA for diffusers, at the last checkpoint",
    "comfyui_lora.safetensors": "the LoRA for ComfyUI, at the last checkpoint",
    "best/pytorch_lora_weights.safetensors": "the LoRA for diffusers, at the step with the lowest held-out loss",
    "best/comfyui_lora.safetensors": "the LoRA for ComfyUI, at the step with the lowest held-out loss",
    "before_after.png": "samples before and after training",
    "report.html": "the report: everything on one page, to hand on",
    "metrics.jsonl": "every figure of every step",
}
"""Files of a run that can be downloaded, by their paths in its folder."""
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy of a report, which may be somebody else's: no script runs, nothing is loaded."""
MOST_COMPARED = 4


@dataclass(frozen=True)
class Download:
    """A file that can be downloaded."""

    file: str
    words: str
    size: str


def downloads_in(folder: Path) -> list[Download]:
    """Lists the files that a run has."""
    found = []
    for file, words in FILES.items():
        if (folder / file).is_file():
            size = (folder / file).stat().st_size
            found.append(Download(file, words, f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"))
    return found


async def show(request: Request) -> Response:
    """The results of a run: its files, and other runs to compare it with."""
    work, folder = run_folder(request)
    state = await watch_of(work, folder).refresh()
    file = await run_in_threadpool(runs.config_of_run, work, folder)
    place = work.roots.place_of(folder)
    others = await run_in_threadpool(_other_runs, work, folder)
    view = {
        "step": "result",
        "name": folder.name,
        "place": place,
        "run": runs.view_of(watch_of(work, folder), turns.loading_since(work, folder)),
        "downloads": downloads_in(folder),
        "is_whole": state is not None and state.config.get("method") == "full",
        "steps": runs.steps_of(file.place if file else None, place),
        "strips": strips_of(work, folder, state) if state else [],
        "others": others,
        "model": state.config.get("pretrained_model_name_or_path") if state else None,
        "folder": str(folder),
        "pipeline": "DiffusionPipeline",
    }
    return answer(request, "result.html", view)


def _other_runs(work: Workplace, folder: Path) -> list[dict[str, str]]:
    found = []
    for root in work.roots.folders.values():
        try:
            found += [each for each in find_runs(root) if each.resolve() != folder]
        except PixtuneError:
            continue
    return [{"place": work.roots.place_of(each), "name": each.name} for each in found[: runs.MOST_RUNS]]


async def download(request: Request) -> Response:
    """A file of a run: query `file`, one of those that its results list."""
    work, folder = run_folder(request)
    name = request.query_params.get("file", "")
    if name not in FILES:
        raise BadRequestError(f"file is one of {', '.join(FILES)}")
    path = work.roots.find(f"{work.roots.place_of(folder)}/{name}")
    if not path.is_file():
        raise BadRequestError(f"this run has no {name}")
    if name == "report.html" and "show" in request.query_params:
        return FileResponse(path, media_type="text/html", headers={"content-security-policy": REPORT_POLICY})
    return FileResponse(path, media_type="application/octet-stream", filename=f"{folder.name}-{Path(name).name}")


async def card(request: Request) -> Response:
    """A model card of the run in Markdown: base, trigger words, how it was trained. It holds no path and no caption."""
    work, folder = run_folder(request)
    state = await watch_of(work, folder).refresh()
    if state is None or not state.config:
        raise BadRequestError("the card is made of the run's config, which no file of it holds yet")
    named = {"content-disposition": 'attachment; filename="README.md"'}
    return PlainTextResponse(model_card(folder.name, state), media_type="text/markdown", headers=named)


def model_card(name: str, state: RunState) -> str:
    """Returns the text of a model card for the hub."""
    config = state.config
    base = str(config.get("pretrained_model_name_or_path", ""))
    is_hub_name = base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()
    data, triggers = config.get("data_config", {}), config.get("trigger_words") or ()
    head = [f"base_model: {json.dumps(base)}"] if is_hub_name else []
    lines = ["---", *head, "library_name: diffusers", "tags: [lora, text-to-image]", "---", "", f"# {name}", ""]
    lines.append(f"A LoRA for {base if is_hub_name else 'the base model that it was trained on'}, made with pixtune.")
    if triggers:
        lines += ["", "Trigger words: " + ", ".join(f"`{str(word).replace('`', '')}`" for word in triggers)]
    lines += ["", "| | |", "|---|---|", f"| steps | {state.step:,} |"]
    for label, value in (
        ("rank", config.get("rank")),
        ("learning rate", config.get("learning_rate")),
        ("size of pictures", data.get("img_size") if isinstance(data, Mapping) else None),
        ("seed", config.get("seed")),
        ("held-out loss", f"{state.held_out_loss.loss:.4f}" if state.held_out_loss else None),
        ("before training", f"{state.first_loss.loss:.4f}" if state.first_loss else None),
    ):
        lines += [f"| {label} | {value} |"] if value is not None else []
    loading = f'DiffusionPipeline.from_pretrained("{base if is_hub_name else "BASE_MODEL"}")'
    lines += ["", "```python", "from diffusers import DiffusionPipeline", f"pipeline = {loading}"]
    lines += ['pipeline.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")', "```", ""]
    return "\n".join(lines)


async def compare(request: Request) -> Response:
    """Runs side by side: query `run`, a place, given two to four times."""
    work = workplace_of(request)
    places = [place for place in request.query_params.getlist("run") if place][:MOST_COMPARED]
    if len(places) < 2:
        raise BadRequestError("name two to four runs to compare")
    compared = []
    for place in places:
        folder = work.roots.find(place)
        state = await watch_of(work, folder).refresh()
        if state is None:
            raise BadRequestError(f"there is no run in {place}")
        figures = watch_of(work, folder).figures
        compared.append(
            {
                "name": folder.name,
                "place": work.roots.place_of(folder),
                "url": f"/run/{as_url(work.roots.place_of(folder))}",
                "words": runs.words_of(state),
                "strips": strips_of(work, folder, state),
                "figures": plain_values(figures),
                "config": flat(state.config),
            }
        )
    view = {
        "step": "compare",
        "runs": compared,
        "differences": differences([each["config"] for each in compared]),
        "prompts": shared_prompts(compared),
    }
    return answer(request, "compare.html", view)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a nested config to dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Lists the keys whose values are not equal in all configs."""
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, [config.get(key) for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def shared_prompts(compared: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lists prompts that several runs have drawn, with the last sample of each run, or None."""
    by_prompt: dict[str, list[Any]] = {}
    for number, run in enumerate(compared):
        for strip in run["strips"]:
            key = f"{strip['prompt']} ({strip['detail']})"
            by_prompt.setdefault(key, [None] * len(compared))[number] = strip["samples"][-1]
    return [{"prompt": prompt, "samples": samples} for prompt, samples in by_prompt.items()]
