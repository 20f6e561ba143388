"""`pixtune sample` samples as planned, whatever form the base has."""

from __future__ import annotations

import functools
import gc
import json
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from pixtune.cli import app
from pixtune.commands import sample as module
from pixtune.commands.sample import config_of, sample_pictures, sizes_of
from pixtune.config.model_parts import NO_PARTS
from pixtune.data import drawing
from pixtune.data.drawing import Plans, SampleRequest, make_plans, open_task, sample_as_planned
from pixtune.data.sample_prompts import AskedPrompt, at_sizes, read_prompts
from pixtune.engine.apply import load_planned
from pixtune.engine.load import LoadedTransformer
from pixtune.errors import ConfigError, WeightsError, WriteError
from pixtune.families import FAMILIES, family_of
from pixtune.hardware.cards import facts_as
from pixtune.hardware.monitor import StageLog
from pixtune.plan.encoders import PLAINLY
from pixtune.plan.sampling import SamplingPlan
from pixtune.sampler import PromptSampler, SamplerSettings
from pixtune.storage.checkpoint import save_checkpoint
from pixtune.storage.lineage import Lineage, Session
from pixtune.storage.model_folder import ModelFolder, open_model_folder
from pixtune.storage.safetensors_writer import TensorFile
from pixtune.trained.adapter_config import METADATA_KEY
from pixtune.trained.export import DIFFUSERS_FILE, read_tensors
from pixtune.trained.find_lora import FoundLora, find_lora
from pixtune.trained.saved_lora import read_saved_lora
from tests.families.test_stock_lora import psnr, write_lora
from tests.full_size import build_full_size_folder
from tests.runs import ROOT
from tests.shallow import shallow_model
from tests.unit.engine import tiny

