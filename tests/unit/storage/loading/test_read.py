"""Weights arrive bit for bit, in order, within bounded memory; what cannot be read is named."""

from __future__ import annotations

import gc
import io
import json
import os
import struct
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pixtune.errors import WeightsError
from pixtune.storage.loading import fast, iterate_tensors, load_safetensors, threads
from pixtune.storage.loading.entries import TensorEntry, read_entries
from pixtune.storage.loading.threads import iterate_with_threads

CPU = torch.device("cpu")
Way = Callable[[list[Path]], Iterator[tuple[str, Tensor]]]
EntryWay = Callable[[list[TensorEntry]], Iterator[tuple[str, Tensor]]]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Every bit pattern, NaN and denormals among them, where the type has several."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).bool()
    num_bytes = torch.empty(shape, dtype=dtype).nbytes
    data_B = torch.randint(0, 256, (num_bytes,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return data_B.view(dtype).view(shape)


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


def assert_same(loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(loaded[name]), bits(tensor)), name


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    shapes = [(37, 53), (), (0,), (3, 0, 2), (1,), (4, 5, 6)]
    return {
        f"{str(dtype).removeprefix('torch.')}.{number}": random_bits(shape, dtype, number)
        for dtype in DTYPES
        for number, shape in enumerate(shapes)
    }


@pytest.fixture
def two_files(tmp_path: Path, tensors: dict[str, Tensor]) -> list[Path]:
    names = list(tensors)
    for file, part in (("b.safetensors", names[::2]), ("a.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    return [tmp_path / "b.safetensors", tmp_path / "a.safetensors"]


def threaded(
    paths: list[Path], num_threads: int = 3, slice_bytes: int = 1000, ahead_bytes: int = 5000
) -> Iterator[tuple[str, Tensor]]:
    entries = read_entries(paths)
    return iterate_with_threads(entries, CPU, num_threads, slice_bytes=slice_bytes, ahead_bytes=ahead_bytes)


def fastsafetensors_on_cpu(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    return fast_on_cpu(read_entries(paths))


def fast_on_cpu(entries: list[TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    pytest.importorskip("fastsafetensors", reason="the extra pixtune[fast] is not installed")
    return fast.iterate_fast(entries, CPU, 2)


ENTRY_WAYS = [partial(iterate_with_threads, device=CPU, num_threads=2), fast_on_cpu]
WAYS = [partial(iterate_tensors, device="cpu"), threaded, fastsafetensors_on_cpu]
all_ways = pytest.mark.parametrize("way", WAYS, ids=["mapped", "threads", "fastsafetensors"])


# ---- what arrives


@all_ways
def test_every_bit_arrives_in_file_order(way: Way, two_files: list[Path], tensors: dict[str, Tensor]) -> None:
    loaded = {name: tensor.clone() for name, tensor in way(two_files)}
    assert_same(loaded, tensors)
    assert list(loaded) == [entry.name for entry in read_entries(two_files)]


@pytest.mark.parametrize("wanted", [{"small"}, set()], ids=["one", "none"])
@pytest.mark.parametrize("way", ENTRY_WAYS, ids=["threads", "fastsafetensors"])
def test_what_is_not_wanted_is_not_read(
    way: EntryWay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: set[str]
) -> None:
    monkeypatch.setattr(fast, "CHUNK_BYTES", 100)  # what is not wanted does not fit a chunk
    save_file({"large": torch.ones(1000), "small": torch.ones(3)}, tmp_path / "f.safetensors")
    entries = [entry for entry in read_entries([tmp_path / "f.safetensors"]) if entry.name in wanted]
    assert {name for name, _ in way(entries)} == wanted


@all_ways
def test_what_was_handed_out_outlives_the_reader(way: Way, two_files: list[Path], tensors: dict[str, Tensor]) -> None:
    loaded = dict(way(two_files))
    gc.collect()
    assert_same(loaded, tensors)


def test_the_order_is_that_of_the_bytes_not_of_the_header(tmp_path: Path) -> None:
    header_file(tmp_path / "f", {"second": place("U8", [2], 1, 3), "first": place("U8", [1], 0, 1)}, b"\1\2\3")
    found = [(name, tensor.tolist()) for name, tensor in iterate_tensors([tmp_path / "f"], "cpu")]
    assert found == [("first", [1]), ("second", [2, 3])]


@pytest.mark.parametrize("num_threads", [1, 2, 8])
@pytest.mark.parametrize("slice_bytes", [97, 1000, 10**6])
def test_threads_and_slices_change_nothing(
    two_files: list[Path],
    tensors: dict[str, Tensor],
    num_threads: int,
    slice_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_exactly = threads.read_exactly

    def late(file: Path, offset_bytes: int, view: memoryview, drop_cache: bool) -> None:
        time.sleep(0.001 if offset_bytes % 7 == 0 else 0)  # other slices overtake this one
        read_exactly(file, offset_bytes, view, drop_cache)

    monkeypatch.setattr(threads, "read_exactly", late)
    loaded = dict(threaded(two_files, num_threads, slice_bytes))
    assert_same(loaded, tensors)
    assert list(loaded) == [entry.name for entry in read_entries(two_files)]


@pytest.mark.parametrize("drop_cache", [True, False])
def test_the_page_cache_is_dropped_where_it_shall_be_and_nothing_is_lost(
    two_files: list[Path], tensors: dict[str, Tensor], drop_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[tuple[int, int]] = []

    def advise(file: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        dropped.append((offset, length))

    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    entries = read_entries(two_files)
    assert_same(dict(iterate_with_threads(entries, CPU, 2, drop_cache=drop_cache)), tensors)
    parts = sorted((each.offset_bytes, each.num_bytes) for each in entries if each.num_bytes)
    assert sorted(dropped) == (parts if drop_cache else [])


def test_a_file_that_is_read_in_small_pieces_arrives_whole(tmp_path: Path) -> None:
    """Network file systems return less than they are asked for."""

    class Trickle(io.BytesIO):
        def readinto(self, view: Any) -> int:
            return super().readinto(memoryview(view)[:3])

    content, view = bytes(range(100)), bytearray(50)
    file: Any = SimpleNamespace(open=lambda mode, buffering: Trickle(content))
    threads.read_exactly(file, 30, memoryview(view))
    assert bytes(view) == content[30:80]


def test_tensors_asked_for_in_inference_mode_can_be_trained(two_files: list[Path]) -> None:
    with torch.inference_mode():
        loaded = dict(threaded(two_files))
    assert not any(tensor.is_inference() for tensor in loaded.values())


@pytest.mark.gpu
@pytest.mark.parametrize("use_fast", [False, True])
def test_every_bit_arrives_on_the_gpu(two_files: list[Path], tensors: dict[str, Tensor], use_fast: bool) -> None:
    large = {"large": random_bits((5000, 4001), torch.bfloat16, 0), "larger": random_bits((9000, 4001), torch.int8, 1)}
    save_file(large, two_files[0].with_name("large.safetensors"))
    paths = [*two_files, two_files[0].with_name("large.safetensors")]
    loaded: dict[str, Tensor] = {}
    for name, tensor in iterate_tensors(paths, "cuda", use_fast=use_fast):
        assert tensor.is_cuda
        loaded[name] = tensor.clone()
        tensor.zero_()  # what comes next reuses this memory, perhaps while this kernel runs
    assert_same(loaded, tensors | large)


# ---- memory


def test_memory_in_flight_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [100, 3000, 100, 9000, 200, 200, 2500, 2500, 2500, 1]
    save_file(
        {f"{i}": torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}, tmp_path / "f.safetensors"
    )
    entries = read_entries([tmp_path / "f.safetensors"])
    lock, read_bytes, at_once, most_at_once = threading.Lock(), 0, 0, 0
    read_exactly = threads.read_exactly

    def counted(file: Path, offset_bytes: int, view: memoryview, drop_cache: bool) -> None:
        nonlocal read_bytes, at_once, most_at_once
        with lock:
            read_bytes, at_once = read_bytes + len(view), at_once + 1
            most_at_once = max(most_at_once, at_once)
        time.sleep(0.001)
        read_exactly(file, offset_bytes, view, drop_cache)
        with lock:
            at_once -= 1

    monkeypatch.setattr(threads, "read_exactly", counted)
    handed_out_bytes, ahead = 0, []
    for _, tensor in iterate_with_threads(entries, CPU, 4, slice_bytes=500, ahead_bytes=4000):
        handed_out_bytes += tensor.nbytes
        time.sleep(0.05)  # a slow consumer: all that may be read is read
        ahead.append(read_bytes - handed_out_bytes)
    assert max(ahead) <= 4000, "but for a tensor that is larger, nothing beyond the bound"
    assert max(ahead) >= 2000, "and yet something is read while the consumer works"
    assert 2 <= most_at_once <= 4


def test_nothing_keeps_a_tensor_that_was_handed_out(two_files: list[Path]) -> None:
    reader, seen = threaded(two_files), 0
    for _, tensor in reader:
        gone = weakref.ref(tensor)
        del tensor
        assert gone() is None
        seen += 1
    assert seen > 10


@pytest.mark.parametrize("num_taken", [0, 1, 5])
def test_stopping_early_leaves_no_thread(two_files: list[Path], num_taken: int) -> None:
    reader = threaded(two_files)
    assert isinstance(reader, Generator)
    for _ in range(num_taken):
        next(reader)
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-weights")]


# ---- what cannot be read


def header_file(path: Path, header: object, data: bytes = b"") -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def place(dtype: str, shape: Sequence[object], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), r"f\.safetensors is missing"),
    "empty": (lambda path: path.write_bytes(b""), "cut off"),
    "cut in its header": (lambda path: cut(path, 20), "cut off"),
    "cut in its data": (lambda path: cut(path, path.stat().st_size - 1), "cut off: it has .* Fetch"),
    "a pickle": (lambda path: torch.save({"a": torch.ones(2)}, path), r"pickle.*Take the model's \.safetensors"),
    "an old pickle": (
        lambda path: torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False),
        "pickle",
    ),
    "a git-lfs pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><html>404</html>"), "web page"),
    "noise": (lambda path: path.write_bytes(b"\xa5" * 100), "no safetensors file"),
    "a list": (lambda path: header_file(path, [1, 2]), "damaged header"),
    "no offsets": (lambda path: header_file(path, {"a": {"dtype": "F32", "shape": [1]}}), "damaged header at a"),
    "a number for a shape": (
        lambda path: header_file(path, {"a": {**place("F32", [], 0, 4), "shape": 7}}),
        "damaged header at a",
    ),
    "words for numbers": (lambda path: header_file(path, {"a": place("F32", ["x"], 0, 4)}), "damaged header at a"),
    "another size": (lambda path: header_file(path, {"a": place("F32", [2], 0, 4)}, bytes(4)), r"\[2\], 8 bytes"),
    "before the data": (lambda path: header_file(path, {"a": place("U8", [4], -4, 0)}, bytes(4)), "damaged header"),
    "shared bytes": (
        lambda path: header_file(path, {"a": place("U8", [4], 0, 4), "b": place("U8", [4], 2, 6)}, bytes(6)),
        "a and b share bytes",
    ),
    "negative shape": (lambda path: header_file(path, {"a": place("U8", [-2, -2], 0, 4)}, bytes(4)), "damaged header"),
    "unknown type": (lambda path: header_file(path, {"a": place("F4", [8], 0, 4)}, bytes(4)), "a as F4"),
    "a hole": (lambda path: header_file(path, {"a": place("U8", [4], 4, 8)}, bytes(8)), "damaged header"),
}


@pytest.mark.parametrize(("break_file", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, break_file: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"a": torch.ones(8)}, path)
    break_file(path)
    with pytest.raises(WeightsError, match=message) as caught:
        load_safetensors(path)
    assert str(path) in str(caught.value)


def test_faults_are_found_before_anything_is_read(two_files: list[Path]) -> None:
    cut(two_files[1], two_files[1].stat().st_size - 1)
    with pytest.raises(WeightsError, match=r"a\.safetensors is cut off"):
        iterate_tensors(two_files, "cpu")  # not even asked for the first


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.fp16.safetensors"):
        save_file({"same": torch.ones(1), name: torch.ones(1)}, tmp_path / name)
    with pytest.raises(WeightsError, match=r"same among them.*model\.fp16\.safetensors.*Leave one"):
        iterate_tensors(sorted(tmp_path.iterdir()), "cpu")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    entries = read_entries([path])
    cut(path, 2000)
    with pytest.raises(WeightsError, match=r"f\.safetensors ends at byte 2,000"):
        list(iterate_with_threads(entries, CPU, 2))
    path.unlink()
    with pytest.raises(WeightsError, match=r"f\.safetensors could not be read at byte .* \(No such file"):
        list(iterate_with_threads(entries, CPU, 2))
