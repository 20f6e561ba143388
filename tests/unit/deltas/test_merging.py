"""A merged base has the weights that the stock pipeline has after `fuse_lora`, and nothing is ever half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixtune.deltas import base_files, merging
from pixtune.deltas.adapter_file import read_adapter
from pixtune.deltas.base_files import open_base
from pixtune.deltas.merging import merge_into_base
from pixtune.errors import WeightsError, WriteError
from pixtune.storage.loading.entries import TensorEntry
from pixtune.storage.loading.shards import load_safetensors_sharded, save_safetensors_sharded
from tests.unit.deltas.loras import MODELS, lora_tensors, shapes_of, write_lora

CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 10, "target_modules": ["to_q"]}


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_safetensors_sharded(folder)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A shipped pipeline whose transformer is in fp32 and in several files."""
    folder = tmp_path_factory.mktemp(request.param) / "base"
    shutil.copytree(MODELS[request.param], folder)
    weights = {name: tensor.float() for name, tensor in weights_of(folder / "transformer").items()}
    for file in (folder / "transformer").glob("*.safetensors*"):
        file.unlink()
    save_safetensors_sharded(weights, folder / "transformer", 400_000, "diffusion_pytorch_model")
    return request.param, folder


@pytest.fixture(scope="module")
def lora(model: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = lora_tensors(shapes_of(model[0], lambda layer: "blocks." in layer))
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in tensors})
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    return write_lora(path, tensors, **{**CONFIG, "target_modules": layers})


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "out" / "merged"
    left = {each.name for each in (tmp_path / "out").iterdir()} if (tmp_path / "out").exists() else set()
    assert left <= {"merged", "merged.safetensors"}, "something half-written is left"


def test_the_result_is_what_the_stock_pipeline_fuses(model: tuple[str, Path], lora: Path, target: Path) -> None:
    import diffusers

    _, folder = model
    weight = -0.6
    pipeline_class = json.loads((folder / "model_index.json").read_text())["_class_name"]
    kind = json.loads((folder / "transformer" / "config.json").read_text())["_class_name"]
    stock = getattr(diffusers, kind).from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    missing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"))
    parts = {
        part: value for part, value in missing.items() if part in json.loads((folder / "model_index.json").read_text())
    }
    pipeline = getattr(diffusers, pipeline_class).from_pretrained(folder, transformer=stock, **parts)
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    pipeline.fuse_lora(lora_scale=weight)
    pipeline.unload_lora_weights()
    expected = pipeline.transformer.state_dict()

    before = weights_of(folder / "transformer")
    merged = merge_into_base(open_base(str(folder)), [(read_adapter(lora), weight)], target)
    found = weights_of(target / "transformer")
    assert found.keys() == expected.keys() == before.keys()
    for tensor_name, tensor in expected.items():
        torch.testing.assert_close(found[tensor_name], tensor, rtol=1e-5, atol=1e-6)
    changed = {each for each in found if not found[each].equal(before[each])}
    assert len(changed) == merged.num_tensors == len(merged.layers) > 30
    assert merged.lost_share < 1e-6
    reloaded = getattr(diffusers, kind).from_pretrained(target / "transformer", torch_dtype=torch.float32)
    assert reloaded.state_dict()[min(changed)].equal(found[min(changed)])


def test_the_folder_is_whole_and_names_no_path(model: tuple[str, Path], lora: Path, target: Path) -> None:
    _, folder = model
    merge_into_base(open_base(str(folder)), [(read_adapter(lora), 0.5)], target)

    def names(root: Path) -> set[str]:
        return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}

    assert names(target) - {"pixtune.json"} == names(folder) - {"README.md", "LICENSE"} - {
        name for name in names(folder) if "/" not in name and name != "model_index.json"
    }
    about = json.loads((target / "pixtune.json").read_text())
    assert about["merged"] == [{"file": "lora.safetensors", "weight": 0.5}] and about["base_model"] == "base"
    assert str(folder.parent) not in (target / "pixtune.json").read_text()
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    assert (target / "transformer" / index.name).read_text() == index.read_text()


