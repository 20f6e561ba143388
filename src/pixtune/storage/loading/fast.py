"""Reads tensors by the fastsafetensors package, where it is installed: it can go from disk to GPU past the CPU (GDS).

Its tensors are views of one large buffer; what is handed out here are copies that own their memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from packaging.version import Version
from torch import Tensor

from pixtune.errors import WeightsError
from pixtune.storage.loading.entries import TensorEntry

PACKAGE = "fastsafetensors"
OLDEST, TOO_NEW = "0.5", "0.6"
"""Bounds of its version, those of the extra `fast`: older ones cannot read parts of files, newer ones are untried."""
CHUNK_BYTES = 512 * 2**20
"""Bytes in its buffer on the device at a time."""
GDS_DEVICE = Path("/dev/nvidia-fs0")
"""Device file that exists where GPUDirect Storage works. Without it, the package warns and reads through the CPU."""


def is_fastsafetensors_available() -> bool:
    """Returns whether a version that pixtune knows is installed and can be imported."""
    return package_obstacle() is None


def package_obstacle() -> str | None:
    """Returns why the package cannot be used on any device; None where it can."""
    try:
        found = version(PACKAGE)
        importlib.import_module(PACKAGE)
    except PackageNotFoundError:
        return f"{PACKAGE} is not installed (pip install 'pixtune[fast]')"
    except (ImportError, OSError) as error:  # OSError: a library of its own does not load
        return f"{PACKAGE} cannot be imported ({error})"
    if not Version(OLDEST) <= Version(found) < Version(TOO_NEW):
        return f"{PACKAGE} {found} is installed, and pixtune knows {OLDEST} (pip install 'pixtune[fast]')"
    return None


def obstacle_to(device: torch.device) -> str | None:
    """Returns why the package is not used for this device; None where it is."""
    if device.type != "cuda":
        return f"{PACKAGE} gains nothing on a {device.type} device"
    return package_obstacle()


def numbered(device: torch.device) -> torch.device:
    """Replaces "cuda" by the current GPU, since the package does not take it without a number."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def iterate_fast(
    entries: Sequence[TensorEntry], device: torch.device, num_threads: int
) -> Iterator[tuple[str, Tensor]]:
    """Yields name and tensor, each on `device` and independent of the reader.

    Reading and consuming take turns, chunk by chunk. The package's own threads know nothing of the consumer's stream,
    and would otherwise write into memory that the consumer has freed while its kernels still read it.

    Raises:
        WeightsError: it left out tensors that the files' headers name.
    """
    from fastsafetensors import ParallelLoader

    wanted = {entry.name for entry in entries}
    loader = ParallelLoader(
        None,
        list(dict.fromkeys(str(entry.file) for entry in entries)),
        queue_size=-1,  # taking turns
        use_tqdm_on_load=False,
        device=str(numbered(device)),
        max_threads=num_threads,
        nogds=not GDS_DEVICE.exists(),
        set_numa=False,  # it would bind the whole process
        max_batch_bytes=max([CHUNK_BYTES, *(entry.num_bytes for entry in entries)]),
        tensor_filter=wanted.__contains__,  # the others are not read
        all_local=True,  # several processes read each for itself
    )
    missing = set(wanted)
    with closing(loader), closing(loader.iterate_weights()) as tensors:
        for name, tensor in tensors:
            missing.discard(name)
            yield name, tensor
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
    if missing:
        raise WeightsError(
            f"{PACKAGE} left out {len(missing)} of {len(entries)} tensors, {min(missing)} among them. Set "
            "use_fastsafetensors: false, which reads them without it."
        )
