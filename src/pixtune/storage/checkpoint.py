"""Saves everything that a run needs to resume, so that a crash at any moment loses nothing.

A checkpoint is a folder `checkpoint-000500` with the LoRA (itself a file that diffusers loads), the optimizer's state
and `state.json`: step, lineage, config, plan, versions, the size and SHA-256 of the other files, and its own SHA-256.
It is written under a temporary name, synced and renamed; older ones are deleted only after that (`course.py`). There is
no pickle and no generator state: random draws are functions of the step (`randomness.py`).
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from pixtune.errors import CheckpointError, DamagedError
from pixtune.inputs.reading import read_bounded
from pixtune.storage.checkpoint_state import (
    FORMAT,
    STATE_FILE,
    checkpoint_path,
    find_checkpoints,
    read_state,
    state_digest,
)
from pixtune.storage.files import file_digest, sync_folder, write_atomically
from pixtune.storage.grouping import group_neighbours
from pixtune.storage.lineage import Lineage, Order, Saved, SetBack, put_in_order, read_lineage, read_set_back
from pixtune.storage.safetensors_writer import TensorFile, save_safetensors
from pixtune.storage.slices import map_file, put_together
from pixtune.storage.state_form import LARGEST_STATE_BYTES, fault_of_decision

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)
Decision = TypeVar("Decision", bound="DataclassInstance")

CheckpointFiles = Mapping[str, TensorFile]
"""Tensors and metadata of a checkpoint's files by the files' names without their ending, for example "optimizer"."""
Seals = dict[str, dict[str, Any]]
"""Size (`bytes`) and SHA-256 (`sha256`) of files by their names."""
WriteFiles = Callable[[Path], Seals]
"""Function that writes a checkpoint's files into a folder: where processes hold the weights together, all of them."""
OPTIMIZER_STEM = "optimizer"
SHARD_BYTES = 4 * 2**30
NUMBERS = r"-\d+-of-\d+"
"""End of the names of files that are several."""
NUM_THREADS = 4
"""Number of files written or read at a time. One thread hashes about as fast as one disk writes; some are faster."""
WRITING, REPLACED, DELETING = ".writing", ".replaced", ".deleting"
"""Endings of a checkpoint's temporary names: unfinished; to be deleted once its successor stands; being deleted."""
SET_BACK_FILE = "set_back.json"

Argument = TypeVar("Argument")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """Tensors of each file, by the file's name without its ending. Where several files hold pieces of the same tensors
    they are one here, without their numbers, and its tensors are `slices.SlicedTensor`."""
    record: dict[str, Any]
    """JSON values that `save_checkpoint` was given."""
    path: Path
    lineage: Lineage


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
    if fault := fault_of_decision(kind, values):
        raise CheckpointError(f"the checkpoint's {name} cannot be used: {fault}. Resume from another one.")
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
    mine = re.compile(rf"{re.escape(stem)}({NUMBERS})?")
    return {name: tensor for key, tensors in files.items() if mine.fullmatch(key) for name, tensor in tensors.items()}


def save_checkpoint(
    output_dir: Path,
    step: int,
    files: CheckpointFiles | WriteFiles,
    record: Mapping[str, Any],
    lineage: Lineage | None = None,
) -> Path:
    """Writes a checkpoint and returns its folder. One of the same step is replaced.

    Args:
        record: everything else that resuming needs, as JSON values.
        lineage: where it comes from.

    Raises:
        CheckpointError: it could not be written, for example because the disk is full. Nothing half-written stays and
            earlier checkpoints are untouched.
    """
    final = checkpoint_path(output_dir, step)
    temporary, replaced = (output_dir / f".{final.name}{ending}" for ending in (WRITING, REPLACED))
    try:
        remove_unfinished(output_dir)
        temporary.mkdir(parents=True)
        written = files(temporary) if callable(files) else write_files(temporary, files)
        _check_all_are_here(temporary, written)
        state: dict[str, Any] = {"format": FORMAT, "step": step, "files": written, "record": record}
        if lineage is not None:
            state["lineage"] = lineage.to_dict()
        state["sha256"] = state_digest(state)
        write_atomically(temporary / STATE_FILE, json.dumps(state, indent=1, sort_keys=True).encode())
        if final.exists():
            final.replace(replaced)  # the same step saved again, for example by a run that was set back
        temporary.replace(final)
        sync_folder(output_dir)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {final} ({error}). Earlier checkpoints are "
            f"untouched. Make room or choose another output_dir, then resume with resume_from_checkpoint=latest."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # renamed already, unless something failed
        _settle_replaced(replaced)
    return final


def load_checkpoint(path: Path, verified: bool = False) -> Checkpoint:
    """Reads a checkpoint and checks every file against its recorded size and hash.

    Args:
        verified: whether this process has just called `verify_checkpoint`, so that files need not be hashed again.

    Raises:
        DamagedError: it is no checkpoint, or damaged; names the file and what to resume from.
        CheckpointError: it is of another format.
    """
    try:
        state = read_state(path)
        if not verified:
            _check_files(path, state["files"])
        tensors = _map_files(path, list(state["files"]))
    except DamagedError as error:
        raise DamagedError(f"{error} {_advice(path)}") from error
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{path} cannot be read ({error}). {_advice(path)}") from error
    return Checkpoint(state["step"], tensors, state["record"], path, _lineage_in(state, path))


def verify_checkpoint(path: Path) -> None:
    """Checks every file of a checkpoint against its recorded size and hash.

    Raises:
        DamagedError: names the file.
        CheckpointError: it is of another format.
    """
    _check_files(path, read_state(path)["files"])