CPU = torch.device("cpu")
MODELS = ("tiny-qwen-image", "tiny-flux")
PLAIN = SamplingPlan("fp32", "fp32", 0, 0, False, None, 0, 0)
NUM_STEPS = 3
MOST_TOKENS = 48
"""More than the prompts have. FLUX pads each to the most that it reads, which are 512 otherwise."""


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One for each model, that changes its pictures."""
    paths = {}
    for name in MODELS:
        folder = open_model_folder(str(shallow_model(name)))
        path = tmp_path_factory.mktemp(name)
        write_lora(family_of(folder), folder, path)
        paths[name] = path / DIFFUSERS_FILE
    return paths


def request_for(
    model: str | Path,
    lora: Path | None = None,
    texts: Sequence[str] = ("red heart, flat emoji style", "a fox"),
    size: tuple[int, int] = (64, 96),
    negative: str | None = None,
    **changes: Any,
) -> SampleRequest:
    settings = SamplerSettings((4, 5), NUM_STEPS, 3.0)
    request = SampleRequest(
        str(shallow_model(model) if model in MODELS else model),
        tuple(AskedPrompt(text, negative, size=size) for text in texts),
        lora, "fp32", settings, MOST_TOKENS if model in MODELS else None, 1024,
    )  # fmt: skip
    return replace(request, **changes)


def pictures(model: str, lora: Path | None, plan: SamplingPlan) -> list[Image.Image]:
    plans = Plans(PLAINLY, plan)
    return [picture.image for picture in sample_as_planned(open_task(request_for(model, lora)), plans, CPU)]


@functools.cache
def plain_pictures(model: str, lora: Path | None) -> list[Image.Image]:
    """Pictures that others are compared with, sampled once: another test shows that they are the same every time."""
    return pictures(model, lora, PLAIN)


def same(ours: Sequence[Image.Image], theirs: Sequence[Image.Image]) -> bool:
    return [picture.tobytes() for picture in ours] == [picture.tobytes() for picture in theirs]


@pytest.mark.parametrize("name", MODELS)
def test_where_weights_wait_and_when_pictures_are_decoded_changes_nothing(name: str, loras: dict[str, Path]) -> None:
    plain = plain_pictures(name, loras[name])
    assert len(plain) == 4 and plain[0].size == (64, 96)
    assert same(pictures(name, loras[name], replace(PLAIN, streamed_blocks=2)), plain)
    assert same(pictures(name, loras[name], replace(PLAIN, decode_last=True)), plain)
    assert not same(pictures(name, loras[name], replace(PLAIN, decode_last=True, tile_pixels=32)), plain)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [2 * NUM_STEPS + 1, 4])
def test_modulation_ahead_draws_the_same_pictures(name: str, rows: int, loras: dict[str, Path]) -> None:
    plain = plain_pictures(name, loras[name])
    ahead = pictures(name, loras[name], replace(PLAIN, modulation_rows=rows))
    assert min(psnr(ours, theirs) for ours, theirs in zip(ahead, plain, strict=True)) > 55


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("weights_format", "least_cosine"), [("int8", 0.85), ("nf4", 0.3)])
def test_a_lora_changes_pictures_of_a_quantized_base_as_those_of_the_plain_one(
    name: str, weights_format: str, least_cosine: float, loras: dict[str, Path]
) -> None:
    """Cosines measured at worst in four pictures: 0.92 and 0.44 (the smaller model), 0.99 and 0.85; by chance 0."""
    plan = replace(PLAIN, weights_format=weights_format, modulation_rows=2 * NUM_STEPS + 1, streamed_blocks=2)
    ours = levels(pictures(name, loras[name], plan)) - levels(pictures(name, None, plan))
    exact = levels(plain_pictures(name, loras[name])) - levels(plain_pictures(name, None))
    assert nn.functional.cosine_similarity(ours, exact, dim=1).min() > least_cosine and not torch.equal(ours, exact)


def levels(images: list[Image.Image]) -> torch.Tensor:
    """8-bit levels as numbers, a row a picture."""
    return torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).double() for image in images])


def test_the_transformer_is_gone_before_the_first_picture_is_decoded(
    loras: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[nn.Module]] = []
    alive: list[bool] = []
    decode = PromptSampler.decode

    def watched_load(*arguments: Any) -> LoadedTransformer:
        transformer = load_planned(*arguments)
        loaded.append(weakref.ref(transformer.module))
        return transformer

    def watched_decode(sampler: PromptSampler, *arguments: Any) -> Image.Image:
        gc.collect()
        alive.append(loaded[0]() is not None)
        return decode(sampler, *arguments)

    monkeypatch.setattr(drawing, "load_planned", watched_load)
    monkeypatch.setattr(PromptSampler, "decode", watched_decode)
    for decode_last in (True, False):
        loaded.clear()
        alive.clear()
        pictures(MODELS[0], loras[MODELS[0]], replace(PLAIN, decode_last=decode_last, streamed_blocks=2))
        assert alive == [not decode_last] * 4


@pytest.mark.parametrize("decode_last", [False, True])
def test_the_memory_of_each_stage_is_recorded_and_no_weights_are_hashed(
    decode_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> str:
        raise AssertionError("nothing outlives this process that keys would have to name")

    monkeypatch.setattr(ModelFolder, "fingerprint", refuse)
    stages, plans = StageLog(), Plans(PLAINLY, replace(PLAIN, decode_last=decode_last))
    assert len(list(sample_as_planned(open_task(request_for(MODELS[0])), plans, CPU, stages))) == 4
    expected = [drawing.ENCODING, drawing.LOADING, drawing.SAMPLING, *([drawing.DECODING] if decode_last else [])]
    assert [stage.stage for stage in stages.stages] == expected


def test_a_demand_for_8_bits_reaches_the_base(tmp_path: Path, loras: dict[str, Path]) -> None:
    name = MODELS[0]
    plain, eight = (
        [Image.open(path) for path in sample_pictures(request, tmp_path / str(request.quantize))]
        for request in (request_for(name, loras[name], quantize=quantize) for quantize in (None, True))
    )
    assert not same(plain, eight) and same(plain, pictures(name, loras[name], PLAIN))
    assert same(eight, pictures(name, loras[name], replace(PLAIN, weights_format="int8")))


# ---- plans, at full size and from headers alone


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_full_size_folder(tmp_path_factory.mktemp("full_size") / "model", "qwen_image")


@pytest.mark.parametrize(
    ("card", "text_format", "weights_format"),
    [("H100", None, "bf16"), ("RTX 4090", None, "fp8"), ("RTX 3060", "int8", "nf4"), ("RTX 4060", "nf4", "nf4")],
)
def test_encoders_and_base_are_planned_for_the_card(
    full_size: Path, card: str, text_format: str | None, weights_format: str
) -> None:
    request = request_for(full_size, weights_format="bf16", size=(1024, 1024))
    plans = make_plans(open_task(request), config_of(request, Path("out")), facts_as(card))
    assert (plans.encoders.text_format, plans.sampling.weights_format) == (text_format, weights_format)
    assert plans.sampling.expected_peak_bytes < facts_as(card).free_bytes


def test_a_limit_is_a_smaller_card_and_a_larger_picture_needs_more(full_size: Path) -> None:
    def plans(**changes: Any) -> Plans:
        request = request_for(full_size, weights_format="bf16", **{"size": (1024, 1024), **changes})
        return make_plans(open_task(request), config_of(request, Path("out")), facts_as("H100"))

    assert plans(gpu_memory_limit_gib=23.3).sampling.weights_format == "fp8"
    assert plans(quantize=False, gpu_memory_limit_gib=15.3).sampling.streamed_blocks > 0
    assert plans(size=(2048, 2048)).sampling.expected_peak_bytes > plans().sampling.expected_peak_bytes
    one_pass = plans(settings=SamplerSettings((0,), 10, 1.0), gpu_memory_limit_gib=31).sampling
    assert one_pass.modulation_rows == 11 and plans(gpu_memory_limit_gib=31).sampling.modulation_rows == NUM_STEPS + 1


def test_a_lora_of_another_model_is_refused_before_anything_is_loaded(full_size: Path, loras: dict[str, Path]) -> None:
    request = request_for(full_size, loras["tiny-flux"])
    with pytest.raises(WeightsError, match=r"no part of a LoRA of qwen_image\. It is a LoRA of flux"):
        make_plans(open_task(request), config_of(request, Path("out")), facts_as("H100"))


def test_a_lora_that_names_another_family_is_refused_though_its_layers_fit(tmp_path: Path) -> None:
    """Both models have linear layers `transformer_blocks.N.attn.to_q` of one size, at toy size and at full size."""
    folders = {name: open_model_folder(str(shallow_model(name))) for name in ("tiny-qwen-image", "tiny-flux")}
    write_lora(family_of(folders["tiny-qwen-image"]), folders["tiny-qwen-image"], tmp_path)
    file = tmp_path / DIFFUSERS_FILE
    tensors, metadata = read_tensors(file)
    flux = family_of(folders["tiny-flux"])
    stated = [
        {**metadata, "pixtune.family": "qwen_image"},
        {METADATA_KEY: metadata[METADATA_KEY], "modelspec.architecture": "qwen-image/lora"},
    ]
    for each in stated:
        save_file(tensors, file, each)
        with pytest.raises(
            WeightsError, match="is a LoRA for another model: for qwen_image, as its metadata state, and"
        ):
            read_saved_lora(file, flux)
        assert read_saved_lora(file, family_of(folders["tiny-qwen-image"])).modules
        assert read_saved_lora(file, FAMILIES["qwen_image_edit"]).modules, "its layers do the same there"
    save_file(tensors, file, {METADATA_KEY: metadata[METADATA_KEY]})
    assert read_saved_lora(file, flux).modules, "nothing states whose it is"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"strengths": (float("nan"),)}, "--strength is nan: must be a finite number."),
        (
            {"settings": SamplerSettings((2**70,), NUM_STEPS, 3.0)},
            "--seed is 1180591620717411303424: must be less than",
        ),
        ({"prompts": (AskedPrompt("a", size=(0, 64)),)}, "--size is 0x64: must be greater than or equal to 16."),
    ],
)
def test_a_value_that_cannot_be_is_said_once_by_its_option(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config_of(request_for("model", **changes), Path("out"))
    assert [found[: len(fault)] for found in raised.value.faults] == [fault]


def test_strength_scales_what_a_lora_adds(loras: dict[str, Path]) -> None:
    """None of it is the picture without the LoRA; half of it lies between."""
    name = "tiny-flux"

    def drawn(strength: float) -> torch.Tensor:
        task = open_task(request_for(name, loras[name], strengths=(strength,)))
        return levels([picture.image for picture in sample_as_planned(task, Plans(PLAINLY, PLAIN), CPU)])

    without, whole = levels(plain_pictures(name, None)), levels(plain_pictures(name, loras[name]))
    assert torch.equal(drawn(0.0), without)
    assert 0 < (drawn(0.5) - without).norm() < (whole - without).norm()
    patterned = replace(saved := read_saved_lora(loras[name], tiny.family_named(name)), alphas={"to_q": 3.0}).scaled(
        0.5
    )
    assert patterned.alphas == {"to_q": 1.5} and patterned.alpha == 0.5 * saved.alpha


def test_guidance_leads_away_from_the_negative_prompt(loras: dict[str, Path]) -> None:
    name = "tiny-qwen-image"
    task = open_task(request_for(name, negative="a fox"))
    fox = [picture.image for picture in sample_as_planned(task, Plans(PLAINLY, PLAIN), CPU)]
    assert not same(fox, plain_pictures(name, None)) and not task.notes
    empty = open_task(request_for(name, negative=" "))  # the family's own empty prompt
    assert same([p.image for p in sample_as_planned(empty, Plans(PLAINLY, PLAIN), CPU)], plain_pictures(name, None))
    (note,) = open_task(request_for("tiny-flux", negative="a fox")).notes
    assert "the negative prompt has no effect" in note


def test_prompts_with_sizes_seeds_and_negatives_of_their_own_are_drawn_as_alone(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a fox", "seed": 5, "negative": "a sun"}, {"prompt": "a sun", "width": 96, "height": 64}]
    file.write_text("\n".join(map(json.dumps, rows)))
    asked = at_sizes(read_prompts(file), None, sizes_of(["64x64", "64X96"], None, None, 1024))
    assert [(each.text, each.size) for each in asked] == [("a fox", (64, 64)), ("a fox", (64, 96)), ("a sun", (96, 64))]

    def drawn(prompts: Sequence[AskedPrompt]) -> list[tuple[int, Image.Image]]:
        task = open_task(replace(request_for("tiny-qwen-image"), prompts=tuple(prompts)))
        return [(each.seed, each.image) for each in sample_as_planned(task, Plans(PLAINLY, PLAIN), CPU)]

    together, alone = drawn(asked), [each for prompt in asked for each in drawn([prompt])]
    assert [seed for seed, _ in together] == [5, 5, 4, 5] == [seed for seed, _ in alone]
    assert [image.size for _, image in together] == [(64, 64), (64, 96), (96, 64), (96, 64)]
    assert same([image for _, image in together], [image for _, image in alone])
    assert not same([together[1][1]], [plain_pictures("tiny-qwen-image", None)[3]]), "without the negative prompt"


@pytest.mark.parametrize("word", ["64", "64x", "x64", "64x64x64", "-64x64", "64 by 64", "\u0664x64", ""])
def test_words_that_are_no_size(word: str) -> None:
    with pytest.raises(ConfigError, match="write width and height as 1328x800"):
        sizes_of([word], None, None, 1024)
    with pytest.raises(ConfigError, match="given twice"):
        sizes_of(["64x64"], 64, None, 1024)
    assert (sizes_of(None, None, None, 640), sizes_of([], 96, None, 640)) == ([None], [(96, 640)])


def test_a_lora_is_found_in_a_run_a_checkpoint_or_a_file(tmp_path: Path, loras: dict[str, Path]) -> None:
    lora, run = loras["tiny-flux"], tmp_path / "run"
    data = {"img_size": 640, "max_text_tokens": 48, "control_size": 256}
    config = {"pretrained_model_name_or_path": "org/model", "data_config": data}
    for step in (5, 9):
        record = {"config": config}
        tensors, metadata = read_tensors(lora)
        save_checkpoint(
            run, step, {lora.stem: TensorFile(tensors, metadata)}, record, Lineage((Session("a", step),), None, step)
        )
    newest = FoundLora(run / "checkpoint-000009" / lora.name, "org/model", 640, NO_PARTS, 48, 256)
    assert find_lora(run) == find_lora(run / "checkpoint-000009") == find_lora(newest.path) == newest  # type: ignore[arg-type]
    shutil.copyfile(lora, run / lora.name)
    assert find_lora(run) == find_lora(run / lora.name) == replace(newest, path=run / lora.name)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copyfile(lora, other / "mine.safetensors")
    assert find_lora(other) == FoundLora(other / "mine.safetensors")
    (tmp_path / "run" / "best").mkdir()
    shutil.copyfile(lora, run / "best" / lora.name)
    assert find_lora(run / "best") == replace(newest, path=run / "best" / lora.name)
    (tmp_path / "sheet.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "report.html").write_text("<html>")
    for path, words in (
        (tmp_path / "runn", f"Did you mean {run}"),
        (tmp_path / "no" / "where", "there is no LoRA at"),
        (tmp_path, f"name one of the runs in it: {run}"),
        (tmp_path / "sheet.png", "a picture. Give the weights"),
        (tmp_path / "report.html", "a web page"),
        (ROOT, "no pytorch"),
    ):
        with pytest.raises(WeightsError, match=words):
            find_lora(path)


def test_a_model_that_a_run_names_from_where_it_was_started_is_found_from_elsewhere(
    tmp_path: Path, loras: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, metadata = read_tensors(loras["tiny-flux"])
    (tmp_path / "models" / "base").mkdir(parents=True)
    for name in ("models/base", "models/gone"):
        config = {"pretrained_model_name_or_path": name, "output_dir": f"runs/{Path(name).name}"}
        run, file = tmp_path / config["output_dir"], TensorFile(tensors, metadata)
        lineage = Lineage((Session("a", 3),), None, 3)
        save_checkpoint(run, 3, {DIFFUSERS_FILE.removesuffix(".safetensors"): file}, {"config": config}, lineage)
    base, gone = tmp_path / "runs" / "base", tmp_path / "runs" / "gone"
    assert {find_lora(base).model, find_lora(base / "checkpoint-000003").model} == {str(tmp_path / "models" / "base")}
    assert find_lora(gone).model == "models/gone"
    monkeypatch.chdir(tmp_path)
    assert find_lora(base).model == "models/base"
    shutil.move(base, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "runs")
    assert find_lora(tmp_path / "moved").model == "models/base"


def test_a_prompt_is_read_as_in_the_run_of_its_lora(
    tmp_path: Path, loras: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLUX attends to padding, so at another length the pictures are others: the small one's turn to smears."""
    tensors, metadata = read_tensors(loras["tiny-flux"])
    data = {"img_size": 640, "max_text_tokens": 48, "control_size": 256}
    record = {"config": {"pretrained_model_name_or_path": "org/model", "data_config": data}}
    files = {loras["tiny-flux"].stem: TensorFile(tensors, metadata)}
    save_checkpoint(tmp_path / "run", 5, files, record, Lineage((Session("a", 5),), None, 5))
    asked: list[SampleRequest] = []

    def draw_nothing(request: SampleRequest, *_: object) -> tuple[Path, ...]:
        asked.append(request)
        return ()

    monkeypatch.setattr("pixtune.commands.sample.sample_pictures", draw_nothing)
    words = ["sample", "a cat", "--lora", str(tmp_path / "run")]
    for more in ([], ["--max-text-tokens", "9", "--control-size", "64"]):
        assert CliRunner().invoke(app, [*words, *more]).exit_code == 0
    assert [(request.max_text_tokens, request.control_size) for request in asked] == [(48, 256), (9, 64)]


