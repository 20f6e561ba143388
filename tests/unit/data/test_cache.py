"""Nothing stale or damaged is read, nothing is encoded twice, every miss says why, and no half of a file is left."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pixtune.data import cache
from pixtune.data.cache import ABSENT, CHECKSUM_START, CacheKey, DiskStore, Entry, Ledger, MemoryStore, Store
from pixtune.data.filling import FillReport, fill, missing_keys
from pixtune.errors import DataError, WriteError
from pixtune.inputs.reading import read_bounded
from pixtune.launch.crew import Share

ENTRY = {"mean": torch.arange(6.0).view(1, 2, 3), "half": torch.ones(2).bfloat16()}


def key(item: str = "a.png", **parts: str) -> CacheKey:
    return CacheKey(item, {"kind": "latents", "picture": "p0", "size": "64x64", **parts})


def count_encodings(made: list[str]) -> Callable[[Sequence[CacheKey], Share], Iterator[tuple[CacheKey, Entry]]]:
    def encode(missing: Sequence[CacheKey], share: Share) -> Iterator[tuple[CacheKey, Entry]]:
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
    assert store.problem("ab12") == ABSENT
    store.write("ab12", ENTRY)
    assert store.problem("ab12") is None and store.problem("ab13") == ABSENT
    entry = store.read("ab12")
    assert entry.keys() == ENTRY.keys()
    for name, tensor in ENTRY.items():
        assert entry[name].dtype == tensor.dtype and torch.equal(entry[name], tensor)
    assert {name: tuple(shape) for name, shape in store.read_shapes("ab12").items()} == {
        "mean": (1, 2, 3),
        "half": (2,),
    }


def test_rows_of_a_batch_and_gradients_do_not_come_along(store: Store) -> None:
    batch = torch.arange(12.0, requires_grad=True).view(3, 4)
    store.write("ab12", {"row": batch[1:2], "turned": batch.T})
    entry = store.read("ab12")
    assert torch.equal(entry["row"], torch.tensor([[4.0, 5, 6, 7]])) and not entry["row"].requires_grad
    assert torch.equal(entry["turned"], batch.detach().T)


def flip(place: int) -> Callable[[bytes], bytes]:
    """Flips the last bit of the byte at `place`, counted from the end where it is negative."""

    def flipped(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[place] ^= 1
        return bytes(changed)

    return flipped


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "empty": lambda data: b"",
    "text": lambda data: b"not tensors at all, but long enough for a header",
    "all zeros": lambda data: bytes(len(data)),
    "zeros behind the header": lambda data: data[:-28] + bytes(28),
    "two numbers exchanged": lambda data: data[:-8] + data[-4:] + data[-8:-4],
    "a bit of a number": flip(-1),
    "a bit of the header's length": flip(1),
    "a bit of a tensor's name": lambda data: data.replace(b'"mean"', b'"meaN"'),
    "a tensor's shape": lambda data: data.replace(b"[1,2,3]", b"[1,3,2]"),
    "a number format": lambda data: data.replace(b"BF16", b"F16", 1).replace(b"}}", b"}} ", 1),
    "a bit of the checksum": flip(CHECKSUM_START),
}
"""What a file may become without an error of the library that reads it."""


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("is_new_process", [True, False])
def test_a_damaged_entry_is_made_anew_and_named_once(tmp_path: Path, name: str, is_new_process: bool) -> None:
    store, ledger = DiskStore(tmp_path / "entries"), Ledger(tmp_path / "ledger.json")
    keys = [key("a.png"), key("b.png", picture="p1")]
    fill(store, ledger, keys, count_encodings([]))
    assert missing_keys(store, keys) == []
    file = entry_file(tmp_path, keys[0])
    sound = file.read_bytes()
    file.write_bytes(DAMAGE[name](sound))
    assert file.read_bytes() != sound
    with pytest.raises(DataError, match=rf"{file} is damaged.*resume"):
        store.read(keys[0].digest)
    made: list[str] = []
    report = fill(DiskStore(store.folder) if is_new_process else store, ledger, keys, count_encodings(made))
    assert made == ["loaded", "a.png"] and file.read_bytes() == sound
    assert str(report) == "1 from the cache, 1 encoded (1 damaged: a.png)"
    assert fill(store, ledger, keys, count_encodings(made)).hits == 2


def entry_file(folder: Path, of: CacheKey) -> Path:
    (file,) = folder.rglob(f"{of.digest}.safetensors")
    return file


def test_another_entrys_file_is_not_read(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    keys = [key("a.png"), key("b.png", picture="p1")]
    fill(store, Ledger(None), keys, count_encodings([]))
    one, other = (entry_file(tmp_path, each) for each in keys)
    one.write_bytes(other.read_bytes())
    assert [store.problem(each.digest) for each in keys] == ["damaged", None]


def test_every_flip_of_a_bit_is_noticed(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.write("ab12", ENTRY)
    (file,) = tmp_path.rglob("*.safetensors")
    sound = file.read_bytes()
    for place in range(8 * len(sound)):
        damaged = bytearray(sound)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(DataError):
            store.read("ab12")
    file.write_bytes(sound)
    assert torch.equal(store.read("ab12")["mean"], ENTRY["mean"])


def test_the_checksum_is_the_crc_32_of_key_and_file(tmp_path: Path) -> None:
    """Computed bit by bit here, so that caches stay good whatever computes it."""
    store = DiskStore(tmp_path)
    store.write("ab12", ENTRY)
    (file,) = tmp_path.rglob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        written = opened.metadata()["checksum"]
    crc = 0xFFFFFFFF
    for byte in b"ab12" + file.read_bytes().replace(written.encode(), b"", 1):
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    assert written == f"{crc ^ 0xFFFFFFFF:08x}"


def test_a_deleted_entry_is_made_anew(tmp_path: Path) -> None:
    store, ledger = DiskStore(tmp_path / "entries"), Ledger(tmp_path / "ledger.json")
    keys = [key("a.png"), key("b.png", picture="p1")]
    fill(store, ledger, keys, count_encodings([]))
    entry_file(tmp_path, keys[0]).unlink()
    for read in (store.read, store.read_shapes):
        with pytest.raises(DataError, match="cannot be read: No such file"):
            read(keys[0].digest)
    assert fill(store, ledger, keys, count_encodings([])).misses == {"deleted": 1}


def test_entries_without_a_checksum_are_made_anew_with_one_line_that_says_why(tmp_path: Path) -> None:
    """Version 0.1.0 wrote such files."""
    store, ledger = DiskStore(tmp_path / "entries"), Ledger(tmp_path / "ledger.json")
    keys = [key("a.png"), key("b.png", picture="p1")]
    fill(store, ledger, keys, count_encodings([]))
    for each in keys:
        save_file(ENTRY, entry_file(tmp_path, each))
    report = fill(store, ledger, keys, count_encodings([]))
    assert str(report) == "0 from the cache, 2 encoded (2 of an earlier version, without a checksum)"
    assert fill(store, ledger, keys, count_encodings([])).hits == 2


def test_an_entry_out_of_reach_is_made_anew_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(tmp_path)
    store.write("ab12", ENTRY)

    def fails(path: Path, most_bytes: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(cache, "read_bounded", fails)
    assert store.problem("ab12") == "unreadable (Input/output error)"
    with pytest.raises(DataError, match=r"Input/output error.*resume"):
        store.read("ab12")


def test_writing_an_entry_waits_for_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checksum notices what a power failure leaves; the wait had been most of what an entry cost."""
    monkeypatch.setattr(os, "fsync", None)
    DiskStore(tmp_path).write("ab12", ENTRY)
    assert DiskStore(tmp_path).problem("ab12") is None


