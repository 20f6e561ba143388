"""Whatever bytes stand in a file, each of its readers returns a value or raises an error that a user can act on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from pixtune.bench.baseline import load_baseline
from pixtune.config import load_config
from pixtune.data.cache import DiskStore, Ledger
from pixtune.data.metadata import read_metadata
from pixtune.errors import PixtuneError
from pixtune.report.page import build_page
from pixtune.report.record import read_record
from pixtune.runs.read import RunReader
from pixtune.storage.checkpoint import read_folder, save_checkpoint, write_set_back
from pixtune.storage.checkpoint_state import STATE_FILE
from pixtune.storage.lineage import Session, SetBack, descend
from pixtune.storage.loading.entries import read_entries
from pixtune.storage.model_folder import open_model_folder, weight_files
from pixtune.storage.safetensors_writer import TensorFile
from pixtune.ui.watch import FigureReader

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value within a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


def with_other(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    """A JSON value with another one at a place; `...` removes what is there."""
    if not path:
        return None if other is ... else other
    copied = value.copy()
    if other is ... and len(path) == 1:
        del copied[path[0]]
    else:
        copied[path[0]] = with_other(value[path[0]], path[1:], other)
    return copied


@st.composite
def changed_json(draw: st.DrawFn, document: Any) -> bytes:
    """A JSON document in which one or two values are others, or gone."""
    for _ in range(draw(st.integers(1, 2))):
        other = draw(VALUES | st.just(...))
        document = with_other(document, draw(st.sampled_from(places(document)[1:] or [()])), other)
    return json.dumps(document).encode()


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A file that is cut, or in which some bytes are others."""
    at = draw(st.integers(0, len(data)))
    return data[:at] + draw(st.binary(max_size=12)) + data[at + draw(st.integers(0, len(data))) :]


HOSTILE = (
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"1" * 5000,
    b'{"a": ' + b"1" * 5000 + b"}",
    b"\xff\xfe{}",
    b"{}",
    b"null",
)
"""Depths and numbers that Python's own parser refuses by errors of their own, and what is JSON and nothing else."""


@st.composite
def changed_line(draw: st.DrawFn, lines: list[bytes]) -> bytes:
    """A file of a JSON value a line, in one of which values are others, or gone."""
    at = draw(st.integers(0, len(lines) - 1))
    changed = draw(changed_json(json.loads(lines[at])))
    return b"".join(line + b"\n" for line in (*lines[:at], changed, *lines[at + 1 :]))


def any_file(good: bytes) -> st.SearchStrategy[bytes]:
    """Bytes of any kind, and those of a file that nearly is right; of a safetensors file the header is changed."""
    near, length = changed_bytes(good), int.from_bytes(good[:8], "little")
    if length < len(good):
        header, data = json.loads(good[8 : 8 + length]), good[8 + length :]
        form = changed_json(header).map(lambda text: len(text).to_bytes(8, "little") + text + data)
    elif b"\n{" in good and not good.startswith(b"{\n"):
        form = changed_line(good.splitlines())
    else:
        form = changed_json(json.loads(good)) if good.startswith(b"{") else near
    return form | form | form | near | st.binary(max_size=60)


TENSORS = {
    "transformer.a.lora_A.weight": torch.zeros(2, 3),
    "transformer.a.lora_B.weight": torch.ones(3, 2, dtype=torch.bfloat16),
}
CONFIG = (
    b"pretrained_model_name_or_path: m\noutput_dir: o\nmax_train_steps: 1\ndata_config: {img_dir: p, num_workers: 1}\n"
)
ROWS = b'{"image": "a.png", "caption": "a b", "control": ["b.png"]}\n{"image": "c.png", "caption": ""}\n'
LOG = (
    b'{"kind": "step", "step": 1, "loss": 0.5, "seconds": 0.1}\n'
    b'{"kind": "validation", "step": 1, "loss": 0.5, "quarters": [1, 2, 3, 4]}\n'
    b'{"kind": "sample", "step": 1, "prompt": "a", "seed": 1, "path": "a.png"}\n'
    b'{"kind": "sample", "step": 2, "prompt": "a", "seed": 1, "path": "b.png", "controls": ["c.png"], "size": [8, 8], '
    b'"strength": 0.5, "negative": "n"}\n'
    b'{"kind": "captions", "step": 0, "gains": {"a": 0.1}, '
    b'"suspects": [{"name": "a", "caption": "b", "gain": 0.1, "path": "c.png"}]}\n'
    b'{"kind": "edit_drift", "step": 2, "path": "b.png", "off_pixels": 0.1, "scale": 1.0, "is_sure": true, '
    b'"color_levels": 3.0}\n'
    b'{"kind": "first_step", "step": 1, "first_step_seconds": 3.0, "compiled_graphs": 0}\n'
    b'{"kind": "exploded", "step": 1, "message": "it has"}\n'
    b'{"kind": "memory", "step": 1, "measured_peak_gib": 1.5, "stages": [{"stage": "steps", "seconds": 1.0, '
    b'"allocated_gib": 1.0, "peak_gib": 1.5, "peak_reserved_gib": 2.0, "host_rss_gib": 3.0}]}\n'
)
LINEAGE = descend(None, Session("a", 0, {"data": "d"}), 1, 5)
DIGEST = "ab" * 32


