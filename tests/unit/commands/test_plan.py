"""`pixtune plan`: its report before anything is downloaded, loaded or trained."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from pixtune.commands import plan as plan_command
from pixtune.commands.plan import (
    Machines,
    PlanReport,
    before_cuda,
    facts_of_this_machine,
    length_of,
    make_report,
)
from pixtune.commands.plan_page import about, render
from pixtune.config import load_config
from pixtune.config.schema import TrainConfig
from pixtune.errors import PixtuneError, PlanError
from pixtune.families import family_of
from pixtune.hardware.cards import HOST_BYTES, facts_as
from pixtune.hardware.facts import GIB, PROCESS_HOST_BYTES
from pixtune.plan.encoders import PLAINLY, TEXT_BYTES_PER_TOKEN, TEXT_TOKENS, decoding_bytes
from pixtune.plan.situation import CONTEXT_BYTES
from pixtune.plan.training import TrainingPlan
from pixtune.planning import BetweenSteps, SamplesBetween, plan_between_steps
from pixtune.storage.architecture import CONFIG_PATTERNS
from pixtune.storage.checkpoint import read_decision
from pixtune.storage.model_folder import ModelFolder
from tests.full_size import TEXT_ENCODER, build_full_size_folder
from tests.runs import ROOT, TINY_MODEL, environment, pixtune


@pytest.fixture(scope="session")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Full-size folders without data."""
    root = tmp_path_factory.mktemp("full_size")
    return {name: build_full_size_folder(root / name, name) for name in ("qwen_image", "flux")}


def config_of(model: Path, *words: str) -> TrainConfig:
    """A config whose data set is not there yet."""
    required = (f"pretrained_model_name_or_path={model}", "output_dir=o", "data_config.img_dir=not/there")
    return load_config(None, [*required, "max_train_steps=1", *words], folders_must_exist=False)


def shown(report: PlanReport, verbose: bool = True) -> str:
    stream = StringIO()
    render(report, Console(file=stream, width=120), verbose)
    return stream.getvalue()


def test_the_steps_of_epochs_count_repeats_and_regularization_pictures(tmp_path: Path) -> None:
    for name, number in (("twice", 6), ("half", 4), ("known", 5)):
        (tmp_path / name).mkdir()
        for index in range(number):
            Image.new("RGB", (64, 64)).save(tmp_path / name / f"{name}{index}.png")
            (tmp_path / name / f"{name}{index}.txt").write_text("a thing")
    folders = f"[{{img_dir: {tmp_path}/twice, repeats: 2}}, {{img_dir: {tmp_path}/half, repeats: 0.5}}]"
    words = ["data_config.img_dir=", f"data_config.folders={folders}", "validation.held_out=0", "train_batch_size=3"]
    epochs = ["max_train_steps=", "num_train_epochs=3"]
    length = length_of(config_of(tmp_path, *words, *epochs))
    assert (length.num_pictures, length.turns_per_epoch, length.num_steps) == (10, 14, 14)  # 3 * (12 + 2) / 3
    assert length.is_by_epochs and not length.is_once
    prior = [f"prior_preservation.folder={tmp_path}/known", "prior_preservation.repeats=2"]
    assert length_of(config_of(tmp_path, *words, *epochs, *prior)).num_steps == 24  # 3 * (12 + 2 + 10) / 3
    drawn = ["prior_preservation.prompts=[a, b]", "prior_preservation.num_pictures=4"]
    assert length_of(config_of(tmp_path, *words, *epochs, *drawn)).num_steps == 22  # 3 * (12 + 2 + 8) / 3


# ---- the whole way, at full size