def test_an_entry_is_checked_once_until_its_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, checked = DiskStore(tmp_path), list[str]()
    store.write("ab12", ENTRY)
    check = cache._problem_of

    def counting(digest: str, data: bytes) -> str | None:
        checked.append(digest)
        return check(digest, data)

    monkeypatch.setattr(cache, "_problem_of", counting)
    assert [store.problem("ab12") for _ in range(3)] == [None] * 3 and checked == ["ab12"]
    store.write("ab12", ENTRY)
    assert store.problem("ab12") is None and checked == ["ab12"] * 2


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
    def breaks_off(missing: Sequence[CacheKey], share: Share) -> Iterator[tuple[CacheKey, Entry]]:
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
    assert reasons(key("a.png", picture="p2"), key("c.png", picture="p3")) == {"with another picture": 1, "new": 1}
    assert reasons(key("a.png", picture="p4", size="32x32")) == {"with another picture and size": 1}
    monkeypatch.setattr(cache, "CODE_VERSION", "other")
    assert reasons(key("a.png", picture="p4", size="32x32")) == {"with another code": 1}


def test_the_report_is_one_readable_line() -> None:
    report = FillReport(hits=3, misses={"new": 2, "with another picture": 1})
    assert str(report) == "3 from the cache, 3 encoded (2 new; 1 with another picture)"
    assert str(FillReport(5, {})) == "5 from the cache, 0 encoded"


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
    assert fill(store, Ledger(path), [key()], count_encodings([])).misses == {"deleted": 1}


