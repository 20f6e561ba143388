"""Saves everything that a run needs to resume, so that a crash at any moment loses nothing.

A checkpoint is a folder `checkpoint-000500` with the LoRA (itself a file that diffusers loads), the optimizer's state
and `state.json`: step, config, plan, versions, the size and SHA-256 of the other files, and its own SHA-256. It is
written under a temporary name, synced and renamed; older ones are deleted only after that. There is no pickle and no
generator state: random draws are functions of the step (`randomness.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from pixtune.errors import CheckpointError
from pixtune.storage.files import file_digest, sync_folder, write_atomically
from pixtune.storage.grouping import group_neighbours
from pixtune.storage.safetensors_writer import TensorFile, save_safetensors

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)
Decision = TypeVar("Decision", bound="DataclassInstance")

CheckpointFiles = Mapping[str, TensorFile]
"""Tensors and metadata of a checkpoint's files by the files' names without their ending, for example "optimizer"."""
FORMAT = 1
STATE_FILE = "state.json"
OPTIMIZER_STEM = "optimizer"
SHARD_BYTES = 4 * 2**30
NUM_THREADS = 4
"""Number of files written or read at a time. One thread hashes about as fast as one disk writes; some are faster."""
NAME = re.compile(r"checkpoint-(\d+)")

Argument = TypeVar("Argument")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """Tensors of each file, by the file's name without its ending."""
    record: dict[str, Any]
    """JSON values that `save_checkpoint` was given."""
    path: Path


def read_decision(kind: type[Decision], values: Mapping[str, Any], name: str) -> Decision:
    """Reads a frozen decision from its fields' values in a checkpoint's record; lists become tuples again.

    A field that has a default may be missing: versions that did not have it did what the default says.

    Args:
        name: the decision's name in an error.

    Raises:
        CheckpointError: another version of pixtune wrote it.
    """
    required = {field.name for field in fields(kind) if field.default is MISSING}
    differing = (required - values.keys()) | (values.keys() - {field.name for field in fields(kind)})
    if differing:
        raise CheckpointError(
            f"the checkpoint's {name} differs from this version's in {', '.join(sorted(differing))}. Resume with the "
            "version of pixtune that wrote it (`versions` in its state.json), or start anew."
        )
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def sharded(stem: str, tensors: Mapping[str, Tensor], max_bytes: int = SHARD_BYTES) -> CheckpointFiles:
    """Divides tensors among files of at most `max_bytes`, or of one tensor: STEM, or STEM-00001-of-00003 and so on.

    Files are written and checked side by side, so there should be several where that takes long.
    """
    shards = [dict(shard) for shard in group_neighbours(tensors.items(), lambda item: item[1].nbytes, max_bytes)]
    if len(shards) < 2:
        return {stem: TensorFile(tensors)}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}": TensorFile(shard) for i, shard in enumerate(shards, start=1)}


def joined(files: Mapping[str, Mapping[str, Tensor]], stem: str) -> dict[str, Tensor]:
    """Joins what `sharded` divided, out of all files of a checkpoint."""
    mine = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?")
    return {name: tensor for key, tensors in files.items() if mine.fullmatch(key) for name, tensor in tensors.items()}


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step:06d}"


