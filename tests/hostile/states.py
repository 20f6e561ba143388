"""Hostile states of a run: checkpoints, logs, locks and encodings that others have written."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pixtune.data.cache import CHECKSUM_END, CHECKSUM_START
from pixtune.storage.checkpoint_state import state_digest
from tests.hostile.case import (
    EITHER,
    REFUSED,
    TAKEN,
    Attack,
    Case,
    damage,
    nested,
    put,
    replace_by,
    safetensors,
)
from tests.hostile.running import run
from tests.hostile.texts import ESCAPE, lay_pictures, train

CHECKPOINTS, LOGS, LOCKS, CACHE = "checkpoints", "logs", "locks", "cache entries"
STEP = "checkpoint-000001"
SPECIAL = ("a named pipe", "a device", "a folder", "a link to itself", "1 TB")


def make_run(folder: Path) -> None:
    """Makes the run of one step that the cases damage copies of, and its cache."""
    folder.mkdir(parents=True)
    lay_pictures(folder)
    outcome = run(Case(CHECKPOINTS, "the run itself", lambda folder, draw: train(folder), TAKEN), train(folder), folder)
    if not outcome.ok:
        raise RuntimeError(f"{outcome.verdict}: {outcome.printed}")


def lay_run(source: Path, folder: Path) -> Attack:
    """Copies the run; the command resumes it for a second step."""
    lay_pictures(folder)
    for name in ("out", "cache"):
        shutil.copytree(source / name, folder / name)
    attack = train(folder)
    return Attack((*attack.words, "max_train_steps=2", "lr_scheduler=constant", "resume_from_checkpoint=latest"), ())


def named(attack: Attack, *culprits: str) -> Attack:
    return Attack(attack.words, culprits)


State = dict[str, Any]


def signed(state: State) -> bytes:
    """Returns a state whose own checksum is right: an attacker can compute it as well."""
    state.pop("sha256", None)
    state["sha256"] = state_digest(state)
    return json.dumps(state, indent=1, sort_keys=True).encode()


def change_state(source: Path, change: Callable[[State], object], folder: Path, draw: random.Random) -> Attack:
    attack = lay_run(source, folder)
    file = folder / "out" / STEP / "state.json"
    state = json.loads(file.read_text())
    changed = change(state)
    put(file, signed(changed if isinstance(changed, dict) else state))
    return named(attack, STEP, "state.json", "checkpoint")


def at(path: str, value: Any) -> Callable[[State], object]:
    """Returns a change of the value at a path of keys."""

    def change(state: State) -> None:
        *keys, last = path.split("/")
        for key in keys:
            state = state[key]
        state[last] = value

    return change


def without(path: str) -> Callable[[State], object]:
    def change(state: State) -> None:
        *keys, last = path.split("/")
        for key in keys:
            state = state[key]
        del state[last]

    return change


STATES: dict[str, Callable[[State], object]] = {
    "a step of -1": at("step", -1),
    "a step that is a text": at("step", "x"),
    "a step of 10^30": at("step", 10**30),
    "a step that is 1.5": at("step", 1.5),
    "no step": without("step"),
    "no record": without("record"),
    "no config": without("record/config"),
    "a record that is a list": at("record", []),
    "a config that is a list": at("record/config", [1]),
    "no files": without("files"),
    "files that are a list": at("files", ["a"]),
    "files that are empty": at("files", {}),
    "a file upwards": at("files/..%2f", None),
    "a plan that is a list": at("record/plan", []),
    "a plan of wrong kinds": at("record/plan/recomputed_blocks", "many"),
    "a plan of -5 blocks": at("record/plan/recomputed_blocks", -5),
    "a plan of 10^12 blocks": at("record/plan/recomputed_blocks", 10**12),
    "a plan of an unknown format": at("record/plan/weights_format", "../x"),
    "a plan of an unknown optimizer": at("record/plan/optimizer", "os.system"),
    "a plan of an unknown kernel": at("record/plan/attention", ["os.system"]),
    "a plan with 10^9 threads": at("record/plan/loading_threads", 10**9),
    "encoders that are a text": at("record/encoders", "x"),
    "encoders in tiles of -1": at("record/encoders/tile_pixels", -1),
    "no encoders": without("record/encoders"),
    "an optimizer's state that is a list": at("record/optimizer_plain", [1]),
    "an optimizer's state of wrong kinds": at("record/optimizer_plain", {"a": 1}),
    "no optimizer's state": without("record/optimizer_plain"),
    "versions of escape codes": at("record/versions", {"torch": ESCAPE, ESCAPE: "1"}),
    "versions that are a list": at("record/versions", [1]),
    "processes that are a text": at("record/num_processes", "x"),
    "a length that is a text": at("record/num_steps", "x"),
    "data of escape codes": at("record/data", ESCAPE),
    "a base that is a list": at("record/base", [ESCAPE]),
    "a lineage that is a list": at("lineage", [1]),
    "a lineage without sessions": at("lineage/sessions", []),
    "sessions that are texts": at("lineage/sessions", ["x"]),
    "a session with more keys": at(
        "lineage/sessions", [{"name": "x", "last_step": 1, "identity": {}, "changes": [], "os": 1}]
    ),
    "a parent that is a list": at("lineage/parent", [1]),
    "a serial number of 10^30": at("lineage/serial", 10**30),
    "a serial number that is a text": at("lineage/serial", "x"),
    "another format": at("format", 99),
    "a format of escape codes": at("format", ESCAPE),
    "a config 900 deep": lambda state: state["record"].update(config=json.loads(nested(900))),
    "a million keys": lambda state: state["record"].update(more={f"k{n}": n for n in range(1_000_000)}),
}


def file_upwards(name: str) -> Callable[[State], object]:
    def change(state: State) -> None:
        state["files"][name] = {"bytes": 10, "sha256": "0" * 64}

    return change


STATES["a file upwards"] = file_upwards("../../../../../../etc/hostname")
STATES["a file at the root"] = file_upwards("/etc/hostname")
STATES["a file of escape codes"] = file_upwards(ESCAPE)
STATES["a file that is a list"] = at("files/optimizer.safetensors", [1])
STATES["a file of -1 bytes"] = at("files/optimizer.safetensors/bytes", -1)
STATES["a file without a hash"] = without("files/optimizer.safetensors/sha256")

TEXTS: dict[str, bytes] = {
    "nothing": b"",
    "zero bytes": bytes(500),
    "half of it": b'{"step": 1, "rec',
    "a list": b"[1]",
    "a word": b'"x"',
    "brackets 100,000 deep": nested(100_000).encode(),
    "objects 100,000 deep": nested(100_000, '{"a":', "}").encode(),
    "no UTF-8": b"\xff\xfe{}",
    "a number of 100,000 digits": b'{"step": ' + b"9" * 100_000 + b"}",
    "a pickle": b"\x80\x04\x95\x00.",
    "NaN": b"NaN",
    "escape codes": ESCAPE.encode(),
}


def lay_text(source: Path, file: str, text: bytes, folder: Path, draw: random.Random) -> Attack:
    attack = lay_run(source, folder)
    put(folder / file, text)
    return named(attack, Path(file).name, STEP, "metrics", "out")


def lay_kind(source: Path, file: str, kind: str, folder: Path, draw: random.Random) -> Attack:
    attack = lay_run(source, folder)
    replace_by(folder / file, kind)
    return named(attack, Path(file).name, STEP, "metrics", "out")


def lay_damage(source: Path, file: str, folder: Path, draw: random.Random) -> Attack:
    attack = lay_run(source, folder)
    path = folder / file
    path.write_bytes(damage(path.read_bytes(), draw))
    return named(attack, path.name, STEP, "metrics", "out")


Entries = dict[str, Any]


def change_tensors(
    source: Path, name: str, change: Callable[[Entries, bytes], bytes], folder: Path, draw: random.Random
) -> Attack:
    """Changes one of a checkpoint's files, and its size and hash in the state."""
    import hashlib

    attack = lay_run(source, folder)
    path = folder / "out" / STEP / name
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    changed = change(json.loads(data[8:start]), data[start:])
    path.write_bytes(changed)
    file = path.with_name("state.json")
    state = json.loads(file.read_text())
    state["files"][name] = {"bytes": len(changed), "sha256": hashlib.sha256(changed).hexdigest()}
    put(file, signed(state))
    return named(attack, STEP, name)


