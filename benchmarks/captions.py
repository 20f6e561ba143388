"""Times captions by a full-size text encoder with random weights, in 16, 8 and 4 bits, beside the plan's memory.

    python benchmarks/captions.py --json result.json

Writes Qwen-Image's text encoder (16.6 GB) to --folder once. Each format answers questions about synthetic pictures of
1024x1024, first with one token and then with --tokens, so that reading pictures and writing words are timed apart;
random weights never end an answer. Peaks are those of torch's allocator while answers are written.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from architectures import ARCHITECTURES
from random_folders import write_random_model

from pixtune.bench.environment import describe as describe_machine
from pixtune.bench.result import Result
from pixtune.bench.synthetic import write_pictures
from pixtune.captioning.describe import Asked, Wish, describe, load_captioner, measure
from pixtune.captioning.pictures import find_pictures
from pixtune.captioning.presets import question_of
from pixtune.commands.failures import exit_on_user_errors
from pixtune.engine.relief import free_unused
from pixtune.families.captioners import open_captioner
from pixtune.family import Captioner, Placement
from pixtune.hardware.facts import GIB
from pixtune.plan.captioning import CaptionPlan, CaptionSizes, caption_bytes, weight_bytes
from pixtune.storage.files import write_atomically

FORMATS = {"bf16": None, "int8": "int8", "nf4": "nf4"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "pixtune-captioner")
    parser.add_argument("--captioner", type=Path, help="a folder with weights, instead of random ones")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[*FORMATS])
    parser.add_argument("--at-once", type=int, nargs="+", default=[16, 1], help="pictures at once")
    parser.add_argument("--size", type=int, default=1024, help="pixels")
    parser.add_argument("--tokens", type=int, default=33, help="tokens of each answer")
    parser.add_argument("--json", type=Path, help="file of the result")
    arguments = parser.parse_args()
    if (folder := arguments.captioner) is None:
        folder = arguments.folder
        write_random_model(folder, ARCHITECTURES["qwen-image"], with_transformer=False)
    captioner, wish = open_captioner(folder), Wish(question_of("plain", 60), None, arguments.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        write_pictures(Path(scratch), arguments.size, max(arguments.at_once), 0, 8)
        pictures, _ = find_pictures(Path(scratch) / "images", "txt")
        asked = [found for each in pictures if isinstance(found := measure(captioner, wish, each, False), Asked)]
        rows = [
            row for name in arguments.formats for row in measure_format(captioner, wish, asked, name, arguments.at_once)
        ]
    result = {"size": arguments.size, "tokens": arguments.tokens, "rows": rows, **describe_machine()}
    print(json.dumps(result, indent=1))
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(result, indent=1).encode())


def measure_format(captioner: Captioner, wish: Wish, asked: list[Asked], name: str, numbers: list[int]) -> list[Result]:
    """Loads the captioner in one format, and returns a row for each number of pictures at once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = CaptionSizes(
        captioner.weights, captioner.cached_numbers_per_token, max(each.num_tokens for each in asked), wish.max_tokens
    )
    began = time.perf_counter()
    encoder = load_captioner(captioner, CaptionPlan(FORMATS[name], 1, 0), Placement(device, torch.bfloat16))
    loading = time.perf_counter() - began
    rows = []
    for at_once in numbers:
        row: Result = {"format": name, "at_once": at_once, "loading_seconds": round(loading, 1)}
        seconds = {}
        for tokens in (1, 1, wish.max_tokens):  # the first warms up
            free_unused()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            short = replace(wish, max_tokens=tokens)
            for _ in describe(captioner, encoder, short, asked[:at_once], at_once, False):
                pass  # answers are read back, which waits for the device
            seconds[tokens] = time.perf_counter() - began
        first, whole = seconds[1], seconds[wish.max_tokens]
        per_token = (whole - first) / max(wish.max_tokens - 1, 1)
        row |= {
            "reading_seconds": round(first, 3),
            "seconds_per_token": round(per_token, 4),
            "captions_per_second_of_80_tokens": round(at_once / (first + 79 * per_token), 2),
            "question_tokens": sizes.question_tokens,
            "expected_weights_gib": round(weight_bytes(sizes, FORMATS[name]) / GIB, 2),
            "expected_peak_gib": round(caption_bytes(sizes, FORMATS[name], at_once) / GIB, 2),
        }
        if device.type == "cuda":
            row |= {
                "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
                "reserved_peak_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
            }
        rows.append(row)
    del encoder
    free_unused()
    return rows


if __name__ == "__main__":
    exit_on_user_errors(main)
