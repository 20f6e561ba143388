"""When fastsafetensors reads the weights, what is asked of it, and what is said where it does not."""

from __future__ import annotations

import logging
import re
import sys
import types
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixtune.errors import WeightsError
from pixtune.storage.loading import fast, is_fastsafetensors_available, iterate_tensors, read
from pixtune.storage.loading.entries import read_entries

CUDA = torch.device("cuda", 0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({name: torch.full((4,), float(number)) for number, name in enumerate("abc")}, tmp_path / "f.safetensors")
    return tmp_path / "f.safetensors"


class FakeLoader:
    """What is used of `fastsafetensors.ParallelLoader`, with a protocol of what happened."""

    events: list[str]
    arguments: dict[str, Any]
    left_out: str | None = None

    def __init__(self, group: None, files: list[str], **arguments: Any) -> None:
        type(self).arguments = arguments
        read = {name: tensor for file in files for name, tensor in load_file(file).items()}
        self.tensors = {name: tensor for name, tensor in read.items() if arguments["tensor_filter"](name)}

    def iterate_weights(self) -> Iterator[tuple[str, Tensor]]:
        try:
            for name, tensor in self.tensors.items():
                if name != self.left_out:
                    self.events.append(name)
                    yield name, tensor
        finally:
            self.events.append("iterator closed")

    def close(self) -> None:
        self.events.append("loader closed")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeLoader]:
    """fastsafetensors 0.5.0 on a machine with a GPU, as far as our code can tell."""

    class Loader(FakeLoader):
        events: list[str] = []  # noqa: RUF012

    stream = types.SimpleNamespace(synchronize=lambda: Loader.events.append("synchronized"))
    monkeypatch.setitem(sys.modules, "fastsafetensors", types.SimpleNamespace(ParallelLoader=Loader))
    monkeypatch.setattr(fast, "version", lambda name: "0.5.0")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return Loader


@pytest.mark.parametrize("use_fast", [True, None])
def test_it_is_used_where_it_is_there(fake: type[FakeLoader], file: Path, use_fast: bool | None) -> None:
    names = [name for name, _ in iterate_tensors([file], CUDA, num_threads=5, use_fast=use_fast)]
    assert names == ["a", "b", "c"]
    assert fake.arguments["device"] == "cuda:0" and fake.arguments["max_threads"] == 5


def test_a_gpu_without_a_number_is_the_current_one(
    fake: type[FakeLoader], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    list(iterate_tensors([file], "cuda", use_fast=True))
    assert fake.arguments["device"] == "cuda:1"


def test_the_gpu_is_done_with_a_tensor_before_the_next_is_asked_for(fake: type[FakeLoader], file: Path) -> None:
    list(fast.iterate_fast(read_entries([file]), CUDA, 2))
    assert fake.events == [
        "a", "synchronized", "b", "synchronized", "c", "synchronized", "iterator closed", "loader closed",
    ]  # fmt: skip
    assert fake.arguments["queue_size"] == -1, "its threads must not write while the consumer's kernels run"


def test_stopping_early_closes_it(fake: type[FakeLoader], file: Path) -> None:
    tensors = fast.iterate_fast(read_entries([file]), CUDA, 2)
    assert isinstance(tensors, Generator)
    next(tensors)
    tensors.close()
    assert fake.events == ["a", "iterator closed", "loader closed"]


def test_its_buffer_takes_the_largest_tensor(
    fake: type[FakeLoader], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "CHUNK_BYTES", 10)
    list(fast.iterate_fast(read_entries([file]), CUDA, 2))
    assert fake.arguments["max_batch_bytes"] == 16


def test_a_tensor_that_it_leaves_out_is_missed(fake: type[FakeLoader], file: Path) -> None:
    fake.left_out = "b"
    with pytest.raises(WeightsError, match=r"left out 1 of 3 tensors, b among them.*use_fastsafetensors: false"):
        list(fast.iterate_fast(read_entries([file]), CUDA, 2))


def test_only_what_is_wanted_is_read(fake: type[FakeLoader], file: Path) -> None:
    names = [name for name, _ in iterate_tensors([file], CUDA, wanted=lambda name: name != "b")]
    assert names == ["a", "c"]


# ---- where it is not used


def not_installed(name: str) -> str:
    raise PackageNotFoundError(name)


@pytest.fixture
def own_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of our own loader on a machine with a GPU."""
    calls: list[dict[str, Any]] = []

    def own(entries: list[object], device: torch.device, num_threads: int, drop_cache: bool) -> Iterator[Any]:
        calls.append({"num_threads": num_threads, "drop_cache": drop_cache})
        return iter(())

    monkeypatch.setattr(read, "iterate_with_threads", own)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(is_integrated=device.index == 1)
    )
    read._tell_once.cache_clear()
    return calls


@pytest.mark.parametrize(
    ("found", "module", "reason"),
    [
        (not_installed, None, r"not installed \(pip install 'pixtune\[fast\]'\)"),
        (lambda name: "0.7.1", types.SimpleNamespace(), r"0\.7\.1 is installed, and pixtune knows 0\.5"),
        (lambda name: "0.4.0", types.SimpleNamespace(), r"0\.4\.0 is installed"),
        (lambda name: "0.5.0", None, "cannot be imported"),
    ],
    ids=["not installed", "too new", "too old", "broken"],
)
def test_our_own_loader_takes_over_and_says_why_once(
    own_calls: list[dict[str, Any]],
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    found: Callable[[str], str],
    module: Any,
    reason: str,
) -> None:
    monkeypatch.setattr(fast, "version", found)
    monkeypatch.setitem(sys.modules, "fastsafetensors", module)  # None: importing it raises ImportError
    with caplog.at_level(logging.INFO, logger="pixtune"):
        for _ in range(3):
            iterate_tensors([file], CUDA, num_threads=5, use_fast=True)
    assert own_calls == [{"num_threads": 5, "drop_cache": False}] * 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(reason, record.getMessage()) and "5 threads" in record.getMessage()
    assert not is_fastsafetensors_available()


@pytest.mark.parametrize(("use_fast", "levels"), [(None, [logging.INFO]), (False, [])])
def test_nobody_is_warned_who_did_not_ask(
    own_calls: list[dict[str, Any]],
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    use_fast: bool | None,
    levels: list[int],
) -> None:
    monkeypatch.setattr(fast, "version", not_installed)
    with caplog.at_level(logging.INFO, logger="pixtune"):
        iterate_tensors([file], CUDA, use_fast=use_fast)
    assert [record.levelno for record in caplog.records] == levels
    assert len(own_calls) == 1


def test_false_never_asks_for_it(fake: type[FakeLoader], own_calls: list[dict[str, Any]], file: Path) -> None:
    iterate_tensors([file], CUDA, use_fast=False)
    assert len(own_calls) == 1 and not fake.events


def test_the_page_cache_is_dropped_where_it_takes_gpu_memory(own_calls: list[dict[str, Any]], file: Path) -> None:
    for index in (0, 1):
        iterate_tensors([file], torch.device("cuda", index), use_fast=False)
    assert [call["drop_cache"] for call in own_calls] == [False, True]