def _renamed(entries: Entries, data: bytes) -> bytes:
    metadata = entries.pop("__metadata__", {})
    return safetensors({f"{name}.x": entry for name, entry in entries.items()}, data, metadata)


def _flat(entries: Entries, data: bytes) -> bytes:
    import math

    metadata = entries.pop("__metadata__", {})
    return safetensors({n: {**e, "shape": [math.prod(e["shape"])]} for n, e in entries.items()}, data, metadata)


def _not_a_number(entries: Entries, data: bytes) -> bytes:
    metadata = entries.pop("__metadata__", {})
    return safetensors(entries, b"\xff" * len(data), metadata)


def _no_tensors(entries: Entries, data: bytes) -> bytes:
    return safetensors({}, b"", {"format": "pt"})


def _whole_numbers(entries: Entries, data: bytes) -> bytes:
    metadata = entries.pop("__metadata__", {})
    return safetensors({n: {**e, "dtype": "I32"} for n, e in entries.items() if e["dtype"] == "F32"}, data, metadata)


def _overlapping(entries: Entries, data: bytes) -> bytes:
    metadata = entries.pop("__metadata__", {})
    first = next(iter(entries.values()))
    return safetensors(dict.fromkeys(entries, first), data, metadata)


def _pickle(entries: Entries, data: bytes) -> bytes:
    import pickle

    from tests.hostile.weights import Executed

    return pickle.dumps(Executed())