def save_checkpoint(
    output_dir: Path,
    step: int,
    files: CheckpointFiles,
    record: Mapping[str, Any],
) -> Path:
    """Writes a checkpoint and returns its folder.

    Args:
        record: everything else that resuming needs, as JSON values.

    Raises:
        CheckpointError: it could not be written, for example because the disk is full. Nothing half-written stays and
            earlier checkpoints are untouched.
    """
    final = checkpoint_path(output_dir, step)
    temporary = output_dir / f".{final.name}.writing"
    try:
        remove_unfinished(output_dir)
        temporary.mkdir(parents=True)
        written = _write_files(temporary, files)
        state: dict[str, Any] = {"format": FORMAT, "step": step, "files": written, "record": record}
        state["sha256"] = _state_digest(state)
        write_atomically(temporary / STATE_FILE, json.dumps(state, indent=1, sort_keys=True).encode())
        if final.exists():
            shutil.rmtree(final)  # the same step saved again, for example by a run that was set back
        temporary.replace(final)
        sync_folder(output_dir)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {final} ({error}). Earlier checkpoints are "
            f"untouched. Make room or choose another output_dir, then resume with resume_from_checkpoint=latest."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # renamed already, unless something failed
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint and checks every file against its recorded size and hash.

    Raises:
        CheckpointError: it is no checkpoint, of another format, or damaged; names the file and what to resume from.
    """
    advice = _advice(path)
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is no checkpoint of pixtune: it has no {STATE_FILE}. {advice}") from error
    except ValueError as error:
        raise CheckpointError(f"{path / STATE_FILE} is damaged ({error}). {advice}") from error
    if isinstance(state, dict) and state.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}. "
            "Use the version that wrote it."
        )
    if not isinstance(state, dict) or state.pop("sha256", None) != _state_digest(state):
        raise CheckpointError(f"{path / STATE_FILE} is damaged: its content is not what was written. {advice}")

    def check(name: str) -> None:
        file, expected = path / name, state["files"][name]
        if not file.is_file():
            raise CheckpointError(f"{file} is missing. {advice}")
        if file.stat().st_size != expected["bytes"] or file_digest(file) != expected["sha256"]:
            raise CheckpointError(f"{file} is damaged: its content is not what was written. {advice}")

    _in_threads(check, list(state["files"]))
    tensors = {Path(name).stem: load_file(path / name) for name in state["files"]}
    return Checkpoint(state["step"], tensors, state["record"], path)


def _write_files(folder: Path, files: CheckpointFiles) -> dict[str, dict[str, Any]]:
    """Writes several files at a time; returns the size and SHA-256 of each by its name."""
    for device in {tensor.device for tensors, _ in files.values() for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)  # the threads' streams do not wait for what the caller's has still to do

    def write(stem: str) -> tuple[str, dict[str, Any]]:
        path = folder / f"{stem}.safetensors"
        digest = save_safetensors(path, *files[stem])
        return path.name, {"bytes": path.stat().st_size, "sha256": digest}

    return dict(_in_threads(write, list(files)))


def _in_threads(work: Callable[[Argument], Result], arguments: Sequence[Argument]) -> list[Result]:
    """Calls `work` with each argument, several at a time, and returns the results in order.

    After a failure no further calls are begun, and those under way are waited for. The first failure in the arguments'
    order is raised: all calls before it have been begun earlier, so it is the same one every time.
    """
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="checkpoint") as pool:
        try:
            running = [pool.submit(work, argument) for argument in arguments]
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)
    return [done.result() for done in running]


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Lists the finished checkpoints, the lowest step first."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def resolve_resume(output_dir: Path, resume_from: str | None) -> Path | None:
    """Returns the checkpoint folder to resume from, or None to start anew.

    Args:
        resume_from: the config's `resume_from_checkpoint`: None, "latest", or a folder (also by its name alone).

    Raises:
        CheckpointError: a named folder does not exist, or a new start would mix with an older run's checkpoints.
    """
    existing = find_checkpoints(output_dir)
    if resume_from is None:
        if existing:
            raise CheckpointError(
                f"{output_dir} already holds a run (up to {existing[-1].name}), which a new start would overwrite. "
                "Pass resume_from_checkpoint=latest to resume it, or choose another output_dir, or delete it."
            )
        return None
    if resume_from == "latest":
        return existing[-1] if existing else None
    for path in (Path(resume_from).expanduser(), output_dir / resume_from):
        if path.is_dir():
            return path
    names = ", ".join(path.name for path in existing) or "none"
    raise CheckpointError(
        f"resume_from_checkpoint: there is no folder {resume_from}. In {output_dir} there are: {names}."
    )


def prune_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Deletes the oldest finished checkpoints beyond `limit`. Must be called only after a newer one is complete."""
    for path in find_checkpoints(output_dir)[: -limit or None] if limit else []:
        shutil.rmtree(path)


def remove_unfinished(output_dir: Path) -> None:
    """Deletes checkpoints that a killed process did not finish writing."""
    for path in output_dir.glob(".checkpoint-*.writing"):
        log.info("removing %s, left by an interrupted write", path)
        shutil.rmtree(path)


def _state_digest(state: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of all of the state but the digest itself."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _advice(path: Path) -> str:
    others = [other.name for other in find_checkpoints(path.parent) if other != path]
    if not others:
        return "There is no other checkpoint beside it: start anew in another output_dir."
    return f"Resume from another: resume_from_checkpoint={others[-1]}."
