"""Reads a stream of WebDataset shards from a server on this machine, and prints rows a second and memory as it goes.

    python benchmarks/streamed_rows.py --shards 1000 --rows 100 --window 4096

Nothing is encoded: it measures what reading, checking and ordering rows take, and whether memory grows. Needs the
package `datasets`.
"""

from __future__ import annotations

import argparse
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from pixtune.config.folders import folders_of
from pixtune.config.sections import DataConfig
from pixtune.data.example_table import Example
from pixtune.data.order import Use
from pixtune.data.streamed.framing import Framer
from pixtune.data.streamed.order import StreamOrder
from pixtune.data.streamed.position import first_position
from pixtune.data.streamed.reading import Patience, Reader, ReadRows
from pixtune.data.streamed.shards import open_shards
from pixtune.data.streamed.state import Counts, StreamState
from pixtune.data.streamed.windows import StreamRow
from pixtune.hardware.meminfo import read_process_bytes
from pixtune.launch.crew import ALONE

BATCH = 8


def write_shards(folder: Path, num_shards: int, num_rows: int) -> None:
    """Writes shards of small JPEGs with captions, of which no two are equal."""
    draw = np.random.default_rng(0)
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as file:
            for row in range(num_rows):
                stream = io.BytesIO()
                size = (96, 64) if draw.random() < 0.5 else (64, 64)
                Image.fromarray(draw.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(stream, "JPEG")
                caption = f"picture {row} of shard {shard}, with some words of no meaning beside it"
                for ending, content in (("jpg", stream.getvalue()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{shard:05d}{row:05d}.{ending}")
                    member.size = len(content)
                    file.addfile(member, io.BytesIO(content))


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a line for each request."""

    def log_message(self, *arguments: object) -> None:
        pass


def serve(folder: str) -> None:
    """Serves a folder until the process ends, and prints the port first."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    print(server.server_port, flush=True)
    server.serve_forever()


class Rows:
    """Rows that are read and framed, and whose pictures are deleted where a run would have encoded them."""

    def __init__(self, reader: Reader, framer: Framer, window: int) -> None:
        self.reader, self.framer, self.window = reader, framer, window
        self.num_shards = len(reader.shards.names)

    def read(self, state: StreamState) -> ReadRows:
        return self.reader.read(state.position, self.window)

    def example_of(self, row: StreamRow) -> Example:
        return self.framer.example(row)

    def count(self, counts: Counts, problems: object) -> None:
        pass

    def encode(self, rows: object) -> None:
        """Deletes the window's pictures."""
        for path in self.reader.paths.values():
            path.unlink(missing_ok=True)
        self.reader.paths.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=100, help="rows of each shard")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--shards-at-once", type=int, default=8)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:  # a process of its own, so that its memory is not counted
        serve(options.serve)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_shards(folder, options.shards, options.rows)
        command = [sys.executable, __file__, "--serve", place]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                read_all(int(server.stdout.readline()), options, folder / "pictures")
            finally:
                server.terminate()


def read_all(port: int, options: argparse.Namespace, pictures: Path) -> None:
    """Asks for the micro-batches of one epoch, and prints a line for each tenth of them."""
    began = time.perf_counter()
    name = f"http://127.0.0.1:{port}/{{00000..{options.shards - 1:05d}}}.tar"
    given = {"dataset": name, "image_column": "jpg", "caption_column": "txt"}
    data = DataConfig.model_validate({"folders": [given], "cache_dir": str(pictures), "img_size": 64})
    (own,) = folders_of(data)
    reader = Reader(open_shards(own), own.captions, (0, False), pictures, 0, Patience(60), ALONE)
    framer = Framer(own, 16, None, 0, reader.shards.names, Path)
    state = StreamState(first_position(options.shards, options.shards_at_once))
    order = StreamOrder(0, BATCH, Rows(reader, framer, options.window), state, Use())
    num_batches = options.shards * options.rows // BATCH - 2  # a few rows wait for others of their size
    print(json.dumps({"micro_batch": 0, "seconds": 0.0, "process_mib": read_process_bytes() >> 20}), flush=True)
    for index in range(num_batches):
        order.micro_batch(index)
        if index == 0 or (index + 1) % (num_batches // 10) == 0:
            seconds = time.perf_counter() - began
            figures = {
                "micro_batch": index + 1,
                "rows_read": order.state.counts.read,
                "seconds": round(seconds, 2),
                "rows_per_second": round(order.state.counts.read / seconds),
                "process_mib": read_process_bytes() >> 20,
                "checkpoint_kib": order.files(index)["stream"].tensors["state"].nbytes >> 10,
                "pictures_on_disk": sum(len(files) for _, _, files in os.walk(pictures)),
            }
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
