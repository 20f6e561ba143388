"""Hostile safetensors and LoRA files: headers that lie, tensors that are not there, descriptions that want more."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from tests.hostile.case import (
    EITHER,
    REFUSED,
    TAKEN,
    Attack,
    Case,
    damage,
    nested,
    place,
    put,
    put_sparse,
    replace_by,
    safetensors,
)
from tests.hostile.texts import BIDI, ESCAPE
from tests.runs import ROOT, TINY_MODEL

SAFETENSORS, LORA = "safetensors", "LoRA files"
LORA_FILE = ROOT / "tests" / "fixtures" / "written_by_0.1.0" / "qwen-image" / "pytorch_lora_weights.safetensors"
NAME = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"


class Executed:
    """A pickle of it runs a command where it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def raw(text: str | bytes, length: int | None = None, data: bytes = bytes(64)) -> bytes:
    """Returns a file whose header is this text."""
    header = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensors(**entries: Any) -> bytes:
    return safetensors(entries, bytes(64))


def zip_of_a_pickle() -> bytes:
    import io
    import zipfile

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Executed()))
    return stream.getvalue()


FILES: dict[str, bytes | Callable[[], bytes]] = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "a header of no length": bytes(8),
    "a header of 2^63 bytes": raw("{}", 2**63),
    "a header of 2^64-1 bytes": raw("{}", 2**64 - 1),
    "a header of 100 MB": lambda: raw(b"{" + b" " * 100_000_000 + b"}"),
    "a header of 60 MB of brackets": lambda: raw("[" + "[]," * 20_000_000 + "1]"),
    "a header of 15 MB of brackets": lambda: raw("[" + "[]," * 5_000_000 + "1]"),
    "a header of 15 MB of tensors": lambda: raw(json.dumps({f"t{n}": place(0, 0, [0]) for n in range(200_000)})),
    "a header that is longer than the file": raw("{}", 5_000),
    "a header that is cut": raw('{"a": {"dtype": "F32", "sha'),
    "a list": raw("[]"),
    "a number": raw("7"),
    "a word": raw('"word"'),
    "nothing as JSON": raw("null"),
    "truth": raw("true"),
    "no UTF-8": raw(b'{"\xff\xfe": 1}'),
    "zero bytes": raw(bytes(500)),
    "brackets 100,000 deep": raw(nested(100_000)),
    "a shape 100,000 deep": raw('{"a": {"dtype": "F32", "shape": ' + nested(100_000) + ', "data_offsets": [0, 4]}}'),
    "a name twice": raw(
        '{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    ),
    "an unknown dtype": tensors(a=place(0, 4, [1], "F128")),
    "a dtype that is a number": tensors(a=place(0, 4, [1], 7)),
    "a dtype of escape codes": tensors(a=place(0, 4, [1], ESCAPE)),
    "a dtype of half a byte": tensors(a=place(0, 4, [8], "F4")),
    "complex numbers": tensors(a=place(0, 8, [1], "C64")),
    "a negative side": tensors(a=place(0, 4, [-1])),
    "two negative sides": tensors(a=place(0, 4, [-1, -1])),
    "a side of 2^62": tensors(a=place(0, 4, [2**62])),
    "a side of 2^64": tensors(a=place(0, 4, [2**64])),
    "sides whose product overflows": tensors(a=place(0, 64, [2**32, 2**32, 2**2])),
    "a side of 10^4000": raw('{"a": {"dtype": "F32", "shape": [' + "9" * 4_000 + '], "data_offsets": [0, 4]}}'),
    "a side of 10^100000": raw('{"a": {"dtype": "F32", "shape": [' + "9" * 100_000 + '], "data_offsets": [0, 4]}}'),
    "a side that is a text": tensors(a=place(0, 4, ["1"])),
    "a side that is 1.5": tensors(a=place(0, 4, [1.5])),
    "a side that is true": tensors(a=place(0, 4, [True])),
    "a side that is nothing": tensors(a=place(0, 4, [None])),
    "a side that is a list": tensors(a=place(0, 4, [[1]])),
    "5,000 sides": tensors(a=place(0, 4, [1] * 5_000)),
    "no elements in 2^62 rows": tensors(a=place(0, 0, [0, 2**62])),
    "offsets in the wrong order": tensors(a=place(8, 4, [1])),
    "negative offsets": tensors(a=place(-8, -4, [1])),
    "offsets beyond the end": tensors(a=place(1_000_000, 1_000_004, [1])),
    "offsets of 2^63": tensors(a=place(2**63, 2**63 + 4, [1])),
    "offsets that are 1.5": tensors(a=place(0.5, 4.5, [1])),  # type: ignore[arg-type]
    "three offsets": tensors(a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}),
    "no offsets": tensors(a={"dtype": "F32", "shape": [1]}),
    "offsets that are a text": tensors(a={"dtype": "F32", "shape": [1], "data_offsets": "04"}),
    "tensors that overlap": tensors(a=place(0, 8, [2]), b=place(4, 12, [2])),
    "tensors with a gap": tensors(a=place(0, 4, [1]), b=place(32, 36, [1])),
    "a tensor that is a list": tensors(a=[1, 2]),
    "a tensor that is a number": tensors(a=3),
    "NaN in the header": raw('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}'),
    "a comment": raw('{} // "a"'),
    "an empty name": tensors(**{"": place(0, 4, [1])}),
    "a name of escape codes": tensors(**{ESCAPE: place(0, 4, [1])}),
    "a name that turns": tensors(**{BIDI: place(0, 4, [1])}),
    "a name that is half a character": raw('{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'),
    "a name of a megabyte": tensors(**{"a" * 1_000_000: place(0, 4, [1])}),
    "a name upwards": tensors(**{"../../../etc/passwd": place(0, 4, [1])}),
    "names of Python": tensors(**{"__class__.__init__.weight": place(0, 4, [1])}),
    "metadata that is a list": safetensors({}, b"", [1]),
    "metadata of numbers": safetensors({}, b"", {"a": 1}),
    "metadata 50,000 deep": raw('{"__metadata__": ' + nested(50_000, '{"a":', "}") + "}"),
    "metadata of escape codes": safetensors({"a": place(0, 4, [1])}, bytes(4), {ESCAPE: ESCAPE}),
    "metadata of 10 MB": lambda: safetensors({"a": place(0, 4, [1])}, bytes(4), {"a": "b" * 10_000_000}),
    "a pickle": pickle.dumps(Executed()),
    "a zip of a pickle": zip_of_a_pickle,
    "an old pickle": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "a web page": b"<!DOCTYPE html><html>401</html>",
    "GGUF": b"GGUF\3\0\0\0" + bytes(100),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "a text": b"these are no weights, and yet they are long enough for a header",
}


