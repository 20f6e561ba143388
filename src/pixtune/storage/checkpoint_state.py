"""Finds checkpoints by name and reads their `state.json`; imports no torch, since lists of runs read it too."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixtune.errors import CheckpointError, DamagedError
from pixtune.inputs.reading import read_bounded
from pixtune.storage.state_form import LARGEST_STATE_BYTES, fault_of_state

FORMAT = 1
STATE_FILE = "state.json"
NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Returns the folder of the checkpoint of a step."""
    return output_dir / f"checkpoint-{step:06d}"


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Lists everything that has the name of a finished checkpoint, the lowest step first."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def read_state(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's `state.json`, and checks it against its own hash.

    Raises:
        DamagedError: it is not what was written, or there is none.
        CheckpointError: another version wrote it in another format.
    """
    file = path / STATE_FILE
    try:
        if not file.is_file():  # a pipe, among others, would keep a reader waiting
            kind = "is no folder" if path.is_file() else f"has no {STATE_FILE}"
            raise DamagedError(f"{path} is no checkpoint of pixtune: it {kind}.")
        state = json.loads(read_bounded(file, LARGEST_STATE_BYTES).decode())
    except OSError as error:
        raise DamagedError(f"{file} cannot be read ({error.strerror or error}).") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{file} is damaged ({error}).") from error
    if isinstance(state, dict) and state.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {state['format']!r:.60}, this version reads {FORMAT}. "
            "Use the version that wrote it."
        )
    if not isinstance(state, dict) or state.pop("sha256", None) != state_digest(state):
        raise DamagedError(f"{file} is damaged: its content is not what was written.")
    if fault := fault_of_state(state):
        raise DamagedError(f"{file} is of another form than pixtune writes: {fault}.")
    return state


def state_digest(state: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of all of the state but the digest itself."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
