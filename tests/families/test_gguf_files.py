"""A transformer in a GGUF file, written by the format's own package, is the transformer that its numbers stand for."""

from __future__ import annotations

import builtins
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from pixtune.config.model_parts import ModelParts
from pixtune.engine.load import PLAIN, Layout, load_transformer
from pixtune.engine.quantize import QuantizedLinear, quantize_rows
from pixtune.errors import WeightsError
from pixtune.families import family_of
from pixtune.families.opening import find_model, open_model
from pixtune.family import Placement
from pixtune.planning import check_transformer
from pixtune.storage.base_reference import steps_fingerprint
from pixtune.storage.gguf_file import read_gguf_header
from pixtune.storage.model_folder import ModelFolder
from tests import single_files
from tests.runs import ROOT

gguf = pytest.importorskip("gguf")
Kind = gguf.GGMLQuantizationType
FP32 = Placement(torch.device("cpu"), torch.float32)


def write(model: str, path: Path, in_blocks: Any, **entries: Any) -> Path:
    """Writes a small model's transformer: matrices of blocks in one format, and the rest as such files have it."""
    writer = gguf.GGUFWriter(path, "flux" if "flux" in model else "qwen_image")
    for key, value in entries.items():
        add = {list: writer.add_array, str: writer.add_string, int: writer.add_uint32}[type(value)]
        add(key, value)
    for name, tensor in single_files.published(model).items():
        kind = in_blocks if single_files.in_blocks(name, tensor) else Kind.F16 if tensor.ndim == 2 else Kind.F32
        data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def opened(model: str, file: Path) -> ModelFolder:
    return open_model(str(file), ModelParts(others=str(ROOT / "assets" / model)))


def weights_of(folder: ModelFolder, layout: Layout = PLAIN) -> dict[str, Tensor]:
    loaded: Any = load_transformer(family_of(folder), folder, FP32, layout).module
    return dict(loaded.state_dict())


def by_hand(tensor: Tensor) -> Tensor:
    """What Q8_0 keeps, by its definition: of 32 neighbours the largest over 127, a half, and whole multiples of it."""
    blocks = tensor.float().view(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros(()))
    codes = blocks * inverse
    codes = codes.sign() * (codes.abs() + 0.5).floor()
    return (codes * scale.half().float()).view(tensor.shape)


@pytest.mark.parametrize("model", ["tiny-qwen-image", "tiny-flux"])
def test_its_numbers_are_those_of_its_blocks(model: str, tmp_path: Path) -> None:
    """FLUX's layers come out of the joined ones of the original names, rows and halves in their places."""
    file = write(model, tmp_path / "8.gguf", Kind.Q8_0, words=["a", "b"], numbers=[1, 2], about="text")
    folder = opened(model, file)
    found, original = weights_of(folder), single_files.transformer_of(model)
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        expected = by_hand(tensor) if single_files.in_blocks(name, tensor) else tensor.float()
        expected = tensor.half().float() if tensor.ndim == 2 and not single_files.in_blocks(name, tensor) else expected
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "bound"), [("Q4_0", 0.2), ("Q5_1", 0.08), ("F16", 0.001)])
def test_other_formats(kind: str, bound: float, tmp_path: Path) -> None:
    file = write("tiny-flux", tmp_path / "x.gguf", Kind[kind])
    found, original = weights_of(opened("tiny-flux", file)), single_files.transformer_of("tiny-flux")
    off = {name: (found[name] - tensor.float()).norm() / tensor.float().norm() for name, tensor in original.items()}
    assert max(off.values()) < bound and (kind == "F16" or max(off.values()) > bound / 100)


def test_it_is_quantized_into_pixtunes_own_8_bits(tmp_path: Path) -> None:
    file = write("tiny-qwen-image", tmp_path / "8.gguf", Kind.Q8_0)
    folder = opened("tiny-qwen-image", file)
    module: Any = load_transformer(family_of(folder), folder, FP32, Layout("int8")).module
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}
    assert layers
    original = single_files.transformer_of("tiny-qwen-image")
    for name, layer in layers.items():
        codes, scale = quantize_rows(by_hand(original[f"{name}.weight"]), torch.int8)
        assert layer.weight.view(torch.int8).equal(codes) and layer.scale.equal(scale)