def test_an_edit_model_without_a_picture_to_edit_is_told_of() -> None:
    """Drawn from words alone, the small one's pictures are specks, and nobody would know why."""
    edit, flux = (str(ROOT / "assets" / name) for name in ("tiny-qwen-image-edit", "tiny-flux"))
    (note,) = open_task(request_for(edit, texts=("make it grey", "make it red"))).notes
    assert note.startswith("no picture to edit for 'make it grey' and 1 more: ") and "--control picture.png" in note
    assert open_task(request_for(flux, texts=("a fox",))).notes == ()


def test_a_lora_says_where_it_goes(loras: dict[str, Path]) -> None:
    lora = read_saved_lora(loras[MODELS[0]], tiny.family_named(MODELS[0]))
    assert (lora.rank, lora.alpha) == (4, 10.0) and "transformer_blocks.0.attn.to_q" in lora.modules
    assert 2 * len(lora.modules) == len(lora.weights)


def test_samples_of_before_are_not_written_over(tmp_path: Path) -> None:
    request = request_for(MODELS[1], texts=("a fox",), settings=SamplerSettings((4,), 1, 1.0))
    for name in ("000-seed4.png", "041-seed7-strength0.5.png", "mine-seed3.png"):
        (tmp_path / name).write_bytes(b"kept")
    (path,) = sample_pictures(request, tmp_path)
    assert path.name == "042-seed4.png"
    assert [file.read_bytes() == b"kept" for file in sorted(tmp_path.iterdir())] == [True, True, False, True]