@pytest.mark.parametrize(
    ("model", "card", "expected"),
    [
        ("qwen_image", "H100", ["bf16", "on the device", "no block"]),
        ("qwen_image", "RTX 4090", ["fp8", "draws ahead", "blocks"]),
        ("flux", "RTX 4070", ["fp8", "in host memory"]),
        ("qwen_image", "RTX 4060", ["nf4", "page-locked"]),
    ],
)
def test_a_card_by_name_gets_an_estimate(
    full_size: dict[str, Path], model: str, card: str, expected: list[str]
) -> None:
    report = make_report(config_of(full_size[model], "data_config.max_text_tokens=256"), card)
    text = shown(report)
    assert report.is_estimate and f"Estimate for {facts_as(card).name}" in text and "nothing was measured" in text
    assert all(word in text for word in [*expected, *(r[:40] for r in report.plan.reasons), "training step"]), text


def test_the_first_lines_answer_whether_it_fits_and_how_long_it_takes(full_size: dict[str, Path]) -> None:
    words = ("gradient_accumulation_steps=2", "max_train_steps=600", "train_batch_size=1")
    pictures = ROOT / "assets" / "demo-style" / "train"
    report = make_report(config_of(full_size["qwen_image"], *words, f"data_config.img_dir={pictures}"), "H100", 256)
    fits, takes, used, machine, *_ = shown(report, verbose=False).splitlines()
    peak = max(phase.device_bytes for phase in report.phases) / GIB
    assert fits.startswith(f"Fits NVIDIA H100 80GB HBM3: {peak:.1f} of {report.usable_bytes / GIB:.1f} GiB at the peak")
    seconds = 2 * report.plan.micro_batch_seconds
    assert f"about {about(600 * seconds)}: 600 steps, {seconds:.2g} s each" in takes and "were measured" in takes
    assert used.startswith("48 pictures with captions, 4 of them held out: each of the others is used about 27 times")
    few = replace(report, length=replace(report.length, num_steps=6))
    assert "each of the others is used 0.27 times" in shown(few, verbose=False), "not about 0 times"
    whole = replace(report, length=replace(report.length, num_held_out=0, turns_per_epoch=48))
    assert "48 pictures with captions: each is used about 25 times" in shown(whole, verbose=False)
    assert report.facts.host_total_bytes == 256 * GIB and "QwenImagePipeline" in machine
    card = shown(make_report(config_of(full_size["qwen_image"]), "RTX 4090"), verbose=False)
    assert "not measured on this kind of card" in card and "there are no pictures in not/there yet" in card
    for word in ("modulation", "CUDA graphs", "inputs of blocks", "page-locked"):
        assert word not in card and word in shown(make_report(config_of(full_size["qwen_image"]), "RTX 4060"))


def test_what_does_not_fit_is_the_first_line(full_size: dict[str, Path]) -> None:
    report = make_report(config_of(full_size["qwen_image"]), "RTX 4090")
    report = replace(report, phases=(replace(report.phases[0], device_bytes=99 * GIB), *report.phases[1:]))
    assert shown(report).startswith("Does not fit as it is: captions encoded, within 22.2 GiB.")


@pytest.mark.parametrize(("seconds", "words"), [(71, "71 s"), (2504, "42 min"), (8000, "2.2 h")])
def test_an_estimate_has_two_digits(seconds: float, words: str) -> None:
    assert about(seconds) == words


def test_it_counts_pictures_and_captions_as_the_config_says(full_size: dict[str, Path]) -> None:
    def peak(*words: str) -> int:
        return make_report(config_of(full_size["flux"], *words), "H200").plan.expected_peak_bytes

    plain = peak()
    assert peak("data_config.img_size=512") < plain < peak("train_batch_size=2")
    assert peak("data_config.max_text_tokens=64") < plain


@pytest.mark.parametrize(("model", "billions"), [("qwen_image", 7.07), ("flux", 4.89)])
def test_captions_need_what_the_text_encoders_weigh(full_size: dict[str, Path], model: str, billions: float) -> None:
    report = make_report(config_of(full_size[model]), "H100")
    captions = report.phases[0]
    assert (captions.name, captions.holds) == ("captions encoded", "text encoder")
    working = TEXT_TOKENS * TEXT_BYTES_PER_TOKEN
    assert captions.device_bytes == pytest.approx(billions * 2e9 + working, rel=0.01)
    assert sum(TEXT_ENCODER[model].values()) == pytest.approx(billions * 1e9, rel=0.01)


