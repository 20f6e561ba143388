"""Tells what a file is that was named as a model's weights and is no safetensors file, by its first bytes.

Nothing is executed, and no pickle is opened.
"""

from __future__ import annotations

import json
from pathlib import Path

from pixtune.inputs.reading import MEBIBYTE, check_regular

PICKLE = "a PyTorch pickle (.pt, .bin, .ckpt), which may run any code when it is read. Take the model's .safetensors"
PICTURE = "a picture"
OTHER_FORMATS = {
    b"PK\x03\x04": PICKLE,  # what torch.save writes: a zip with a pickle in it
    b"\x80": PICKLE,  # what it wrote before torch 1.6
    b"version ": "a git-lfs pointer: the weights were not downloaded. Run `git lfs pull` in its folder",
    b"<": "a web page, perhaps an error message. Fetch the weights again, as a .safetensors file",
    b"GGUF": "a GGUF file, which is read as the base of a run alone. Take it as .safetensors",
    b"\x89PNG": PICTURE,
    b"\xff\xd8\xff": PICTURE,
    b"RIFF": PICTURE,
    b"GIF8": PICTURE,
    b"\x89HDF": "an HDF5 file (Keras)",
    b"\x1f\x8b": "a compressed archive. Unpack it first",
    b"7z\xbc\xaf": "a compressed archive. Unpack it first",
    b"Rar!": "a compressed archive. Unpack it first",
}
"""First bytes of files that are found under a safetensors name. Read as a header's length, each exceeds the longest."""
WORKFLOW_CHUNKS = (b"tEXtworkflow\0", b"tEXtprompt\0", b"iTXtworkflow\0", b"iTXtprompt\0")
"""Beginnings of the parts of a PNG in which ComfyUI keeps the workflow that drew it."""
MOST_BYTES = MEBIBYTE
"""Bytes of a file that are looked at."""
WORKFLOW = (
    "a ComfyUI workflow, which names models and holds none. Give the file that its node for loading the model names"
)


def kind_of_bytes(path: Path) -> str:
    """Returns what a file that is no safetensors file is, as the rest of a sentence, mostly with what to do.

    Raises:
        OSError: it cannot be read.
    """
    check_regular(path)
    with path.open("rb") as stream:
        data = stream.read(MOST_BYTES)
    if not data.strip(b"\0"):
        content = "filled with zeros" if data else "empty"
        return f"{content}, as one whose download was cut off. Fetch the model again"
    kind = next((kind for signature, kind in OTHER_FORMATS.items() if data.startswith(signature)), None)
    if kind == PICTURE:
        is_workflow = any(chunk in data for chunk in WORKFLOW_CHUNKS)
        return f"a picture with {WORKFLOW}" if is_workflow else "a picture. Give the weights as .safetensors"
    if kind is not None:
        return kind
    if data.lstrip()[:1] in (b"{", b"["):
        return _kind_of_json(data)
    if _is_text(data):
        return f"text, which begins with {data[:40].decode('utf-8', 'replace')!r}. Give the weights as .safetensors"
    return "something else, or cut off. Fetch the model again"


def _kind_of_json(data: bytes) -> str:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None  # cut off here, or damaged
    if isinstance(content, dict):
        is_graph = isinstance(content.get("nodes"), list)
        if is_graph or any(isinstance(node, dict) and "class_type" in node for node in content.values()):
            return WORKFLOW
        if "weight_map" in content:
            return "the index of weights that lie in several files. Give the folder that it is in"
        if "_class_name" in content or "architectures" in content:
            return "a model's config, without weights. Give the folder that it is in, or the model's .safetensors"
    elif b'"class_type"' in data or b'"nodes"' in data:
        return WORKFLOW
    return "JSON, without weights. Give the weights as .safetensors"


def _is_text(data: bytes) -> bool:
    head = data[:256]
    return not any(byte < 9 or 13 < byte < 32 for byte in head)
