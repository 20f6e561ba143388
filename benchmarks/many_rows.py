"""Seconds and memory of the parts of a run that hold every example: python benchmarks/many_rows.py --rows 1000000

It writes a metadata file of that many rows, which name a few pictures again and again, reads it as a run does, and goes
on to the order of the first epochs. Nothing is encoded. One line a part: seconds, memory of the process now and at its
peak, and bytes a row beyond what the libraries take.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

from pixtune.bench.environment import describe
from pixtune.config.schema import TrainConfig
from pixtune.config.sections import DataConfig, ValidationConfig
from pixtune.data.cache import Ledger, MemoryStore
from pixtune.data.encode import Encoder
from pixtune.data.encodings import Encodings
from pixtune.data.example_table import signatures_of
from pixtune.data.order import BatchOrder
from pixtune.data.prepare import choose_wanted, read_own
from pixtune.families import family_of
from pixtune.families.opening import open_model
from pixtune.family import Placement
from pixtune.hardware.meminfo import read_process_bytes
from pixtune.launch.crew import ALONE
from pixtune.plan.encoders import PLAINLY

MODEL = Path(__file__).resolve().parents[1] / "assets" / "tiny-qwen-image"
NUM_PICTURES = 16
CAPTION = "picture number {} of a thing, in a style that about twenty words describe, as captions of people do"
MIB = 2**20


class FullStore(MemoryStore):
    """A cache that has all entries."""

    def problem(self, digest: str) -> str | None:
        return None


def write_rows(folder: Path, num_rows: int) -> Path:
    for number in range(NUM_PICTURES):
        Image.new("RGB", (64 + 16 * (number % 4), 64), (number * 9, 0, 0)).save(folder / f"{number}.png")
    with (folder / "rows.jsonl").open("w") as stream:
        for number in range(num_rows):
            row = {"image": f"{number % NUM_PICTURES}.png", "caption": CAPTION.format(number)}
            stream.write(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


def measure(folder: Path, num_rows: int) -> None:
    data = DataConfig(img_dir=folder, img_size=64, metadata_file=write_rows(folder, num_rows))
    config = TrainConfig(
        pretrained_model_name_or_path=str(MODEL), output_dir=folder / "run", max_train_steps=10, data_config=data,
        validation=ValidationConfig(held_out=0.0),
    )  # fmt: skip
    model = open_model(config.pretrained_model_name_or_path, config.model_parts)
    family, before = family_of(model), read_process_bytes()

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds, now = time.perf_counter() - began, read_process_bytes()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(
            f"{what:34} {seconds:8.1f} s {seconds / num_rows * 1e6:7.1f} us a row   now {now / MIB:6.0f} MiB "
            f"({(now - before) / num_rows:5.0f} bytes a row)   peak {peak / MIB:6.0f} MiB",
            flush=True,
        )

    with timed("reading rows, headers and digests"):
        _, _, training, _ = read_own(config, family, model, crew=ALONE)
    with timed("choosing what is encoded"):
        wanted, _ = choose_wanted(config, family, model, training, (), ())
        items, pictures = wanted.texts(config, family), wanted.pictures(config)
    encoder = Encoder(
        family, model, Placement(torch.device("cpu"), torch.float32), PLAINLY, None, FullStore(), Ledger(None),
        Console(quiet=True), None,
    )  # fmt: skip
    with timed("keys of all encodings"):
        Encodings(encoder).know(items, pictures)
        del items, pictures, wanted
    with timed("sizes, uses, names, loss weights"):
        order = BatchOrder(signatures_of(training), 8, 0, [example.use for example in training])
        kept = [example.name for example in training], [example.loss_weight for example in training]
    with timed("the first epoch's order"):
        order.micro_batch(0)
    with timed("three more"):
        assert all(order.epoch(epoch) for epoch in (1, 2, 3)) and kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), parser.parse_args().rows)


if __name__ == "__main__":
    main()