def test_encoders_are_made_to_fit_and_the_plan_says_how(full_size: dict[str, Path]) -> None:
    report = make_report(config_of(full_size["qwen_image"], 'samples.prompts=["a cat"]'), "RTX 4060")
    captions, pictures = report.phases[:2]
    assert captions.holds == "text encoder in nf4" and report.encoders.text_format == "nf4"
    assert not {captions.name, pictures.name} & {phase.name for phase in report.too_large}
    assert report.phases[-1].holds.endswith("autoencoder in tiles of 384 pixels")
    words = " ".join(shown(report).split())
    assert "text encoder in 4 bits (nf4 weights, 4." in words
    plain = make_report(config_of(full_size["qwen_image"]), "H100")
    assert not plain.encoders.reasons and "more than there is" not in shown(plain)


def test_an_encoder_on_the_cpu_takes_nothing_of_the_gpu(full_size: dict[str, Path]) -> None:
    words = ("gpu_memory_limit_gib=5.4", "data_config.img_size=512", "data_config.max_text_tokens=256")
    report = make_report(config_of(full_size["qwen_image"], *words), "RTX 4060")
    captions = report.phases[0]
    assert (captions.holds, captions.device_bytes) == ("nothing: the text encoder works on the CPU", 0)
    assert "captions are encoded on the CPU, which is slow" in " ".join(shown(report).split())


def test_a_phase_that_does_not_fit_is_named_with_what_to_do(full_size: dict[str, Path]) -> None:
    report = make_report(config_of(full_size["qwen_image"], "precompute_text_embeddings=false"), "RTX 4090")
    (training,) = report.too_large
    missing = (training.device_bytes - report.usable_bytes) / GIB
    assert f"training step would need {missing:.1f} GiB more than there is. Leave out disable" in shown(report)


@pytest.mark.parametrize(
    ("words", "stays"),
    [
        ((), False),
        (("disable_cpu_offload=true",), True),
        (("precompute_text_embeddings=false",), True),
    ],
)
def test_encoders_that_stay_are_counted_in_every_phase_after_them(
    full_size: dict[str, Path], words: tuple[str, ...], stays: bool
) -> None:
    report = make_report(config_of(full_size["qwen_image"], *words), "H100")
    training = next(phase for phase in report.phases if phase.name == "training step")
    more_gib = (training.device_bytes - report.plan.expected_peak_bytes) / GIB
    assert (more_gib > 13.1) is stays and ("text encoder" in training.holds) is stays


def test_sampling_is_a_phase_where_there_are_samples(full_size: dict[str, Path]) -> None:
    def names(*words: str) -> list[str]:
        return [phase.name for phase in make_report(config_of(full_size["flux"], *words), "H100").phases]

    assert names()[-1] == "training step" and names('samples.prompts=["a cat"]')[-1] == "sampling"


# ---- the command


def test_the_command_prints_json_for_programs(full_size: dict[str, Path]) -> None:
    config = ROOT / "train_configs" / "train_lora.yaml"
    model = f"pretrained_model_name_or_path={full_size['qwen_image']}"
    run = pixtune("plan", config, model, "--card", "H100", "--json")  # as --as
    assert run.returncode == 0, run.stdout
    values = json.loads(run.stdout[run.stdout.index("{") :])
    assert values["is_estimate"] is True and values["machine"]["name"] == facts_as("H100").name
    plan = read_decision(TrainingPlan, values["plan"], "plan")
    training = next(phase for phase in values["phases"] if phase["name"] == "training step")
    assert training["device_bytes"] == plan.expected_peak_bytes <= values["usable_bytes"]


