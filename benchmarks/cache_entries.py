"""Measures what cache entries cost: python benchmarks/cache_entries.py [--entries 100] [--rounds 5] [--folder DIR]

Writes entries of full size (latents of 1024x1024 pixels, features of 512 tokens of Qwen2.5-VL 7B), and takes for each
kind the milliseconds an entry, medians of the rounds, of

* hash: the checksums that Python brings along, over the entry's bytes;
* write, synced: as `storage.files` writes by default, one `fsync` for the file and one for its folder;
* write: as the cache writes;
* check: what a start does, with the cache's threads;
* read, unchecked: stock safetensors, each tensor copied once;
* read: what a step's read-ahead thread does, checksum included.

Files are in the page cache when they are read: the disk's own time comes on top of either. Prints JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pixtune.bench.environment import describe
from pixtune.data.cache import CacheKey, DiskStore, missing_keys
from pixtune.storage.safetensors_writer import save_without_digest

KINDS: Mapping[str, Mapping[str, Tensor]] = {
    "latents": {"mean": torch.rand(1, 16, 128, 128), "std": torch.rand(1, 16, 128, 128)},
    "text": {"prompt_embeds": torch.rand(512, 3584).bfloat16()},
}
HASHES: Mapping[str, Callable[[bytes], object]] = {
    "crc32": zlib.crc32,
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "blake2b": lambda data: hashlib.blake2b(data).digest(),
}


def milliseconds(work: Callable[[], object], count: int, rounds: int) -> float:
    """Times `work`, which handles `count` entries, and returns the median of the rounds for one of them."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return round(statistics.median(seconds) / count * 1000, 3)


def measure(folder: Path, entry: Mapping[str, Tensor], count: int, rounds: int) -> dict[str, float]:
    """Measures one kind of entry in an empty folder."""
    store = DiskStore(folder / "entries")
    keys = [CacheKey(str(number), {"number": str(number)}) for number in range(count)]
    files = [store.folder / key.digest[:2] / f"{key.digest}.safetensors" for key in keys]
    data = b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in entry.values())
    figures = {f"hash {name}": milliseconds(partial(take, data), 1, 10 * rounds) for name, take in HASHES.items()}

    def write_synced() -> None:
        for key in keys:
            save_without_digest(folder / "synced" / key.digest, entry)

    def write() -> None:
        for key in keys:
            store.write(key.digest, dict(entry))

    def read_unchecked() -> None:
        for file in files:
            for tensor in load_file(file).values():
                tensor.clone()

    def read() -> None:
        for key in keys:
            store.read(key.digest)

    def check() -> None:
        assert not missing_keys(DiskStore(store.folder), keys)

    works = {
        "write, synced": write_synced,
        "write": write,
        "check": check,
        "read, unchecked": read_unchecked,
        "read": read,
    }
    return {"bytes": len(data), **figures, **{name: milliseconds(work, count, rounds) for name, work in works.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; absent: the folder for temporary files")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    for kind, entry in KINDS.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            figures[kind] = measure(Path(folder), entry, arguments.entries, arguments.rounds)
    print(json.dumps({"milliseconds an entry": figures, "environment": describe()}, indent=2))


if __name__ == "__main__":
    main()
