"""The plan of a config, live: what to choose, whether it fits, how long it takes, and what more would cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from pixtune.commands.plan import PlanReport, make_report
from pixtune.commands.plan_page import ADVICE, about, in_short, time_lines, verdict
from pixtune.config.folders import folders_of
from pixtune.config.schema import TrainConfig
from pixtune.data.layouts import find_examples
from pixtune.errors import FaultsError, PixtuneError
from pixtune.hardware.cards import CARDS
from pixtune.hardware.facts import GIB
from pixtune.storage.architecture import find_architecture, find_cached, find_shipped
from pixtune.storage.model_folder import download_command
from pixtune.ui import choices, form, runs, turns
from pixtune.ui.answers import BadRequestError, answer, done, field, read_form
from pixtune.ui.configs import ConfigFile, given_values, open_config, read_config, write_config
from pixtune.ui.home import first_prompts
from pixtune.ui.jobs import command_line
from pixtune.ui.workplace import Workplace, place_in, workplace_of
from pixtune.ui.yaml_edit import parse_value, set_key


@dataclass(frozen=True)
class Bar:
    """A phase's memory beside what there is."""

    name: str
    holds: str
    gib: float
    share: float
    """Share of what is usable; above 1 it does not fit."""
    is_largest: bool
    advice: str


@dataclass(frozen=True)
class Other:
    """Cost of another choice."""

    words: str
    peak_gib: float | None
    fits: bool
    time: str


@dataclass(frozen=True)
class PlanView:
    """The plan as the page shows it."""

    verdict: str
    fits: bool
    has_gpu: bool
    machine: str
    usable_gib: float
    bars: tuple[Bar, ...]
    times: tuple[str, ...]
    decisions: tuple[tuple[str, str], ...]
    reasons: tuple[str, ...]
    assumptions: tuple[str, ...]
    others: tuple[Other, ...]
    problem: str = ""
    faults: tuple[str, ...] = ()


ON_CPU = (
    "There is no GPU here: a run would use the CPU, which only small models suit. Above, choose a card to plan for."
)
NO_PLAN = PlanView("", False, False, "", 0, (), (), (), (), (), ())


def build_plan(config: TrainConfig, card: str) -> PlanView:
    """Plans a config for this machine, or for a card of the table; a plan that cannot be made is shown with why."""
    if config.training_adapter.path is None:
        return plan_here(config, card)
    # Such a LoRA is read by torch, whose 200 MB are not to stay in the server.
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:
        return apart.submit(plan_here, config, card).result()


def plan_here(config: TrainConfig, card: str) -> PlanView:
    """Plans a config within this process; see `build_plan`."""
    try:
        report = make_report(config, card or None)
    except PixtuneError as error:
        return problem_view(error)
    largest = max((phase.device_bytes for phase in report.phases), default=0)
    bars = tuple(
        Bar(
            phase.name, phase.holds, phase.device_bytes / GIB, phase.device_bytes / (report.usable_bytes or 1),
            phase.device_bytes == largest, ADVICE[phase.name] if phase in report.too_large else "",
        )
        for phase in report.phases
    )  # fmt: skip
    return PlanView(
        verdict=verdict(report).replace("\\[", "[") if report.usable_bytes else ON_CPU,
        fits=not report.too_large,
        has_gpu=bool(report.usable_bytes),
        machine=report.facts.name,
        usable_gib=report.usable_bytes / GIB,
        bars=bars,
        times=tuple(time_lines(report)),
        decisions=tuple(in_short(report.plan)),
        reasons=(*report.plan.reasons, *report.encoders.reasons),
        assumptions=report.assumptions,
        others=tuple(other_choices(config, card)) if report.usable_bytes else (),
    )


def problem_view(error: PixtuneError) -> PlanView:
    """Shows why there is no plan."""
    what, faults = (error.headline, error.faults) if isinstance(error, FaultsError) else (str(error), [])
    return PlanView(**{**NO_PLAN.__dict__, "problem": what, "faults": tuple(faults)})


