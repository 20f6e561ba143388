"""Measures what cache entries cost: python benchmarks/cache_entries.py [--entries 100] [--rounds 5] [--fill 5000]

Writes entries of full size (latents of 1024x1024 pixels, features of 512 tokens of Qwen2.5-VL 7B), and takes for each
kind the milliseconds an entry, medians of the rounds, of

* hash: the checksums that Python brings along, over the entry's bytes;
* write, synced: as `storage.files` writes by default, one `fsync` for the file and one for its folder;
* write: as the cache writes;
* check: what a start does, with the cache's threads;
* read, unchecked: stock safetensors, each tensor copied once;
* read: what a step's read-ahead thread does, checksum included.

`--fill N` measures instead what filling a cache with N pictures of 64 pixels and N captions costs beside the encoders,
for which there are stand-ins: milliseconds an entry, of the process and of the clock.

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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from pixtune.bench.environment import describe
from pixtune.data.buckets import build_buckets, frame_picture
from pixtune.data.cache import CacheKey, DiskStore, Ledger
from pixtune.data.encode import Encoder, FramedPicture, TextItem
from pixtune.data.filling import missing_keys
from pixtune.data.images import picture_digest
from pixtune.families import family_of
from pixtune.family import Conditioning, LatentDistribution, Placement
from pixtune.plan.encoders import PLAINLY
from pixtune.storage.model_folder import ModelFolder
from pixtune.storage.safetensors_writer import save_without_digest

KINDS: Mapping[str, Mapping[str, Tensor]] = {
    "latents": {"mean": torch.rand(1, 16, 128, 128), "std": torch.rand(1, 16, 128, 128)},
    "text": {"prompt_embeds": torch.rand(512, 3584).bfloat16()},
}
SMALL_MODEL = Path(__file__).resolve().parent.parent / "assets" / "tiny-qwen-image"
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


@dataclass(frozen=True)
class WithoutEncoders(Encoder):
    """Encodes in no time."""

    def open_autoencoder(self) -> Callable[[Tensor], LatentDistribution]:
        latents = torch.zeros(1, 16, 8, 8)
        return lambda pixels: LatentDistribution(latents.clone(), latents.clone())

    def open_text_encoder(self) -> Callable[[TextItem], Conditioning]:
        features = torch.zeros(12, 128)
        return lambda item: {"prompt_embeds": features.clone()}


def measure_fill(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Measures the filling of a cache in an empty folder."""
    draw = np.random.default_rng(0)
    for number in range(count):
        pixels = draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.png")
    model = ModelFolder(SMALL_MODEL)
    encoder = WithoutEncoders(
        family_of(model), model, Placement(torch.device("cpu"), torch.float32), PLAINLY, None,
        DiskStore(folder / "cache"), Ledger(folder / "ledger.json"), Console(quiet=True), None,
    )  # fmt: skip
    framing = frame_picture(64, 64, build_buckets(64, 16))

    def pictures() -> None:
        items = [FramedPicture(path.name, path, picture_digest(path), framing) for path in sorted(folder.glob("*.png"))]
        encoder.fill_pictures(items, encoder.latent_keys(items))

    def captions() -> None:
        items = [TextItem(f"a face, number {number}") for number in range(count)]
        encoder.fill_texts(items, encoder.text_keys(items))

    figures = {}
    for work in (pictures, captions):
        began, cpu_began = time.perf_counter(), time.process_time()
        work()
        spent = {"process": time.process_time() - cpu_began, "clock": time.perf_counter() - began}
        figures[work.__name__] = {name: round(seconds / count * 1000, 3) for name, seconds in spent.items()}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; absent: the folder for temporary files")
    parser.add_argument("--fill", type=int, help="number of pictures, and of captions, to fill a cache with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.fill:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            filled = measure_fill(Path(folder), arguments.fill)
        print(json.dumps({"milliseconds an entry": filled, "environment": describe()}, indent=2))
        return
    figures = {}
    for kind, entry in KINDS.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            figures[kind] = measure(Path(folder), entry, arguments.entries, arguments.rounds)
    print(json.dumps({"milliseconds an entry": figures, "environment": describe()}, indent=2))


if __name__ == "__main__":
    main()
