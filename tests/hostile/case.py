"""One hostile file or model folder, and what is asked of the command that meets it."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EITHER, REFUSED, TAKEN = "either", "refused", "taken"
"""What a command may do: refuse the input in words, or take it as fine."""


@dataclass(frozen=True)
class Attack:
    """A command that is about to meet hostile files."""

    words: tuple[str, ...]
    """What is typed after `pixtune`."""
    culprits: tuple[str, ...]
    """Parts of names, of which a refusal has to name one."""


@dataclass(frozen=True)
class Case:
    """A hostile input that can be made again from its seed."""

    kind: str
    name: str
    lay: Callable[[Path, random.Random], Attack]
    """Writes the input into an empty folder, by the draws that it is given."""
    expected: str = EITHER
    most_mib: int = 512
    """Memory that the command may take beyond what a process with all libraries has, MiB."""
    most_seconds: float = 30.0


def damage(data: bytes, draw: random.Random) -> bytes:
    """Returns the bytes with a few of them changed, some cut off, some exchanged or repeated; headers more often."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        place = draw.randrange(min(len(changed), draw.choice([64, 200, len(changed)])))
        changed[place] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
    way = draw.randrange(5)
    if way == 0:
        del changed[draw.randrange(len(changed)) :]
    elif way == 1:
        begin = draw.randrange(len(changed))
        changed[begin:begin] = changed[begin : begin + draw.randrange(1, 200)]
    elif way == 2:
        begin = draw.randrange(len(changed))
        changed[begin : begin + draw.randrange(1, 100)] = bytes(draw.randrange(1, 100))
    return bytes(changed)


def put(path: Path, data: bytes | str) -> Path:
    """Writes a file and the folders above it. A text may hold half characters, which are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    return path


def put_sparse(path: Path, num_bytes: int, head: bytes = b"") -> Path:
    """Writes a file that is large and takes no room on the disk."""
    put(path, head)
    with path.open("r+b") as stream:
        stream.truncate(num_bytes)
    return path


def replace_by(path: Path, kind: str) -> None:
    """Puts something else in a file's place."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a link to itself":
        path.symlink_to(path)
    elif kind == "1 TB":
        put_sparse(path, 2**40)


def safetensors(
    tensors: Mapping[str, Any], data: bytes = b"", metadata: Any = None, length: int | None = None
) -> bytes:
    """Returns a safetensors file byte by byte.

    Args:
        tensors: what the header says, whether true or not.
        length: what the file says of its header's length; None: the truth.
    """
    header = dict(tensors) if metadata is None else {"__metadata__": metadata, **tensors}
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def place(begin: int, end: int, shape: Iterable[Any], dtype: Any = "F32") -> dict[str, Any]:
    """Returns one tensor's entry of a safetensors header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def nested(levels: int, opening: str = "[", closing: str = "]") -> str:
    """Returns brackets within brackets."""
    return opening * levels + closing * levels