TENSORS: Mapping[str, Callable[[Entries, bytes], bytes]] = {
    "of other names": _renamed,
    "without sides": _flat,
    "of NaN": _not_a_number,
    "empty": _no_tensors,
    "of whole numbers": _whole_numbers,
    "all in one place": _overlapping,
    "a pickle": _pickle,
}

LINES: dict[str, Any] = {
    "a sample outside": {
        "kind": "sample",
        "step": 0,
        "prompt": "x",
        "seed": 0,
        "path": "../../../../../../etc/hostname",
    },
    "a sample that is a device": {"kind": "sample", "step": 0, "prompt": "x", "seed": 0, "path": "/dev/zero"},
    "a sample of escape codes": {"kind": "sample", "step": 0, "prompt": ESCAPE, "seed": 0, "path": ESCAPE},
    "a sample of half a character": {"kind": "sample", "step": 0, "prompt": "\ud800", "seed": 0, "path": "a\ud800.png"},
    "a sample with controls that are numbers": {
        "kind": "sample",
        "step": 0,
        "prompt": "x",
        "seed": 0,
        "path": "x",
        "controls": [1, [2]],
    },
    "a sample with controls that are a number": {
        "kind": "sample",
        "step": 0,
        "prompt": "x",
        "seed": 0,
        "path": "x",
        "controls": 7,
    },
    "a sample with a zero byte": {"kind": "sample", "step": 0, "prompt": "x", "seed": 0, "path": "a\0b"},
    "a sample of a long name": {"kind": "sample", "step": 0, "prompt": "x", "seed": 0, "path": "a" * 5000},
    "a loss of quarters that are many": {"kind": "validation", "step": 0, "loss": 1, "quarters": [1] * 100_000},
    "a loss without quarters": {"kind": "validation", "step": 0, "loss": 1, "quarters": []},
    "a loss of truth": {"kind": "validation", "step": 0, "loss": True, "quarters": [True]},
    "a step of -10^30": {"kind": "step", "step": -(10**30), "loss": 1},
    "figures that are texts": {"kind": "step", "step": 1, "loss": "x", "seconds": [1], "grad_norm": {"a": 1}},
    "figures of 10^400": {"kind": "step", "step": 1, "loss": 10**400, "seconds": 10**400},
    "memory of stages that are texts": {"kind": "memory", "step": 1, "stages": ["x"]},
    "memory of stages that lack names": {"kind": "memory", "step": 1, "stages": [{"stage": "x"}]},
    "memory of other kinds": {
        "kind": "memory",
        "step": 1,
        "stages": [],
        "expected_peak_gib": "x",
        "measured_peak_gib": [1],
    },
    "a first step that is NaN": {
        "kind": "first_step",
        "step": 1,
        "first_step_seconds": float("nan"),
        "compiled_graphs": -1,
    },
    "a warning that is HTML": {"kind": "drift", "step": 1, "message": "<script>alert(1)</script>" * 1000},
    "a problem of escape codes": {"kind": "problem", "step": 1, "message": ESCAPE},
    "an unknown kind": {"kind": ESCAPE, "step": 1},
    "a kind that is a list": {"kind": [1], "step": 1},
    "a step that is true": {"kind": "step", "step": True},
}


