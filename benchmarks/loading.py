"""Measures how fast weights reach a device: python benchmarks/loading.py [--gigabytes 2] [--device cuda] [--rounds 3]

Writes a file of that size, whose tensors have the shapes of a large transformer's block, and reads it by

* disk: 16 MiB at a time into one buffer, past the page cache where the file system allows it (O_DIRECT);
* mapped: stock safetensors, each tensor to the device as soon as it is asked for;
* threads: pixtune's own loader;
* fastsafetensors, where it is installed.

The consumer reads every tensor once on the device and drops it. "cold" is after the file's pages were dropped from the
page cache, "warm" right after that. Rounds alternate, the figure is their median. Beside it stands the growth of the
process's own memory, without the pages of mapped files. Each way has a process of its own. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pixtune.bench.environment import describe
from pixtune.storage.loading.entries import read_entries
from pixtune.storage.loading.fast import iterate_fast, package_obstacle
from pixtune.storage.loading.threads import iterate_with_threads

BLOCK_SHAPES = [(18432, 3072), (18432,), (3072, 3072), (3072,), (12288, 3072), (12288,), (3072, 12288), (128,)]
CHUNK_BYTES = 16 * 2**20


def write_model(path: Path, num_bytes: int) -> None:
    """Writes bf16 tensors, block after block, until there are `num_bytes`."""
    tensors: dict[str, Tensor] = {}
    written_bytes, generator = 0, torch.Generator().manual_seed(0)
    while written_bytes < num_bytes:
        for number, shape in enumerate(BLOCK_SHAPES):
            tensor = torch.randint(0, 2**15, shape, generator=generator, dtype=torch.int16).view(torch.bfloat16)
            tensors[f"block.{len(tensors)}.{number}"] = tensor
            written_bytes += tensor.nbytes
    save_file(tensors, path)


def drop_cache(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())  # what has not been written cannot be dropped
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_disk(path: Path) -> str:
    """Reads the file in order, and returns whether past the page cache or through it, in words."""
    buffer = mmap.mmap(-1, CHUNK_BYTES)  # O_DIRECT asks for aligned memory
    try:
        descriptor, how = os.open(path, os.O_RDONLY | os.O_DIRECT), "O_DIRECT"
    except OSError:  # tmpfs and some network mounts have no such thing
        descriptor, how = os.open(path, os.O_RDONLY), "pread after dropping the page cache"
    offset_bytes = 0
    while count := os.preadv(descriptor, [buffer], offset_bytes):
        offset_bytes += count
    os.close(descriptor)
    return how


def iterate_stock(path: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt", device=str(device)) as file:
        for name in file.offset_keys():
            yield name, file.get_tensor(name)


def private_bytes() -> int:
    """Reads this process's memory without the pages of files."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def time_once(tensors: Callable[[], Iterator[tuple[str, Tensor]]], device: torch.device) -> dict[str, float]:
    """Measures the seconds until every tensor has been read once on the device, and the growth of the process."""
    before_bytes, most_bytes = private_bytes(), 0
    start = time.perf_counter()
    for _, tensor in tensors():
        tensor.view(torch.int16).amax()
        del tensor
        most_bytes = max(most_bytes, private_bytes())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"seconds": time.perf_counter() - start, "grown_bytes": most_bytes - before_bytes}


def measure(way: str, path: Path, device: torch.device, num_threads: int) -> dict[str, Any]:
    """Measures one cold and one warm run in this process."""
    if way == "disk":
        drop_cache(path)
        start = time.perf_counter()
        how = read_disk(path)
        return {"cold": {"seconds": time.perf_counter() - start}, "how": how}
    entries = read_entries([path])
    ways = {
        "mapped": lambda: iterate_stock(path, device),
        "threads": lambda: iterate_with_threads(entries, device, num_threads),
        "fastsafetensors": lambda: iterate_fast(entries, device, num_threads),
    }
    torch.zeros(1, device=device).amax()  # starting CUDA is not loading
    drop_cache(path)
    return {"cold": time_once(ways[way], device), "warm": time_once(ways[way], device)}


def measure_apart(way: str, path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs `measure` in a process of its own."""
    words = ["--measure", way, str(path), "--device", arguments.device, "--threads", str(arguments.threads)]
    result = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


def summary(rounds: list[dict[str, Any]], num_bytes: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"how": rounds[0]["how"]} if "how" in rounds[0] else {}
    for state in ("cold", "warm"):
        runs = [one[state] for one in rounds if state in one]
        if runs:
            speeds = [num_bytes / run["seconds"] for run in runs]
            figures[f"{state}_bytes_per_second"] = round(statistics.median(speeds))
            figures[f"{state}_rounds"] = [round(speed) for speed in speeds]
        if runs and "grown_bytes" in runs[0]:
            figures[f"{state}_grown_bytes"] = max(run["grown_bytes"] for run in runs)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2, help="size of the file, in 10^9 bytes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", help="folder of the file, on the disk to measure (default: that of temporary files)"
    )
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, path = arguments.measure
        print(json.dumps(measure(way, Path(path), torch.device(arguments.device), arguments.threads)))
        return
    obstacle = package_obstacle()
    ways = ["disk", "mapped", "threads", *([] if obstacle else ["fastsafetensors"])]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder, "model.safetensors")
        write_model(path, int(arguments.gigabytes * 1e9))
        rounds = [{way: measure_apart(way, path, arguments) for way in ways} for _ in range(arguments.rounds)]
        num_bytes = path.stat().st_size
    figures = {way: summary([one[way] for one in rounds], num_bytes) for way in ways}
    disk = figures["disk"]["cold_bytes_per_second"]
    for way in ways[1:]:
        figures[way]["cold_over_disk"] = round(figures[way]["cold_bytes_per_second"] / disk, 2)
    result = {
        "benchmark": "loading",
        "device": arguments.device,
        "file_bytes": num_bytes,
        "num_threads": arguments.threads,
        "ways": figures,
        "fastsafetensors": obstacle or version("fastsafetensors"),
        **describe(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