def test_bf16_weights_are_rounded_once_from_the_exact_sum(tmp_path: Path, target: Path) -> None:
    shapes = shapes_of("flux")
    weights = {f"{layer}.weight": torch.randn(shape).bfloat16() for layer, shape in shapes.items()}
    folder = tmp_path / "transformer"
    save_safetensors_sharded(weights, folder, stem="diffusion_pytorch_model")
    (folder / "config.json").write_text("{}")
    tensors = lora_tensors(shapes, size=0.02)
    lora = write_lora(tmp_path / "a.safetensors", tensors, **CONFIG)
    merged = merge_into_base(open_base(str(folder)), [(read_adapter(lora), 1.0)], target)
    found, lost, added = weights_of(target), 0.0, 0.0
    for layer in shapes:
        delta = 2.5 * tensors[f"{layer}.lora_B.weight"].double() @ tensors[f"{layer}.lora_A.weight"].double()
        exact = weights[f"{layer}.weight"].double() + delta
        assert found[f"{layer}.weight"].dtype == torch.bfloat16
        # The sum is made in fp32, which may lie on the other side of the middle between two bf16 numbers.
        assert (found[f"{layer}.weight"] == exact.to(torch.bfloat16)).float().mean() > 0.999
        lost += float((found[f"{layer}.weight"].double() - exact).square().sum())
        added += float(delta.square().sum())
    assert merged.lost_share == pytest.approx((lost / added) ** 0.5, rel=1e-3)
    assert merged.lost_share > 0.1, "numbers this small are mostly lost in bf16, and that is reported"