def test_the_ledger_never_decides_what_is_used(tmp_path: Path) -> None:
    store, path = DiskStore(tmp_path / "entries"), tmp_path / "ledger.json"
    fill(store, Ledger(path), [key()], count_encodings([]))
    path.unlink()
    made: list[str] = []
    assert fill(store, Ledger(path), [key()], count_encodings(made)).hits == 1 and not made
    made = []
    fill(MemoryStore(), Ledger(path), [key()], count_encodings(made))
    assert made == ["loaded", "a.png"]


def test_a_ledger_that_cannot_be_written_costs_reasons_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A full cache on a disk that is read-only serves a run, whatever its pictures are called by now."""
    store = DiskStore(tmp_path / "entries")
    fill(store, Ledger(None), [key("a.png")], count_encodings([]))
    (tmp_path / "ledger.json").mkdir()
    assert fill(store, Ledger(tmp_path / "ledger.json"), [key("b.png")], count_encodings([])).hits == 1
    assert caplog.text.count("ledger.json could not be written") == 1


def test_a_ledger_is_written_where_something_is_new(tmp_path: Path) -> None:
    store, path = DiskStore(tmp_path / "entries"), tmp_path / "ledger.json"
    fill(store, Ledger(path), [key("a.png")], count_encodings([]))
    written = path.stat().st_ino
    fill(store, Ledger(path), [key("a.png")], count_encodings([]))
    assert path.stat().st_ino == written
    fill(store, Ledger(path), [key("b.png")], count_encodings([]))
    assert json.loads(path.read_text()).keys() == {"a.png", "b.png"}


# ---- a full disk


def test_a_full_disk_leaves_no_part_of_a_file_and_the_older_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(tmp_path / "entries")
    store.write("ab12", ENTRY)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    for digest in ("ab12", "cd34"):
        with pytest.raises(WriteError, match=rf"{digest}\.safetensors could not be written .*No space left"):
            store.write(digest, {"mean": torch.zeros(9)})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["ab12.safetensors"]
    assert torch.equal(store.read("ab12")["mean"], ENTRY["mean"]) and store.problem("cd34") == ABSENT


def test_an_entry_that_cannot_be_read_once_is_told_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that works again when it is asked a second time, as a failing one does for a while."""
    store, made = DiskStore(tmp_path / "entries"), list[str]()
    fill(store, Ledger(None), [key()], count_encodings(made))
    answers = iter([OSError(errno.EIO, "Input/output error")])

    def fails_once(path: Path, limit: int) -> bytes:
        for error in answers:
            raise error
        return path.read_bytes()

    monkeypatch.setattr(cache, "read_bounded", fails_once)
    report = fill(DiskStore(store.folder), Ledger(None), [key()], count_encodings(made))
    assert str(report) == "0 from the cache, 1 encoded (1 unreadable (Input/output error))"
    assert "entries of the cache are unreadable (Input/output error): those of a.png" in caplog.text
    assert missing_keys(DiskStore(store.folder), [key()]) == []


# ---- a cache that several machines share


def test_an_entry_that_another_machine_has_just_made_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system remembers for a while that a name was absent."""
    store, other = (DiskStore(tmp_path / "entries") for _ in range(2))
    other.write("ab12", ENTRY)
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    real, looks = read_bounded, iter([FileNotFoundError(errno.ENOENT, "No such file")] * 3)

    def lagging(path: Path, most: int) -> bytes:
        for error in looks:
            raise error
        return real(path, most)

    monkeypatch.setattr(cache, "read_bounded", lagging)
    with pytest.raises(DataError, match="No such file"):
        store.read("ab12")
    assert not pauses, "it is deleted, where nobody is known to have made it just now"
    store.expect_others()
    assert torch.equal(store.read("ab12")["mean"], ENTRY["mean"]) and len(pauses) == 2


def test_an_entry_that_never_comes_is_an_error_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LATE_SECONDS", 0.2)
    store = DiskStore(tmp_path / "entries")
    store.expect_others()
    for read in (store.read, store.read_shapes):
        with pytest.raises(DataError, match="No such file"):
            read("ab12")


def test_an_entry_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(tmp_path / "entries")
    store.write("ab12", ENTRY)
    real, errors = read_bounded, iter([OSError(errno.ESTALE, "Stale file handle")])

    def stale(path: Path, most: int) -> bytes:
        for error in errors:
            raise error
        return real(path, most)

    monkeypatch.setattr(cache, "read_bounded", stale)
    assert torch.equal(store.read("ab12")["mean"], ENTRY["mean"])
