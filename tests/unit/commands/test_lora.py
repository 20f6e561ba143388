"""`pixtune lora`: what its commands print and leave, and how they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pixtune.commands.lora import app
from pixtune.commands.lora_page import megabytes, percent, table
from pixtune.errors import PixtuneError
from tests.unit.deltas.loras import MODELS, lora_tensors, shapes_of, write_lora


def run(*words: object) -> str:
    """What a command prints, where it ends well."""
    outcome = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


def refused(*words: object) -> str:
    """What a command refuses by: a wrong command line, or an error of a user."""
    try:
        outcome = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    except PixtuneError as error:
        return str(error)
    assert outcome.exit_code == 2, outcome.output
    return " ".join(outcome.output.split())


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, shapes = tmp_path_factory.mktemp("loras"), shapes_of("flux")
    metadata = {"pixtune.family": "flux", "pixtune.trigger_words": '["tw3mo"]', "ss_dataset_dirs": "/somewhere"}
    one = write_lora(folder / "one.safetensors", lora_tensors(shapes), metadata, r=4, lora_alpha=10)
    other = write_lora(folder / "other.safetensors", lora_tensors(shapes, 8, 1), {"pixtune.family": "flux"})
    return one, other


def test_info_says_what_a_file_is(loras: tuple[Path, Path]) -> None:
    printed = run("info", loras[0])
    for words in (
        "a LoRA with the names of diffusers",
        "flux",
        "tw3mo",
        "float32",
        "2.5",
        "transformer_blocks.N.attn.to_q",
    ):
        assert words in printed
    assert "transformer_blocks.1.attn.to_q" not in printed
    assert "transformer_blocks.1.attn.to_q" in run("info", loras[0], "--layers")


def rows_of(printed: str) -> dict[str, str]:
    """The rows of `info` above its table, by their names."""
    rows: Any = (line.split(maxsplit=1) for line in printed.partition("\n\n")[0].splitlines()[1:])
    return dict(rows)


def test_info_prints_what_is_stated_and_that_nothing_is(tmp_path: Path) -> None:
    """Layers of 3 and 5 inputs and 4 outputs: 2 x 3 + 4 x 2 + 4 x 5 + 4 x 4 numbers, those of the second all zero."""
    shapes = {"transformer_blocks.0.attn.to_q": (4, 3), "transformer_blocks.0.attn.to_k": (4, 5)}
    tensors = lora_tensors(shapes, lambda layer: 2 if layer.endswith("to_q") else 4)
    tensors = {name: tensor * ("to_q" in name) for name, tensor in tensors.items()}
    a, b = (tensors[f"transformer_blocks.0.attn.to_q.lora_{part}.weight"] for part in "AB")
    stated = {"pixtune.family": "flux", "pixtune.base_model": "some/base", "modelspec.title": "A title"}
    stated["pixtune.trigger_words"] = '["zwx", "b c"]'
    rows = rows_of(run("info", write_lora(tmp_path / "a.safetensors", tensors, stated)))
    assert (rows["title"], rows["base"], rows["trigger"]) == ("A title", "some/base", "zwx, b c")
    assert rows["for"] == "flux (its layers are also those of flux_kontext), the size of no published model"
    assert (rows["layers"], rows["scale"]) == ("2, 1 of them zero", "1")
    assert sorted(rows["rank"].removesuffix(" layers").split(", ")) == ["2 in 1", "4 in 1"]
    assert rows["numbers"].startswith("50 in float32, ")
    assert float(rows["norm"]) == pytest.approx(float((b @ a).norm()), rel=1e-3)
    bare = rows_of(run("info", write_lora(tmp_path / "b.safetensors", tensors, {"pixtune.family": "flux"})))
    assert (bare["base"], bare["trigger"]) == ("not stated", "not stated") and "title" not in bare
    assert all(bare[name] == rows[name] for name in ("for", "layers", "rank", "scale", "norm"))


def test_a_run_s_folder_means_its_newest_lora(loras: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pytorch_lora_weights.safetensors").write_bytes(loras[0].read_bytes())
    assert "pytorch_lora_weights.safetensors: a LoRA" in run("info", tmp_path / "run")
    assert "cosine +1.0000" in run("compare", loras[0], tmp_path / "run")
    assert f"name one of the runs in it: {tmp_path / 'run'}." in refused("info", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "a run writes one with its first checkpoint" in refused("info", tmp_path / "empty")


def test_numbers_beyond_a_format_are_refused(loras: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "m.safetensors"
    words = ("merge", *loras, "--weight", 1e-3, "--weight", 1e7, "--dtype", "fp16", "--output", target)
    assert "beyond float16" in refused(*words) and not target.exists()


def test_info_in_json_has_every_layer_with_its_norm(loras: tuple[Path, Path]) -> None:
    found = json.loads(run("info", loras[0], "--json"))
    tensors = load_file(loras[0])
    assert found["families"] == ["flux", "flux_kontext"] and not found["full_size"] and found["models"] == []
    assert found["ranks"] == {"4": found["num_layers"]} and found["trigger_words"] == ["tw3mo"]
    assert found["num_layers"] == len(tensors) // 2 == len(found["layers"])
    squares = 0.0
    for layer, each in found["layers"].items():
        delta = 2.5 * tensors[f"transformer.{layer}.lora_B.weight"] @ tensors[f"transformer.{layer}.lora_A.weight"]
        assert each["norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert (each["outputs"], each["inputs"]) == delta.shape
        squares += each["norm"] ** 2
    assert found["norm"] == pytest.approx(squares**0.5)


def test_info_names_the_published_models_whose_size_fits(tmp_path: Path) -> None:
    layer = {"transformer_blocks.59.attn.to_q": (3072, 3072)}
    found = json.loads(run("info", write_lora(tmp_path / "a.safetensors", lora_tensors(layer, 1)), "--json"))
    assert (
        found["full_size"]
        and "Qwen/Qwen-Image" in found["models"]
        and "black-forest-labs/FLUX.1-dev" not in found["models"]
    )


def test_convert_goes_round_and_tells_what_it_leaves_out(loras: tuple[Path, Path], tmp_path: Path) -> None:
    printed = run("convert", loras[0], "--to", "kohya", "--output", tmp_path / "k.safetensors")
    assert "ss_dataset_dirs" in printed and "names of diffusers to those of kohya" in printed
    run("convert", tmp_path / "k.safetensors", "--to", "diffusers", "--output", tmp_path / "d.safetensors")
    before, after = load_file(loras[0]), load_file(tmp_path / "d.safetensors")
    assert before.keys() == after.keys() and all(after[name].equal(tensor) for name, tensor in before.items())
    run("convert", loras[0], "--to", "comfyui", "--output", tmp_path / "c.safetensors", "--keep-metadata")
    assert "ss_dataset_dirs" in json.loads(run("info", tmp_path / "c.safetensors", "--json"))["metadata"]


def test_merge_joins_and_keeps_to_a_rank(loras: tuple[Path, Path], tmp_path: Path) -> None:
    run("merge", *loras, "--weight", 1, "--weight", -0.5, "--output", tmp_path / "m.safetensors")
    found = json.loads(run("compare", loras[0], tmp_path / "m.safetensors", "--json"))
    assert 0.9 < found["cosine"] < 1
    printed = run(
        "merge", *loras, "--rank", 5, "--output", tmp_path / "r.safetensors", "--format", "kohya", "--dtype", "bf16"
    )
    assert "rank 5 (before: 12)" in printed and "in total" in printed
    found = json.loads(run("info", tmp_path / "r.safetensors", "--json"))
    assert (found["format"], [*found["dtypes"]], [*found["ranks"]]) == ("kohya", ["bfloat16"], ["5"])


def test_resize_states_the_error_that_is_made(loras: tuple[Path, Path], tmp_path: Path) -> None:
    stated = json.loads(run("resize", loras[1], "--rank", 3, "--output", tmp_path / "r.safetensors", "--json"))
    made = json.loads(run("compare", loras[1], tmp_path / "r.safetensors", "--json"))
    assert stated["error"] == pytest.approx(made["difference"], rel=1e-6)
    for layer, each in stated["layers"].items():
        assert each["error"] == pytest.approx(made["layers"][layer]["difference"], rel=1e-6)
    by_energy = json.loads(run("resize", loras[1], "--energy", 0.5, "--output", tmp_path / "e.safetensors", "--json"))
    assert all(each["error"] <= 0.5**0.5 + 1e-6 for each in by_energy["layers"].values())
    assert "error" in run("resize", loras[1], "--rank", 2, "--output", tmp_path / "t.safetensors", "--layers")


def test_merge_into_a_base_and_extract_again(loras: tuple[Path, Path], tmp_path: Path) -> None:
    printed = run("merge", loras[0], "--base", MODELS["flux"], "--output", tmp_path / "merged")
    assert "one.safetensors x 1" in printed and (tmp_path / "merged" / "model_index.json").is_file()
    words = ("extract", MODELS["flux"], tmp_path / "merged", "--rank", 4, "--output", tmp_path / "x.safetensors")
    assert "layers are equal in both models" in run(*words, "--dtype", "fp32")
    found = json.loads(run("compare", loras[0], tmp_path / "x.safetensors", "--json"))
    assert found["cosine"] > 0.999


def test_compare_shows_kinds_and_layers(loras: tuple[Path, Path]) -> None:
    assert "transformer_blocks.N.attn.to_q" in run("compare", *loras)
    assert "transformer_blocks.1.attn.to_q" in run("compare", *loras, "--layers")
    assert "+1.0000" in run("compare", loras[0], loras[0])


def test_command_lines_that_mean_nothing_are_refused(loras: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = loras
    new = tmp_path / "new.safetensors"
    base = MODELS["flux"]
    whole = base / "transformer" / "diffusion_pytorch_model.safetensors"
    expected = {
        "give --rank": ("resize", one, "--output", new),
        "above 0 and at most 1": ("resize", one, "--energy", 1.5, "--output", new),
        "1 weights for 2 LoRAs": ("merge", one, other, "--weight", 1, "--output", new),
        "finite number other than 0": ("merge", one, "--weight", 0, "--output", new),
        "--weight nan": ("merge", one, "--weight", "nan", "--output", new),
        "nothing to merge": ("merge", one, "--output", new),
        "a base keeps its own format": ("merge", one, "--base", base, "--rank", 2, "--output", tmp_path / "new"),
        "is what is read": ("convert", one, "--to", "kohya", "--output", one),
        "exists already": ("convert", one, "--to", "kohya", "--output", other),
        "end in .safetensors": ("convert", one, "--to", "kohya", "--output", tmp_path / "new.pt"),
        "is a folder that exists": ("merge", one, "--base", base, "--output", tmp_path),
        "must end in .safetensors": ("merge", one, "--base", whole, "--output", tmp_path / "new"),
        "lies in": ("merge", one, "--base", base, "--output", base / "new"),
        "cannot use it here": ("extract", base, base, "--rank", 2, "--device", "cuda:99", "--output", new),
        "the same weights": ("extract", base, base, "--rank", 2, "--output", new),
    }  # fmt: skip
    for words, command in expected.items():
        assert words in refused(*command), command
    assert not new.exists() and not (tmp_path / "new").exists()


def test_a_file_of_escape_codes_steers_no_terminal(tmp_path: Path) -> None:
    tensors = lora_tensors({"transformer_blocks.30.attn.to_q": (4, 4)})
    metadata = {
        "pixtune.trigger_words": json.dumps(["\x1b[31mred"]),
        "modelspec.title": "\x1b]0;title\x07",
        "\x1b": "x",
    }
    assert "\x1b" not in run("info", write_lora(tmp_path / "a.safetensors", tensors, metadata))
    save_file({"\x1b[31m.lora_A.weight": torch.ones(1, 1)}, tmp_path / "b.safetensors")
    assert "\x1b" not in refused("info", tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("share", "text"), [(None, "none"), (0.0, "0%"), (0.5, "50.00%"), (0.012345, "1.23%"), (3e-6, "3.0e-04%")]
)
def test_a_share_that_is_not_zero_never_looks_like_zero(share: float | None, text: str) -> None:
    assert percent(share) == text


def test_tables_and_sizes() -> None:
    assert table(("a", "bb"), [("ccc", "1")]) == ["  a    bb", "  ccc   1"]
    assert (megabytes(2048), megabytes(3 * 2**20)) == ("2.0 KiB", "3.0 MiB")