def test_nothing_is_loaded_and_torch_is_not_imported(full_size: dict[str, Path], tmp_path: Path) -> None:
    """Weight files are holes: whoever reads one gets zeros in tens of gigabytes. Torch and others take seconds,
    and without torch no CUDA starts."""
    bare = [configs_alone(folder, tmp_path / name) for name, folder in full_size.items()]
    code = f"""
import sys
from pathlib import Path
from pixtune.config import load_config
from pixtune.commands.plan import make_report
for model in {[str(folder) for folder in (full_size["qwen_image"], *bare, "Qwen/Qwen-Image")]}:
    words = [f"pretrained_model_name_or_path={{model}}", "output_dir=o", "data_config.img_dir=x"]
    config = load_config(None, [*words, "max_train_steps=1"], folders_must_exist=False)
    for card in ("4090", None):
        make_report(config, card)
heavy = {{"torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    env = environment(HF_HOME=str(tmp_path))  # an empty cache
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_config_that_does_not_fit_ends_with_what_is_missing(full_size: dict[str, Path]) -> None:
    with pytest.raises(PlanError, match="GiB are missing"):
        make_report(config_of(full_size["qwen_image"], "disable_gradient_checkpointing=true"), "RTX 4090")


def test_an_unknown_card_is_answered_with_near_ones() -> None:
    with pytest.raises(PixtuneError, match="no card named 'RTX 4095'"):
        make_report(config_of(TINY_MODEL), "RTX 4095")


# ---- models without weights


def configs_alone(source: Path, folder: Path) -> Path:
    """Leaves what the error's command fetches: no weights, but the index of those that come in several files."""
    for file in {file for pattern in CONFIG_PATTERNS for file in source.glob(pattern.replace("*.", "*/*."))}:
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return folder


def test_configs_alone_are_enough(full_size: dict[str, Path], tmp_path: Path) -> None:
    configs_alone(full_size["qwen_image"], tmp_path)
    total_size = 2 * TEXT_ENCODER["qwen_image"]["text_encoder"]
    index = {"metadata": {"total_size": total_size}, "weight_map": {}}
    (tmp_path / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    of_configs = make_report(config_of(tmp_path), "RTX 4090")
    of_headers = make_report(config_of(full_size["qwen_image"]), "RTX 4090")
    assert of_configs.plan == of_headers.plan and of_configs.phases[0] == of_headers.phases[0]
    assert "the weights are not there yet" in of_configs.assumptions[0]


# ---- machines


def test_the_context_of_a_run_is_not_there_yet() -> None:
    facts = facts_as("RTX 4090")
    assert before_cuda(facts).free_bytes == facts.free_bytes - CONTEXT_BYTES
    assert before_cuda(facts).host_available_bytes == facts.host_available_bytes - PROCESS_HOST_BYTES
    assert before_cuda(facts_as("DGX Spark")).host_available_bytes == facts_as("DGX Spark").host_available_bytes


def test_a_plan_for_this_machine_leaves_room_for_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_command, "read_facts_without_cuda", lambda: facts_as("RTX 4090"))
    assert facts_of_this_machine() == before_cuda(facts_as("RTX 4090"))


def test_without_a_gpu_the_plan_is_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_command, "read_facts_without_cuda", lambda: None)
    assert facts_of_this_machine().device == "cpu"
    report = make_report(config_of(TINY_MODEL))
    assert not report.phases and "There is no GPU here" in shown(report)


# ---- between steps


def test_what_is_done_between_steps_needs_memory_beside_what_the_run_holds(full_size: dict[str, Path]) -> None:
    folder = ModelFolder(full_size["qwen_image"])
    family, config = family_of(folder), config_of(full_size["qwen_image"])
    tokens, pixels = 4096 + 512, 1024 * 1024

    def between(card: str, sample_pixels: int, **changes: object) -> BetweenSteps:
        report = make_report(config, card)
        plan = replace(report.plan, **changes)  # type: ignore[arg-type]
        samples = SamplesBetween(sample_pixels)
        return plan_between_steps(config, family, folder, plan, PLAINLY, samples, tokens)

    sampled, measured = between("H100", pixels), between("H100", 0)
    assert sampled.tile_pixels is None and sampled.device_bytes > decoding_bytes(pixels) > measured.device_bytes > 0
    assert between("RTX 4060", pixels).tile_pixels is not None
    assert between("H100", pixels, usable_bytes=0) == BetweenSteps(None, 0)  # a CPU


