"""`pixtune bench`: what it measures, what it leaves alone, and when it calls a result worse."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pixtune.bench import peaks, steps
from pixtune.bench.baseline import compare, load_baseline, refuse_other
from pixtune.bench.environment import NO_COMMIT, read_commit
from pixtune.bench.flops import StepFlops
from pixtune.bench.result import Formats, quartiles, shares_of_peak
from pixtune.bench.steps import WARM_UP_STEPS, formats_of
from pixtune.bench.synthetic import write_pictures
from pixtune.cli import app
from pixtune.config import load_config
from pixtune.errors import BaselineError
from tests.runs import ROOT, TINY_MODEL, environment, pixtune

STEPS, BATCH, SIDE, TEXT_TOKENS = 3, 2, 64, 24


def write_user_config(folder: Path, **more: object) -> Path:
    """Of a user whose data is not even there, and who validates, draws, tracks and drops captions."""
    values = {
        "pretrained_model_name_or_path": str(TINY_MODEL),
        "output_dir": str(folder / "output"),
        "mixed_precision": "no",
        "max_train_steps": 1000,
        "num_train_epochs": 3,
        "train_batch_size": BATCH,
        "rank": 4,
        "report_to": "tensorboard",
        "resume_from_checkpoint": "latest",
        "data_config": {
            "img_dir": str(folder / "pictures"),
            "img_size": SIDE,
            "cache_dir": str(folder / "cache"),
            "caption_dropout_rate": 0.5,
            "random_ratio": True,
        },
        "validation": {"held_out_dir": str(folder / "held out")},
        "samples": {"prompts": ["a cat"]},
        **more,
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(values))
    return path


def bench(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """With temporary files in a folder that is looked into afterwards."""
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    words = ["--steps", STEPS, "--text-tokens", TEXT_TOKENS, *arguments]
    return pixtune("bench", folder / "run.yaml", *words, env=environment(TMPDIR=str(temporary)))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    """One run: its folder, its JSON, and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    write_user_config(folder)
    run = bench(folder, "--json", folder / "result.json")
    assert run.returncode == 0, run.stdout
    return folder, json.loads((folder / "result.json").read_text()), run.stdout


