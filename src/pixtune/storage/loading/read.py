"""Reads safetensors one tensor after the other onto a device, by the fastest way that this machine has."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixtune.errors import WeightsError
from pixtune.storage.loading.entries import TensorEntry, read_entries
from pixtune.storage.loading.fast import iterate_fast, obstacle_to
from pixtune.storage.loading.threads import iterate_with_threads

logger = logging.getLogger(__name__)

NUM_THREADS = 8
RENAMED = "the file has other names for its tensors than the model"


def iterate_tensors(
    files: Iterable[str | Path],
    device: torch.device | str,
    num_threads: int = NUM_THREADS,
    use_fast: bool | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[str, Tensor]]:
    """Yields name and tensor of some safetensors files, in the files' order, each directly on `device`.

    Nothing keeps a tensor once the next one is asked for, so a consumer that drops each needs a few hundred megabytes
    however large the model: `num_threads` times 16 MiB in host memory, and what was read ahead on the device. On a CPU
    they are views of the mapped file, which must stay as it is while they live.

    Args:
        num_threads: number of slices that are read at a time. Without effect on a CPU.
        use_fast: True and None take fastsafetensors where it can be used; where it cannot, True warns why. False never
            takes it.
        wanted: returns whether to read the tensor of a name; the others cost nothing.

    Raises:
        WeightsError: a file is missing, cut off or of another format; before anything is read.
    """
    entries = [entry for entry in read_entries(map(Path, files)) if wanted(entry.name)]
    return iterate_entries(entries, device, num_threads, use_fast)


def iterate_entries(
    entries: Sequence[TensorEntry],
    device: torch.device | str,
    num_threads: int = NUM_THREADS,
    use_fast: bool | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yields name and tensor of entries, as `iterate_tensors` does."""
    device = torch.device(device)
    if device.type == "cpu":
        return _iterate_mapped(entries)
    if use_fast is not False:
        # It finds tensors by the names in the file, whole.
        obstacle = RENAMED if any(entry.stored_name for entry in entries) else obstacle_to(device)
        if obstacle is None:
            return iterate_fast(entries, device, num_threads)
        _tell_once(f"{obstacle}; the weights are read by {num_threads} threads of pixtune's own", use_fast is True)
    # An integrated GPU takes its memory from the CPU's, where the page cache of what was read is in its way.
    is_integrated = device.type == "cuda" and bool(torch.cuda.get_device_properties(device).is_integrated)
    return iterate_with_threads(entries, device, num_threads, drop_cache=is_integrated)


def load_safetensors(
    path: str | Path, num_threads: int = NUM_THREADS, device: torch.device | str = "cpu", use_fast: bool = True
) -> dict[str, Tensor]:
    """Reads all tensors of one file by `iterate_tensors`."""
    return dict(iterate_tensors([path], device, num_threads, use_fast))


def _iterate_mapped(entries: Sequence[TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    """Yields views of the mapped files: where nothing is copied to a device, no way is faster (benchmarks)."""
    for path, of_file in itertools.groupby(entries, key=lambda entry: entry.file):
        try:
            opened = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise WeightsError(f"{path} has a damaged header ({error}). Fetch the model again.") from error
        with opened as file:
            for entry in of_file:
                tensor = file.get_tensor(entry.stored_name or entry.name)
                if entry.stored_name:
                    tensor = tensor.view(entry.dtype)
                    tensor = tensor[entry.first_row : entry.first_row + entry.shape[0]] if entry.shape else tensor
                yield entry.name, tensor


@functools.cache
def _tell_once(message: str, is_warning: bool) -> None:
    logger.log(logging.WARNING if is_warning else logging.INFO, message)