def test_the_plan_is_said_before_anything_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_facts", lambda device: facts_as("RTX 4060"))
    said: list[str] = []
    paths = sample_pictures(request_for(MODELS[1], texts=("a fox",)), tmp_path, said.append)
    assert not said and [path.name for path in paths] == ["000-seed4.png", "001-seed5.png"]
    (line,) = said
    assert line.startswith("plan: base weights in fp32: about 0.") and "GiB are usable" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": SamplerSettings((0,), 0, 3.0)}, "--steps is 0"),
        ({"settings": SamplerSettings((0,), 1, float("nan"))}, "--guidance is nan"),
        ({"settings": SamplerSettings((2**70,), 1, 3.0)}, "--seed is"),
        ({"size": (8, 64)}, "--size is 8x64"),
        ({"size": (10**9, 64)}, "--size is 1000000000x64"),
        ({"control_size": 0}, "control_size is 0"),
        ({"max_text_tokens": 0}, "max_text_tokens is 0"),
        ({"gpu_memory_limit_gib": float("inf")}, "gpu_memory_limit_gib is inf"),
        ({"texts": ("half a \ud83d letter",)}, "whole characters"),
    ],
)
def test_a_request_that_cannot_be_is_refused_before_anything_is_opened(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    request = request_for("no-such-model", **changes)
    with pytest.raises(ConfigError, match=words):
        list(sample_pictures(request, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file/out could not be written to .* --output"):
        list(sample_pictures(request_for("no-such-model"), tmp_path / "file" / "out"))


def test_a_size_is_rounded_and_a_prompt_cut_with_a_word_on_each(tmp_path: Path) -> None:
    said: list[str] = []
    settings = SamplerSettings((0,), 1, 1.0)
    request = request_for(MODELS[0], texts=("one two three four",), size=(100, 70), settings=settings)
    (path,) = sample_pictures(replace(request, max_text_tokens=2), tmp_path, said.append)
    assert Image.open(path).size == (96, 64)
    notes = [line for line in said if line.startswith("note: ")]
    assert notes[0] == "note: samples are drawn at 96x64, not 100x70: the model's sides are multiples of 16."
    assert "1 caption is longer than the 2 tokens" in notes[1] and "the prompt 'one two three four'" in notes[1]
    with pytest.raises(ConfigError, match=r"It is 16x15 pixels|--size is 16x15"):
        list(sample_pictures(request_for(MODELS[0], size=(16, 15)), tmp_path))