def test_it_times_the_configs_own_steps(measured: tuple[Path, Any, str]) -> None:
    _, result, printed = measured
    case = result["case"]
    assert (case["model"], case["method"], case["rank"]) == ("QwenImagePipeline", "lora", 4)
    assert (case["resolution_pixels"], case["batch_size"]) == (SIDE, BATCH)
    assert (case["num_image_tokens"], case["num_text_tokens"]) == ((SIDE // 16) ** 2, TEXT_TOKENS)
    assert len(result["seconds_per_step"]["all"]) == STEPS
    assert result["seconds_per_step"]["num_warm_up_steps"] == WARM_UP_STEPS
    assert result["losses"]["first"] != result["losses"]["last"]
    assert result["plan"]["weights_format"] == "fp32" and result["plan"]["reasons"][0] in printed
    assert set(result["peak_tflop_per_second"]) == {"fp32"}
    assert {"machine", "versions", "commit", "date"} <= set(result)
    assert f"{result['seconds_per_step']['median']:.4g}" in printed


def test_speed_is_operations_over_time(measured: tuple[Path, Any, str]) -> None:
    _, result, _ = measured
    seconds, tflop = result["seconds_per_step"]["median"], result["tflop"]
    assert result["tflop_per_second"]["model"] == pytest.approx(tflop["model"] / seconds)
    share = tflop["hardware"] / seconds / result["peak_tflop_per_second"]["fp32"]
    assert result["share_of_peak"]["hardware"] == pytest.approx(share)
    # 5 blocks of 24 width² weights, half of which each token passes forward and backward; without their ends.
    tokens, width = BATCH * (16 + TEXT_TOKENS), 256
    assert tflop["parts"]["plain"] * 1e12 == pytest.approx(2 * 2 * tokens * 12 * width**2 * 5, rel=0.1)


def test_the_keys_are_those_of_stored_results(measured: tuple[Path, Any, str]) -> None:
    _, result, _ = measured
    earlier = json.loads((ROOT / "benchmarks/results/headline_h200/flux-1024px-batch1-bf16.json").read_text())
    for part in ("tflop", "share_of_peak", "memory", "seconds_per_step", "case"):
        assert result[part].keys() == earlier[part].keys()
    assert result["tflop"]["parts"].keys() == earlier["tflop"]["parts"].keys()


def test_it_leaves_nothing_but_the_result(measured: tuple[Path, Any, str]) -> None:
    folder, _, _ = measured
    assert sorted(path.name for path in folder.iterdir()) == ["result.json", "run.yaml", "temporary"]
    assert not list((folder / "temporary").glob("pixtune-bench-*"))


@pytest.mark.parametrize(("factor", "code", "words"), [(100, 0, "as good as"), (0.001, 1, "worse than")])
def test_slower_than_the_baseline_is_exit_code_1(
    measured: tuple[Path, Any, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    factor: float,
    code: int,
    words: str,
) -> None:
    folder, result, _ = measured
    before = {**result, "seconds_per_step": {"median": result["seconds_per_step"]["median"] * factor}}
    (tmp_path / "before.json").write_text(json.dumps(before))
    monkeypatch.setattr(steps, "measure", lambda *_: result)
    files = ["--baseline", tmp_path / "before.json", "--json", tmp_path / "now.json"]
    run = CliRunner().invoke(app, ["bench", str(folder / "run.yaml"), *map(str, files)])
    assert run.exit_code == code and f"{words} the baseline" in run.stdout, run.output
    assert json.loads((tmp_path / "now.json").read_text()) == result, "kept also where it is worse"


def test_another_case_is_refused_before_a_step_is_taken(measured: tuple[Path, Any, str]) -> None:
    folder, _, _ = measured
    run = bench(folder, "rank=8", "train_batch_size=1", "--resolution", 32, "--baseline", folder / "result.json")
    assert run.returncode == 1 and "first step" not in run.stdout
    for line in ("case.rank is 8 now and 4 there", "case.batch_size is 1 now and 2", "case.resolution_pixels is 32"):
        assert line in run.stdout


def test_it_recomputes_what_the_plan_says(measured: tuple[Path, Any, str]) -> None:
    folder, kept, _ = measured
    run = bench(folder, "disable_gradient_checkpointing=false", "--json", folder / "recomputed.json")
    assert run.returncode == 0, run.stdout
    recomputed = json.loads((folder / "recomputed.json").read_text())
    (folder / "recomputed.json").unlink()
    assert recomputed["tflop"]["model"] == kept["tflop"]["model"]
    parts = recomputed["tflop"]["parts"]
    assert recomputed["tflop"]["hardware"] - kept["tflop"]["hardware"] == pytest.approx(
        parts["plain_again"] + parts["lora_again"] + parts["attention"] / 3
    )


# ---- the parts


def test_captions_and_controls_are_as_many_as_asked_for(tmp_path: Path) -> None:
    data = write_pictures(tmp_path, size_pixels=32, num_pictures=3, num_controls=2, num_words=7)
    for folder in (data.images, *data.controls):
        assert sorted(path.name for path in folder.glob("*.png")) == ["0.png", "1.png", "2.png"]
    assert {len(path.read_text().split()) for path in data.images.glob("*.txt")} == {7}
    contents = {path.read_bytes() for path in tmp_path.rglob("*.png")}
    assert len(contents) == 9, "two pictures are equal, and would be encoded once"


@pytest.mark.parametrize(
    ("model", "data", "count"),
    [
        ("tiny-qwen-image-edit", {"control_dir": ["a", "b"]}, 2),
        ("tiny-qwen-image-edit", {"control_dir": "a"}, 1),
        ("tiny-qwen-image-edit", {"metadata_file": "rows.jsonl"}, 1),
        ("tiny-qwen-image", {"metadata_file": "rows.jsonl"}, 0),
        ("tiny-qwen-image-edit", {}, 0),
    ],
)
def test_a_sample_has_the_configs_controls(tmp_path: Path, model: str, data: dict[str, Any], count: int) -> None:
    model_folder = str(TINY_MODEL.parent / model)
    path = write_user_config(tmp_path, pretrained_model_name_or_path=model_folder, data_config={"img_dir": "x", **data})
    assert steps.usual_controls(load_config(path, folders_must_exist=False)) == count


def test_a_spread_is_that_of_all_steps() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_each_formats_operations_are_held_against_its_own_peak() -> None:
    """A second of bf16 and half a second of fp8 at the peak, in a step of three."""
    flops = StepFlops(plain=60, attention=40, quantized=100, quantized_again=50)
    found = shares_of_peak(flops, Formats("bf16", "fp8"), {"bf16": 100.0, "fp8": 200.0}, seconds=3.0)
    assert found["model"] == pytest.approx(1.5 / 3)
    assert found["hardware"] == pytest.approx(1.75 / 3)


def test_a_peak_counts_two_operations_a_multiplication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "build_product", lambda *_: lambda: time.sleep(0.01))
    monkeypatch.setattr(peaks, "SIDES", {"cpu": (100, 200)})
    assert peaks.measure_peaks(["fp32"], torch.device("cpu"))["fp32"] == pytest.approx(2 * 200**3 / 0.01, rel=0.2)


def test_square_products_are_whole() -> None:
    product = peaks.build_product("fp32", 16, torch.device("cpu"))
    assert product().shape == (16, 16)


def test_a_cpu_has_one_format(tmp_path: Path) -> None:
    from pixtune.hardware.facts import HardwareFacts
    from pixtune.plan.training import plan_training
    from tests.full_size import full_size_footprint

    config = load_config(write_user_config(tmp_path, quantize=True), folders_must_exist=False)
    facts = HardwareFacts("cpu", "a CPU", (0, 0), 0, 0)
    plan = plan_training(facts, full_size_footprint(config), config)
    assert plan.weights_format == "int8" and formats_of(plan, torch.device("cpu")) == Formats("fp32", "fp32")


def stored(**changes: Mapping[str, Any]) -> dict[str, Any]:
    parts: dict[str, dict[str, Any]] = {
        "case": {"model": "A", "rank": 16},
        "machine": {"gpu": "B"},
        "versions": {"torch": "2.11"},
        "seconds_per_step": {"median": 1.0},
        "memory": {"peak_allocated_gib": 10.0},
    }
    return {"benchmark": "training_steps", **{name: {**part, **changes.get(name, {})} for name, part in parts.items()}}


def test_slower_by_5_percent_or_larger_by_2_is_worse() -> None:
    def is_worse(seconds: float, gib: float | None) -> bool:
        now = stored(seconds_per_step={"median": seconds}, memory={"peak_allocated_gib": gib})
        return compare(now, stored(), Path("before.json")).is_worse

    assert not is_worse(1.04, 10.1) and not is_worse(0.5, 5.0)
    assert is_worse(1.06, 10.0) and is_worse(0.5, 10.3)
    assert not is_worse(1.04, None), "without a GPU no memory is compared"


def test_new_versions_are_said_and_another_machine_is_refused() -> None:
    newer = compare(stored(versions={"torch": "2.13"}), stored(), Path("before.json"))
    assert "torch 2.11 to 2.13" in newer.in_words()
    with pytest.raises(BaselineError, match=r"machine\.gpu is 'C' now and 'B' there"):
        refuse_other(stored(machine={"gpu": "C"}), stored(), Path("before.json"))


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "no such file"), ("{", "no JSON"), ('{"benchmark": "loading"}', "'loading'"), ("[]", "'list'")],
)
def test_a_baseline_that_is_none_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "before.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BaselineError, match=words) as caught:
        load_baseline(path)
    assert str(path) in str(caught.value)


def test_a_commit_is_that_of_the_source_not_of_whatever_surrounds_it(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        run = subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return run.stdout.strip()

    source = tmp_path / "site-packages" / "module.py"
    source.parent.mkdir()
    source.write_text("")
    assert read_commit(source) == NO_COMMIT
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "the user's own")
    assert read_commit(source) == NO_COMMIT
    git("add", str(source))
    git("commit", "--quiet", "-m", "with the source")
    assert read_commit(source) == git("rev-parse", "--short", "HEAD")
    source.write_text("changed")
    assert read_commit(source).endswith("-dirty")