def other_choices(config: TrainConfig, card: str) -> list[Other]:
    """Plans what a person may want to change next: larger pictures, more at once, a higher rank."""
    data = config.data_config
    found = []
    size = data.img_size if isinstance(data.img_size, int) else max(data.img_size)
    for words, changes in (
        (f"pictures of {size * 3 // 2 // 16 * 16} pixels", {"img_size": size * 3 // 2 // 16 * 16}),
        ("twice as many pictures at once", {"train_batch_size": config.batch_size * 2}),
        ("twice the rank", {"rank": config.rank * 2}),
    ):
        changed = config.model_copy(update=changes)
        if "img_size" in changes:
            changed = config.model_copy(update={"data_config": data.model_copy(update=changes)})
        try:
            report = make_report(changed, card or None)
        except PixtuneError:
            found.append(Other(words, None, False, ""))
            continue
        found.append(Other(words, peak_gib(report), not report.too_large, seconds_words(report)))
    return found


def peak_gib(report: PlanReport) -> float:
    """Returns the largest phase's memory."""
    return max((phase.device_bytes for phase in report.phases), default=0) / GIB


def seconds_words(report: PlanReport) -> str:
    """Returns how long a step takes, and all of them."""
    if not report.plan.micro_batch_seconds:
        return ""
    step = report.plan.micro_batch_seconds * report.length.micro_batches_per_step
    whole = "" if report.length.num_steps is None else f", {about(report.length.num_steps * step)} in all"
    return f"{step:.2g} s a step{whole}"


# ---- the page


def count_pictures(config: TrainConfig | None) -> int:
    """Counts the pictures with captions of a config's folders; 0 where they cannot be read."""
    if config is None:
        return 0
    try:
        folders = [each for each in folders_of(config.data_config) if each.dataset is None and each.img_dir.is_dir()]
        return sum(len(find_examples(each).pairs) for each in folders)
    except PixtuneError:
        return 0


def count_missing(config: TrainConfig | None) -> int:
    """Counts the pictures of a config's folders without a caption, with which no run begins; 0 where none is read."""
    if config is None:
        return 0
    try:
        folders = [each for each in folders_of(config.data_config) if each.dataset is None and each.img_dir.is_dir()]
        return sum(len(find_examples(each).lone_pictures) for each in folders)
    except PixtuneError:
        return 0


def suggested_prompts(config: TrainConfig | None) -> list[str]:
    """Returns captions to draw while a run learns that has no prompts yet: its pictures came after its config."""
    if config is None or config.samples.prompts:
        return []
    folder = folders_of(config.data_config)[0]
    if folder.dataset is not None or not folder.img_dir.is_dir():
        return []
    try:
        return first_prompts(find_examples(folder)) or []
    except PixtuneError:
        return []


@dataclass(frozen=True)
class ModelState:
    """Place of a config's model."""

    name: str
    is_here: bool
    words: str
    command: str


def model_state(config: TrainConfig | None) -> ModelState | None:
    """Finds whether a model's files are on this machine, and else how they get here."""
    if config is None:
        return None
    name = config.pretrained_model_name_or_path
    try:
        if Path(name).expanduser().exists():
            return ModelState(name, True, "a folder on this machine", "")
        cached = find_cached(name)
        if cached is not None and cached.has_weights("transformer"):
            return ModelState(name, True, "in this machine's hub cache", "")
        size = download_gb(name)
        about_size = f"{size:.0f} GB or a little more" if size else "tens of gigabytes"
        return ModelState(name, False, f"not here yet: {about_size} to download, once", download_command(name))
    except PixtuneError as error:
        return ModelState(name, False, str(error), "")


def edits_pictures(config: TrainConfig | None) -> bool:
    """Returns whether a config's model takes control pictures; False where it is not known."""
    from pixtune.families import family_of

    try:
        return (
            config is not None and family_of(find_architecture(config.pretrained_model_name_or_path)).max_controls > 0
        )
    except PixtuneError:
        return False


def download_gb(name: str) -> float | None:
    """Returns the size of a published model in bf16, GB; None where it is not known here."""
    from pixtune.families import family_of
    from pixtune.planning import shapes_of_config

    shipped = find_shipped(name)
    if shipped is None:
        return None
    encoders = [shipped.count_parameters(part) or 0 for part in ("text_encoder", "text_encoder_2", "vae")]
    transformer = sum(math.prod(shape) for shape in shapes_of_config(family_of(shipped), shipped).values())
    return 2e-9 * (sum(encoders) + transformer)


def build_view(work: Workplace, file: ConfigFile, card: str, error: str = "") -> dict[str, Any]:
    """Puts the page's values together."""
    given = given_values(file.text)
    num_pictures, is_small = count_pictures(file.config), _is_small(given)
    plan = build_plan(file.config, card) if file.config is not None else problem_view(_problem(file))
    return {
        "step": "plan",
        "steps": runs.steps_of_config(work, file),
        "file": {"place": file.place, "name": file.name, "text": file.text, "path": str(file.path)},
        "plan": plan,
        "card": card,
        "cards": [each.name for each in CARDS],
        "qualities": [
            {"word": each.word, "title": each.title, "sentence": each.sentence,
             "keys": choices.keys_of(each, num_pictures, is_small)}
            for each in choices.QUALITIES
        ],
        "chosen": choices.chosen(given, num_pictures, is_small),
        "fields": form.essential_fields(given, edits_pictures(file.config)),
        "sections": form.all_sections(given),
        "num_pictures": num_pictures,
        "prompts": suggested_prompts(file.config),
        "num_missing": count_missing(file.config),
        "at_work": [folder.name for folder in turns.at_work(work, runs.folder_of_config(work, file))],
        "model": model_state(file.config),
        "command": command_line(["train", _shown_path(work, file)]),
        "error": error,
    }  # fmt: skip


def _is_small(given: Mapping[str, Any]) -> bool:
    return choices.is_small_model(str(given.get("pretrained_model_name_or_path", "")))


def _problem(file: ConfigFile) -> PixtuneError:
    assert file.problem is not None, "a config without values has a problem"
    return file.problem


def _shown_path(work: Workplace, file: ConfigFile) -> str:
    return str(file.path.relative_to(work.home) if file.path.is_relative_to(work.home) else file.path)


def _card(request: Request) -> str:
    card = request.query_params.get("card", "")
    return card if any(card == each.name for each in CARDS) else ""


async def show(request: Request) -> Response:
    """The choices and the plan of a config; `card` names another GPU to plan for."""
    work = workplace_of(request)
    file = open_config(work, place_in(request))
    return answer(request, "plan.html", await run_in_threadpool(build_view, work, file, _card(request)))


async def change(request: Request) -> Response:
    """Changes a config: one `key` to `value` (empty: leave it out), the keys of a `quality`, or the whole `yaml`."""
    work, fields = workplace_of(request), await read_form(request)
    file = open_config(work, place_in(request))
    text = file.text
    if "yaml" in fields:
        text = fields["yaml"]
    elif "quality" in fields:
        quality = next((each for each in choices.QUALITIES if each.word == fields["quality"]), None)
        if quality is None:
            raise BadRequestError(f"quality is one of {', '.join(each.word for each in choices.QUALITIES)}")
        keys = choices.keys_of(quality, count_pictures(file.config), _is_small(given_values(text)))
        for key, value in keys.items():
            text = set_key(text, key, value)
    else:
        key, value = field(fields, "key"), field(fields, "value").strip()
        if not form.is_key(key):
            raise BadRequestError(f"{key[:80]!r} is no key of a config")
        if key == "samples.prompts" and not value.startswith("["):
            parsed: Any = [line.strip() for line in value.splitlines() if line.strip()]
        elif value in form.choices_of(next(each.values for each in form.all_keys() if each.name == key)):
            parsed = {"true": True, "false": False}.get(value, value)
        else:
            parsed = parse_value(value) if value else None
        text = set_key(text, key, parsed or None if key == "samples.prompts" else parsed)
    await run_in_threadpool(write_config, file.path, text)
    if request.headers.get("hx-request"):
        file = read_config(work, file.place, file.path)
        view = await run_in_threadpool(build_view, work, file, fields.get("card", ""))
        return answer(request, "plan_parts.html", view)
    return done(request, f"/plan/{file.place}", {"text": text})


async def yaml_file(request: Request) -> Response:
    """The YAML of a config."""
    file = open_config(workplace_of(request), place_in(request))
    named = {"content-disposition": f'attachment; filename="{file.name.encode("ascii", "replace").decode()}.yaml"'}
    return PlainTextResponse(file.text, headers=named if "download" in request.query_params else {})
