"""Files that are the stock library's to the byte, written from where the tensors lie."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pixtune.errors import WriteError
from pixtune.storage import safetensors_writer
from pixtune.storage.safetensors_writer import (
    CODES,
    PIECE_BYTES,
    save_one_by_one,
    save_safetensors,
    save_without_digest,
)


def noise(dtype: torch.dtype, *shape: int) -> Tensor:
    """Any bytes; for truth values, those that there are."""
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.uint8).bool()
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype).view(shape)


def of_every_format() -> dict[str, Tensor]:
    """Each format several times, with names in no order, some of them not ASCII."""
    tensors = {}
    for number, dtype in enumerate(CODES):
        tensors[f"z{number}.weight"] = noise(dtype, 3, 5)
        tensors[f"{19 - number}/bias"] = noise(dtype, 7)
        tensors[f'狐 "{number}" \\ \n\t\x1f\x7f\u2028 é'] = noise(dtype, 1)
        tensors[f"Empty{number}"] = noise(dtype, 0, 2)
    return tensors


TENSORS: dict[str, dict[str, Tensor]] = {
    "every format": of_every_format(),
    "numbers without dimensions": {"b": torch.tensor(3.0).bfloat16(), "a": torch.tensor(3), "c": torch.tensor(True)},
    "empty": {"a": torch.empty(0), "b": torch.empty(3, 0, 2, dtype=torch.int8)},
    "a trained weight": {"a": torch.nn.Parameter(torch.randn(3, 4))},
    "several pieces": {"b": noise(torch.bfloat16, PIECE_BYTES + 3), "a": noise(torch.uint8, PIECE_BYTES)},
}  # fmt: skip


def stock_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def header_and_data(content: bytes) -> tuple[list[tuple[str, Any]], bytes]:
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 8 == 0
    return list(json.loads(content[8:start]).items()), content[start:]


@pytest.mark.parametrize("metadata", [None, {"step": "3"}], ids=["no metadata", "metadata"])
@pytest.mark.parametrize("tensors", TENSORS.values(), ids=TENSORS.keys())
def test_bytes_are_those_of_the_stock_library(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None
) -> None:
    digest = save_safetensors(tmp_path / "f", tensors, metadata)
    content = (tmp_path / "f").read_bytes()
    assert content == stock_bytes(tensors, metadata)
    assert digest == hashlib.sha256(content).hexdigest()
    save_without_digest(tmp_path / "g", tensors, metadata)
    assert (tmp_path / "g").read_bytes() == content


def test_no_format_of_the_stock_library_is_left_out() -> None:
    """But for the one whose shape in the file is another than the tensor's."""
    assert {dtype for dtype in safetensors.torch._SIZE if dtype} - {torch.float4_e2m1fn_x2} == CODES.keys()