def lay_line(source: Path, line: Any, folder: Path, draw: random.Random) -> Attack:
    attack = lay_run(source, folder)
    log = folder / "out" / "metrics.jsonl"
    log.write_bytes((json.dumps(line) + "\n").encode() + log.read_bytes())
    return named(attack, "metrics.jsonl")


def lay_many_lines(source: Path, line: bytes, number: int, folder: Path, draw: random.Random) -> Attack:
    attack = lay_run(source, folder)
    log = folder / "out" / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + (line + b"\n") * number)
    return named(attack, "metrics.jsonl")


HOLDERS: dict[str, Any] = {
    "process -1": {"pid": -1},
    "process 0": {"pid": 0},
    "process 10^30": {"pid": 10**30},
    "a process that is a text": {"pid": "x"},
    "a process that is a list": {"pid": [1]},
    "a host of escape codes": {"host": ESCAPE},
    "a host that is a list": {"host": [1]},
    "a beat that is a text": {"beat": "x"},
    "a step of escape codes": {"step": ESCAPE},
    "since a number": {"since": 5},
}


def lay_lock(source: Path, changes: Mapping[str, Any], folder: Path, draw: random.Random) -> Attack:
    """The lock of this machine's boot, so that the process that it names is looked for."""
    from dataclasses import asdict

    from pixtune.storage.output_lock import this_process

    attack = lay_run(source, folder)
    put(folder / "out" / "run.lock", json.dumps({**asdict(this_process()), **changes}))
    return named(attack, "out")


def change_entry(
    source: Path, which: str, change: Callable[[Entries, bytes], bytes], folder: Path, draw: random.Random
) -> Attack:
    """Changes an entry of the cache and makes its checksum right: an attacker can compute it as well."""
    attack = lay_run(source, folder)
    path = sorted((folder / "cache").glob("entries/*/*.safetensors"))[0 if which == "first" else -1]
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    changed = change(json.loads(data[8:start]), data[start:])
    if not changed.startswith(b"\x80"):
        end = 8 + int.from_bytes(changed[:8], "little")
        header = {"__metadata__": {"checksum": "0" * 8}, **_without_metadata(json.loads(changed[8:end]))}
        text = json.dumps(header, separators=(",", ":")).encode()
        whole = bytearray(len(text).to_bytes(8, "little") + text + changed[end:])
        crc = zlib.crc32(path.stem.encode())
        for piece in (whole[:CHECKSUM_START], whole[CHECKSUM_END:]):
            crc = zlib.crc32(piece, crc)
        whole[CHECKSUM_START:CHECKSUM_END] = f"{crc:08x}".encode()
        changed = bytes(whole)
    path.write_bytes(changed)
    return named(attack, path.name, "cache")


def _without_metadata(entries: Entries) -> Entries:
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}