def a_checkpoint(folder: Path) -> bytes:
    path = save_checkpoint(folder, 1, {"lora": TensorFile(TENSORS)}, {"config": {"rank": 1}}, LINEAGE)
    return (path / STATE_FILE).read_bytes()


def a_set_back(folder: Path) -> bytes:
    write_set_back(folder, SetBack("checkpoint-000001", LINEAGE.sessions, 5))
    return (folder / "set_back.json").read_bytes()


def an_entry(folder: Path) -> bytes:
    store = DiskStore(folder)
    store.write(DIGEST, {"mean": torch.arange(4.0)})
    (path,) = folder.rglob("*.safetensors")
    return path.read_bytes()


def an_index_of_weights(folder: Path) -> bytes:
    (folder / "model.safetensors").write_bytes(save({"a": torch.zeros(1), "b": torch.zeros(1)}))
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {"total_size": 8}, "weight_map": dict.fromkeys("ab", "model.safetensors")})
    )
    return index.read_bytes()


def an_index_of_a_model(folder: Path) -> bytes:
    (folder / "vae").mkdir()
    index = folder / "model_index.json"
    index.write_text(json.dumps({"_class_name": "QwenImagePipeline", "vae": ["diffusers", "AutoencoderKLQwenImage"]}))
    return index.read_bytes()


def a_report(folder: Path) -> str:
    return build_page(folder, read_record(folder), config={}, plan={}, versions={}, facts={})


def read_tensors_places(folder: Path) -> None:
    """Reads a header, and compares it with the file and with the stock library, where that accepts it."""
    path = folder / "a.safetensors"
    entries = read_entries([path])
    for entry in entries:
        assert entry.num_bytes == math.prod(entry.shape) * entry.dtype.itemsize
        assert 8 <= entry.offset_bytes <= entry.offset_bytes + entry.num_bytes <= path.stat().st_size
    try:
        stock = load_file(path)
    except (SafetensorError, OSError, KeyError):
        return
    assert {entry.name: (entry.dtype, entry.shape) for entry in entries} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stock.items()
    }


def read_entry(folder: Path) -> object:
    store = DiskStore(folder)
    return store.read(DIGEST) if store.problem(DIGEST) is None else None


READERS: dict[str, tuple[str, bytes | Callable[[Path], bytes], Callable[[Path], object]]] = {
    "safetensors": ("a.safetensors", save(TENSORS), read_tensors_places),
    "index of weights": ("model.safetensors.index.json", an_index_of_weights, weight_files),
    "index of a model": ("model_index.json", an_index_of_a_model, lambda f: open_model_folder(str(f)).components),
    "config": ("a.yaml", CONFIG, lambda folder: load_config(folder / "a.yaml", folders_must_exist=False)),
    "metadata": ("a.jsonl", ROWS, lambda folder: read_metadata(folder / "a.jsonl", folder)),
    "state of a checkpoint": ("checkpoint-000001/state.json", a_checkpoint, read_folder),
    "set-back": ("set_back.json", a_set_back, read_folder),
    "log": ("metrics.jsonl", LOG, a_report),
    "log of a run that is watched": ("metrics.jsonl", LOG, lambda folder: FigureReader(folder).read()),
    "log of a run in a list": ("metrics.jsonl", LOG, lambda folder: RunReader(folder, with_curve=True).read()),
    "entry of the cache": (f"{DIGEST[:2]}/{DIGEST}.safetensors", an_entry, read_entry),
    "ledger of the cache": ("a.json", b'{"a": {"model": "b"}}', lambda folder: Ledger(folder / "a.json")),
    "result of a benchmark": (
        "a.json",
        b'{"benchmark": "training_steps"}',
        lambda folder: load_baseline(folder / "a.json"),
    ),
}
"""File, its content where it is right, and what reads it."""


@pytest.mark.parametrize("reader", READERS)
def test_any_bytes_are_a_value_or_an_error_in_words(tmp_path_factory: pytest.TempPathFactory, reader: str) -> None:
    name, good, read = READERS[reader]
    folder = tmp_path_factory.mktemp("any")
    content = good if isinstance(good, bytes) else good(folder)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    assert path.exists() or isinstance(good, bytes), "nobody reads it"
    path.write_bytes(content)
    read(folder)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read(folder)
        except PixtuneError as error:
            assert str(error).strip() and "\x1b" not in str(error)

    for data in HOSTILE:
        check(data)
    settings(max_examples=100)(given(data=any_file(content))(check))()