def test_tensors_of_any_layout_have_the_bytes_of_their_values(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(2, 3, 4).requires_grad_()
    tensors = {
        "turned": base.transpose(0, 2), "part": base[:, :, 1:3], "repeated": base[:1, :, :1].expand(2, 3, 5),
        "later": base[1], "image": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            }  # fmt: skip
    save_safetensors(tmp_path / "f", tensors)
    assert (tmp_path / "f").read_bytes() == stock_bytes({name: tensor.clone() for name, tensor in tensors.items()})
    assert all(torch.equal(read, tensors[name]) for name, read in load_file(tmp_path / "f").items())


def test_metadata_are_the_same_in_one_order(tmp_path: Path) -> None:
    metadata = {name: f'狐 "{name}" \\ \n\x01\x7f' for name in ("e", "format", "é", "a", "B", "狐", "d\n")}
    tensors = {"a": torch.randn(3)}
    save_safetensors(tmp_path / "f", tensors, metadata)
    content = (tmp_path / "f").read_bytes()
    assert header_and_data(content) == header_and_data(stock_bytes(tensors, metadata))
    assert len(content) == len(stock_bytes(tensors, metadata)), "escaped alike"
    assert list(dict(header_and_data(content)[0])["__metadata__"]) == sorted(metadata)
    with safe_open(tmp_path / "f", framework="pt") as file:
        assert file.metadata() == metadata


def test_a_file_without_tensors(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "f", {})
    assert (tmp_path / "f").read_bytes() == stock_bytes({})
    save_safetensors(tmp_path / "f", {}, {"step": "3"})
    with safe_open(tmp_path / "f", framework="pt") as file:
        assert file.metadata() == {"step": "3"} and not list(file.keys()), "the stock library's own is no JSON"


def test_tensors_that_share_memory_are_each_written(tmp_path: Path) -> None:
    one = torch.randn(6)
    save_safetensors(tmp_path / "f", {"a": one, "b": one, "c": one.view(2, 3)})
    assert all(torch.equal(read.flatten(), one) for read in load_file(tmp_path / "f").values())


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a": torch.zeros(2), "x": torch.zeros(2, dtype=torch.complex128)}, {}, r"x \(torch.complex128\)"),
        ({"a": torch.zeros(2)}, {"step": 3}, "metadata as texts"),
    ],
)
def test_what_a_file_cannot_hold_is_said_before_it_is_written(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        save_safetensors(tmp_path / "f", tensors, metadata)
    assert not list(tmp_path.iterdir())


# ---- what it takes


def test_a_large_tensor_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces lie in the tensor's own memory, side by side, and little is allocated beside it."""
    large = noise(torch.bfloat16, 2 * PIECE_BYTES + 1)
    made = safetensors_writer._pieces
    seen: list[tuple[int, int]] = []

    def watched(tensors: Sequence[Tensor]):
        for piece in made(tensors):
            seen.append((torch.frombuffer(piece, dtype=torch.uint8).data_ptr() - large.data_ptr(), len(piece)))
            yield piece

    monkeypatch.setattr(safetensors_writer, "_pieces", watched)
    tracemalloc.start()
    try:
        save_safetensors(tmp_path / "f", {"large": large})
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen == [(number * PIECE_BYTES, PIECE_BYTES) for number in range(4)] + [(4 * PIECE_BYTES, 2)]
    assert peak_bytes < PIECE_BYTES / 4


class Elsewhere(Tensor):
    """Stands for memory on a device: it cannot be looked into, only copied from."""

    is_cpu = False


def test_what_is_on_a_device_passes_through_one_small_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": noise(torch.bfloat16, PIECE_BYTES), "b": noise(torch.uint8, 3), "c": noise(torch.int64, 5)}
    buffers: list[Tensor] = []
    empty = torch.empty

    def watched(*arguments: int, **options: Any) -> Tensor:
        buffers.append(empty(*arguments, **options))
        return buffers[-1]

    monkeypatch.setattr(torch, "empty", watched)
    there = {name: tensor.as_subclass(Elsewhere) for name, tensor in tensors.items()}
    save_safetensors(tmp_path / "f", {**there, "here": torch.ones(3)})
    assert [buffer.numel() for buffer in buffers] == [PIECE_BYTES]
    assert (tmp_path / "f").read_bytes() == stock_bytes({**tensors, "here": torch.ones(3)})
    save_safetensors(tmp_path / "g", {"b": there["b"]})
    assert buffers[-1].numel() == 3, "no larger than what passes through it"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_safetensors(tmp_path / "f", {"a": torch.ones(3)})
    before = (tmp_path / "f").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="f could not be written"):
        save_safetensors(tmp_path / "f", {"a": torch.zeros(3)})
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_tensors_that_come_one_by_one_make_the_same_file(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5), "a": torch.randn(4).bfloat16(), "c": torch.arange(6), "empty": torch.zeros(0, 7),
    }  # fmt: skip
    outline = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    save_safetensors(tmp_path / "whole", tensors, {"k": "v"})
    asked: list[str] = []

    def tensor_of(name: str) -> Tensor:
        asked.append(name)
        return tensors[name]

    save_one_by_one(tmp_path / "parts", outline, tensor_of, {"k": "v"})
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(asked) == sorted(tensors)
    with pytest.raises(TypeError, match="header has another"):
        save_one_by_one(tmp_path / "other", outline, lambda name: tensors[name].double())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]
