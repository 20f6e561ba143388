"""Writing files so that a reader, or a run that goes on after a crash, never sees half of one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pixtune.errors import WriteError


def user_cache_folder() -> Path | None:
    """What can be made again is kept there from run to run; None where this user can keep nothing."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pixtune"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where the user has no home
        return None
    return folder if os.access(folder, os.W_OK) else None


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary name beside `path`, syncs, renames.

    Raises:
        WriteError: it could not be written. The old file stands and nothing half-written is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if temporary.exists():  # not where the folder itself could not be made
            temporary.unlink()
        raise WriteError(f"{path} could not be written ({error.strerror or error}). Is the disk full?") from error


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Tensors as one safetensors file, atomically. CPU copies are made; names keep their order by safetensors' rule."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(contiguous, metadata=dict(metadata) if metadata else None))


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable (POSIX: a rename is safe only once its folder is synced)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
