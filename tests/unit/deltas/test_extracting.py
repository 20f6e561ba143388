"""A LoRA that was merged into a model comes out again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixtune.deltas.adapter_file import read_adapter
from pixtune.deltas.base_files import open_base
from pixtune.deltas.delta import dense
from pixtune.deltas.extracting import Extracted, extract_lora
from pixtune.deltas.merging import merge_into_base
from pixtune.deltas.svd import Wanted
from pixtune.errors import WeightsError
from tests.unit.deltas.loras import lora_tensors, write_lora

LAYERS = {f"transformer_blocks.{n}.attn.to_{each}": (12, 9) for n in (0, 1) for each in "qk"}
CPU = torch.device("cpu")


def base(path: Path, changes: Mapping[str, Tensor] = MappingProxyType({}), seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    weights = {f"{layer}.weight": torch.randn(shape, generator=generator) for layer, shape in LAYERS.items()}
    save_file({**weights, "transformer_blocks.0.attn.norm_q.weight": torch.ones(9), **changes}, path)
    return path


def extract(one: Path, other: Path, wanted: Wanted, dtype: torch.dtype = torch.float32) -> Extracted:
    return extract_lora(open_base(str(one)), open_base(str(other)), wanted, dtype, CPU)


def test_what_was_merged_comes_out(tmp_path: Path) -> None:
    one, layers = base(tmp_path / "one.safetensors"), list(LAYERS)[:3]
    tensors = lora_tensors({layer: LAYERS[layer] for layer in layers}, 3)
    lora = read_adapter(write_lora(tmp_path / "lora.safetensors", tensors, r=3, lora_alpha=6))
    merge_into_base(open_base(str(one)), [(lora, 1.0)], tmp_path / "other.safetensors")
    found = extract(one, tmp_path / "other.safetensors", Wanted(3))
    assert found.cuts.keys() == {*layers} and found.num_equal == 1 and found.not_held == ()
    for layer, cut in found.cuts.items():
        expected = 2 * tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(dense(cut.delta), expected, rtol=0, atol=1e-5)
        assert cut.error < 1e-5 * cut.norm


def test_the_rank_cuts_and_the_error_is_stated(tmp_path: Path) -> None:
    one, other = base(tmp_path / "one.safetensors"), base(tmp_path / "other.safetensors", seed=1)
    before, after = load_file(one), load_file(other)
    for wanted in (Wanted(2), Wanted(energy=0.8)):
        for layer, cut in extract(one, other, wanted).cuts.items():
            values = torch.linalg.svdvals((after[f"{layer}.weight"] - before[f"{layer}.weight"]).double())
            held = values.square().cumsum(0) / values.square().sum()
            rank = 2 if wanted.rank else int((held < 0.8).sum()) + 1
            assert cut.delta.rank == rank
            assert cut.error == pytest.approx(float(values[rank:].norm()), rel=1e-4)


def test_what_no_lora_can_hold_is_named(tmp_path: Path) -> None:
    one = base(tmp_path / "one.safetensors")
    norm = {"transformer_blocks.0.attn.norm_q.weight": torch.zeros(9)}
    assert extract(one, base(tmp_path / "b.safetensors", norm, seed=1), Wanted(2)).not_held == (*norm,)


def test_a_file_and_a_folder_and_other_number_formats_go_together(tmp_path: Path) -> None:
    one, folder = base(tmp_path / "one.safetensors"), tmp_path / "folder"
    folder.mkdir()
    half = {name: tensor.bfloat16() for name, tensor in load_file(base(tmp_path / "b.safetensors", seed=1)).items()}
    save_file(half, folder / "diffusion_pytorch_model.safetensors")
    found = extract(one, folder, Wanted(9))
    layer = next(iter(LAYERS))
    expected = half[f"{layer}.weight"].float() - load_file(one)[f"{layer}.weight"]
    torch.testing.assert_close(dense(found.cuts[layer].delta), expected, rtol=0, atol=1e-5)


def flux(path: Path) -> Path:
    save_file({"single_blocks.0.linear2.weight": torch.ones(4, 20)}, path)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "the same weights in all 4 layers"),
        ({"transformer_blocks.0.attn.to_q.weight": torch.ones(3, 9)}, "models of different sizes"),
        ({"transformer_blocks.0.attn.to_q.weight": torch.full((12, 9), torch.nan)}, "NaN or infinity"),
        ({"transformer_blocks.0.attn.to_q.weight": torch.ones(12, 9).to(torch.float8_e4m3fn)}, "mostly their rounding"),
        ({"transformer_blocks.2.attn.to_q.weight": torch.ones(12, 9)}, "lacks transformer_blocks.2.attn.to_q"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_compared_are_refused(change: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    one, other = base(tmp_path / "one.safetensors"), base(tmp_path / "other.safetensors", change)
    with pytest.raises(WeightsError, match=words):
        extract(one, other, Wanted(2))


def test_models_of_different_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="models of different kinds"):
        extract(base(tmp_path / "one.safetensors", {"transformer_blocks.0.img_mlp.net.2.weight": torch.ones(2, 2)}),
                flux(tmp_path / "flux.safetensors"), Wanted(2))  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"decoder.conv_in.weight": torch.ones(1, 1, 3, 3)}, "VAE"),
        ({"transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1, 1)}, "LoRA"),
        ({"x": torch.ones(1)}, "x"),
    ],
)
def test_what_is_no_transformer_is_named(tensors: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "base.safetensors")
    with pytest.raises(WeightsError, match=f"base.safetensors.*{words}"):
        open_base(str(tmp_path / "base.safetensors"))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere"):
        open_base(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="empty"):
        open_base(str(tmp_path / "empty"))