def test_a_single_file_with_the_authors_names_gets_each_part_in_its_rows(tmp_path: Path, target: Path) -> None:
    """Rows by hand: q, k and v one below the other, in a single-stream block the MLP's first layer below them."""
    width = 8
    file = {
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.randn(3 * width, width),
        "model.diffusion_model.single_blocks.0.linear1.weight": torch.randn(7 * width, width),
        "model.diffusion_model.final_layer.adaLN_modulation.1.weight": torch.randn(2 * width, width),
        "model.diffusion_model.img_in.weight": torch.randn(width, 4),
        "vae.decoder.conv_in.weight": torch.randn(2, 2, 3, 3),
    }
    save_file(file, tmp_path / "flux.safetensors", {"made by": "a test"})
    shapes = {
        "transformer_blocks.0.attn.to_k": (width, width),
        "single_transformer_blocks.0.proj_mlp": (4 * width, width),
        "single_transformer_blocks.0.attn.to_q": (width, width),
        "norm_out.linear": (2 * width, width),
        "x_embedder": (width, 4),
    }
    tensors = lora_tensors(shapes, 2)
    lora = write_lora(tmp_path / "a.safetensors", tensors)
    target = target.with_suffix(".safetensors")
    merge_into_base(open_base(str(tmp_path / "flux.safetensors")), [(read_adapter(lora), 2.0)], target)
    delta = {layer: 2 * tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"] for layer in shapes}
    expected = {name: tensor.clone() for name, tensor in file.items()}
    qkv, linear1, modulation, img_in, _ = expected.values()
    qkv[width : 2 * width] += delta["transformer_blocks.0.attn.to_k"]
    linear1[:width] += delta["single_transformer_blocks.0.attn.to_q"]
    linear1[3 * width :] += delta["single_transformer_blocks.0.proj_mlp"]
    modulation[:width] += delta["norm_out.linear"][width:]  # shift comes first there, scale in diffusers
    modulation[width:] += delta["norm_out.linear"][:width]
    img_in += delta["x_embedder"]
    found = load_file(target)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def small_base(path: Path, **changes: Tensor) -> Path:
    layers = {
        "transformer_blocks.0.attn.to_q.weight": torch.ones(4, 4),
        "transformer_blocks.0.attn.to_k.weight": torch.ones(4, 4),
    }
    save_file({**layers, **changes}, path)
    return path


def small_lora(path: Path, size: float = 0.1, layer: str = "transformer_blocks.0.attn.to_q", side: int = 4) -> Path:
    return write_lora(path, lora_tensors({layer: (side, side)}, 2, size=size))


def test_several_loras_add_up(tmp_path: Path, target: Path) -> None:
    base, one = small_base(tmp_path / "base.safetensors"), small_lora(tmp_path / "one.safetensors")
    other = write_lora(
        tmp_path / "other.safetensors", lora_tensors({"transformer_blocks.0.attn.to_q": (4, 4)}, 3, seed=5)
    )
    target = target.with_suffix(".safetensors")
    merge_into_base(open_base(str(base)), [(read_adapter(one), 1.0), (read_adapter(other), -2.0)], target)
    expected = torch.ones(4, 4)
    for path, weight in ((one, 1.0), (other, -2.0)):
        down, up = load_file(path).values()
        expected = expected + weight * (up @ down)
    found = load_file(target)
    torch.testing.assert_close(found["transformer_blocks.0.attn.to_q.weight"], expected)
    assert found["transformer_blocks.0.attn.to_k.weight"].equal(torch.ones(4, 4))


@pytest.mark.parametrize(
    ("base", "lora", "words"),
    [
        ({}, {"side": 5}, "5 inputs and 5 outputs of transformer_blocks.0.attn.to_q, which has 4 and 4"),
        ({}, {"layer": "transformer_blocks.1.attn.to_q"}, "no linear layer transformer_blocks.1.attn.to_q"),
        ({"transformer_blocks.0.attn.to_q.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, {}, "float8_e4m3fn"),
        ({"transformer_blocks.0.attn.to_q.weight": torch.full((4, 4), torch.nan)}, {}, "NaN or infinity"),
        ({"transformer_blocks.0.attn.to_q.weight": torch.ones(4, 4).half()}, {"size": 1e3}, "beyond float16"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    tmp_path: Path, target: Path, base: dict[str, Tensor], lora: dict[str, object], words: str
) -> None:
    opened = open_base(str(small_base(tmp_path / "base.safetensors", **base)))
    adapter = read_adapter(small_lora(tmp_path / "lora.safetensors", **lora))  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=words):
        merge_into_base(opened, [(adapter, 1.0)], target.with_suffix(".safetensors"))
    assert not target.with_suffix(".safetensors").exists()


def test_a_full_disk_and_an_interrupted_merge_leave_nothing(
    model: tuple[str, Path], lora: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = open_base(str(model[1])), read_adapter(lora)
    with monkeypatch.context() as patch:
        patch.setattr(merging.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 10))  # type: ignore[attr-defined]
        with pytest.raises(WriteError, match="GiB free"):
            merge_into_base(base, [(adapter, 1.0)], target)
    reads = iter(range(40))

    def read_then_stop(entry: TensorEntry) -> Tensor:
        if next(reads, None) is None:
            raise KeyboardInterrupt
        return base_files.read_tensor(entry)

    monkeypatch.setattr(merging, "read_tensor", read_then_stop)
    with pytest.raises(KeyboardInterrupt):
        merge_into_base(base, [(adapter, 1.0)], target)
    assert not target.exists()


def test_a_merge_that_is_under_way_is_not_disturbed(model: tuple[str, Path], lora: Path, tmp_path: Path) -> None:
    (tmp_path / ".merged.writing").mkdir()
    with pytest.raises(WriteError, match="another one is writing it"):
        merge_into_base(open_base(str(model[1])), [(read_adapter(lora), 1.0)], tmp_path / "merged")
    assert (tmp_path / ".merged.writing").is_dir()


def test_one_tensor_at_a_time_is_read(
    model: tuple[str, Path], lora: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is gone before the next is read, however many there are."""
    import weakref

    living: list[weakref.ref[Tensor]] = []

    def read(entry: TensorEntry) -> Tensor:
        assert sum(each() is not None for each in living) <= 1, "earlier tensors are kept"
        tensor = base_files.read_tensor(entry)
        living.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(merging, "read_tensor", read)
    merge_into_base(open_base(str(model[1])), [(read_adapter(lora), 1.0)], target)
    assert len(living) > 50