# ---- several GPUs


def test_several_gpus_are_planned_without_being_there(full_size: dict[str, Path]) -> None:
    config = config_of(full_size["qwen_image"], "gradient_accumulation_steps=2", "max_train_steps=100")
    one, report = make_report(config, "RTX 4070"), make_report(config, "RTX 4070", machines=Machines(4, 2))
    assert one.together is None and "together" not in json.loads(one.to_json()) and not one.why_together
    together = report.together
    assert together is not None and together.step is not None and report.plan.shards == together.shards == 4
    assert (together.num_processes, together.copies, report.length.pictures_per_step) == (8, 2, 16)
    assert report.facts.host_total_bytes == 4 * HOST_BYTES, "for each GPU of a host"
    text = " ".join(shown(report, verbose=False).split())
    assert "8 GPUs on 2 hosts take 16 pictures a step" in text and "2 copies of the weights, each in parts" in text
    assert f"100 steps, {together.step.seconds:.2g} s each" in text and "NVLink" not in text and "host memory (" in text
    verbose = " ".join(shown(report).split())
    assert all(verbose.count(" ".join(reason.split())) == 1 for reason in report.why_together), "said once"
    values = json.loads(report.to_json())["together"]
    assert values["shards"] == 4 and values["num_exchanges"] == len(together.gathers) + 1
    assert values["efficiency"] == together.step.efficiency <= 1


def test_a_network_by_its_rate_and_all_weights_without_an_estimate(full_size: dict[str, Path]) -> None:
    config = config_of(full_size["qwen_image"])
    slow, fast = (make_report(config, "H100", machines=Machines(1, 8, gbit)) for gbit in (1, 400))
    assert any("the link bounds the step: gradients take" in reason for reason in slow.why_together)
    assert not any("the link bounds" in reason for reason in fast.why_together)
    assert slow.together and fast.together and slow.together.step and fast.together.step
    assert slow.together.step.efficiency < 0.5 < 0.95 < fast.together.step.efficiency
    everything = make_report(config_of(full_size["qwen_image"], "method=full"), "H200", machines=Machines(8))
    assert everything.together is not None and everything.together.step is None
    assert "of gradients" in shown(everything, verbose=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "Invalid value for '--gpus': Input should be greater than or equal to 1"),
        (["--gpus", "-2"], "Invalid value for '--gpus'"),
        (["--gpus", "two"], "Invalid value for '--gpus'"),
        (["--gpus", "1.5"], "Invalid value for '--gpus'"),
        (["--gpus", "99999999999"], "Invalid value for '--gpus': Input should be less than or equal to 1024"),
        (["--hosts", "0"], "Invalid value for '--hosts'"),
        (["--network", "10"], "--network works with --hosts 2 or more"),
        (["--hosts", "2", "--network", "0"], "Invalid value for '--network'"),
        (["--hosts", "2", "--network", "nan"], "Invalid value for '--network'"),
        (["--hosts", "2", "--network", "inf"], "Invalid value for '--network'"),
        (["--gpus", "4", "distributed.shards=3"], "cannot be divided into groups of 3. Possible here: 1, 2, 4"),
        (["--gpus", "2", "distributed.shards=4"], "cannot be divided into groups of 4. Possible here: 1, 2"),
        (["distributed.shards=0"], "distributed.shards"),
        (["distributed.shards=two"], "distributed.shards"),
        (["--gpus", "2", "distributed.shards=2", "disable_gradient_checkpointing=true"], "are recomputed in the backw"),
        (["--gpus", "2", "--as", "RTX 9999"], "no card named 'RTX 9999'"),
    ],
)
def test_bad_numbers_of_gpus_get_one_clear_error(words: list[str], message: str) -> None:
    given = words if "--as" in words else [*words, "--as", "H100"]
    outcome = pixtune("plan", "train_configs/train_lora.yaml", *given, env=environment(COLUMNS="200"))
    printed = " ".join(outcome.stdout.replace("│", " ").split())
    assert outcome.returncode in (1, 2) and message in printed and "Traceback" not in printed, printed