def export(folder: Path, *culprits: str) -> Attack:
    file = folder / "lora.safetensors"
    return Attack(("export", str(file), "--output", str(folder / "out")), culprits or ("lora.safetensors",))


def sample(folder: Path, *culprits: str, model: Path = TINY_MODEL) -> Attack:
    words = ("sample", "--model", model, "--prompt", "a face", "--lora", folder / "lora.safetensors", "--steps", 1,
             "--width", 32, "--height", 32, "--weights-format", "fp32", "--output", folder / "out")  # fmt: skip
    return Attack(tuple(map(str, words)), culprits or ("lora.safetensors",))


def tool(*words: object) -> Callable[..., Attack]:
    """Returns an attack on `pixtune lora`; FILE among the words stands for the hostile file."""

    def attack(folder: Path, *culprits: str) -> Attack:
        typed = [str(folder / "lora.safetensors") if word == "FILE" else str(word) for word in words]
        output = () if words[0] in ("info", "compare") else ("--output", str(folder / "out.safetensors"))
        return Attack(("lora", *typed, *output), culprits or ("lora.safetensors",))

    return attack


TOOLS = {
    "info": tool("info", "FILE", "--json"),
    "convert": tool("convert", "FILE", "--to", "kohya"),
    "resize": tool("resize", "FILE", "--rank", 1),
    "compare": tool("compare", LORA_FILE, "FILE"),
    "merge": tool("merge", "FILE", "--base", TINY_MODEL / "transformer" / "diffusion_pytorch_model.safetensors"),
    "merge into it": tool("merge", LORA_FILE, "--base", "FILE"),
    "extract": tool("extract", "FILE", TINY_MODEL, "--rank", 1),
}
COMMANDS = {"export": export, "sample": sample, **TOOLS}


def lay_file(command: str, data: bytes | Callable[[], bytes], folder: Path, draw: random.Random) -> Attack:
    put(folder / "lora.safetensors", data() if callable(data) else data)
    return COMMANDS[command](folder)


def lay_special(command: str, kind: str, folder: Path, draw: random.Random) -> Attack:
    path = folder / "lora.safetensors"
    replace_by(path, kind)
    if kind == "1 TB of tensors":
        head, _ = lora_parts()
        entry = place(0, 2**40, [2**19, 2**19])
        put_sparse(path, 2**40 + 8 + 2**16, safetensors({NAME: entry}, b"", head))
    return COMMANDS[command](folder)


