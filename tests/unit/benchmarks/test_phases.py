"""benchmarks/phases.py and the model folders that it writes."""

from __future__ import annotations

import importlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pixtune.errors import WriteError
from pixtune.families import family_of
from pixtune.family import Placement, Prompt
from pixtune.planning import count_text_weights
from pixtune.storage.loading import load_safetensors_sharded
from pixtune.storage.model_folder import ModelFolder, open_model_folder
from tests import processes
from tests.full_size import AUTOENCODER, TEXT_ENCODER, UNREAD
from tests.runs import ROOT

BENCHMARKS = ROOT / "benchmarks"
FAMILY = {"qwen-image": "qwen_image", "flux": "flux"}
BF16_BYTES = 2
Result = dict[str, Any]


def small_config(model: str, part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((ROOT / "assets" / model / part / "config.json").read_text())
    return config


@pytest.fixture
def architectures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With toys: the small models' own sizes."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("architectures")
    for name in FAMILY:
        full = module.ARCHITECTURES[name]
        toy = replace(
            full,
            transformer=small_config(full.small_model, "transformer"),
            autoencoder=small_config(full.small_model, "vae"),
            text_encoders={part: replace(encoder, values={}) for part, encoder in full.text_encoders.items()},
        )
        monkeypatch.setitem(module.ARCHITECTURES, f"toy-{name}", toy)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(subprocess, "run", processes.forked_run)
    return module


# ---- the folders


@pytest.mark.parametrize("name", FAMILY)
def test_parts_are_as_large_as_the_published_ones(architectures: ModuleType, name: str) -> None:
    """Counts of the real files, weight by weight."""
    family = FAMILY[name]
    parts = importlib.import_module("random_folders").parts_of(architectures.ARCHITECTURES[name], True)
    counts = {part.name: part.num_bytes // BF16_BYTES for part in parts}
    expected = TEXT_ENCODER[family] | {"vae": AUTOENCODER[family]}
    expected["text_encoder"] += sum(UNREAD[family].values())
    assert {part: counts[part] for part in expected} == expected
    billions = {"qwen-image": 20.4, "flux": 11.9}
    assert counts["transformer"] / 1e9 == pytest.approx(billions[name], abs=0.05)


@pytest.mark.parametrize("name", FAMILY)
def test_the_usual_code_reads_what_was_written(architectures: ModuleType, tmp_path: Path, name: str) -> None:
    random_folders = importlib.import_module("random_folders")
    toy = architectures.ARCHITECTURES[f"toy-{name}"]
    written = random_folders.write_random_model(tmp_path / "model", toy, with_transformer=False)
    folder = open_model_folder(str(tmp_path / "model"))
    assert folder.has_weights("vae") and not folder.has_weights("transformer")
    assert random_folders.write_random_model(tmp_path / "model", toy, with_transformer=False) == 0
    added = random_folders.write_random_model(tmp_path / "model", toy)
    assert added == BF16_BYTES * folder.num_parameters("transformer")
    parts = [*toy.text_encoders, "vae"]
    assert written == BF16_BYTES * sum(folder.num_parameters(part) for part in parts)

    small, family = ModelFolder(ROOT / "assets" / toy.small_model), family_of(folder)
    assert {part: shapes_of(folder, part) for part in [*parts, "transformer"]} == {
        part: shapes_of(small, part) for part in [*parts, "transformer"]
    }
    assert count_text_weights(family, folder) == count_text_weights(family, small)
    placement = Placement(torch.device("cpu"), torch.bfloat16)
    (row,) = family.encode_text(family.load_text_encoder(folder, placement), [Prompt("a red heart")])
    latents = family.encode_images(family.load_autoencoder(folder, placement), torch.rand(1, 3, 64, 64))
    for tensor in (*row.values(), latents.mean_BCHW, latents.std_BCHW):
        assert tensor.isfinite().all() and tensor.float().std() > 0


def shapes_of(folder: ModelFolder, part: str) -> dict[str, torch.Size]:
    """A tied weight stands in some files twice; of these only the first is compared."""
    tensors = load_safetensors_sharded(folder.path / part)
    return {name: tensor.shape for name, tensor in tensors.items() if name != "encoder.embed_tokens.weight"}


def test_a_part_that_was_broken_off_is_written_again(architectures: ModuleType, tmp_path: Path) -> None:
    random_folders = importlib.import_module("random_folders")
    toy = architectures.ARCHITECTURES["toy-qwen-image"]
    random_folders.write_random_model(tmp_path, toy, with_transformer=False)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    (tmp_path / "vae" / random_folders.COMPLETE).unlink()
    file.write_bytes(whole[:100])
    assert 0 < random_folders.write_random_model(tmp_path, toy, with_transformer=False) < 1e7
    assert file.read_bytes() == whole
    values = load_file(file)["encoder.conv_in.weight"].float()
    assert 0.01 < values.std() < 0.03 and not values.flatten()[:10].equal(values.flatten()[10:20])


def test_what_does_not_fit_is_not_begun(
    architectures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_folders = importlib.import_module("random_folders")
    monkeypatch.setattr(random_folders.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**30 + 1000))
    with pytest.raises(WriteError, match=r"1\.0 GiB are free .* --phases caching"):
        random_folders.write_random_model(tmp_path / "new" / "model", architectures.ARCHITECTURES["toy-flux"])
    assert not list(tmp_path.iterdir())


# ---- cells


@pytest.mark.parametrize("name", FAMILY)
def test_phases_are_measured_and_shown(
    architectures: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    phases = importlib.import_module("phases")
    output, weights = tmp_path / "results", tmp_path / "weights"
    wanted = phases.PHASES if name == "qwen-image" else ["sampling"]  # each takes a process, seconds to start
    words = ["--output", str(output), "--folder", str(weights), "--steps", "3", f"toy-{name},1,64"]
    words += ["--phases", ",".join(wanted)]
    monkeypatch.setattr("sys.argv", ["phases.py", *words])
    phases.main()
    printed = capsys.readouterr().out
    assert not list(weights.iterdir()), "the model's folder is removed when its cells are done"
    results = {phase: json.loads((output / f"toy-{name}-1-{phase}-size=64.json").read_text()) for phase in wanted}
    stages = {phase: [stage["stage"] for stage in result["stages"]] for phase, result in results.items()}
    expected = {
        "caching": ["text encoding", "image encoding"], "sampling": ["prompts encoded", "transformer", "pictures drawn"]
    }  # fmt: skip
    assert stages == {phase: expected[phase] for phase in wanted}
    for result in results.values():
        assert {"machine", "versions", "commit", "wall_seconds", "encoders"} <= set(result)
    assert results["sampling"]["seconds_per_step"] > 0
    assert results["sampling"]["passes_per_step"] == (2 if name == "qwen-image" else 1)
    assert printed.count("\n") == 2 + sum(map(len, stages.values())) and " s/step |" in printed
    if "caching" in wanted:
        for rate in (results["caching"]["captions"], results["caching"]["pictures"]):
            assert rate["per_second"] > 0
        assert printed.count("/s |") == 2

    def refuse(*_: object) -> Result:
        raise AssertionError("what is there is not measured again")

    monkeypatch.setattr(phases, "run_cell", refuse)
    monkeypatch.setattr("sys.argv", ["phases.py", *words, "--table"])
    phases.main()
    assert capsys.readouterr().out == printed


def test_a_process_that_takes_more_than_its_limit_is_told(architectures: ModuleType) -> None:
    phases = importlib.import_module("phases")
    stage = {"stage": "text encoding", "holds": "text encoder", "planned_gib": 5.0, "peak_gib": 5.1}
    rate = {"per_second": 1.0}
    result = {"model": "flux", "limit_gib": 7.4, "phase": "caching", "outside_allocator_gib": 0.6,
              "captions": rate, "pictures": rate}  # fmt: skip
    for reserved_gib, word in ((6.7, "yes"), (6.9, "NO")):
        (row,) = phases.rows({**result, "stages": [{**stage, "peak_reserved_gib": reserved_gib}]})
        columns = dict(zip(phases.COLUMNS, (text.strip() for text in row.strip("|").split("|")), strict=True))
        assert columns["within"] == word and columns["process GiB"] == f"{reserved_gib + 0.6:.2f}"
    (failed,) = phases.rows({**result, "failed": "exit code 1: no room"})
    assert failed.count("|") == row.count("|")


def test_a_models_cells_stand_together_and_caching_comes_first(architectures: ModuleType) -> None:
    phases = importlib.import_module("phases")
    cells = phases.parse_cells([], phases.PHASES)
    assert len({cell.name for cell in cells}) == len(cells) == 20
    order = [(cell.model, cell.phase) for cell in cells]
    assert list(dict.fromkeys(order)) == [(model, phase) for model in FAMILY for phase in phases.PHASES]
    assert order == sorted(order, key=list(dict.fromkeys(order)).index)
    with pytest.raises(ValueError, match="the model is one of qwen-image, flux"):
        phases.parse_cells(["qwen-image-edit,79"], phases.PHASES)
    with pytest.raises(ValueError, match="a phase is one of"):
        phases.parse_cells([], ["training"])


def test_steps_are_timed_without_the_one_that_warms_up(
    architectures: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = importlib.import_module("phase_worker")
    assert worker.seconds_of_steps([0.0, 7.0, 9.5, 12.0]) == [2.5, 2.5]
    assert worker.seconds_of_steps([0.0, 6.0]) == [6.0]
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 21.0, 30.0, 33.0])
    monkeypatch.setattr(worker, "now", lambda: next(clock))
    encodes = worker.Encodes()
    encode = worker.watched(lambda encoder: lambda one: one * 2, encodes)(None)
    assert [encode(each) for each in (1, 3, 4)] == [2, 6, 8]
    assert encodes.rates() == {"load_seconds": 5.0, "per_second": 0.5}, "two in 1 and 3 s, after one that warms up"
