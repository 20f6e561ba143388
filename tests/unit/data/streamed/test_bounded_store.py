"""The cache of a stream stays within its limit, and loses what was not used for longest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pixtune.data.cache import ABSENT, DiskStore
from pixtune.data.streamed.bounded_store import BoundedStore
from pixtune.errors import DataError
from pixtune.launch.crew import ALONE, Crew

ENTRY = {"mean": torch.zeros(256)}
SIZE = 1024
"""Bytes of an entry's tensors; its file has a header beside them."""


def digest(number: int) -> str:
    return f"{number:064x}"


def held(folder: Path) -> list[int]:
    return sorted(int(path.stem, 16) for path in folder.rglob("*.safetensors"))


def filled(folder: Path, numbers: range) -> DiskStore:
    store = DiskStore(folder)
    for number in numbers:
        store.write(digest(number), ENTRY)
        os.utime(folder / digest(number)[:2] / f"{digest(number)}.safetensors", (number, number))
    return store


def test_what_was_not_used_for_longest_goes_first_and_what_is_needed_stays(tmp_path):
    store = BoundedStore(filled(tmp_path, range(6)), 8 * SIZE, ALONE)
    store.begin({digest(0), digest(9)})
    assert held(tmp_path) == [*range(6)], "the limit is not reached"
    for number in range(6, 10):
        store.write(digest(number), ENTRY)
    assert held(tmp_path)[0] == 0 and held(tmp_path)[-4:] == [6, 7, 8, 9]
    assert 1 not in held(tmp_path) and 2 not in held(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 8 * SIZE + 4 * 200  # new headers
    assert store.problem(digest(1)) == ABSENT and store.problem(digest(0)) is None
    store.begin({digest(9)})
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 8 * SIZE
    assert 0 in held(tmp_path), "it was used a window ago"


def test_a_window_that_does_not_fit_is_an_error_that_names_both_keys(tmp_path):
    store = BoundedStore(filled(tmp_path, range(3)), 2 * SIZE, ALONE)
    store.begin({digest(7)})
    store.write(digest(7), ENTRY)
    store.write(digest(8), ENTRY)
    with pytest.raises(DataError) as caught:
        store.write(digest(9), ENTRY)
    assert "stream.cache_limit_gib" in str(caught.value) and "stream.window" in str(caught.value)
    assert held(tmp_path) == [7, 8]


def test_processes_keep_the_limit_together_and_delete_no_entry_twice(tmp_path):
    filled(tmp_path, range(12))
    stores = [BoundedStore(DiskStore(tmp_path), 12 * (SIZE + 200), Crew(object(), rank, 3)) for rank in range(3)]  # type: ignore[arg-type]
    for store in stores:
        store.begin({digest(11)})
    for number in range(12, 18):
        stores[number % 3].write(digest(number), ENTRY)
    assert len(held(tmp_path)) <= 13 and {11, *range(12, 18)} <= {*held(tmp_path)}
    stores[0].begin({digest(number) for number in range(12, 18)})
    assert {*range(12, 18)} <= {*held(tmp_path)}


def test_a_request_to_end_is_noticed_before_an_entry_is_made(tmp_path):
    def check() -> None:
        raise KeyboardInterrupt

    store = BoundedStore(DiskStore(tmp_path), SIZE, ALONE, check)
    with pytest.raises(KeyboardInterrupt):
        store.write(digest(1), ENTRY)
    assert not held(tmp_path)


def test_a_folder_that_is_not_there_yet_holds_nothing(tmp_path):
    BoundedStore(DiskStore(tmp_path / "none"), SIZE, ALONE).begin({digest(1)})
