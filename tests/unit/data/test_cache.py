"""Nothing stale is read, nothing is encoded twice, every miss says why, and a full disk leaves no half of a file."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from pixtune.data import cache
from pixtune.data.cache import CacheKey, DiskStore, Entry, Ledger, MemoryStore, Store, fill
from pixtune.errors import WriteError

ENTRY = {"mean": torch.arange(6.0).view(1, 2, 3), "half": torch.ones(2).bfloat16()}


def key(item: str = "a.png", **parts: str) -> CacheKey:
    return CacheKey(item, {"kind": "latents", "picture": "p0", "size": "64x64", **parts})


def count_encodings(made: list[str]) -> Callable[[Sequence[CacheKey]], Iterator[tuple[CacheKey, Entry]]]:
    def encode(missing: Sequence[CacheKey]) -> Iterator[tuple[CacheKey, Entry]]:
        made.append("loaded")
        for one in missing:
            made.append(one.item)
            yield one, ENTRY

    return encode


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return DiskStore(tmp_path / "entries") if request.param == "disk" else MemoryStore()


# ---- keys


def test_every_part_and_its_name_decide_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key().digest
    assert before == key().digest
    assert len({before, key(picture="p1").digest, key(size="64x48").digest, key(more="x").digest}) == 4
    assert CacheKey("a", {"x": "1", "y": "2"}).digest != CacheKey("a", {"x": "2", "y": "1"}).digest
    assert CacheKey("a", {"x": "1", "y": "2"}).digest == CacheKey("a", {"y": "2", "x": "1"}).digest
    monkeypatch.setattr(cache, "CODE_VERSION", "other")
    assert key().digest != before


def test_the_name_that_a_person_reads_does_not_decide_the_key() -> None:
    """A renamed picture is not encoded again."""
    assert key("a.png").digest == key("b.png").digest


# ---- stores


def test_an_entry_is_read_back_as_it_was_written(store: Store) -> None:
    assert not store.has("ab12")
    store.write("ab12", ENTRY)
    assert store.has("ab12") and not store.has("ab13")
    entry = store.read("ab12")
    assert entry.keys() == ENTRY.keys()
    for name, tensor in ENTRY.items():
        assert entry[name].dtype == tensor.dtype and torch.equal(entry[name], tensor)


def test_rows_of_a_batch_and_gradients_do_not_come_along(store: Store) -> None:
    batch = torch.arange(12.0, requires_grad=True).view(3, 4)
    store.write("ab12", {"row": batch[1:2], "turned": batch.T})
    entry = store.read("ab12")
    assert torch.equal(entry["row"], torch.tensor([[4.0, 5, 6, 7]])) and not entry["row"].requires_grad
    assert torch.equal(entry["turned"], batch.detach().T)


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_text(path: Path) -> None:
    path.write_text("not tensors at all, but long enough for a header")


@pytest.mark.parametrize("damage", [damage_cut, damage_empty, damage_text, Path.unlink])
def test_a_damaged_or_deleted_entry_is_made_anew(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    store, ledger = DiskStore(tmp_path / "entries"), Ledger(tmp_path / "ledger.json")
    keys = [key("a.png"), key("b.png", picture="p1")]
    fill(store, ledger, keys, count_encodings([]))
    (file,) = (tmp_path / "entries").rglob(f"{keys[0].digest}.safetensors")
    damage(file)
    made: list[str] = []
    report = fill(store, ledger, keys, count_encodings(made))
    assert made == ["loaded", "a.png"]
    assert (report.hits, report.misses) == (1, {"deleted or damaged": 1})
    assert torch.equal(store.read(keys[0].digest)["mean"], ENTRY["mean"])


# ---- filling


def test_encoders_are_not_loaded_when_nothing_is_missing(store: Store) -> None:
    made: list[str] = []
    keys = [key("a.png"), key("b.png", picture="p1")]
    first = fill(store, Ledger(None), keys, count_encodings(made))
    assert made == ["loaded", "a.png", "b.png"] and (first.hits, first.misses) == (0, {"new": 2})
    second = fill(store, Ledger(None), keys, count_encodings(made))
    assert len(made) == 3 and (second.hits, second.misses) == (2, {})


def test_equal_content_under_two_names_is_encoded_once(store: Store) -> None:
    made: list[str] = []
    report = fill(store, Ledger(None), [key("a.png"), key("copy.png")], count_encodings(made))
    assert len(made) == 2 and sum(report.misses.values()) == 1 and report.hits == 0
    assert fill(store, Ledger(None), [key("a.png"), key("copy.png")], count_encodings(made)).hits == 1


def test_what_was_encoded_before_a_crash_is_kept(store: Store) -> None:
    def breaks_off(missing: Sequence[CacheKey]) -> Iterator[tuple[CacheKey, Entry]]:
        yield missing[0], ENTRY
        raise KeyboardInterrupt

    keys = [key("a.png"), key("b.png", picture="p1")]
    with pytest.raises(KeyboardInterrupt):
        fill(store, Ledger(None), keys, breaks_off)
    made: list[str] = []
    fill(store, Ledger(None), keys, count_encodings(made))
    assert made == ["loaded", "b.png"]


def test_every_miss_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(tmp_path / "entries")

    def reasons(*keys: CacheKey) -> dict[str, int]:
        return fill(store, Ledger(tmp_path / "ledger.json"), keys, count_encodings([])).misses

    assert reasons(key("a.png"), key("b.png", picture="p1")) == {"new": 2}
    assert reasons(key("a.png"), key("b.png", picture="p1")) == {}
    assert reasons(key("a.png", picture="p2"), key("c.png", picture="p3")) == {"changed: picture": 1, "new": 1}
    assert reasons(key("a.png", picture="p4", size="32x32")) == {"changed: picture, size": 1}
    monkeypatch.setattr(cache, "CODE_VERSION", "other")
    assert reasons(key("a.png", picture="p4", size="32x32")) == {"changed: code": 1}


def test_the_report_is_one_readable_line() -> None:
    report = cache.FillReport(hits=3, misses={"new": 2, "changed: picture": 1})
    assert str(report) == "3 from the cache, 3 encoded (1 changed: picture; 2 new)"
    assert str(cache.FillReport(5, {})) == "5 from the cache, 0 encoded"


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"a.png": "text"}', "\xff"])
def test_a_damaged_ledger_costs_reasons_and_nothing_else(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(text, encoding="latin-1")
    store = MemoryStore()
    with caplog.at_level(logging.WARNING):
        report = fill(store, Ledger(path), [key()], count_encodings([]))
    assert report.misses == {"new": 1} and "ledger.json is damaged" in caplog.text
    store = MemoryStore()
    assert fill(store, Ledger(path), [key()], count_encodings([])).misses == {"deleted or damaged": 1}


def test_the_ledger_never_decides_what_is_used(tmp_path: Path) -> None:
    store, path = DiskStore(tmp_path / "entries"), tmp_path / "ledger.json"
    fill(store, Ledger(path), [key()], count_encodings([]))
    path.unlink()
    made: list[str] = []
    assert fill(store, Ledger(path), [key()], count_encodings(made)).hits == 1 and not made
    made = []
    fill(MemoryStore(), Ledger(path), [key()], count_encodings(made))
    assert made == ["loaded", "a.png"]


# ---- a full disk


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_no_part_of_a_file_and_the_older_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = DiskStore(tmp_path / "entries")
    store.write("ab12", ENTRY)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    monkeypatch.setattr(Path, "replace", full) if call == "replace" else None
    for digest in ("ab12", "cd34"):
        with pytest.raises(WriteError, match=rf"{digest}\.safetensors could not be written .*No space left"):
            store.write(digest, {"mean": torch.zeros(9)})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["ab12.safetensors"]
    assert torch.equal(store.read("ab12")["mean"], ENTRY["mean"]) and not store.has("cd34")