def lay_cache(source: Path, kind: str, folder: Path, draw: random.Random) -> Attack:
    attack = lay_run(source, folder)
    path = draw.choice(sorted((folder / "cache").glob("entries/*/*.safetensors")))
    if kind == "damaged":
        path.write_bytes(damage(path.read_bytes(), draw))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "without a checksum":
        path.write_bytes(safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)))
    else:
        replace_by(path, kind)
    return named(attack, path.name, "cache")


def cases(rounds: int, source: Path) -> Iterator[Case]:
    """Yields the cases, of which each damages a copy of the run in `source`."""
    yield Case(CHECKPOINTS, "as it was written", lambda folder, draw: lay_run(source, folder), TAKEN)
    for what, change in STATES.items():
        yield Case(CHECKPOINTS, what, partial(change_state, source, change))
    state = f"out/{STEP}/state.json"
    for what, text in TEXTS.items():
        yield Case(CHECKPOINTS, f"a state of {what}", partial(lay_text, source, state, text), REFUSED)
    for kind in SPECIAL:
        yield Case(CHECKPOINTS, f"a state that is {kind}", partial(lay_kind, source, state, kind), REFUSED)
        weights = f"out/{STEP}/optimizer.safetensors"
        yield Case(
            CHECKPOINTS, f"an optimizer's file that is {kind}", partial(lay_kind, source, weights, kind), REFUSED
        )
    for name in ("optimizer.safetensors", "pytorch_lora_weights.safetensors"):
        for what, alter in TENSORS.items():
            yield Case(CHECKPOINTS, f"{name} {what}", partial(change_tensors, source, name, alter))
    for number in range(rounds):
        yield Case(CHECKPOINTS, f"a damaged state {number}", partial(lay_damage, source, state))
    for file in ("out/metrics.jsonl", "out/set_back.json"):
        for what, text in TEXTS.items():
            yield Case(LOGS, f"{Path(file).name} of {what}", partial(lay_text, source, file, text))
        for kind in SPECIAL:
            yield Case(LOGS, f"{Path(file).name} that is {kind}", partial(lay_kind, source, file, kind))
    for what, line in LINES.items():
        yield Case(LOGS, f"a line of {what}", partial(lay_line, source, line), EITHER)
    yield Case(LOGS, "a million damaged lines", partial(lay_many_lines, source, b"x", 1_000_000))
    yield Case(LOGS, "a line of 200 MB", partial(lay_many_lines, source, b"x" * 200_000_000, 1))
    yield Case(
        LOGS, "a line of 15 MB of brackets", partial(lay_many_lines, source, b"[" + b"[]," * 5_000_000 + b"1]", 1)
    )
    for number in range(rounds):
        yield Case(LOGS, f"a damaged log {number}", partial(lay_damage, source, "out/metrics.jsonl"))
    for what, holder in HOLDERS.items():
        yield Case(LOCKS, what, partial(lay_lock, source, holder))
    for what, text in TEXTS.items():
        yield Case(LOCKS, f"a lock of {what}", partial(lay_text, source, "out/run.lock", text))
    for kind in SPECIAL:
        yield Case(LOCKS, f"a lock that is {kind}", partial(lay_kind, source, "out/run.lock", kind))
    for kind in ("damaged", "empty", "without a checksum", *SPECIAL):
        yield Case(CACHE, kind, partial(lay_cache, source, kind))
    for which in ("first", "last"):
        for what, alter in TENSORS.items():
            yield Case(CACHE, f"{which} {what}, checksum right", partial(change_entry, source, which, alter))
    for file in ("cache/ledger.json", "cache/caption_tokens.json"):
        for what in ("zero bytes", "a list", "brackets 100,000 deep", "no UTF-8"):
            yield Case(CACHE, f"{Path(file).name} of {what}", partial(lay_text, source, file, TEXTS[what]), TAKEN)
        for kind in SPECIAL:
            yield Case(CACHE, f"{Path(file).name} that is {kind}", partial(lay_kind, source, file, kind))
