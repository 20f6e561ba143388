"""Two processes that fill one cache fill it as one does, byte for byte, and end together where one of them fails."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from tests import processes
from tests.runs import DEMO_HELD_OUT, ROOT, end_of, overrides, pixtune, start_ranks, write_config

CHARACTER = ROOT / "assets" / "demo-character"
FOLDERS = [
    {"img_dir": str(CHARACTER / "images"), "mask_dir": str(CHARACTER / "masks"), "flip": True},
    {"img_dir": str(DEMO_HELD_OUT), "shuffle_tags": True},
]
SETTINGS = {"data_config__img_dir": "null", "data_config__folders": json.dumps(FOLDERS), "max_train_steps": 1}


def start_two(folder: Path, cache: Path, before: processes.Before | None = None) -> list[processes.Started]:
    words = overrides(folder / "run", cache, **SETTINGS)
    return start_ranks("train", "--config", write_config(folder), *words, before=before)


def files_of(cache: Path) -> dict[str, bytes]:
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def note_writers(file: Path) -> None:
    """Has each process write down the entries that it makes, and take its time."""
    from pixtune.data.cache import DiskStore, Entry

    write = DiskStore.write

    def noted(self: DiskStore, digest: str, entry: Entry) -> None:
        write(self, digest, entry)
        with file.open("a") as stream:
            stream.write(f"{os.environ['RANK']} {digest}\n")
        time.sleep(0.02)

    DiskStore.write = noted  # type: ignore[method-assign]


def test_a_cache_that_two_fill_is_the_one_that_one_fills(tmp_path: Path) -> None:
    two, one, writers = tmp_path / "two", tmp_path / "one", tmp_path / "writers"
    ranks = start_two(tmp_path, two, partial(note_writers, writers))
    (code, printed), (other_code, other) = map(end_of, ranks)
    assert (code, other_code) == (0, 0), printed + other
    outcome = pixtune("train", "--config", write_config(tmp_path), *overrides(tmp_path / "alone", one, **SETTINGS))
    assert outcome.returncode == 0, outcome.stdout

    assert files_of(two) == files_of(one)
    assert any(".tmp" not in name and "entries/" in name for name in files_of(one))
    noted = [line.split() for line in writers.read_text().splitlines()]
    assert max(Counter(digest for _, digest in noted).values()) == 1, "no entry was made twice"
    shares = Counter(rank for rank, _ in noted)
    assert shares.keys() == {"0", "1"} and min(shares.values()) > len(noted) / 5, shares
    for kind in ("captions", "pictures"):  # what is reported counts both shares
        (of_two,), (of_one,) = (
            [line for line in text.splitlines() if line.startswith(f"{kind}: 0 from the cache, ")]
            for text in (printed, outcome.stdout)
        )
        assert of_two == of_one
    assert "captions:" not in other and "pictures:" not in other


def spoil_a_share() -> None:
    """The second process finds its third picture changed while it was in use."""
    from pixtune.data.encode import FramedPicture
    from pixtune.errors import DataError

    read, number = FramedPicture.read, 0

    def spoiled(self: FramedPicture) -> object:
        nonlocal number
        number += 1
        time.sleep(0.05)
        if os.environ["RANK"] == "1" and number > 2:
            raise DataError("a picture changed while it was in use", [f"{self.path} has other content."])
        return read(self)

    FramedPicture.read = spoiled  # type: ignore[method-assign, assignment]


def test_a_share_that_fails_ends_all_with_one_error(tmp_path: Path) -> None:
    ranks = start_two(tmp_path, tmp_path / "cache", spoil_a_share)
    (code, printed), (other_code, other) = map(end_of, ranks)
    assert (code, other_code) == (1, 1), printed + other
    assert "error:" not in other and "has other content." in printed, "the first process prints it, once"
    report = "error: process 1 of 2 failed while encoding pictures: a picture changed while it was in use:"
    assert report in " ".join(printed.split()), printed
    assert "Traceback" not in printed + other and not [*tmp_path.rglob("*.tmp")]


def slow_and_impatient(writers: Path) -> None:
    from pixtune.launch import peers, stop

    peers.SILENT_SECONDS, stop.LOST_SECONDS = 2.0, 1.0
    note_writers(writers)


@pytest.mark.parametrize(
    ("lost", "sent"),
    [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGKILL)],
    ids=["killed", "stopped", "first"],
)
def test_a_process_that_is_gone_while_encoding_is_named_and_what_was_made_is_kept(
    tmp_path: Path, lost: int, sent: signal.Signals
) -> None:
    writers, cache = tmp_path / "writers", tmp_path / "cache"
    ranks = start_two(tmp_path, cache, partial(slow_and_impatient, writers))
    until = time.monotonic() + 60
    while not (writers.exists() and f"\n{lost} " in writers.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    ranks[lost].send_signal(sent)
    began = time.monotonic()
    code, printed = end_of(ranks[1 - lost], 60)
    assert time.monotonic() - began < 20
    if ranks[lost].poll() is None:
        ranks[lost].send_signal(signal.SIGKILL)
    named = (f"error: process {lost} of 2 (pid ", "error: the store where the processes meet is gone, with process 0")
    assert code == 1 and sum(map(printed.count, named)) == 1 and "Traceback" not in printed, printed
    made = {line.split()[1] for line in writers.read_text().splitlines()}
    assert made <= {path.stem for path in cache.rglob("*.safetensors")}