def test_a_plan_needs_its_header_alone_and_its_numbers_are_its_fingerprint(tmp_path: Path) -> None:
    paths = [write("tiny-flux", tmp_path / f"{kind.name}.gguf", kind) for kind in (Kind.Q8_0, Kind.Q4_0)]
    parts = ModelParts(others=str(ROOT / "assets" / "tiny-flux"))
    found = find_model(str(paths[0]), parts)
    check_transformer(family_of(found), found)
    assert found.file is not None
    shapes = {name: tuple(tensor.shape) for name, tensor in single_files.transformer_of("tiny-flux").items()}
    assert found.file.shapes == shapes
    prints = [steps_fingerprint(opened("tiny-flux", path)) for path in (*paths, paths[0])]
    assert prints[0] == prints[2] != prints[1]


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("tiny-flux", tmp_path / "8.gguf", Kind.Q8_0)
    real = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__", lambda name, *a, **k: missing() if name == "gguf" else real(name, *a, **k)
    )
    with pytest.raises(WeightsError, match=r"pip install 'pixtune\[gguf\]'"):
        opened("tiny-flux", file)


def missing() -> Any:
    raise ImportError("gguf")


def text(words: bytes) -> bytes:
    return struct.pack("<Q", len(words)) + words


def header(
    *, version: int = 3, tensors: int = 1, entries: bytes = b"", num_entries: int = 0, rest: bytes = b""
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, num_entries) + entries + rest


def tensor(name: bytes, shape: tuple[int, ...], kind: int, begin: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, begin)


DAMAGED = {
    "nothing behind the mark": (b"GGUF", "damaged"),
    "an old version": (header(version=1), "version 1"),
    "of a big-endian machine": (header(version=3 << 24), "big-endian"),
    "more tensors than there can be": (header(tensors=2**60), "tensors"),
    "a list without an end": (
        header(entries=text(b"k") + struct.pack("<IIQ", 9, 4, 2**60), num_entries=1), "ends early"
    ),
    "a list of lists": (header(entries=text(b"k") + struct.pack("<IIQ", 9, 9, 2), num_entries=1), "list of 2"),
    "texts without an end": (header(entries=text(b"k") + struct.pack("<IIQ", 9, 8, 2**40), num_entries=1), "list of"),
    "an unknown type": (header(entries=text(b"k") + struct.pack("<I", 77), num_entries=1), "type 77"),
    "a name without an end": (header(rest=struct.pack("<Q", 2**50)), "a name of"),
    "a name that is no text": (header(rest=tensor(b"\xff\xfe", (32,), 0)), "damaged"),
    "nine dimensions": (header(rest=tensor(b"a", (1,) * 9, 0)), "9 dimensions"),
    "twice the same": (header(tensors=2, rest=2 * tensor(b"a", (32,), 0)), "twice"),
    "an unknown format": (header(rest=tensor(b"a", (32,), 999)), "format 999"),
    "half a block": (header(rest=tensor(b"a", (33,), 8)), "whose blocks have 32"),
    "a huge shape": (header(rest=tensor(b"a", (2**40, 2**40), 0)), "has the shape"),
    "an alignment of 3": (
        header(entries=text(b"general.alignment") + struct.pack("<II", 4, 3), num_entries=1),
        "alignment of 3",
    ),
    "cut off": (header(rest=tensor(b"a", (4096,), 0)), "cut off"),
    "no transformer": (header(rest=tensor(b"a", (8,), 0)) + bytes(256), "a"),
    "a format without a decoder": (header(rest=tensor(b"a", (8,), 28)) + bytes(256), "does not decode"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_error(name: str, tmp_path: Path) -> None:
    content, words = DAMAGED[name]
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=words) as caught:
        opened("tiny-flux", file)
    assert "\n" not in str(caught.value)


def test_places_are_those_of_the_packages_own_reader(tmp_path: Path) -> None:
    file = write("tiny-qwen-image", tmp_path / "5.gguf", Kind.Q5_0, **{"general.alignment": 64, "words": ["x"] * 9})
    theirs = {
        each.name: (each.tensor_type.name, [int(side) for side in each.shape[::-1]], each.data_offset, each.n_bytes)
        for each in gguf.GGUFReader(file).tensors
    }
    ours = {
        name: (entry["dtype"], entry["shape"], entry["data_offsets"][0], numpy.diff(entry["data_offsets"]).item())
        for name, entry in read_gguf_header(file).items()
    }
    assert ours == theirs