def _check_files(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Compares files with their recorded sizes and hashes, several at a time."""

    def check(name: str) -> None:
        _check_size(path / name, files[name]["bytes"])
        try:
            intact = file_digest(path / name) == files[name]["sha256"]
        except OSError as error:
            raise DamagedError(f"{path / name} cannot be read ({error.strerror or error}).") from error
        if not intact:
            raise DamagedError(f"{path / name} is damaged: its content is not what was written.")

    _in_threads(check, list(files))


def _check_size(file: Path, num_bytes: int) -> None:
    if not file.is_file():
        raise DamagedError(f"{file} is missing.")
    if file.stat().st_size != num_bytes:
        raise DamagedError(f"{file} is damaged: its content is not what was written.")


def _map_files(path: Path, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    tensors: dict[str, dict[str, Tensor]] = {}
    pieces: dict[str, list[tuple[dict[str, Tensor], dict[str, int]]]] = defaultdict(list)
    for name in names:
        mapped, first_rows = map_file(path / name)
        if first_rows:
            pieces[re.sub(NUMBERS, "", Path(name).stem)].append((mapped, first_rows))
        else:
            tensors[Path(name).stem] = mapped
    for stem, files in pieces.items():
        mapped_files, firsts = zip(*files, strict=True)
        try:
            tensors[stem] = put_together(mapped_files, firsts)  # type: ignore[assignment]
        except DamagedError as error:
            raise DamagedError(f"{path} is damaged: {error}") from error
    return tensors


def _check_all_are_here(folder: Path, written: Seals) -> None:
    """Checks that this process sees what others say they have written.

    Raises:
        OSError: it does not.
    """
    for name, seal in written.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != seal["bytes"]:
            raise OSError(
                f"{name} was written by another process and is not there: all processes of a run need the same "
                "output_dir, on a disk that all of their machines share"
            )


def write_files(folder: Path, files: CheckpointFiles) -> Seals:
    """Writes files, several at a time; returns the size and SHA-256 of each by its name.

    Raises:
        OSError: one could not be written.
    """
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


@dataclass(frozen=True)
class FolderContent:
    """The checkpoints of an output folder, by their states and the sizes of their files."""

    saved: tuple[Saved, ...]
    """Checkpoints that are whole, as far as that shows without reading all of their files."""
    unusable: tuple[CheckpointError, ...]
    """Reasons why the others cannot be used, the highest number first."""
    set_back: SetBack | None
    """The last time that the run was set back."""

    @property
    def order(self) -> Order:
        return put_in_order(self.saved, self.set_back)


def read_folder(output_dir: Path) -> FolderContent:
    """Reads what checkpoints there are. Nothing is wrong about a folder without any, or one that is not there."""
    saved, unusable = [], []
    for path in reversed(find_checkpoints(output_dir)):
        try:
            saved.append(read_saved(path))
        except CheckpointError as error:
            unusable.append(error)
    return FolderContent(tuple(saved), tuple(unusable), _read_set_back(output_dir))


def read_saved(path: Path) -> Saved:
    """Reads a checkpoint's step and lineage, and checks the sizes of its files.

    Raises:
        DamagedError: it is no checkpoint, or damaged.
        CheckpointError: it is of another format.
    """
    state = read_state(path)
    for name, written in state["files"].items():
        _check_size(path / name, written["bytes"])
    return Saved(path, state["step"], _lineage_in(state, path))


def _lineage_in(state: Mapping[str, Any], path: Path) -> Lineage:
    try:
        return read_lineage(state.get("lineage"), state["step"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} has a lineage of another form than this version's. Use the version that wrote it."
        ) from error


def _read_set_back(output_dir: Path) -> SetBack | None:
    file = output_dir / SET_BACK_FILE
    try:
        if not file.is_file():
            return None
        values = json.loads(read_bounded(file, LARGEST_STATE_BYTES).decode())
        return read_set_back(values)
    except (AttributeError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("%s cannot be read (%s): it is taken not to be there", file, error)
        return None


def write_set_back(output_dir: Path, set_back: SetBack) -> None:
    """Notes in the output folder that the run was set back.

    Raises:
        WriteError: it could not be written.
    """
    write_atomically(output_dir / SET_BACK_FILE, json.dumps(asdict(set_back), indent=1).encode())


def delete_checkpoint(path: Path) -> None:
    """Deletes a finished checkpoint, such that a reader sees all of it or nothing.

    Raises:
        OSError: it could not be deleted.
    """
    doomed = path.with_name(f".{path.name}{DELETING}")
    path.replace(doomed)
    shutil.rmtree(doomed)


def remove_unfinished(output_dir: Path) -> None:
    """Clears away what a killed process left under temporary names. What it was about to replace gets its name back."""
    for path in output_dir.glob(".checkpoint-*"):
        if path.suffix in (WRITING, DELETING):
            log.info("removing %s, left by an interrupted write", path)
            shutil.rmtree(path)
        elif path.suffix == REPLACED:
            _settle_replaced(path)


def _settle_replaced(replaced: Path) -> None:
    """Deletes a checkpoint whose successor stands, and gives it its name back where there is none."""
    final = replaced.with_name(replaced.name[1:].removesuffix(REPLACED))
    if replaced.exists() and not final.exists():
        replaced.replace(final)
    shutil.rmtree(replaced, ignore_errors=True)


def _advice(path: Path) -> str:
    others = [other.path.name for other in read_folder(path.parent).order.all if other.path != path]
    if not others:
        return "There is no other checkpoint beside it: start anew in another output_dir."
    return f"Resume from another: resume_from_checkpoint={others[0]}."