@cache
def lora_parts() -> tuple[dict[str, str], dict[str, Any]]:
    """Returns metadata and tensors' entries of a good LoRA."""
    data = LORA_FILE.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return header.pop("__metadata__"), header


def lora_data() -> bytes:
    data = LORA_FILE.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


ADAPTER: dict[str, Mapping[str, Any]] = {  # what it is: changes of the adapter's config
    "a rank of 0": {"r": 0},
    "a negative rank": {"r": -1},
    "a rank of 10^12": {"r": 10**12},
    "a rank that is a text": {"r": "4"},
    "a rank that is nothing": {"r": None},
    "an alpha of 1e308": {"lora_alpha": 1e308},
    "an alpha that is NaN": {"lora_alpha": float("nan")},
    "an infinite alpha": {"lora_alpha": float("inf")},
    "an alpha that is a list": {"lora_alpha": [1]},
    "a pattern that takes for ever": {"rank_pattern": {"(a+)+$": 4}},
    "a pattern of alternatives that takes for ever": {"rank_pattern": {"(a|a)*$": 4, "(.|.)*x": 4}},
    "a pattern with a backward reference": {"alpha_pattern": {r"(.*)(.*)(.*)(.*)\1\2\3\4x": 1}},
    "a pattern of many stars": {"alpha_pattern": {".*" * 12 + "x": 1}},
    "a pattern of a thousand optional letters": {"alpha_pattern": {"a?" * 500 + "a" * 500: 1}},
    "a pattern that is damaged": {"rank_pattern": {"(": 4}},
    "a pattern that repeats 10^9 times": {"rank_pattern": {"(a{1,9999}){1,9999}": 4}},
    "100,000 patterns": {"rank_pattern": {f"x{n}": 4 for n in range(100_000)}},
    "patterns that are a list": {"rank_pattern": [1, 2]},
    "ranks of 10^9 by pattern": {"rank_pattern": {".*": 10**9}},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "rsLoRA as a text": {"use_rslora": "yes"},
    "a class of its own": {"auto_mapping": {"base_model_class": "os.system", "parent_library": "os"}},
    "another kind": {"peft_type": "../../evil"},
    "a base at an address": {"base_model_name_or_path": "http://127.0.0.1:9/model"},
    "a start by a class": {"init_lora_weights": {"__reduce__": "os.system"}},
    "modules to save": {"modules_to_save": ["proj_out"]},
    "layers copied a million times": {"layer_replication": [[0, 1_000_000]]},
    "a runtime": {"runtime_config": {"ephemeral_gpu_offload": True}},
    "an unknown key of escape codes": {ESCAPE: ESCAPE},
    "targets that are a pattern": {"target_modules": "(x+x+)+y"},
}

METADATA: dict[
    str, Mapping[str, str | None]
] = {  # what it is: changes of the file's metadata; None: the key is left out
    "no description": {"lora_adapter_metadata": None},
    "a description that is no JSON": {"lora_adapter_metadata": "{"},
    "a description that is a list": {"lora_adapter_metadata": "[]"},
    "a description 100,000 deep": {"lora_adapter_metadata": nested(100_000)},
    "a description of escape codes": {"lora_adapter_metadata": ESCAPE},
    "no family": {"pixtune.family": None},
    "an unknown family": {"pixtune.family": "../../evil"},
    "a family of escape codes": {"pixtune.family": ESCAPE},
    "a step that is a text": {"pixtune.step": "x"},
    "a step of 10,000 digits": {"pixtune.step": "9" * 10_000},
    "no step": {"pixtune.step": None},
    "no hash": {"pixtune.config_hash": None},
    "trigger words that are no JSON": {"pixtune.trigger_words": "["},
    "trigger words that are a number": {"pixtune.trigger_words": "7"},
    "trigger words 100,000 deep": {"pixtune.trigger_words": nested(100_000)},
    "versions that are a list": {"pixtune.versions": "[1, 2]"},
    "versions that are no JSON": {"pixtune.versions": "x"},
    "no base": {"pixtune.base_model": None},
    "no trigger words": {"pixtune.trigger_words": None},
}


def lay_adapter(command: str, changes: Mapping[str, Any], folder: Path, draw: random.Random) -> Attack:
    metadata, entries = lora_parts()
    adapter = {
        **json.loads(metadata["lora_adapter_metadata"]),
        **{f"transformer.{key}": value for key, value in changes.items()},
    }
    metadata = {**metadata, "lora_adapter_metadata": json.dumps(adapter)}
    put(folder / "lora.safetensors", safetensors(entries, lora_data(), metadata))
    return COMMANDS[command](folder)


