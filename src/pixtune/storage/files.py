"""Writes files so that a reader, or a run that resumes after a crash, never sees half of one.

Several machines may write to one folder, over NFS, too. So there are no locks here: a file is written under a name that
nobody else has, and renamed. Of two that write the same one, the last stays, whole.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pixtune.config.schema import TrainConfig
from pixtune.errors import PixtuneError, WriteError

log = logging.getLogger(__name__)


def user_cache_folder() -> Path | None:
    """Returns the folder for what can be made again but is kept from run to run; None where this user has none."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pixtune"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where the user has no home
        return None
    return folder if os.access(folder, os.W_OK) else None


TEMPORARY = ".tmp"
"""Ending of the names of files that are not whole yet."""
STALE_SECONDS = 86400.0
"""Age from which a temporary file in a folder that others write to is of a process that was killed."""


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Opens a file to write to, under a temporary name beside `path`; it is synced and renamed to `path` at the end.

    Args:
        durable: whether to wait until the disk has it. False serves content whose reader notices damage and can make it
            again: a process that is killed leaves the old file or the new one either way, a power failure may leave the
            new one empty.

    Raises:
        WriteError: it could not be written. The old file is kept and nothing half-written is left, as after any
            other error within the block.
    """
    # Numbers of processes are no names: containers and machines that share a disk have the same ones.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as stream:
                yield stream
                if durable:
                    stream.flush()
                    os.fsync(stream.fileno())
                written = os.fstat(stream.fileno())
            _rename(temporary, path, written)
        finally:
            temporary.unlink(missing_ok=True)  # renamed already, unless something failed
        if durable:
            sync_folder(path.parent)
    except PixtuneError:  # of what was to be written: some of these are OSErrors as well
        raise
    except OSError as error:
        raise WriteError(f"{path} could not be written ({error.strerror or error}){_question(error)}") from error


def _rename(temporary: Path, path: Path, written: os.stat_result) -> None:
    """Puts a file in its place, where the file system may have done so without its answer having come.

    An NFS client asks again then, and is told that there is no such file.
    """
    try:
        temporary.replace(path)
    except FileNotFoundError:
        if not path.exists() or not os.path.samestat(path.stat(), written):
            raise


def remove_stale(folder: Path) -> None:
    """Removes from a folder, and the folders in it, the temporary files of processes that were killed.

    Others may be writing there meanwhile: what is younger than `STALE_SECONDS`, by the clock of the disk's machine,
    stays. What cannot be removed stays, too.
    """
    with suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, prefix=".now.", suffix=TEMPORARY) as stream:
        now = os.fstat(stream.fileno()).st_mtime
        for each in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            with suppress(OSError), os.scandir(each) as entries:
                for entry in entries:
                    if entry.name.startswith(".") and entry.name.endswith(TEMPORARY):
                        with suppress(OSError):
                            if now - entry.stat(follow_symlinks=False).st_mtime > STALE_SECONDS:
                                os.unlink(entry.path)


def remove_temporary(folder: Path) -> None:
    """Removes from a folder the files that `replacing` never finished, since its process was killed.

    Must be called only while no other process writes there.
    """
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def _question(error: OSError) -> str:
    """Returns what to look at first, by the kind of an error of writing."""
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return ": may this user write there?"
    if error.errno in {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}:
        return ": does something else stand in its place?"
    return ": is the disk full?" if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} else ""


PROBE_BYTES = 1 << 10
"""Size of the file that `check_writable` writes: a full disk has no room for the smallest."""


def check_writable(folder: Path, remedy: str) -> None:
    """Checks that files can be written to a folder, which need not exist, by writing one. Leaves nothing behind.

    Permissions alone do not show a full disk, a quota, or a network share that refuses.

    Args:
        remedy: sentence on what to do, for example which key names another folder.

    Raises:
        WriteError: the folder cannot be made or written to.
    """
    made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # On Linux it has no name, so that a process that is killed meanwhile leaves nothing either.
            with tempfile.TemporaryFile(dir=folder, prefix=".writable.", suffix=".tmp") as stream:
                stream.write(bytes(PROBE_BYTES))
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            for each in made:
                if each.is_dir():
                    each.rmdir()
    except OSError as error:
        raise WriteError(
            f"{folder} could not be written to ({error.strerror or error}){_question(error) or '.'} {remedy}"
        ) from error


def check_outputs(config: TrainConfig) -> None:
    """Checks that a run's results, and a tracker's files, can be written.

    Raises:
        WriteError: they cannot; names the key.
    """
    check_writable(config.output_dir, "Set output_dir to another folder.")
    if config.report_to is not None:
        check_writable(config.output_dir / config.logging_dir, "Set logging_dir to another folder.")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a whole file at once, by `replacing`."""
    with replacing(path) as stream:
        stream.write(data)


def write_if_possible(path: Path, data: bytes) -> None:
    """Writes a file as `write_atomically` does; where that fails, warns. For what is only remembered, to save time."""
    try:
        write_atomically(path, data)
    except WriteError as error:
        log.warning("%s It only saves time: the run goes on without it.", error)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable (POSIX: a rename is safe only once its folder is synced)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def text_digest(text: str) -> str:
    """Returns the SHA-256 of a text in UTF-8, as hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remembered_digest(file: Path, memo_dir: Path | None) -> str:
    """Returns a file's SHA-256 as hex; that of a large file is kept in `memo_dir` by its path, size and time."""
    stat = file.stat()
    if memo_dir is None or stat.st_size < 64 * 2**20:
        return file_digest(file)
    key = hashlib.sha256(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    memo = memo_dir / f"{key}.sha256"
    # Written twice, so that damage shows: by a wrong digest, all encodings would be those of another model.
    remembered = memo.read_bytes().split() if memo.is_file() else []
    if len(remembered) == 2 and remembered[0] == remembered[1]:
        return remembered[0].decode()
    digest = file_digest(file)
    write_if_possible(memo, f"{digest}\n{digest}\n".encode())
    return digest
