"""The scripts in benchmarks/, at the size of a toy: they measure, keep what they measured and go on with it."""

from __future__ import annotations

import importlib
import json
import subprocess
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from pixtune.storage.checkpoint import joined, load_checkpoint
from pixtune.storage.checkpoint_state import checkpoint_path, find_checkpoints
from tests import processes

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
SIDES = {"num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 128, "joint_attention_dim": 64}
FLUX_SIDES = {**SIDES, "num_layers": 1, "num_single_layers": 2, "pooled_projection_dim": 32, "guidance_embeds": True}
TOYS = {"toy": ("qwen-image", SIDES), "toy-edit": ("qwen-image-edit-2509", SIDES), "toy-flux": ("flux", FLUX_SIDES)}
STEPS = 4
"""The benchmark leaves out three to warm up."""
Result = dict[str, Any]


@pytest.fixture
def architectures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With toys of each family beside the full sizes."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("architectures")
    for name, (model, sides) in TOYS.items():
        full = module.ARCHITECTURES[model]
        toy = replace(full, transformer=full.transformer | sides)
        monkeypatch.setitem(module.ARCHITECTURES, name, toy)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(subprocess, "run", processes.forked_run)
    return module


def script(name: str) -> ModuleType:
    """A module of benchmarks/, where `architectures` has made them importable."""
    return importlib.import_module(name)


# ---- full_size.py


def test_all_weights_are_trained_saved_and_gone_on_with(architectures: ModuleType, tmp_path: Path) -> None:
    full_size = script("full_size")
    output = tmp_path / "run"
    words = ["method=full", "mixed_precision=bf16", "learning_rate=0.001", "checkpoints_total_limit=1"]

    def run(steps: int, *more: str) -> Result:
        """As by `main`: model folder and pictures are made anew each time."""
        folder = tmp_path / f"{steps} steps"
        full_size.prepare(folder, "toy", 64, num_held_out=1)
        result: Result = full_size.measure(folder, output, "toy", 64, steps, [*words, *more], num_held_out=1)
        return result

    first = run(STEPS)
    before = load_checkpoint(checkpoint_path(output, STEPS))
    longer = run(STEPS + 2, "resume_from_checkpoint=latest")
    assert len(first["losses"]) == STEPS and len(longer["losses"]) == STEPS + 2
    assert longer["losses"][:STEPS] == first["losses"]
    assert [line["step"] for line in longer["held_out_losses"]] == [0, STEPS, STEPS + 2]
    assert longer["held_out_losses"][:2] == first["held_out_losses"]
    assert [path.name for path in find_checkpoints(output)] == [f"checkpoint-{STEPS + 2:06d}"]
    after = load_checkpoint(checkpoint_path(output, STEPS + 2))
    one, other = joined(before.tensors, "transformer"), joined(after.tensors, "transformer")
    # The base is random anew in each process, so weights that are near to the saved ones have gone on from them.
    steps_apart = {name: (one[name].float() - other[name].float()).abs().max().item() for name in one}
    assert 0 < max(steps_apart.values()) < 0.02
    assert (output / "model" / "transformer" / "config.json").is_file()


def test_the_loss_of_pictures_that_are_not_trained_on_falls(
    architectures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_size = script("full_size")

    def held_out_losses(learning_rate: float, *more: str) -> list[float]:
        """Before the first step and after the last."""
        folder = tmp_path / f"{learning_rate:g}{len(more)}"
        full_size.prepare(folder, "toy", 64, num_held_out=2)
        words = ["method=full", f"learning_rate={learning_rate:g}", "mixed_precision=no", *more]
        result: Result = full_size.measure(folder, folder / "run", "toy", 64, 5, words, num_held_out=2)
        assert [line["step"] for line in result["held_out_losses"]] == [0, 5]
        assert len(result["losses"]) == 5
        return [line["loss"] for line in result["held_out_losses"]]

    before, after = held_out_losses(1e-3)
    assert after < 0.99 * before
    unchanged = held_out_losses(1e-12)
    assert unchanged[1] == pytest.approx(unchanged[0], rel=1e-6), "noise and sigmas are the same both times"


# ---- reference.py


@pytest.mark.parametrize("name", ["toy", "toy-flux"])
def test_the_reference_learns_by_its_lora_alone(architectures: ModuleType, name: str) -> None:
    reference = script("reference")
    settings = reference.Settings(architectures.ARCHITECTURES[name], 64, batch_size=2, num_text_tokens=8, rank=2)
    device = torch.device("cpu")
    torch.manual_seed(0)
    model = reference.build_model(settings, device)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step = reference.build_step(settings, model, device)
    step(), step()  # the first matrices of a new LoRA learn from the second step on
    changed = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert changed == {name for name in before if ".lora_" in name}
    assert model.is_gradient_checkpointing
    assert not reference.build_model(replace(settings, recompute=False), device).is_gradient_checkpointing
    layers = {name.split(".lora_")[0].removeprefix("transformer_blocks.0.") for name in changed}
    assert {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"} <= layers


def test_the_references_target_is_noise_minus_latents(architectures: ModuleType) -> None:
    """A model that gives back the right velocity has no loss."""
    reference = script("reference")
    latents_BLC, seen = torch.randn(2, 4, 3), []

    def right(hidden_states: torch.Tensor, timestep: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        sigma_B11 = timestep.float()[:, None, None]
        noise_BLC = (hidden_states[:, :4].float() - (1 - sigma_B11) * latents_BLC) / sigma_B11
        seen.append(hidden_states.shape[1])
        return (torch.cat([noise_BLC - latents_BLC, hidden_states[:, 4:]], dim=1),)

    loss = reference.flow_matching_loss(right, latents_BLC, torch.randn(2, 5, 3).bfloat16(), {})
    assert loss < 0.01 and seen == [9], "rounding to bf16 leaves less than that"
    wrong = reference.flow_matching_loss(lambda **all: (-right(**all)[0],), latents_BLC, torch.zeros(2, 0, 3), {})
    assert wrong > 1


def test_reference_and_pixtune_measure_the_same_case(
    architectures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the very command that the tables use for ours; the reference in this process, where its toy is known."""
    cells, reference = script("cells"), script("reference")
    monkeypatch.setattr(reference, "CONTROL_PIXELS", 64)
    overrides = ("mixed_precision=bf16", "data_config.control_size=64")
    for name, controls in (("toy-edit", 2), ("toy-flux", 0)):
        cell = cells.StepCell(name, 64, batch_size=2, num_controls=controls, overrides=overrides)
        ours = cells.measure_steps(cell, tmp_path, num_steps=2)
        assert "failed" not in ours, (tmp_path / f"{cell.name}.log").read_text()
        settings = reference.Settings(
            architectures.ARCHITECTURES[name], 64, 2, cell.num_text_tokens, controls, num_steps=2
        )
        theirs = reference.measure(settings, torch.device("cpu"))
        assert theirs["case"] == ours["case"]
        assert theirs["tflop"]["model"] == ours["tflop"]["model"]
        assert theirs["tflop"]["hardware"] > 1.2 * ours["tflop"]["hardware"]  # it recomputes every block
        assert set(theirs) <= set(ours)


# ---- cells.py and the tables


def test_what_is_there_is_not_measured_again(architectures: ModuleType, tmp_path: Path) -> None:
    cells = script("cells")
    wanted = [cells.StepCell("toy", side) for side in (1, 2, 3)]
    shown: list[int] = []
    measured: list[int] = []

    def measure(cell: Any) -> Result:
        measured.append(cell.resolution_pixels)
        return {"side": cell.resolution_pixels}

    def run(some: list[Any], table: bool = False, no_later_than: float = 1e9) -> list[Any]:
        shown.clear()
        arguments = Namespace(output=tmp_path, table=table, no_later_than=no_later_than)
        left: list[Any] = cells.run_cells(some, arguments, measure, lambda cell, result: shown.append(result["side"]))
        return left

    assert run(wanted[:1]) == [] and measured == [1]
    assert run(wanted, table=True) == wanted[1:] and measured == [1] and shown == [1]
    assert run(wanted, no_later_than=0.0) == wanted[1:] and measured == [1]
    assert run(wanted) == [] and measured == [1, 2, 3] and shown == [1, 2, 3]


def test_a_cell_that_fails_says_why_and_one_that_hangs_is_ended(architectures: ModuleType, tmp_path: Path) -> None:
    cells = script("cells")
    refused = cells.measure_steps(cells.StepCell("toy", overrides=("rank=many",)), tmp_path, num_steps=1)
    assert "rank" in refused["failed"] and "exit code 1" in refused["failed"]
    late = cells.measure_steps(cells.StepCell("toy"), tmp_path, num_steps=1, most_seconds=0.2)
    assert "more than 0.2 s" in late["failed"]
    row = cells.table_row(cells.StepCell("toy"), late, [""])
    assert row.count("|") == cells.table_header([""]).splitlines()[1].count("|")


def result_of(seconds: float) -> Result:
    return {
        "seconds_per_step": {"median": seconds, "first_quartile": seconds, "third_quartile": seconds},
        "tflop_per_second": {"model": 100 / seconds, "hardware": 120 / seconds},
        "share_of_peak": {"hardware": 0.5},
        "memory": {"peak_allocated_gib": 10.0, "peak_process_gib": None},
        "first_step_seconds": 30.0,
    }


def test_the_headline_has_ratios_to_both_compiled_references(
    architectures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    headline = script("headline")
    seconds = {"reference, compiled": 0.6, "reference, compiled, nothing recomputed": 0.4, "bf16": 0.3, "8 bits": 0.2,
               "reference, eager": 0.9}  # fmt: skip
    asked = []

    def measure(cell: Any, *_: object) -> Result:
        asked.append((cell.model, cell.reference, cell.recomputes, cell.overrides))
        return result_of(seconds[cell.label])

    monkeypatch.setattr(headline, "measure_steps", measure)
    monkeypatch.setattr("sys.argv", ["headline.py", "--output", str(tmp_path)])
    headline.main()
    last_columns = [
        "|".join(line.split("|")[-3:-1]).strip() for line in capsys.readouterr().out.splitlines() if "| 0." in line
    ]
    assert last_columns == ["1.00 | 0.67", "1.50 | 1.00", "2.00 | 1.33", "3.00 | 2.00", "0.67 | 0.44"] * 2
    assert len(set(asked)) == 10 and {model for model, *_ in asked} == {"qwen-image", "flux"}
    headline.main()
    assert len(asked) == 10, "a second call measures nothing"


def test_each_call_of_a_sweep_has_its_own_reference(
    architectures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = script("sweep")
    asked = []

    def measure(cell: Any, *_: object) -> Result:
        asked.append(cell.name)
        return {**result_of(0.5 if cell.reference else 0.25), "cell": cell.name}

    monkeypatch.setattr(sweep, "measure_steps", measure)

    def call(*cells: str) -> list[str]:
        asked.clear()
        monkeypatch.setattr("sys.argv", ["sweep.py", "--output", str(tmp_path), *cells])
        sweep.main()
        return list(asked)

    first = call("qwen-image,512,1,0", "qwen-image-edit-2509,1024,1,2", "flux,1024,4,0,gpu_memory_limit_gib=23.3")
    assert [name for name in first if "reference" in name] == [
        "qwen-image-1024px-batch1-reference_of_call_1", "flux-1024px-batch1-reference_of_call_1",
    ]  # fmt: skip
    assert len(first) == 5 and capsys.readouterr().out.count("| 2.00 |") == 3
    assert call("qwen-image,512,1,0") == [], "nothing is left to measure, so no reference either"
    second = call("qwen-image,512,1,0", "qwen-image,2048,1,0")
    assert second == ["qwen-image-1024px-batch1-reference_of_call_2", "qwen-image-2048px-batch1"]
    stored = json.loads((tmp_path / "qwen-image-2048px-batch1.json").read_text())
    assert stored["reference"]["cell"] == second[0]


def test_a_sweep_has_every_size_that_was_promised(architectures: ModuleType) -> None:
    sweep = script("sweep")
    cells = sweep.sweep_cells()
    assert len({cell.name for cell in cells}) == len(cells)
    for model in ("qwen-image", "flux"):
        of_model = [cell for cell in cells if cell.model == model and not cell.overrides]
        assert {cell.resolution_pixels for cell in of_model} == {512, 1024, 1328, 1536, 2048}
        assert {cell.batch_size for cell in of_model} == {1, 2, 4}
        capped = [cell for cell in cells if cell.model == model and cell.overrides]
        assert len(capped) == len(sweep.LIMITS_GIB[model])
    assert {cell.num_controls for cell in cells if "edit" in cell.model} == {1, 2}
    with pytest.raises(ValueError, match="the model is one of"):
        sweep.parse_cell("no-model,512,1,0")


def test_card_sizes_keeps_its_files_and_its_table(
    architectures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stored results of earlier versions are read, and an own one is written beside them."""
    card_sizes = script("card_sizes")
    old = json.loads((BENCHMARKS / "results" / "card_size_qwen_image_47.json").read_text())
    (tmp_path / "qwen-image-47.json").write_text(json.dumps(old))
    monkeypatch.setattr(card_sizes, "measure", lambda *_: {**old, "seconds_per_step_median": 9.0})
    monkeypatch.setattr("sys.argv", ["card_sizes.py", "--output", str(tmp_path), "qwen-image,47", "flux,7.4,rank=64"])
    card_sizes.main()
    printed = capsys.readouterr().out
    peak_gib = old["memory"][0]["measured_peak_gib"]
    assert f"| {old['seconds_per_step_median']:.3f} | {peak_gib:.2f} |" in printed and "| 9.000 |" in printed
    written = json.loads((tmp_path / "flux-7_4-rank=64.json").read_text())
    assert written["limit_gib"] == 7.4 and "wall_seconds" in written


# ---- card_sizes.py


@pytest.mark.usefixtures("architectures")
def test_every_stored_result_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Older ones have other names in their plans."""
    card_sizes = script("card_sizes")
    stored = [json.loads(path.read_text()) for path in (BENCHMARKS / "results").glob("card_size_*.json")]
    rows = [card_sizes.row(result) for result in stored]
    assert len(rows) > 20 and any("cheap recomputed" in row for row in rows)
    assert {row.count("|") for row in rows} == {len(card_sizes.COLUMNS) + 1}


@pytest.mark.usefixtures("architectures")
def test_a_cell_of_many_shapes_has_pictures_and_captions_in_many(tmp_path: Path) -> None:
    card_sizes, full_size = script("card_sizes"), script("full_size")
    cell = card_sizes.parse_cell("qwen-image,23.3,rank=8,--shapes")
    assert cell.shapes and cell.overrides == ("rank=8",) and "shapes" in cell.name
    assert not card_sizes.parse_cell("qwen-image,23.3").shapes
    full_size.prepare(tmp_path, "qwen-image", 64, shapes=full_size.MANY_SHAPES)
    images = sorted((tmp_path / "pictures" / "images").glob("*.png"))
    shapes = {(Image.open(image).size, len(image.with_suffix(".txt").read_text().split())) for image in images}
    assert len(shapes) == len(images) == 20


# ---- drawing.py


def test_a_samplers_steps_are_measured_in_every_way(architectures: ModuleType) -> None:
    """Without a GPU nothing is captured, so the planned way is the plain one."""
    drawing = script("drawing")
    result = drawing.measure(drawing.Settings("toy-edit", size=64, steps=3))
    ways = result["ways"]
    assert list(ways) == ["plain", "pass by pass, planned"] and ways["pass by pass, planned"]["psnr_db"] is None
    assert all(way["seconds_per_step"] > 0 and way["captured"] == 0 for way in ways.values())
    assert result["plan"]["passes"]["captures"] == 0 and result["obstacles"]["compile"] == "no GPU"
    json.dumps(result)
    one, other = torch.tensor([0.0, 10.0]), torch.tensor([1.0, 10.0])
    assert drawing.psnr(other, one) == pytest.approx(23.01, abs=0.01), "10 to 1, half of the numbers off by 1"