def lay_description(command: str, changes: Mapping[str, str | None], folder: Path, draw: random.Random) -> Attack:
    metadata, entries = lora_parts()
    kept = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    put(folder / "lora.safetensors", safetensors(entries, lora_data(), kept))
    return COMMANDS[command](folder)


def renamed(change: Callable[[str], str]) -> Callable[[], bytes]:
    def make() -> bytes:
        metadata, entries = lora_parts()
        return safetensors({change(name): entry for name, entry in entries.items()}, lora_data(), metadata)

    return make


def reshaped(change: Callable[[list[int]], list[int]], dtype: str | None = None) -> Callable[[], bytes]:
    def make() -> bytes:
        metadata, entries = lora_parts()
        changed = {n: {**e, "shape": change(e["shape"]), "dtype": dtype or e["dtype"]} for n, e in entries.items()}
        return safetensors(changed, lora_data(), metadata)

    return make


LORAS: dict[str, Callable[[], bytes]] = {
    "of other layers": renamed(lambda name: name.replace("attn", "nowhere")),
    "of layers of Python": renamed(lambda name: name.replace("attn.to_q", "__class__")),
    "of names of escape codes": renamed(lambda name: name.replace("attn", ESCAPE)),
    "of layers that are none": renamed(lambda name: name.replace("attn.to_q", "attn.norm_q")),
    "of the other matrix twice": renamed(lambda name: name.replace("lora_A", "lora_C")),
    "with its sides exchanged": reshaped(lambda shape: shape[::-1]),
    "of vectors": reshaped(lambda shape: [shape[0] * shape[1]]),
    "of four sides": reshaped(lambda shape: [1, 1, *shape]),
    "of another rank": reshaped(lambda shape: [shape[0] * 2, shape[1] // 2]),
    "of whole numbers": reshaped(lambda shape: shape, "I32"),
    "of NaN": lambda: safetensors(lora_parts()[1], b"\xff" * len(lora_data()), lora_parts()[0]),
    "of 8 bits": reshaped(lambda shape: [shape[0], shape[1] * 4], "F8_E4M3"),
}


def cases(rounds: int = 8) -> Iterator[Case]:
    for number, (what, data) in enumerate(FILES.items()):
        command = ("export", "sample")[number % 2]
        yield Case(SAFETENSORS, f"{what} ({command})", partial(lay_file, command, data), REFUSED)
    for number, (what, data) in enumerate(FILES.items()):
        command = list(TOOLS)[number % len(TOOLS)]
        yield Case(SAFETENSORS, f"{what} (lora {command})", partial(lay_file, command, data), REFUSED)
    for kind in ("a named pipe", "a device", "a folder", "a link to itself", "1 TB", "1 TB of tensors"):
        for command in COMMANDS:
            yield Case(SAFETENSORS, f"{kind} ({command})", partial(lay_special, command, kind), REFUSED)
    for what, changes in ADAPTER.items():
        yield Case(LORA, f"{what} (sample)", partial(lay_adapter, "sample", changes))
    for what, changes in list(ADAPTER.items())[:9]:
        yield Case(LORA, f"{what} (export)", partial(lay_adapter, "export", changes))
    for number, (what, changes) in enumerate(ADAPTER.items()):
        command = list(TOOLS)[number % 5]
        yield Case(LORA, f"{what} (lora {command})", partial(lay_adapter, command, changes))
    for number, (what, described) in enumerate(METADATA.items()):
        command = list(TOOLS)[number % 5]
        yield Case(LORA, f"{what} (lora {command})", partial(lay_description, command, described))
    for what, described in METADATA.items():
        yield Case(LORA, f"{what} (export)", partial(lay_description, "export", described))
    for what, described in list(METADATA.items())[:5]:
        yield Case(LORA, f"{what} (sample)", partial(lay_description, "sample", described), REFUSED)
    for what, make in LORAS.items():
        for command in COMMANDS:
            yield Case(LORA, f"{what} ({command})", partial(lay_file, command, make))
    for number in range(2 * rounds):
        command = list(COMMANDS)[number % len(COMMANDS)]

        def lay(folder: Path, draw: random.Random, command: str = command) -> Attack:
            return lay_file(command, damage(LORA_FILE.read_bytes(), draw), folder, draw)

        yield Case(LORA, f"damaged {number} ({command})", lay)
    yield Case(LORA, "as it was written (export)", partial(lay_file, "export", LORA_FILE.read_bytes), TAKEN)
    yield Case(LORA, "as it was written (sample)", partial(lay_file, "sample", LORA_FILE.read_bytes), EITHER)
